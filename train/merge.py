"""Merge a LoRA adapter into its base: a checkpoint in the hub's layout that needs no adapter any more.

python train/merge.py --model google/paligemma2-10b-pt-448 --adapter runs/coco/final --out runs/coco/merged
"""

from pathlib import Path

from model import PaliGemma
from model.io.names import shown
from model.io.weights import DTYPES
from model.lora import fold
from train.run.program import parser, run


def main(argv=None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--model", required=True, help="the base: a folder, a hub id, or nano")
    add("--adapter", required=True, help="the adapter's folder or hub id")
    add("--out", type=Path, required=True, help="a new folder, for config, weights and tokenizer")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the merged weights")
    add("--shard-gb", type=float, default=5.0, help="largest size of a weights file")
    args = options.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out}: is not an empty folder")
    model = PaliGemma.from_pretrained(args.model, adapter=args.adapter, dtype=DTYPES[args.dtype])
    fold(model).save_pretrained(args.out, max_shard_bytes=args.shard_gb * 1e9)
    print(f"merged checkpoint: {shown(args.out)}")


if __name__ == "__main__":
    run(main, __file__)

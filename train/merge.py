"""Merge a LoRA adapter into its base: a checkpoint in the hub's layout that needs no adapter any more.

python train/merge.py --model google/paligemma2-10b-pt-448 --adapter runs/coco/final --out runs/coco/merged
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from model import PaliGemma
from model.io.hub import COMPANION_FILES, resolve
from model.lora import fold

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="the base: a folder, a hub id, or nano")
    add("--adapter", required=True, help="the adapter's folder or hub id")
    add("--out", type=Path, required=True, help="a new folder, for config, weights and tokenizer")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the merged weights")
    add("--shard-gb", type=float, default=5.0, help="largest size of a weights file")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out}: is not an empty folder")
        base = resolve(args.model)
        model = PaliGemma.from_pretrained(str(base), adapter=args.adapter, dtype=DTYPES[args.dtype])
        fold(model).save_pretrained(args.out, max_shard_bytes=int(args.shard_gb * 1e9))
        for name in COMPANION_FILES:
            if (base / name).exists():
                shutil.copy(base / name, args.out / name)
    except (ValueError, OSError) as error:
        sys.exit(f"merge.py: {error}")
    print(f"merged checkpoint: {args.out}")


if __name__ == "__main__":
    main()

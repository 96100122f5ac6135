"""How fast closed-set detection is, beside transformers (which only tests and benchmarks need).

    python infer/benchmark.py                                                # the shipped nano
    python infer/benchmark.py --groups 12 --batch-size 1 16                  # whole answers, not extrapolated
    python infer/benchmark.py --model paligemma2-3b-224 --branches 51        # a random 3B: 7 GB of disk
    python infer/benchmark.py --model paligemma2-3b-448 --branches 51 --device cuda --batch-size 1 8 32

Official sizes get random weights in bfloat16, without a hub. All sides read the same files and images,
take turns in one process, and decode the same number of tokens under the same grammar (transformers by a
LogitsProcessor); in float32 their tokens are compared. The time of an answer with all its groups follows from
the prefill and a token; "ours, parallel" decodes its --branches at once, and is timed as a whole. Peak memory
is that of a process of its own. The floor of a token is the time to read the decoder's weights once, at the
speed at which this machine copies memory.
"""

import argparse
import contextlib
import functools
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from infer.lib.measuring import installed, print_table, random_checkpoint, run_child, seconds
from infer.lib.options import add_device_argument, check_output, usable_device, write_output
from model import PaliGemma
from model.config import VARIANTS
from model.decoding.closed_set import GROUP, ClosedSet, GroupDecoder, Head
from model.decoding.detector import head_for
from model.decoding.packing import load_for_decoding
from model.decoding.parallel import ParallelDecoder
from model.io.hub import NANO
from model.io.tokenizer import LOCS, Tokenizer
from model.io.weights import DTYPES, load_config
from train.run.processes import peak_memory
from train.run.program import parser, positive, run

# "<bos>detect all classes\n" and the rest of the grammar in the official vocabulary: random checkpoints have
# no tokenizer.
OFFICIAL_IDS = dict(prompt=(2, 8557, 832, 7695, 108), loc0=256_000, class0=7, eos=1)
COPIED_BYTES = 1 << 28  # more than caches hold


# ---- the sides ---------------------------------------------------------------------------------------------


def language_of(folder: Path) -> ClosedSet:
    config = load_config(folder)
    if (folder / "tokenizer.model").exists():
        return ClosedSet.of(config, Tokenizer(folder))
    return ClosedSet(**OFFICIAL_IDS, classes=config.classes, groups=config.groups)


@functools.cache
def our_model(folder: Path, dtype: str, device: str, int8: bool, compiled: bool) -> PaliGemma:
    """Shared by the sides that read the same matrices: a full-size model fits once."""
    return load_for_decoding(folder, dtype=DTYPES[dtype], device=device, int8=int8, compiled=compiled)


class Ours:
    in_sequence = True

    def __init__(self, folder: Path, args: argparse.Namespace, int8=False, compiled=False, fused_head=True):
        self.model = our_model(folder, args.dtype, args.device, int8, compiled)
        self.language = language_of(folder)
        self.decoders = {}
        self.head = head_for(self.model) if fused_head else Head

    @torch.inference_mode()
    def prefill(self, images: Tensor) -> None:
        prompt = torch.tensor(self.language.prompt, device=images.device).expand(len(images), -1)
        cache = self.model.new_cache(len(images), prompt.shape[1])
        self.model.prefill(self.model.encode(images), prompt, cache)

    def decode(self, images: Tensor, groups: int) -> Tensor:
        """Images [B, 3, S, S] -> tokens [B, 5 * groups]."""
        if groups not in self.decoders:
            self.decoders[groups] = GroupDecoder(self.model, self.language, groups, head=self.head)
        return self.decoders[groups](images).tokens.flatten(1)


class Parallel(Ours):
    """All boxes in five steps, however many groups the others decode."""

    in_sequence = False

    def __init__(self, folder: Path, args: argparse.Namespace, compiled=False):
        super().__init__(folder, args, compiled=compiled)
        self.decoder = ParallelDecoder(self.model, self.language, args.branches, head=self.head)

    def decode(self, images: Tensor, groups: int) -> Tensor:
        return self.decoder(images).tokens.flatten(1)


class Peer:
    """transformers, with its eager attention: its other kinds leave out Gemma 2's soft caps."""

    in_sequence = True

    def __init__(self, folder: Path, args: argparse.Namespace):
        from transformers import PaliGemmaForConditionalGeneration
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=DTYPES[args.dtype], attn_implementation="eager"
        ).to(args.device)
        self.model.generation_config.eos_token_id = None  # the answer always has all its groups
        self.language = language_of(folder)

    def prefill(self, images: Tensor) -> None:
        self._generate(images, 1)

    def decode(self, images: Tensor, groups: int) -> Tensor:
        return self._generate(images, GROUP * groups)

    @torch.inference_mode()
    def _generate(self, images: Tensor, count: int) -> Tensor:
        prompt = torch.tensor(self.language.prompt, device=images.device).expand(len(images), -1)
        image_tokens = self.model.config.text_config.num_image_tokens
        image = prompt.new_full((len(images), image_tokens), self.model.config.image_token_index)
        ids = torch.cat((image, prompt), dim=1)
        generated = self.model.generate(
            pixel_values=images.to(self.model.dtype),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),  # without them, the prompt is causal
            max_new_tokens=count,
            do_sample=False,
            logits_processor=[partial(self._allow, ids.shape[1])],
        )
        return generated[:, ids.shape[1] :]

    def _allow(self, start: int, ids: Tensor, scores: Tensor) -> Tensor:
        """The logits with all but the ids that the grammar allows at this position masked."""
        first, last = self.language.allowed((ids.shape[1] - start) % GROUP)
        if last - first < LOCS:
            last -= 1  # a class, but not noise, as ours
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:last] = scores[:, first:last]
        return allowed


SIDES = {
    "ours": Ours,
    "ours, int8": partial(Ours, int8=True),
    "ours, compiled": partial(Ours, compiled=True),
    "ours, plain head": partial(Ours, fused_head=False),
    "ours, parallel": Parallel,
    "ours, parallel, compiled": partial(Parallel, compiled=True),
    "transformers": Peer,
}


# ---- measuring ---------------------------------------------------------------------------------------------


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


def weight_bytes(folder: Path, args: argparse.Namespace) -> int:
    """The size of the decoder's layers, all of which every token reads."""
    with torch.device("meta"):
        layers = PaliGemma(load_config(folder)).decoder.layers
    return DTYPES[args.dtype].itemsize * sum(p.numel() for p in layers.parameters())


def random_images(folder: Path, batch: int, device: str) -> Tensor:
    size = load_config(folder).vision.image_size
    generator = torch.Generator().manual_seed(batch)
    return (2 * torch.rand(batch, 3, size, size, generator=generator) - 1).to(device)


def time_sides(sides: dict, batch: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    """A row for each side: medians of args.rounds timings."""
    images, groups = random_images(folder, batch, args.device), args.groups
    tokens = {name: side.decode(images, groups) for name, side in sides.items()}  # warms up, too
    times = {name: [] for name in sides}
    for turn in range(args.rounds):
        # The sides take turns because the machine's speed drifts, and in alternating order because each finds
        # the processor's caches as the side before it left them.
        for name in reversed(sides) if turn % 2 else sides:
            prefill = seconds(partial(sides[name].prefill, images), args.device)
            whole = seconds(partial(sides[name].decode, images, groups), args.device)
            times[name].append((prefill, whole, (whole - prefill) / (GROUP * groups)))
    rows = []
    for name, side in sides.items():
        prefill, answer, token = (statistics.median(column) for column in zip(*times[name], strict=True))
        equal = None
        if side.in_sequence:
            answer = prefill + token * GROUP * side.language.groups
            equal = bool((tokens[name] == tokens["ours"]).all()) if args.dtype == "float32" else None
        else:
            token = None
        row = dict(batch=batch, side=name, prefill=prefill, token=token, answer=answer)
        rows.append(row | dict(images_s=batch / answer, tokens_equal=equal))
    for row in rows:
        row["of_ours"] = row["answer"] / rows[0]["answer"]
    return rows


def peak_of(name: str, folder: Path, args: argparse.Namespace) -> int:
    """Most bytes held by a process that loads a side and decodes a group for one image."""
    own = "--folder", folder, "--device", args.device, "--dtype", args.dtype
    return run_child(__file__, *own, "--child", name)["peak"]


def child(args: argparse.Namespace) -> None:
    SIDES[args.child](args.folder, args).decode(random_images(args.folder, 1, args.device), 1)
    print(json.dumps(dict(peak=peak_memory(args.device))))


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Print all figures of a checkpoint; the same for --json."""
    on_gpu = args.device.startswith("cuda")
    asked = {"ours, int8": args.int8, "ours, compiled": args.compile, "transformers": args.peer}
    asked |= {"ours": True, "ours, plain head": on_gpu, "ours, parallel": args.parallel}
    asked |= {"ours, parallel, compiled": args.parallel and args.compile}
    names = [name for name in SIDES if asked[name]]
    size, bandwidth = weight_bytes(folder, args), copy_bandwidth(args.device)
    floor = size / bandwidth
    where = torch.cuda.get_device_name(args.device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, {args.device} ({where}), torch {torch.__version__}")
    print(f"the decoder's layers: {size / 1e9:.2f} GB, copied at {bandwidth / 1e9:.1f} GB/s")
    print(f"floor of a token: {1000 * floor:.2f} ms")
    peaks = {name: peak_of(name, folder, args) for name in names} if args.memory else {}
    sides = {name: SIDES[name](folder, args) for name in names}
    rows = [row for batch in args.batch_size for row in time_sides(sides, batch, folder, args)]
    for row in rows[: len(peaks)]:  # measured at batch 1, shown with the first
        row["peak"] = peaks[row["side"]]
    print_table([as_text(row, floor) for row in rows])
    about = dict(model=args.model, dtype=args.dtype, device=where, torch=torch.__version__)
    return about | dict(bandwidth=bandwidth, floor=floor, groups_timed=args.groups, rows=rows)


def as_text(row: dict, floor: float) -> dict[str, str]:
    """A row as it is printed."""
    return {
        "batch": f"{row['batch']:5} {row['side']}",
        "prefill s": f"{row['prefill']:.3f}",
        "ms a token": f"{1000 * row['token']:.2f}" if row["token"] else "",
        "of floor": f"{floor / row['token']:.0%}" if row["token"] else "",
        "answer s": f"{row['answer']:.3f}",
        "of ours": f"{row['of_ours']:.2f}x",
        "images/s": f"{row['images_s']:.3f}",
        "peak GB": f"{row['peak'] / 1e9:.2f}" if "peak" in row else "",
        "": "other tokens than ours" if row["tokens_equal"] is False else "",
    }


def main() -> None:
    options = parser(__doc__)
    add, switch = options.add_argument, argparse.BooleanOptionalAction
    models = ["nano", *VARIANTS]
    add("--model", default="nano", choices=models, help="nano, or random weights of an official size")
    add_device_argument(options)
    add("--dtype", choices=DTYPES, help="default: float32 for nano, else bfloat16")
    add("--batch-size", nargs="+", type=positive, default=[1])
    add("--groups", type=positive, default=3, help="decoded in a timing; images/s are of the model's number")
    add("--rounds", type=positive, default=3, help="timings of each side; their median is shown")
    add("--int8", action=switch, default=False, help="ours with 8-bit decoder matrices, too")
    add("--compile", action=switch, default=False, help="ours with torch.compile, too")
    add("--parallel", action=switch, default=True, help="ours with all boxes in five steps, too")
    add(
        "--branches",
        type=positive,
        help="boxes in parallel (default: the model's); 51 is an official answer",
    )
    add("--peer", action=switch, default=installed("transformers"), help="transformers, too")
    add("--memory", action=switch, default=True, help="peak memory of each side, in a process of its own")
    add("--folder", type=Path, help="a random checkpoint is built there, or found and used")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = options.parse_args()
    args.dtype = args.dtype or ("float32" if args.model == "nano" else "bfloat16")
    args.device = usable_device(args.device)
    check_output(args.json)
    if args.child:
        return child(args)
    nano = contextlib.nullcontext(NANO)
    with nano if args.model == "nano" else random_checkpoint(args.model, args.folder) as folder:
        figures = measure(folder, args)
    if args.json:
        write_output(figures, args.json)


if __name__ == "__main__":
    run(main, __file__)

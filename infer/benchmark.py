"""How fast closed-set detection is, beside transformers (which only tests and benchmarks need).

    python infer/benchmark.py                                                # the shipped nano
    python infer/benchmark.py --model paligemma2-3b-224 --batch-size 1       # a random 3B: 7 GB of disk
    python infer/benchmark.py --model paligemma2-3b-448 --device cuda --batch-size 1 8 32 --compile

Official sizes get random weights in bfloat16, as no hub is asked. All sides read the same files and images,
run in turns in one process, and decode the same number of tokens under the same grammar (transformers by a
LogitsProcessor); in float32 their tokens are compared. Peak memory is that of a process of its own. The floor
of a token is the decoder's weights read once, at the speed at which this machine copies memory.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from infer.lib.measuring import build
from infer.lib.options import DTYPES, head_for, usable_device
from model import PaliGemma
from model.config import VARIANTS
from model.decoding.closed_set import GROUP, ClosedSet, GroupDecoder, Head
from model.decoding.packing import can_pack, pack, quantize
from model.io.hub import resolve
from model.io.tokenizer import LOCS, Tokenizer
from model.io.weights import load_config
from model.io.writing import write_json

OFFICIAL_IDS = dict(prompt=(2, 8557, 832, 7695, 108), loc0=256_000, class0=7, eos=1)
COPY = 1 << 28  # bytes


# ---- what is run -------------------------------------------------------------------------------------------


def language_of(folder: Path) -> ClosedSet:
    config = load_config(folder)
    if (folder / "tokenizer.model").exists():
        return ClosedSet.of(config, Tokenizer(folder))
    return ClosedSet(**OFFICIAL_IDS, classes=config.classes, groups=config.groups)


class Ours:
    def __init__(self, folder: Path, args: argparse.Namespace, int8=False, compiled=False, fused_head=True):
        self.model = PaliGemma.from_pretrained(str(folder), dtype=DTYPES[args.dtype], device=args.device)
        if int8:
            quantize(self.model)
        elif can_pack(self.model) and not compiled:
            pack(self.model)
        if compiled:
            self.model.decoder.compile()
        self.language = language_of(folder)
        self.decoders = {}
        self.head = head_for(self.model) if fused_head else Head

    @torch.inference_mode()
    def prefill(self, images: Tensor) -> None:
        prompt = torch.tensor(self.language.prompt, device=images.device).expand(len(images), -1)
        self.model.prefill(
            self.model.encode(images), prompt, self.model.new_cache(len(images), prompt.shape[1])
        )

    def decode(self, images: Tensor, groups: int) -> Tensor:
        """Images [B, 3, S, S] -> tokens [B, 5 * groups]."""
        if groups not in self.decoders:
            self.decoders[groups] = GroupDecoder(self.model, self.language, groups, head=self.head)
        return self.decoders[groups](images).tokens.flatten(1)


class Peer:
    """transformers, in its eager attention: its others leave Gemma 2's soft caps out."""

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
            token_type_ids=torch.zeros_like(ids),  # or the prompt is causal
            max_new_tokens=count,
            do_sample=False,
            logits_processor=[partial(self._allow, ids.shape[1])],
        )
        return generated[:, ids.shape[1] :]

    def _allow(self, start: int, ids: Tensor, scores: Tensor) -> Tensor:
        first, last = self.language.allowed((ids.shape[1] - start) % GROUP)
        if last - first < LOCS:
            last -= 1  # not noise
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:last] = scores[:, first:last]
        return allowed


SIDES = {
    "ours": Ours,
    "ours, int8": partial(Ours, int8=True),
    "ours, compiled": partial(Ours, compiled=True),
    "ours, plain head": partial(Ours, fused_head=False),
    "transformers": Peer,
}


# ---- measuring ---------------------------------------------------------------------------------------------


def seconds(function, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


def random_images(folder: Path, batch: int, device: str) -> Tensor:
    size = load_config(folder).vision.image_size
    generator = torch.Generator().manual_seed(batch)
    return (2 * torch.rand(batch, 3, size, size, generator=generator) - 1).to(device)


def time_sides(sides: dict, batch: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    """A row for each side: medians over the rounds, in which the order of the sides alternates."""
    images, groups = random_images(folder, batch, args.device), args.groups
    tokens = {name: side.decode(images, groups) for name, side in sides.items()}  # warm-up, too
    times = {name: [] for name in sides}
    for turn in range(args.rounds):
        for name in reversed(sides) if turn % 2 else sides:
            prefill = seconds(lambda side=sides[name]: side.prefill(images), args.device)
            whole = seconds(lambda side=sides[name]: side.decode(images, groups), args.device)
            times[name].append((prefill, (whole - prefill) / (GROUP * groups)))
    rows = []
    for name in sides:
        prefill, token = (statistics.median(column) for column in zip(*times[name], strict=True))
        answer = prefill + token * GROUP * language_of(folder).groups
        equal = bool((tokens[name] == tokens["ours"]).all()) if args.dtype == "float32" else None
        rows.append(dict(batch=batch, side=name, prefill=prefill, token=token, images_s=batch / answer))
        rows[-1] |= dict(tokens_equal=equal)
    return rows


def peak_memory(name: str, folder: Path, args: argparse.Namespace) -> float:
    """Bytes, in a process that loads the model and decodes a group for one image."""
    own = ["--folder", folder, "--device", args.device, "--dtype", args.dtype]
    command = [sys.executable, __file__, *map(str, own), "--child", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def child(args: argparse.Namespace) -> None:
    SIDES[args.child](args.folder, args).decode(random_images(args.folder, 1, args.device), 1)
    print(peak_bytes(args.device))


def peak_bytes(device: str) -> int:
    """Of this process so far: the GPU's memory, or the resident memory, mapped files included."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def print_table(rows: list[dict], floor: float) -> None:
    columns = ("prefill s", "ms a token", "of floor", "images/s", "peak GB")
    print(f"{'batch':>5} {'':16}" + "".join(f"{column:>11}" for column in columns))
    for row in rows:
        line = f"{row['batch']:5} {row['side']:16}{row['prefill']:11.3f}{1000 * row['token']:11.2f}"
        line += f"{floor / row['token']:11.0%}{row['images_s']:11.3f}"
        line += f"{row['peak'] / 1e9:11.2f}" if "peak" in row else f"{'':11}"
        print(line + ("   other tokens than ours" if row["tokens_equal"] is False else ""))


def run(folder: Path, args: argparse.Namespace) -> dict:
    on_gpu = args.device.startswith("cuda")
    asked = {"ours, int8": args.int8, "ours, compiled": args.compile, "ours, plain head": on_gpu}
    asked["transformers"] = args.peer
    names = ["ours", *(name for name in asked if asked[name])]
    with torch.device("meta"):
        layers = PaliGemma(load_config(folder)).decoder.layers
    size, bandwidth = weight_bytes(layers, args), copy_bandwidth(args.device)
    floor, threads = size / bandwidth, f"{torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(args.device) if on_gpu else threads
    print(f"{args.model}, {args.dtype}, {args.device} ({where}), torch {torch.__version__}")
    print(f"the decoder's layers: {size / 1e9:.2f} GB, copied at {bandwidth / 1e9:.1f} GB/s")
    print(f"floor of a token: {1000 * floor:.2f} ms")
    peaks = {name: peak_memory(name, folder, args) for name in names} if args.memory else {}
    sides, rows = {name: SIDES[name](folder, args) for name in names}, []
    for batch in args.batch_size:
        rows += time_sides(sides, batch, folder, args)
    for row in rows[: len(peaks)]:  # of batch 1
        row["peak"] = peaks[row["side"]]
    print_table(rows, floor)
    about = dict(model=args.model, dtype=args.dtype, device=where, torch=torch.__version__)
    return about | dict(bandwidth=bandwidth, floor=floor, groups_timed=args.groups, rows=rows)


def weight_bytes(module: torch.nn.Module, args: argparse.Namespace) -> int:
    return DTYPES[args.dtype].itemsize * sum(p.numel() for p in module.parameters())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--model",
        default="nano",
        choices=["nano", *VARIANTS],
        help="nano, or random weights of an official size",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: float32 for nano, else bfloat16")
    add("--batch-size", nargs="+", type=int, default=[1])
    add(
        "--groups",
        type=int,
        default=3,
        help="decoded in each timing; images/s is told for all of the model's",
    )
    add("--rounds", type=int, default=3, help="timings of each side, of which the median is shown")
    add("--int8", action=switch, default=False, help="ours with 8-bit decoder matrices, too")
    add("--compile", action=switch, default=False, help="ours with torch.compile, too")
    add("--peer", action=switch, default=installed("transformers"), help="transformers, too")
    add("--memory", action=switch, default=True, help="peak memory of each side, in a process of its own")
    add("--folder", type=Path, help="a random checkpoint is built there, or found and used")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.model == "nano" else "bfloat16")
    return args


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def main() -> None:
    args = arguments()
    usable_device(args.device)
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory(prefix="paligemma-") as temporary:
        folder = resolve("nano") if args.model == "nano" else args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            build(args.model, folder)
        figures = run(folder, args)
    if args.json:
        write_json(figures, args.json)


if __name__ == "__main__":
    main()

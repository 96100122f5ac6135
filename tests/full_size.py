"""PaliGemma 2 3B at its real size, beside transformers: load time, peak memory, next-token distributions; and
the boxes of its branches beside those of plain steps, each box a text of its own.

    python tests/full_size.py                       # minutes; 8 GB of disk, 8 GB of memory
    python tests/full_size.py --float32             # both in float32 too, as the yardstick: 16 GB of memory
    python tests/full_size.py --folder /big/disk    # where the temporary checkpoint goes

Not a pytest test: it writes a random checkpoint in bfloat16, in the official layout, and loads it in a new
process for each side, so that peaks do not mix. Memory is printed after loading, after reading a byte of
every page of every weight, and after a forward: a file that is mapped rather than copied costs nothing before
it is read. Exit code 0 if every check holds.
"""

import argparse
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from helpers import PlainSteps
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.lib.measuring import build_checkpoint, language_of, print_table, run_child
from model import PaliGemma
from model.config import VARIANTS
from model.decoding.closed_set import Head
from model.decoding.parallel import ParallelDecoder
from model.io.weights import DTYPES
from train.run.program import parser, run

GB = 1e9
VARIANT = "paligemma2-3b-224"
T, PREFIX = 12, 8  # text tokens, how many of these are the prompt
BOS, NEWLINE = 2, 108
SIDES = ["ours bfloat16", "transformers bfloat16", "ours float32", "transformers float32"]
BOXES, BRANCHES = ["boxes bfloat16", "boxes float32"], 24
STAGES = ["load", "read", "forward"]
# In file sizes: float32 weights are two, and the mapped file stays resident until all of it is converted.
MAX_PEAK = {"ours bfloat16": 1.1, "ours float32": 3.2}
MAX_KL = {"bfloat16": 0.1, "float32": 1e-6}  # nats, at every position; measured: 0.07 and 4e-10
MIN_EQUAL = {"bfloat16": 18, "float32": BRANCHES}  # boxes; measured: 23 and 24


# Child processes --------------------------------------------------------------------------------------------


def inputs() -> tuple[Tensor, Tensor]:
    """A random image [1, 3, S, S] in [-1, 1], and tokens [1, T]: bos, words, newline, words of the answer."""
    generator, size = torch.Generator().manual_seed(1), VARIANTS[VARIANT].vision.image_size
    images = 2 * torch.rand(1, 3, size, size, generator=generator) - 1
    tokens = torch.randint(473, 255_968, (1, T), generator=generator)
    tokens[0, 0], tokens[0, PREFIX - 1] = BOS, NEWLINE
    return images, tokens


def our_side():
    """Two functions: folder, dtype -> our model; model -> logits [T, vocab]."""

    def load(folder, dtype):
        return PaliGemma.from_pretrained(str(folder), dtype=dtype)

    return load, lambda model: model(*inputs(), PREFIX)[0]


def their_side():
    """The same two of transformers."""
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(folder, dtype):
        model, report = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        if any(report.values()):
            raise ValueError(f"transformers expects other tensors: {report}")
        return model.eval()

    def logits_of(model):
        images, tokens = inputs()
        image = tokens.new_zeros(1, VARIANTS[VARIANT].vision.tokens)
        is_suffix = torch.arange(T)[None] >= PREFIX
        ids = torch.cat((image + VARIANTS[VARIANT].image_token, tokens), dim=1)
        out = model(
            pixel_values=images,
            input_ids=ids,
            token_type_ids=torch.cat((image, is_suffix.long()), dim=1),  # or it is causal everywhere
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        )
        return out.logits[0, -T:].float()

    return load, logits_of


def memory() -> dict[str, int]:
    """Bytes: the peak of the resident memory so far; what is resident now, anonymous and of files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    size = {words[0]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
    return {
        "peak": size["VmHWM:"],
        "anonymous": size["RssAnon:"],
        "mapped": size["RssFile:"] + size["RssShmem:"],
    }


@torch.no_grad()
def measure(side: str, folder: Path) -> dict:
    """Seconds, and memory above that of the imported libraries, after each stage. Writes the logits too."""
    load, logits_of = our_side() if side.startswith("ours") else their_side()
    base = memory()
    base["peak"] = base["anonymous"] + base["mapped"]
    report = {}

    def stage(name, action):
        start = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - start
        report[name] = {"seconds": seconds} | {key: value - base[key] for key, value in memory().items()}
        return result

    model = stage("load", lambda: load(folder, DTYPES[side.split()[1]]))
    pages = [weight.flatten().view(torch.uint8)[:: mmap.PAGESIZE] for weight in model.parameters()]
    stage("read", lambda: [page.sum() for page in pages])
    logits = stage("forward", lambda: logits_of(model))
    save_file({"logits": logits.contiguous()}, folder / f"logits of {side}")
    return report


class WatchedHead(Head):
    """Keeps the last logits."""

    def __call__(self, hidden, slot, uniform):
        self.logits = self.decoder.logits(hidden, *self.allowed[slot])
        return super().__call__(hidden, slot, uniform)


@torch.inference_mode()
def boxes_both_ways(side: str, folder: Path) -> dict:
    """The boxes of K branches, and of K texts that are read token by token: how many are equal, and how far
    the class's distribution of a branch is from that of a text with its coordinates (KL, nats)."""
    model = PaliGemma.from_pretrained(str(folder), dtype=DTYPES[side.split()[1]])
    language = language_of(folder)
    image, _ = inputs()
    decoder = ParallelDecoder(model, language, BRANCHES, head=WatchedHead)
    answer = decoder(image)
    plain = PlainSteps(model, language, image)
    in_text = plain.boxes(BRANCHES, decoder.reading)
    in_branches = zip(answer.locs[0].tolist(), answer.labels[0].tolist())
    log_p = decoder.head.logits.double().log_softmax(-1)  # [K, classes and noise]
    log_q = torch.cat([plain.probabilities(*locs) for locs in answer.locs[0].tolist()]).double().log()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).max().item()
    return dict(equal=sum(box in in_text for box in in_branches), kl=kl)


# The parent process ---------------------------------------------------------------------------------------


def measure_in_child(side: str, folder: Path) -> dict:
    """What a side's function returns in a new process, which finds no weights in the page cache."""
    print(f"{side} ...", flush=True)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return run_child(__file__, "--folder", folder, "--child", side)[-1]


def check_room(folder: Path, disk: float, wanted: float) -> None:
    """Refuse to start without enough free disk space and memory (GB)."""
    if not Path("/proc/meminfo").exists():
        raise ValueError("this program reads its memory use from /proc: it needs Linux")
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    free = shutil.disk_usage(folder).free / GB
    if free < disk:
        raise ValueError(f"{folder} has {free:.1f} GB free, {disk} GB are needed: choose another --folder")
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024 / GB
    if available < wanted:
        raise ValueError(f"{available:.1f} GB of memory are available, {wanted} GB are needed")


def compare_memory(reports: dict[str, dict], size: int) -> list[str]:
    """Print the table of seconds and memory; returns the complaints."""
    print(f"\ncheckpoint {size / GB:.2f} GB; memory in GB, above that of the imported libraries")
    complaints, rows = [], []
    for side, report in reports.items():
        for stage in STAGES:
            now = report[stage]
            times = now["peak"] / size
            row = {"": f"{side}, {stage}", "seconds": f"{now['seconds']:.1f}"}
            row |= {"peak": f"{now['peak'] / GB:.2f}", "in file sizes": f"{times:.2f}"}
            rows.append(row | {key: f"{now[key] / GB:.2f}" for key in ("anonymous", "mapped")})
        weights = size * (2 if side.endswith("float32") else 1)
        resident = (report["read"]["anonymous"] + report["read"]["mapped"]) / weights
        if resident < 0.99:
            complaints.append(f"{side}: only {resident:.2f} of the weights are resident: its peak is no peak")
        if side in MAX_PEAK and times > MAX_PEAK[side]:
            complaints.append(f"{side}: the peak is {times:.2f} file sizes, more than {MAX_PEAK[side]}")
        if side in MAX_PEAK and (now["anonymous"] + now["mapped"]) / weights > 1.1:
            complaints.append(f"{side}: more than the weights stays in memory")
    print_table(rows)
    return complaints


def compare_logits(logits: dict[str, Tensor]) -> list[str]:
    """Print how far apart the next-token distributions are; returns the complaints."""
    logs = {side: value.double().log_softmax(-1) for side, value in logits.items()}
    rows = []
    for side, log in logs.items():
        entropy, top = -(log.exp() * log).sum(-1), log.max(-1)
        row = {"next token": side, "entropy, nats": f"{entropy.min():.2f} to {entropy.max():.2f}"}
        row["top probability"] = f"{top.values.min().exp():.3f} to {top.values.max().exp():.3f}"
        rows.append(row | {"top tokens": f"{len(top.indices.unique())} of {T}"})
    print()
    print_table(rows)
    kl, rows = {}, []
    for p, q in [(1, 0), (2, 0), (2, 1), (3, 2)][: 4 if len(logs) == 4 else 1]:
        log_p, log_q = logs[SIDES[p]], logs[SIDES[q]]
        kl[p, q] = (log_p.exp() * (log_p - log_q)).sum(-1)
        row = {"KL(p || q)": f"{SIDES[p]} || {SIDES[q]}", "max": f"{kl[p, q].max():.1e}"}
        same = f"{(log_p.argmax(-1) == log_q.argmax(-1)).sum()} of {T}"
        rows.append(row | {"mean": f"{kl[p, q].mean():.1e}", "same top": same})
    print()
    print_table(rows)
    complaints = []
    for pair, dtype in (((1, 0), "bfloat16"), ((3, 2), "float32")):
        if pair in kl and not kl[pair].max() <= MAX_KL[dtype]:  # `not <=` so that NaN is a complaint
            complaints.append(f"{dtype}: KL up to {kl[pair].max():.1e} nats, more than {MAX_KL[dtype]}")
    if (2, 0) in kl and kl[2, 0].mean() > 1.5 * kl[2, 1].mean():
        complaints.append("bfloat16: ours is further from float32 than transformers is")
    return complaints


def compare_boxes(found: dict[str, dict]) -> list[str]:
    """Print how alike the boxes of branches and of plain steps are; returns the complaints."""
    rows, complaints = [], []
    for side, of in found.items():
        dtype, equal, kl = side.split()[1], f"{of['equal']} of {BRANCHES}", f"{of['kl']:.1e}"
        rows.append({"branches || plain steps": dtype, "equal boxes": equal, "KL of classes": kl})
        if of["equal"] < MIN_EQUAL[dtype] or not of["kl"] <= MAX_KL[dtype]:
            complaints.append(f"{side}: {equal} are those of plain steps, KL up to {kl} nats")
    print()
    print_table(rows)
    return complaints


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options.add_argument("--float32", action=argparse.BooleanOptionalAction, default=False)
    options.add_argument("--child", choices=SIDES + BOXES, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        child = boxes_both_ways if args.child in BOXES else measure
        print(json.dumps(child(args.child, args.folder)))
        return 0
    check_room(args.folder, disk=8, wanted=16 if args.float32 else 8)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("FAILED: ended from outside"))  # removes the folder
    sides = SIDES if args.float32 else SIDES[:2]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="paligemma2-3b-") as temporary:
        folder = Path(temporary)
        build_checkpoint(VARIANT, folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        reports = {side: measure_in_child(side, folder) for side in sides}
        boxes = {side: measure_in_child(side, folder) for side in BOXES[: len(sides) // 2]}
        logits = {side: load_file(folder / f"logits of {side}")["logits"] for side in sides}
    complaints = compare_memory(reports, size) + compare_logits(logits) + compare_boxes(boxes)
    print("\nFAILED: " + "; ".join(complaints) if complaints else "\npassed")
    return int(bool(complaints))


if __name__ == "__main__":
    run(main, __file__)

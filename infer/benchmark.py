"""How fast closed-set detection is, beside transformers and llama.cpp (which only benchmarks and tests need).

    python infer/benchmark.py                                           # the shipped nano
    python infer/benchmark.py --groups 12 --batch-size 1 16             # whole answers, not extrapolated
    python infer/benchmark.py --model paligemma2-3b-224 --branches 51 --threads 2 1 --folder 3b
    python infer/benchmark.py --model paligemma2-3b-448 --branches 51 --device cuda --batch-size 1 8 32

Official sizes get random weights in bfloat16, without a hub: 7 GB of disk, 15 with those for llama.cpp. The
sides take turns, each in a process of its own, so that memory holds one model at a time. A turn times the
prefill and the tokens of --groups boxes, from which the time of an answer with all its groups follows; boxes
in parallel are timed whole. When --minutes are over, the turn that runs ends with what it has measured: all
sides have a turn before any has a second, and transformers, the slowest on most CPUs, comes last.

All sides but llama.cpp read the same images and decode under the same grammar (transformers by a
LogitsProcessor); in float32 their tokens are compared. llama.cpp has no vision tower here: its prefill and
its answers are those of the decoder alone. Peak memory is that of loading and of a first answer.

of GEMM      the operations that a prefill needs, at the best rate at which this machine multiplies square
             matrices in the weights' dtype or a wider one, against the prefill's time; in int8, ours has two
             products for each (and none in the vision tower), so that 100% cannot be reached
of reading   the bytes of the weights that a token needs, at the speed at which this machine reads a matrix
             that is multiplied by a vector, against the token's time
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from infer.lib.measuring import (
    gemm_rates,
    language_of,
    prefill_flops,
    print_table,
    random_checkpoint,
    read_bandwidth,
    run_child,
    weights_read,
)
from infer.lib.options import add_device_argument, check_output, usable_device, write_output
from infer.lib.peers import PEERS, choose_peers, write_gguf
from infer.lib.turns import PARALLEL, SIDES, gguf_file, turn
from model.config import VARIANTS
from model.decoding.closed_set import GROUP
from model.io.hub import NANO
from model.io.weights import DTYPES, load_config
from train.run.program import complain, minutes, parser, positive, run


def child(args: argparse.Namespace) -> None:
    for row in turn(args.child, args.folder, args):
        print(json.dumps(row), flush=True)


def take_turns(names: list[str], end: float, folder: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of all turns that are possible until `end`, in seconds of time.monotonic."""
    own = ["--folder", folder, "--scratch", args.scratch, "--device", args.device, "--dtype", args.dtype]
    own += ["--threads", *args.threads]
    took, rows = dict.fromkeys(names, 0.0), []
    for number in range(args.rounds):
        # The sides take turns because the machine's speed drifts; the order changes because each finds caches
        # as the side before it left them.
        for name in reversed(names) if number % 2 else names:
            start = time.monotonic()
            if took[name] >= end - start:
                continue
            try:
                rows += run_child(__file__, *sys.argv[1:], *own, "--child", name, limit=end - start)
            except ChildProcessError as error:
                complain(error, __file__)
            took[name] = time.monotonic() - start
            print(f"turn {number + 1}, {name}: {took[name]:.0f} s", flush=True)
    return rows


def limits(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """What the machine can do with each number of threads: bytes to read, and operations, a second."""
    found = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        found[threads] = dict(read=read_bandwidth(args.device)) | gemm_rates(args.device, args.seconds / 10)
    return found


def summary(turns: list[dict], machine: dict, folder: Path, args: argparse.Namespace) -> list[dict]:
    """A row of figures for each number of threads, batch size and side: medians of its turns."""
    found: dict[tuple, list[dict]] = {}
    for row in turns:
        found.setdefault((row["threads"], row["batch"], row["side"]), []).append(row)
    order = [name + form for name in SIDES for form in ("", PARALLEL)]
    rows = []
    for threads, batch, side in sorted(found, key=lambda key: (*key[:2], order.index(key[2]))):
        own, ours = found[threads, batch, side], found.get((threads, batch, "ours"))
        prefill, whole = (statistics.median(row[name] for row in own) for name in ("prefill", "whole"))
        row = dict(threads=threads, batch=batch, side=side, turns=len(own), prefill=prefill)
        row |= shares(side, batch, prefill, whole, machine[threads], folder, args)
        same = args.dtype == "float32" and ours and side in ("ours", "ours, compiled", "transformers")
        row["tokens_equal"] = own[0]["tokens"] == ours[0]["tokens"] if same else None
        rows.append(row | dict(peak=own[0]["peak"]))
    ours = {(row["threads"], row["batch"]): row["answer"] for row in rows if row["side"] == "ours"}
    for row in rows:
        answer = ours.get((row["threads"], row["batch"]))
        row["of_ours"] = answer and row["answer"] / answer
    return rows


def shares(
    side: str, batch: int, prefill: float, whole: float, machine: dict, folder: Path, args: argparse.Namespace
) -> dict:
    """Seconds of a token and of an answer, and the shares of the machine's limits that are used.

    prefill, whole: measured seconds; whole: of the --groups boxes that are timed, or of all in parallel.
    machine: of `limits`, with this number of threads.
    """
    config, language = load_config(folder), language_of(folder)
    own, llama, int8 = side.startswith("ours"), side.startswith("llama.cpp"), "int8" in side
    flops = batch * prefill_flops(config, len(language.prompt), vision=not llama)
    of_gemm = flops / prefill / machine["int8" if int8 else args.dtype]
    token, of_reading, answer = None, None, whole
    if not side.endswith(PARALLEL):
        unread = 0 if own and args.device.startswith("cuda") else 1  # a graph reads the last token, too
        token = (whole - prefill) / (GROUP * args.groups - unread)
        answer = prefill + token * (GROUP * language.groups - unread)
        layers, head = weights_read(config)
        each = (34 / 32 if llama else 1) if int8 else DTYPES[args.dtype].itemsize
        of_reading = each * (layers if own else layers + head) / token / machine["read"]
    row = dict(of_gemm=of_gemm, token=token, of_reading=of_reading)
    return row | dict(answer=answer, images_s=batch / answer)


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Measure a checkpoint and print its figures; returns what --json writes."""
    on_gpu = args.device.startswith("cuda")
    asked = {"ours": True, "ours, int8": args.int8, "ours, compiled": args.compile}
    asked |= {"ours, plain head": on_gpu, "llama.cpp, int8": args.int8 and "llama.cpp" in args.peers}
    asked |= dict.fromkeys(args.peers, True)
    names = [name for name in SIDES if asked.get(name)]
    where = torch.cuda.get_device_name(args.device) if on_gpu else f"{os.cpu_count()} cores"
    print(f"{args.model}, {args.dtype}, {args.device} ({where}), torch {torch.__version__}")
    for name in names:
        if name.startswith("llama.cpp") and not (file := gguf_file(name, args)).exists():
            write_gguf(folder, file, "int8" if "int8" in name else args.dtype)
    start, before = time.monotonic(), limits(args)
    took = time.monotonic() - start  # and as long again after the turns
    end = start + 60 * args.minutes - took
    turns = take_turns(names, end, folder, args)
    after = limits(args)  # others may use the machine too: the better figure is nearer to what it can do
    machine = {n: {name: max(rate, after[n][name]) for name, rate in before[n].items()} for n in before}
    for threads, found in machine.items():
        read, *gemm = (f"{name} {rate / 1e9:.1f}" for name, rate in found.items())
        print(f"threads {threads}, in 10^9 a second: bytes {read}; GEMM operations {', '.join(gemm)}")
    rows = summary(turns, machine, folder, args)
    if not rows:
        raise ValueError("no side has ended a turn")
    print_table([table_row(row) for row in rows], left=("side",))
    done = {(row["side"], row["threads"]) for row in rows}
    for name, threads in itertools.product(names, args.threads):
        if (name, threads) not in done:
            print(f"not measured: {name}, threads {threads}")
    about = dict(model=args.model, dtype=args.dtype, device=where, torch=torch.__version__)
    return about | dict(machine=machine, groups_timed=args.groups, rows=rows)


def table_row(row: dict) -> dict[str, str]:
    """The cells of a row as they are printed."""

    def cell(name: str, form: str, factor: float = 1) -> str:
        return "" if row[name] is None else form.format(factor * row[name])

    return {
        "threads": f"{row['threads']}",
        "batch": f"{row['batch']}",
        "side": row["side"],
        "prefill s": cell("prefill", "{:.3f}"),
        "of GEMM": cell("of_gemm", "{:.0%}"),
        "ms a token": cell("token", "{:.2f}", 1000),
        "of reading": cell("of_reading", "{:.0%}"),
        "answer s": cell("answer", "{:.3f}"),
        "of ours": cell("of_ours", "{:.2f}x"),
        "images/s": cell("images_s", "{:.3f}"),
        "peak GB": cell("peak", "{:.2f}", 1e-9),
        "turns": f"{row['turns']}",
        "": "other tokens than ours" if row["tokens_equal"] is False else "",
    }


def main() -> None:
    options = parser(__doc__)
    add, switch = options.add_argument, argparse.BooleanOptionalAction
    add("--model", default="nano", choices=["nano", *VARIANTS], help="nano, or random weights of a size")
    add_device_argument(options)
    add("--dtype", choices=DTYPES, help="default: float32 for nano, else bfloat16")
    add("--batch-size", nargs="+", type=positive, default=[1])
    add("--threads", nargs="+", type=positive, default=[torch.get_num_threads()], help="of a CPU")
    add("--groups", type=positive, default=3, help="decoded in a timing; answers are of the model's number")
    add("--rounds", type=positive, default=3, help="turns of each side; medians are shown")
    add("--seconds", type=float, default=2, help="passes are repeated in a turn until then")
    add("--minutes", type=minutes, default=10, help="of measuring; a turn that would not fit is left out")
    add("--int8", action=switch, default=True, help="8-bit matrices, too")
    add("--compile", action=switch, default=False, help="ours with torch.compile, too")
    add("--parallel", action=switch, default=True, help="ours with all boxes in five steps, too")
    add("--branches", type=positive, help="boxes in parallel (default: the model's); 51: an official answer")
    add("--peers", nargs="*", choices=PEERS, help="(default: those that are installed)")
    add("--folder", type=Path, help="random checkpoints are built there, or found and used")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    add("--scratch", type=Path, help=argparse.SUPPRESS)  # where the files for llama.cpp are
    args = options.parse_args()
    args.dtype = args.dtype or ("float32" if args.model == "nano" else "bfloat16")
    args.device = usable_device(args.device)
    if args.child:
        return child(args)
    check_output(args.json)
    args.peers = choose_peers(args.peers, args.device)
    nano = contextlib.nullcontext(NANO)
    with (
        tempfile.TemporaryDirectory(prefix="paligemma-") as temporary,
        nano if args.model == "nano" else random_checkpoint(args.model, args.folder) as folder,
    ):
        args.scratch = Path(temporary) if args.model == "nano" else folder
        figures = measure(folder, args)
    if args.json:
        write_output(figures, args.json)


if __name__ == "__main__":
    run(main, __file__)

"""The trial: cases that try hard to break the project, each judged right or wrong (tests/trial/frame.py).

    python tests/run_trial.py    # the short form, a minute: a few cases of each kind
    python tests/run_trial.py --long    # the full counts, hours
    python tests/run_trial.py --only flips --seed 5 --cases 100 --first 300

Prints a line for each kind: tried, right, wrong, seconds. The exit code is 1 if any case was wrong; each such
case is shown with the command that tries it again. After Ctrl-C, the line is of what was tried by then.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from trial import KINDS
from trial.frame import Kind, Skipped, quiet, random_numbers

from train.run.program import stop_by_exception


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--long", action="store_true", help="the full counts")
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--seed", type=int, default=0)
    add("--cases", type=int, metavar="N", help="of each kind, instead of the usual number")
    add("--first", type=int, default=0, metavar="N", help="number of the first case")
    return options.parse_args()


def try_kind(kind: Kind, key: str, args: argparse.Namespace, place: Path) -> tuple[int, int, bool]:
    """Try the cases of a kind: how many were tried, how many were wrong, and whether it was stopped."""
    count, tried, wrong = args.cases or (kind.long if args.long else kind.short), 0, 0
    try:
        for number in range(args.first, args.first + count):
            folder = place / "case"
            folder.mkdir()
            what, fault = kind.attempt(random_numbers(args.seed, key, number), number, folder)
            shutil.rmtree(folder)
            tried += 1
            if fault:
                wrong += 1
                form = "--long " if args.long else ""
                again = f"python tests/run_trial.py {form}--only {key} --seed {args.seed} --first {number}"
                print(
                    f"WRONG  {key} {number}: {what}: {fault}\n  {again} --cases 1",
                    file=sys.stderr,
                    flush=True,
                )
    except KeyboardInterrupt:
        return tried, wrong, True
    return tried, wrong, False


def main() -> int:
    args, any_wrong, stopped = arguments(), False, False
    quiet()
    Kind.full = args.long
    print(f"{'kind':<34}{'tried':>8}{'right':>8}{'wrong':>8}{'seconds':>10}", flush=True)
    for key in args.only:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
            place = Path(root) / key
            place.mkdir()
            try:
                with contextlib.closing(KINDS[key](place)) as kind:
                    tried, wrong, stopped = try_kind(kind, key, args, place)
            except Skipped as reason:
                print(f"{KINDS[key].name:<34}skipped: {reason}", flush=True)
                continue
        seconds, any_wrong = time.monotonic() - begun, any_wrong or wrong > 0
        print(f"{kind.name:<34}{tried:>8,}{tried - wrong:>8,}{wrong:>8,}{seconds:>10.1f}", flush=True)
        if stopped:
            break
    return 130 if stopped else int(any_wrong)


if __name__ == "__main__":
    with stop_by_exception():
        sys.exit(main())

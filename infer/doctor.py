"""What breaks without an error: invariants of a checkpoint, of an attention or mask put into it, and of data.

    python infer/doctor.py                                             # nano
    python infer/doctor.py --model SRC --adapter A --attention mine:attend --mask mine:mask
    python infer/doctor.py --model SRC --data train.jsonl --images photos

A table of what passed and what is broken, with the number that was measured and the place where. The loss of
answers is measured on pictures of --data, or on practice scenes where that has no two that can be used. The
exit code is 0 only if nothing is broken. In bfloat16 the limits are wider than in float32 (--dtype), which
finds more and takes more memory."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from infer.checkup.answers import Case, check_answers, coco_cases, jsonl_cases
from infer.checkup.data import check_data
from infer.checkup.finding import Finding
from infer.checkup.network import check_network, patient_for
from infer.lib.measuring import print_table
from infer.lib.options import add_model_arguments, load_model
from infer.lib.scenes import drawn_scenes
from model import PaliGemma
from model.io.image import image_folder
from model.io.names import shown
from train.data.coco import CocoIndex
from train.data.forms import PART_NAMES, find_data
from train.data.jsonl import is_jsonl
from train.run.program import parser, positive, run

RESULTS = {True: "passed", False: "BROKEN", None: "-"}


def main() -> int:
    options = parser(__doc__)
    add = options.add_argument
    add_model_arguments(options)
    add("--data", type=Path, help="a COCO file, or JSON lines of image, prefix and suffix")
    add("--images", type=Path, help="the folder of its images (default: images/ beside the file)")
    add("--count", type=positive, default=8, help="pictures whose answers are measured")
    add("--ask", choices=["words", "all"], help="for boxes by the names of classes, or in the closed-set "
        "language (default: in words if the model knows any)")  # fmt: skip
    args = options.parse_args()
    if args.count < 2:
        raise ValueError(f"--count {args.count}: must be at least 2, as pictures are compared")
    if args.data:
        found = find_data(args.data, args.images, PART_NAMES)
        if found.form not in ("COCO", "JSONL"):
            raise ValueError(
                f"{found}: make a COCO file of it with train/convert.py to-coco, which checks it too"
            )
        args.data, args.images = found.path, found.images
    findings = list(examine(load_model(args), args))
    print_table([table_row(finding) for finding in findings], left=("where",))
    broken = sum(finding.passed is False for finding in findings)
    print(f"{broken} broken" if broken else "nothing is broken")
    return 1 if broken else 0


def table_row(finding: Finding) -> dict[str, str]:
    row = {"check": finding.check, "": RESULTS[finding.passed], "measured": finding.number}
    return row | {"where": shown(finding.where)}


def examine(model: PaliGemma, args: argparse.Namespace) -> Iterator[Finding]:
    """All checks, in the order of the table."""
    cases, images = [], args.data and image_folder(args.data, args.images)
    if args.data:
        with contextlib.suppress(ValueError, OSError):  # check_data says what is wrong
            cases = find_cases(model, args, args.data, images)
    if len(cases) < 2:
        with drawn_scenes(3 * args.count, "same", model.config.vision.image_size) as scenes:
            cases = find_cases(model, args, scenes, scenes.parent / "images")
    yield from check_network(patient_for(model, cases))
    yield from check_answers(model, cases)
    if args.data:
        yield from check_data(model, args.data, images)


def find_cases(model: PaliGemma, args: argparse.Namespace, file: Path, images: Path) -> list[Case]:
    if is_jsonl(file):
        return jsonl_cases(model, file, images, args.count)
    index, config = CocoIndex.read(file, images, max_classes=None), model.config
    words = args.ask == "words" or (args.ask is None and config.open_vocabulary)
    words = words or not set(index.classes) <= set(config.classes)  # the closed-set language lacks some
    return coco_cases(model, index, images, args.count, words)


if __name__ == "__main__":
    run(main, __file__)

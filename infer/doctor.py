"""What breaks without a word: invariants of a checkpoint, of an attention or a mask put into it, of data.

    python infer/doctor.py                                             # nano
    python infer/doctor.py --model SRC --adapter A --attention mine:attend --mask mine:mask
    python infer/doctor.py --model SRC --data train.jsonl --images photos

A table of what passed and what is broken, with the number that was measured and the place where. The loss of
answers is measured on pictures of --data, or without it on practice scenes. The exit code is 0 only if
nothing is broken. In bfloat16 the limits are wider than in float32 (--dtype), which finds more and takes more
memory."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infer.checkup.answers import Case, check_answers, coco_cases, jsonl_cases
from infer.checkup.data import check_data
from infer.checkup.finding import Finding
from infer.checkup.network import check_network, patient_for
from infer.lib.measuring import print_table
from infer.lib.options import add_model_arguments, load_model
from model import PaliGemma
from model.io.image import image_folder
from model.io.names import shown
from train.data.coco import CocoIndex
from train.data.jsonl import is_jsonl
from train.practice.write import write_coco
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
    findings = list(examine(load_model(args), args))
    print_table([table_row(finding) for finding in findings], left=("where",))
    broken = sum(finding.passed is False for finding in findings)
    print(f"{broken} broken" if broken else "nothing is broken")
    return 1 if broken else 0


def table_row(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "": RESULTS[finding.passed],
        "measured": finding.number,
        "where": shown(finding.where),
    }


def examine(model: PaliGemma, args: argparse.Namespace) -> Iterator[Finding]:
    """All checks, in the order of the table."""
    of_data = list(check_data(model, args.data, image_folder(args.data, args.images))) if args.data else []
    with tempfile.TemporaryDirectory() as folder:
        cases = find_cases(model, args, Path(folder))
    yield from check_network(patient_for(model, cases))
    yield from check_answers(model, cases)
    yield from of_data


def find_cases(model: PaliGemma, args: argparse.Namespace, folder: Path) -> list[Case]:
    """Pictures and answers of --data, or of practice scenes, which are drawn into a folder."""
    file, images = args.data, image_folder(args.data, args.images) if args.data else None
    if file is None:
        write_coco(folder / "scenes", 3 * args.count, "same", model.config.vision.image_size)
        file, images = folder / "scenes" / "instances.json", folder / "scenes" / "images"
    try:
        if is_jsonl(file):
            return jsonl_cases(model, file, images, args.count)
        index = CocoIndex.read(file, images, max_classes=None)
    except (ValueError, OSError):
        if args.data is None:
            raise
        return []  # the file cannot be read, which is among the findings
    named = args.ask == "words" or (args.ask is None and model.config.open_vocabulary)
    words = named or not set(index.classes) <= set(model.config.classes)
    return coco_cases(model, index, images, args.count, words)


if __name__ == "__main__":
    run(main, __file__)

"""COCO mean average precision of a detector.

    python infer/evaluate.py    # nano on the three held-out practice sets
    python infer/evaluate.py --model SRC --data instances.json --images DIR --out runs/eval
    python infer/evaluate.py --model SRC --data FOLDER    # any form that fit.py takes
    torchrun --nproc_per_node=8 infer/evaluate.py ...    # the images are shared out

Prints pycocotools' own figures (AP and AR over IoU 0.50 to 0.95, 100 boxes an image), over all images, those
without objects too; then AP when the class is ignored, and how far scores are from the share of right boxes
(expected calibration error, ten bins).

--out keeps the predictions: report.py draws them, and a stopped run continues from them.

Pictures that cannot be read, or have another size than the file says, are named, and there are no figures of
the others: those would be of another set. With --out all others are predicted all the same, and kept. With
--skip-broken the figures are of the others, and say how many pictures are left out.
"""

import argparse
import json
import os
import sys
import tempfile
import zlib
from datetime import timedelta
from pathlib import Path

import torch

from infer.lib.options import add_detection_arguments, check_output, load_detector, tables, write_output
from infer.lib.predictions import (
    SCENES_FOLDER,
    add_set_arguments,
    check_settings,
    evaluate,
    evaluation_sets,
    file_stamps,
    left_out,
)
from model.io.names import shown
from model.io.writing import check_writable, write_lines
from train.data.forms import PART_NAMES, Found, find_data, lists_of
from train.practice.write import HELD_OUT_SETS
from train.run.processes import all_gather, join_processes, own_device, rank_and_world
from train.run.program import parser, run

# Options that do not change the boxes of an image.
NOT_IN_PREDICTIONS = ("out", "json", "sets", "data", "images", "part", "device", "batch_size", "skip_broken")


def print_figures(name: str, figures: dict) -> None:
    skipped = len(figures.get("skipped", ()))
    values = {key: x for key, x in figures.items() if key not in ("images", "calibration", "skipped")}
    ap, *texts = (f"{key} {x:.3f}" if x >= 0 else f"{key} -" for key, x in values.items())
    print(f"m{ap} ({shown(name)}{left_out(skipped, figures['images'])})")
    for row in (texts[:5], texts[5:11], texts[11:]):  # precision, recall, ours
        print("   " + "   ".join(row))


def join_torchrun(args: argparse.Namespace) -> None:
    """Under torchrun: meet the other processes, and choose this one's GPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        join_processes("gloo", patience=timedelta(days=7))  # the first to finish waits for the last
        if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
            args.device = str(own_device("cuda", world))


def settings_of(
    args: argparse.Namespace, folder: Path, found: Found | None, instances: str
) -> dict[Path, dict]:
    """{folder of results: all that the predictions in it depend on}, for each set. found: --data; instances:
    see read_other_form."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_IN_PREDICTIONS}
    settings |= {f"{name} files": file_stamps(settings.get(name)) for name in ("model", "adapter")}
    if found:
        data, images = map(os.path.realpath, (found.path, found.images))
        changed = zlib.crc32(instances.encode()) if instances else found.path.stat().st_mtime_ns
        own = dict(name=found.name, data_changed=changed, data=own_file(found) if instances else data)
        return {folder: settings | own | dict(images=images)}
    # Relative to the folder, which may move.
    places = dict(data=f"{SCENES_FOLDER}/instances.json", images=f"{SCENES_FOLDER}/images")
    return {
        folder / split: settings | dict(name=HELD_OUT_SETS[split], data_changed=None) | places
        for split in args.sets
    }


def own_file(found: Found) -> str:
    """The COCO file made from a set of another form, relative to the folder of results."""
    return f"data/{found.name}.json"


def read_other_form(found: Found | None) -> str:
    """The text of a COCO file made from a set of another form; "" for a COCO file, or without --data."""
    if found is None or found.form == "COCO":
        return ""
    return json.dumps(lists_of(found, strict=False))


def main() -> None:
    options = parser(__doc__)
    add_set_arguments(options, "a file or a folder of any form of train/data/forms.py", tuple(HELD_OUT_SETS))
    options.add_argument("--part", choices=PART_NAMES, help="of a set in parts (default: test, else val)")
    options.add_argument("--score-threshold", type=float, default=0.0)
    note = "folder of predictions and figures; what is there already is used"
    options.add_argument("--out", type=Path, metavar="DIR", help=note)
    add_detection_arguments(options)
    args = options.parse_args()
    if args.out:
        check_writable(args.out)
    join_torchrun(args)
    if not args.data and (alone := args.images or args.part):
        raise ValueError(f"{alone}: --images and --part belong to --data, which is missing")
    parts = [args.part] if args.part else ["test", "val"]
    found = find_data(args.data, args.images, parts) if args.data else None
    check_output(args.json, read=[found and found.path])
    instances = read_other_form(found)
    if found and (instances or found.path != args.data) and rank_and_world()[0] == 0:
        print(found, file=sys.stderr)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(all_gather(temporary)[0])  # the first process's, for all of them
        for out, settings in settings_of(args, folder, found, instances).items():
            check_settings(out, settings)
        all_gather(None)  # no process predicts before all have looked
        if instances and rank_and_world()[0] == 0:  # for this program, and for report.py
            (folder / own_file(found)).parent.mkdir(exist_ok=True)
            write_lines([instances], folder / own_file(found))
        all_gather(None)
        if found:
            args.images = found.images
            args.data = folder / own_file(found) if instances else found.path
        detector = load_detector(args)
        for name, data, images, out in evaluation_sets(args, folder, detector.model):
            if of_set := evaluate(detector, data, images, args.batch_size, name, out, args.skip_broken):
                with tables(args.json):
                    print_figures(name, of_set)
                figures[name] = of_set
    if args.json and figures:
        write_output(figures, args.json)


if __name__ == "__main__":
    run(main, __file__)

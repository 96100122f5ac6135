"""Make the scores of parallel boxes say how many of them are right.

    python infer/calibrate.py --model runs/mine/final --data val.json --images photos
    python infer/calibrate.py    # nano, on scenes of the practice set's development split

Fits three numbers (PaliGemmaConfig.calibration) to the boxes that are found in a set of pictures, and writes
them to the checkpoint's config.json, or to the adapter's detection.json. The order of the boxes stays; mAP
changes a little, as boxes of one object are averaged by their scores. The pictures must be none that the
model was trained on, where scores are too high, and none on which it will be measured.
"""

import json
import tempfile
from pathlib import Path

from infer.lib.options import add_detection_arguments, load_detector
from infer.lib.predictions import predict
from model.decoding.parallel import ParallelDecoder
from model.io.adapter import DETECTION
from model.io.hub import NANO
from model.io.names import shown
from model.io.writing import check_writable, read_json, write_json, write_lines
from train.data.forms import Found, find_data, lists_of
from train.measures import (
    calibration_error,
    category_ids,
    fit_calibration,
    match_boxes,
    read_coco,
    run_cocoeval,
)
from train.practice.write import write_coco
from train.run.program import parser, positive, run


def calibrate(
    detector, data: Path, images: Path, batch_size: int | None, name: Path | None = None
) -> tuple[float, float, float]:
    """Fit the calibration of a detector to a COCO file and set it; the three numbers. name: of the file in
    messages."""
    coco, name = read_coco(data, images), name or data
    ids = category_ids(coco, detector.classes, name)

    def evaluation():
        results, faults = predict(detector, coco, images, ids, batch_size, name.stem)
        if faults:
            raise ValueError(next(iter(faults.values())))
        return run_cocoeval(coco, [result for result in results if result["category_id"] != -1])

    detector.decode.calibration = None
    scores, right, _ = match_boxes(before := evaluation())
    if not 0 < right.sum() < len(right):
        share = f"{right.sum()} of {len(right)} boxes"
        raise ValueError(f"{name}: {share} are right, which says nothing of scores")
    detector.decode.calibration = fit_calibration(scores, right)
    after = evaluation()  # boxes that find the same object weigh by their odds, so they may move a little
    errors = "{:.3f} -> {:.3f}".format(*(calibration_error(each)[0] for each in (before, after)))
    print(f"calibration error {errors}   mAP {before.stats[0]:.3f} -> {after.stats[0]:.3f}")
    return detector.decode.calibration


def as_coco(found: Found, folder: Path) -> tuple[Path, Path]:
    """The COCO file of a set and the folder of its images. A set of another form is written as one into
    `folder`."""
    if found.form == "COCO":
        return found.path, found.images
    file = folder / f"{found.name}.json"
    write_lines([json.dumps(lists_of(found))], file)
    return file, found.images


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    note = "any form of train/data/forms.py (of one in parts, val); without it, practice scenes are drawn"
    add("--data", type=Path, help=f"a file or a folder of {note}")
    add("--images", type=Path, help="the folder of its images (default: images/ beside the file, or its own)")
    add("--count", type=positive, default=1000, help="practice scenes")
    add_detection_arguments(options)
    options.set_defaults(score_threshold=0.0)
    args = options.parse_args()
    if args.classes:
        raise ValueError("--classes: only boxes in parallel are calibrated, those without --classes")
    source = args.adapter or args.model
    folder = NANO if source == "nano" else Path(source)
    file = folder / (DETECTION if args.adapter else "config.json")
    if not file.is_file():
        raise ValueError(f"{shown(file)} is no file here: give a copy of the checkpoint that can be changed")
    check_writable(folder)
    detector = load_detector(args)
    if not isinstance(detector.decode, ParallelDecoder):
        how = "give --decode parallel to calibrate it for that"
        raise ValueError(f"{shown(source)} answers in sequence: {how}")
    with tempfile.TemporaryDirectory() as temporary:
        if args.data:
            data, images = as_coco(find_data(args.data, args.images, ["val", "test"]), Path(temporary))
        else:
            scenes = Path(temporary, "scenes")
            write_coco(scenes, args.count, "development", detector.model.config.vision.image_size)
            data, images = scenes / "instances.json", scenes / "images"
        found = [round(x, 4) for x in calibrate(detector, data, images, args.batch_size, args.data)]
    raw = read_json(file)
    (raw if args.adapter else raw.setdefault("detection", {}))["calibration"] = found
    write_json(raw, file)
    print(f"{shown(file)}: calibration {found}")


if __name__ == "__main__":
    run(main, __file__)

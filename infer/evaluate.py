"""COCO mean average precision of a detector.

    python infer/evaluate.py    # nano on the three held-out practice sets
    python infer/evaluate.py --model SRC --data instances.json --images DIR --out runs/eval
    torchrun --nproc_per_node=8 infer/evaluate.py ...    # the images are shared out

Figures are pycocotools' own (AP and AR over IoU 0.50 to 0.95, 100 boxes an image), over all images, those
without objects too. Beside them: AP when the class is ignored, and how far a score is from the share of right
boxes (expected calibration error, ten bins).

--out keeps the predictions for report.py and makes a run that was stopped go on (infer/lib/predictions.py).
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from infer.lib.options import add_detection_arguments, check_json, load_detector
from infer.lib.predictions import file_stamps, predict, remember
from model.decoding.detector import Detector
from model.io.writing import write_json
from train.run.processes import gathered, join, leave, process

HELD_OUT = {"same": "same drawings", "vendor": "unseen vendor", "crowded": "crowded scenes"}
FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")  # in pycocotools' order
FIGURES += ("AR1", "AR10", "AR100", "AR small", "AR medium", "AR large")
NO_MATTER = ("out", "json", "sets", "data", "images", "device", "batch_size")  # for what an image's boxes are
BINS = 10  # of scores, for calibration


def read_coco(file: Path) -> COCO:
    """A COCO annotation file; ValueError in words if it is none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
            missing = [key for key in ("images", "annotations", "categories") if key not in coco.dataset]
            for number, record in enumerate(coco.dataset.get("annotations", ()), start=1):
                record["id"] = number  # pycocotools takes 0 for "no match"
                record.setdefault("area", record["bbox"][2] * record["bbox"][3])
                record.setdefault("iscrowd", 0)
            coco.createIndex()
    except (OSError, ValueError, AssertionError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} is not a COCO annotation file: {error or 'its top level is no object'}"
        ) from error
    if missing:
        raise ValueError(f"{file} is not a COCO annotation file: no {missing[0]!r} list")
    return coco


def category_ids(coco: COCO, classes: tuple[str, ...], file: Path) -> list[int]:
    """The file's category id of each class of the model, by name."""
    by_name = {category["name"]: category["id"] for category in coco.dataset["categories"]}
    unknown = [name for name in by_name if name not in classes]
    if unknown:
        told = ", ".join(unknown[:5])
        raise ValueError(f"{file} has categories that are not among the {len(classes)} to detect: {told}")
    return [by_name.get(name, -1) for name in classes]


def run_cocoeval(coco: COCO, results: list[dict], use_classes: bool = True) -> COCOeval:
    """pycocotools' evaluation, its printing kept quiet."""
    with contextlib.redirect_stdout(io.StringIO()):
        if not results:  # loadRes cannot take an empty list
            detected = COCO()
            detected.dataset = coco.dataset | dict(annotations=[])
            detected.createIndex()
        else:
            detected = coco.loadRes([dict(result) for result in results])
        evaluation = COCOeval(coco, detected, "bbox")
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def judged(evaluation: COCOeval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every box: score, right at IoU 0.5, image id, each [n]. Boxes in crowds count as neither."""
    first_area = [e for e in evaluation.evalImgs if e and e["aRng"] == evaluation.params.areaRng[0]]
    rows = [
        (score, match > 0, e["image_id"])
        for e in first_area
        for score, match, ignored in zip(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0])
        if not ignored
    ]
    scores, right, images = zip(*rows) if rows else ((), (), ())
    return np.array(scores, float), np.array(right, bool), np.array(images)


def calibration(evaluation: COCOeval) -> tuple[float, list[dict]]:
    """Expected calibration error of the scores (a box is right at IoU 0.5), and its table by score."""
    scores, right, _ = judged(evaluation)
    if not len(scores):
        return 0.0, []
    of_bin = np.minimum((scores * BINS).astype(int), BINS - 1)
    table = []
    for b in np.unique(of_bin).tolist():
        inside = of_bin == b
        means = {
            name: round(float(x[inside].mean()), 4) for name, x in (("mean_score", scores), ("right", right))
        }
        table.append(dict(bin=f"{b / BINS:.1f}-{(b + 1) / BINS:.1f}", boxes=int(inside.sum())) | means)
    error = sum(row["boxes"] * abs(row["mean_score"] - row["right"]) for row in table) / len(scores)
    return float(error), table


def evaluate(
    detector: Detector, data: Path, images: Path, batch_size: int | None, title: str, out: Path | None = None
) -> dict:
    """All figures of one set, in the first process; nothing in the others of torchrun.

    Raises ValueError if the file, a class, an image or what out holds is not what it should be.
    """
    coco = read_coco(data)
    ids = category_ids(coco, detector.classes, data)
    shares = gathered(predict(detector, coco, images, ids, batch_size, title, out, *process()))
    if process()[0] > 0:
        return {}
    results = sorted((result for share in shares for result in share), key=lambda r: r["image_id"])
    # Boxes of a class that the set does not have count only when classes are ignored.
    of_set = [result for result in results if result["category_id"] != -1]
    evaluation = run_cocoeval(coco, of_set)
    any_class = run_cocoeval(coco, results, use_classes=False)
    error, table = calibration(evaluation)
    figures = {name: round(float(value), 4) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    figures["AP any class"] = round(float(any_class.stats[0]), 4)
    figures |= {"calibration error": round(error, 4), "images": len(coco.imgs), "calibration": table}
    if out:
        (out / "results.json").write_text(json.dumps(of_set), encoding="utf-8")
        write_json(figures, out / "figures.json")
    return figures


def report(name: str, figures: dict) -> None:
    print(f"mAP {figures['AP']:.3f} ({name})")
    shown = [key for key in figures if key not in ("AP", "images", "calibration")]
    texts = [f"{key} {figures[key]:.3f}" if figures[key] >= 0 else f"{key} -" for key in shown]
    for row in (texts[:5], texts[5:11], texts[11:]):  # precision, recall, ours
        print("   " + "   ".join(row))


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, help="a COCO instances file; without it, the held-out practice sets are drawn")
    add("--images", type=Path, help="the folder of its images (default: images/ beside the file)")
    add("--sets", nargs="+", choices=HELD_OUT, default=list(HELD_OUT), help="held-out practice sets")
    add("--count", type=int, default=1000, help="scenes of each practice set")
    add("--score-threshold", type=float, default=0.0)
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of predictions and figures; goes on with what is there",
    )
    add_detection_arguments(parser)
    return parser.parse_args(argv)


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: meet the other processes, and take this one's GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        join("gloo", timeout=timedelta(days=7))  # the first to finish waits for the last
        if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"


def run(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError("--count must be at least 1")
    check_json(args.json)
    join_processes(args)
    detector = load_detector(args, args.score_threshold)
    settings = {name: value for name, value in vars(args).items() if name not in NO_MATTER}
    settings |= {f"{name} files": file_stamps(settings.get(name)) for name in ("model", "adapter")}
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(gathered(temporary)[0])
        for split in [None] if args.data else args.sets:
            name, out = (HELD_OUT[split], folder / split) if split else (args.data.stem, folder)
            data = out / "scenes" / "instances.json" if split else args.data
            images = (args.data and args.images) or data.parent / "images"
            where = {  # inside the folder, it may move
                key: path.relative_to(out) if split else path.resolve()
                for key, path in (("data", data), ("images", images))
            }
            changed = None if split else data.stat().st_mtime_ns
            remember(out, settings | dict(name=name, data_changed=changed) | where)
            gathered(None)  # every process has looked before one goes on
            if split and process()[0] == 0 and not data.exists():
                from train.practice.write import write_coco

                write_coco(data.parent, args.count, split, detector.model.config.vision.image_size)
            gathered(None)  # the scenes are drawn
            if of_set := evaluate(detector, data, images, args.batch_size, name, out):
                report(name, of_set)
                figures[name] = of_set
    if args.json and figures:
        write_json(figures, args.json)


def main() -> None:
    status = 0
    try:
        run(arguments())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        status = f"evaluate.py: {str(error).splitlines()[0]}"
    except KeyboardInterrupt:
        status = 130
    leave(status)


if __name__ == "__main__":
    main()

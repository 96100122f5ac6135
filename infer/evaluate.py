"""COCO mean average precision of a detector.

    python infer/evaluate.py    # nano on the three held-out practice sets
    python infer/evaluate.py --model SRC --data instances.json --images DIR

Figures are pycocotools' own (AP over IoU 0.50 to 0.95, 100 boxes an image). Beside them: AP when the class is
ignored, and how far a score is from the share of right boxes (expected calibration error, ten bins).
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from infer.detector import Detector, add_model_arguments, check_json, load_detector
from model.image import load_image
from model.weights import write_json

HELD_OUT = {"same": "same drawings", "vendor": "unseen vendor", "crowded": "crowded scenes"}
FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")  # the first six of pycocotools
BINS = 10  # of scores, for calibration


def read_coco(file: Path) -> COCO:
    """A COCO annotation file; ValueError in words if it is none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        missing = [key for key in ("images", "annotations", "categories") if key not in coco.dataset]
    except (OSError, ValueError, AssertionError, KeyError, TypeError) as error:
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
        raise ValueError(f"{file} has categories that the model was not taught: {', '.join(unknown[:5])}")
    return [by_name.get(name, -1) for name in classes]


def predict(
    detector: Detector, coco: COCO, images: Path, ids: list[int], batch_size: int, title: str
) -> list[dict]:
    """Results in COCO's format for every image of the set."""
    results = []
    records = sorted(coco.dataset["images"], key=lambda record: record["id"])
    bar = tqdm(total=len(records), desc=title, unit="image", leave=False)
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        found_all = detector([load_image(images / record["file_name"]) for record in batch])
        for record, found in zip(batch, found_all, strict=True):
            for (x0, y0, x1, y1), score, label in zip(
                *(a.tolist() for a in (found.boxes, found.scores, found.labels))
            ):
                box = [x0, y0, x1 - x0, y1 - y0]
                results.append(dict(image_id=record["id"], category_id=ids[label], bbox=box, score=score))
        bar.update(len(batch))
    bar.close()
    return results


def run_cocoeval(coco: COCO, results: list[dict], use_classes: bool = True) -> COCOeval:
    """pycocotools' evaluation, its printing kept quiet."""
    with contextlib.redirect_stdout(io.StringIO()):
        if not results:  # loadRes cannot take an empty list
            detected = COCO()
            detected.dataset = dict(
                images=coco.dataset["images"], categories=coco.dataset["categories"], annotations=[]
            )
            detected.createIndex()
        else:
            detected = coco.loadRes([dict(result) for result in results])
        evaluation = COCOeval(coco, detected, "bbox")
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def calibration(evaluation: COCOeval) -> tuple[float, list[dict]]:
    """Expected calibration error of the scores (a box is right at IoU 0.5), and its table by score."""
    first_area = [e for e in evaluation.evalImgs if e and e["aRng"] == evaluation.params.areaRng[0]]
    scores = np.array([score for e in first_area for score in e["dtScores"]])
    right = np.array([match > 0 for e in first_area for match in e["dtMatches"][0]])
    if not len(scores):
        return 0.0, []
    of_bin = np.minimum((scores * BINS).astype(int), BINS - 1)
    table = []
    for b in np.unique(of_bin).tolist():
        inside = of_bin == b
        table.append(
            dict(
                bin=f"{b / BINS:.1f}-{(b + 1) / BINS:.1f}",
                boxes=int(inside.sum()),
                mean_score=round(float(scores[inside].mean()), 4),
                right=round(float(right[inside].mean()), 4),
            )
        )
    error = sum(row["boxes"] * abs(row["mean_score"] - row["right"]) for row in table) / len(scores)
    return float(error), table


def evaluate(detector: Detector, data: Path, images: Path, batch_size: int, title: str) -> dict:
    """All figures of one set. Raises ValueError if the file, a class or an image is not what it should be."""
    coco = read_coco(data)
    ids = category_ids(coco, detector.classes, data)
    results = predict(detector, coco, images, ids, batch_size, title)
    # Boxes of a class that the set does not have count only when classes are ignored.
    evaluation = run_cocoeval(coco, [r for r in results if r["category_id"] != -1])
    any_class = run_cocoeval(coco, results, use_classes=False)
    error, table = calibration(evaluation)
    figures = {name: round(float(value), 4) for name, value in zip(FIGURES, evaluation.stats, strict=False)}
    figures |= {
        "AR100": round(float(evaluation.stats[8]), 4),
        "AP any class": round(float(any_class.stats[0]), 4),
    }
    return figures | {"calibration error": round(error, 4), "images": len(coco.imgs), "calibration": table}


def report(name: str, figures: dict) -> None:
    print(f"mAP {figures['AP']:.3f} ({name})")
    shown = [key for key in figures if key not in ("AP", "images", "calibration")]
    print(
        "   " + "   ".join(f"{key} {figures[key]:.3f}" if figures[key] >= 0 else f"{key} -" for key in shown)
    )


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
    add("--batch-size", type=int, default=32)
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.batch_size < 1 or args.count < 1:
        raise ValueError("--batch-size and --count must be at least 1")
    check_json(args.json)
    detector = load_detector(args, args.score_threshold)
    figures = {}
    if args.data:
        name = args.data.stem
        figures[name] = evaluate(
            detector, args.data, args.images or args.data.parent / "images", args.batch_size, name
        )
        report(name, figures[name])
    else:
        from train.scenes import write_coco

        size = detector.model.config.vision.image_size
        with tempfile.TemporaryDirectory() as folder:
            for split in args.sets:
                out = Path(folder) / split
                write_coco(out, args.count, split, size)
                name = HELD_OUT[split]
                figures[name] = evaluate(
                    detector, out / "instances.json", out / "images", args.batch_size, name
                )
                report(name, figures[name])
    if args.json:
        write_json(figures, args.json)


def main() -> None:
    try:
        run(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()

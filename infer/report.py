"""Pictures of an evaluation and of a training run, with a page that shows them all.

    python infer/evaluate.py --out runs/eval
    python infer/report.py --eval runs/eval --run runs/nano --out report    # then open report/index.html

Right means IoU 0.5 or more with an object of the same class. Needs matplotlib.
"""

import argparse
import html
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.evaluate import HELD_OUT, judged, read_coco, run_cocoeval
from infer.lib.draw import draw_boxes
from infer.lib.plots import (
    ap_per_class,
    box_sizes,
    boxes_per_image,
    calibration,
    learning_curve,
    points,
    precision_recall,
    score_distribution,
    validation_curve,
)
from model.io.image import load_image
from model.io.writing import read_json

STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}
PANEL, MARGIN, TITLE = 560, 12, 30  # pixels of the contact sheets
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .2em 1em; border-bottom: 1px solid #ddd }}
th {{ text-align: left }} td {{ text-align: right; font-variant-numeric: tabular-nums }}
figure {{ margin: 2em 0 }} img {{ max-width: 100% }} figcaption {{ color: #555; max-width: 50em }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


class Evaluated:
    """A folder that evaluate.py --out has finished: truth, boxes, and which boxes are right.

    scores, right and image (a row of ids) [n] are of all boxes; objects, found, correct and f1 of each image.
    Boxes with a score of `threshold` or more are `found`: it is where F1 over the whole set is best.
    """

    def __init__(self, folder: Path):
        settings, self.figures = read_json(folder / "settings.json"), read_json(folder / "figures.json")
        self.name, self.images = settings["name"], folder / settings["images"]
        self.coco = read_coco(folder / settings["data"])
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.evaluation = run_cocoeval(self.coco, results)
        self.truth = [a for a in self.coco.dataset["annotations"] if not a.get("iscrowd")]
        if not self.truth:
            raise ValueError(f"{folder}: its images have no objects, there is nothing to draw")
        self.ids = sorted(self.coco.imgs)
        row, rows = {image_id: i for i, image_id in enumerate(self.ids)}, len(self.ids)
        self.scores, self.right, images = judged(self.evaluation)
        image = np.array([row[i] for i in images.tolist()], int)
        order = np.argsort(-self.scores, kind="stable")
        f1 = 2 * self.right[order].cumsum() / (np.arange(1, len(order) + 1) + len(self.truth))
        self.threshold = float(self.scores[order[f1.argmax()]]) if len(order) else 0.5
        shown = self.scores >= self.threshold
        self.boxes = [result for result in results if result["score"] >= self.threshold]
        self.objects = np.bincount([row[a["image_id"]] for a in self.truth], minlength=rows)
        self.found = np.bincount(image[shown], minlength=rows)
        self.correct = np.bincount(image[shown & self.right], minlength=rows)
        both = self.objects + self.found
        self.f1 = np.where(both > 0, 2 * self.correct / np.maximum(both, 1), 1.0)
        precision = self.evaluation.eval["precision"][..., 0, -1]  # of all sizes, 100 boxes an image
        occurs = np.flatnonzero(precision[0, 0] > -1)
        self.precision = precision[:, :, occurs]  # [IoU, recall, class]
        self.classes = [self.evaluation.params.catIds[k] for k in occurs]  # the category id of each
        self.names = {category_id: category["name"] for category_id, category in self.coco.cats.items()}


# Contact sheets and the page -------------------------------------------------------------------------------


def panel(e: Evaluated, image: Image.Image, boxes: list[dict]) -> Image.Image:
    """An image with boxes in COCO's format, PANEL pixels wide."""
    names = [e.names[b["category_id"]] + (f" {b['score']:.2f}" if "score" in b else "") for b in boxes]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (b["bbox"] for b in boxes)]
    drawn = draw_boxes(image, corners, names, [b["category_id"] for b in boxes])
    return drawn.resize((PANEL, round(PANEL * drawn.height / drawn.width)), Image.Resampling.LANCZOS)


def contact_sheet(e: Evaluated, rows: np.ndarray, file: Path) -> None:
    """Images one below the other, each twice: the truth on the left, the boxes found on the right."""
    tiles, font = [], ImageFont.load_default(16)
    for i in rows.tolist():
        record = e.coco.imgs[e.ids[i]]
        image = load_image(e.images / record["file_name"])
        sides = [panel(e, image, [b for b in x if b["image_id"] == e.ids[i]]) for x in (e.truth, e.boxes)]
        tile = Image.new("RGB", (2 * PANEL + 3 * MARGIN, sides[0].height + TITLE), "white")
        texts = (
            f"{Path(record['file_name']).name}    objects: {e.objects[i]}",
            f"boxes found: {e.found[i]}, right: {e.correct[i]}    F1 {e.f1[i]:.2f}",
        )
        for x, side, text in zip((MARGIN, PANEL + 2 * MARGIN), sides, texts, strict=True):
            tile.paste(side, (x, TITLE))
            ImageDraw.Draw(tile).text((x, 10), text, font=font, fill="black")
        tiles.append(tile)
    Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles])).save(file, quality=90)


def plot(draw, subject, file: Path) -> str:
    """Let a function draw on new axes, save them, and put its caption into HTML."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: needs no screen

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        caption = draw(figure.subplots(), subject)
        figure.savefig(file, dpi=130)
    return figure_tag(file, caption)


def figure_tag(file: Path, caption: str) -> str:
    name, caption = html.escape(file.name), html.escape(caption)
    return f'<figure><img src="{name}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def figures_table(sets: list[Evaluated]) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(e.name)}</th>" for e in sets) + "</tr>"]
    for key in (key for key in sets[0].figures if key != "calibration"):
        values = (e.figures[key] for e in sets)
        cells = (str(v) if key == "images" else f"{v:.3f}" if v >= 0 else "-" for v in values)
        rows.append(f"<tr><th>{html.escape(key)}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def report_set(e: Evaluated, prefix: str, out: Path, count: int) -> list[str]:
    """The pictures of one set; their HTML."""
    parts = [f"<h2>{html.escape(e.name)}</h2>"]
    for draw in (precision_recall, score_distribution, boxes_per_image, box_sizes, calibration, ap_per_class):
        parts.append(plot(draw, e, out / f"{prefix}{draw.__name__}.png"))
    for name, key in (("best", -e.f1), ("worst", e.f1)):
        file = out / f"{prefix}{name}.jpg"
        contact_sheet(e, np.lexsort((-e.objects, key))[:count], file)  # of equal F1, more objects first
        caption = f"The {name} images by F1. Left the objects, right the boxes found, with their scores."
        parts.append(figure_tag(file, caption))
    return parts


def report_run(folder: Path, out: Path) -> list[str]:
    """The curves of a training run, of those that it logged; their HTML."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    except (OSError, ValueError) as error:
        raise ValueError(f"--run {folder}: its metrics.jsonl cannot be read ({error})") from error
    parts = ["<h2>training</h2>"]
    for draw, keys in ((learning_curve, ["loss"]), (validation_curve, ["val_loss", "val_mAP"])):
        if any(points(metrics, key)[0].size for key in keys):
            parts.append(plot(draw, metrics, out / f"{draw.__name__}.png"))
    return parts


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--eval", type=Path, required=True, metavar="DIR", help="the --out of evaluate.py")
    add("--run", type=Path, metavar="DIR", help="the --out of fit.py")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures and index.html")
    add("--images", type=int, default=5, help="best and worst images shown of each set")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise ValueError("--images must be at least 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install matplotlib")
    folders = [args.eval, *(args.eval / split for split in HELD_OUT)]
    folders = [folder for folder in folders if (folder / "figures.json").exists()]
    if not folders:
        raise ValueError(f"--eval {args.eval}: no finished evaluation; make one with evaluate.py --out")
    sets = [Evaluated(folder) for folder in folders]
    args.out.mkdir(parents=True, exist_ok=True)
    body = [figures_table(sets)]
    for e, folder in zip(sets, folders, strict=True):
        body += report_set(e, "" if folder == args.eval else f"{folder.name}_", args.out, args.images)
    if args.run:
        body += report_run(args.run, args.out)
    page = args.out / "index.html"
    page.write_text(PAGE.format(title="Evaluation", body="\n".join(body)), encoding="utf-8")
    print(f"report: {page}")


def main() -> None:
    try:
        run(arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Pictures of an evaluation and of a training run, with a page that shows them all.

    python infer/evaluate.py --out runs/eval
    python infer/report.py --eval runs/eval --run runs/nano --out report    # then open report/index.html

Right means IoU 0.5 or more with an object of the same class. Needs matplotlib.
"""

import html
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.lib.draw import draw_boxes, framed
from infer.lib.plots import EVALUATION_PLOTS, RUN_PLOTS, Evaluated, new_figure, points, require_matplotlib
from model.io.image import load_image
from model.io.names import shown
from model.io.writing import atomic_write, each_line, explain, write_lines
from train.practice.write import HELD_OUT_SETS
from train.run.program import parser, positive, run

PANEL, MARGIN, TITLE = 560, 12, 30  # pixels, in contact sheets
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


# ---- contact sheets and the page ---------------------------------------------------------------------------


def draw_panel(result: Evaluated, image: Image.Image, boxes: list[dict]) -> Image.Image:
    """An image with boxes in COCO's format, PANEL pixels wide."""
    names = [result.names[b["category_id"]] + (f" {b['score']:.2f}" if "score" in b else "") for b in boxes]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (b["bbox"] for b in boxes)]
    drawn = draw_boxes(image, corners, names, [b["category_id"] for b in boxes])
    return drawn.resize((PANEL, round(PANEL * drawn.height / drawn.width)), Image.Resampling.LANCZOS)


def save_contact_sheet(result: Evaluated, rows: np.ndarray, file: Path) -> None:
    """Images one below the other, each twice: its objects on the left, the boxes found on the right."""
    tiles, font = [], ImageFont.load_default(16)
    for i in rows.tolist():
        record = result.coco.imgs[result.ids[i]]
        image = load_image(result.images / record["file_name"])
        sides = [
            draw_panel(result, image, [b for b in boxes if b["image_id"] == result.ids[i]])
            for boxes in (result.truth, result.boxes)
        ]
        tile = Image.new("RGB", (2 * PANEL + 3 * MARGIN, sides[0].height + TITLE), "white")
        texts = (
            f"{shown(Path(record['file_name']).name)}    the objects: {result.objects[i]}",
            f"found by the model: {result.found[i]}, right: {result.correct[i]}    F1 {result.f1[i]:.2f}",
        )
        for x, side, text in zip((MARGIN, PANEL + 2 * MARGIN), sides, texts, strict=True):
            tile.paste(framed(side), (x, TITLE))
            ImageDraw.Draw(tile).text((x, 10), text, font=font, fill="black")
        tiles.append(tile)
    sheet = Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles]))
    with atomic_write(file) as temporary:
        sheet.save(temporary, "JPEG", quality=90)


def save_plot(draw, subject, file: Path) -> str:
    """Save what `draw` draws on new axes; returns the plot's HTML, with the caption that draw returned."""
    with new_figure(file, 7.5, 4.8) as figure:
        caption = draw(figure.subplots(), subject)
    return figure_tag(file, caption)


def figure_tag(file: Path, caption: str) -> str:
    name, caption = html.escape(file.name), html.escape(caption)
    return f'<figure><img src="{name}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def figures_table(sets: list[Evaluated]) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(result.name)}</th>" for result in sets) + "</tr>"]
    for key in (key for key in sets[0].figures if key != "calibration"):
        values = (result.figures[key] for result in sets)
        cells = (f"{v}" if key == "images" else f"{v:.3f}" if v >= 0 else "-" for v in values)
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th>{html.escape(shown(key))}</th>{columns}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def report_set(result: Evaluated, prefix: str, out: Path, count: int) -> list[str]:
    """Draw the pictures of one set into `out`; returns their HTML."""
    parts = [f"<h2>{html.escape(result.name)}</h2>"]
    for draw in EVALUATION_PLOTS:
        parts.append(save_plot(draw, result, out / f"{prefix}{draw.__name__}.png"))
    for name, key in (("best", -result.f1), ("worst", result.f1)):
        file = out / f"{prefix}{name}.jpg"
        order = np.lexsort((-result.objects, key))  # of equal F1, more objects first
        save_contact_sheet(result, order[:count], file)
        caption = f"The {name} images by F1. Left the objects, right the boxes found, with their scores."
        parts.append(figure_tag(file, caption))
    return parts


def report_run(folder: Path, out: Path) -> list[str]:
    """Draw the curves of what a training run has logged into `out`; returns their HTML."""
    with explain(f"--run {folder}: its metrics.jsonl cannot be read", OSError, ValueError):
        lines = [line for _, _, line in each_line(folder / "metrics.jsonl")]
        metrics = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be half written
        if not all(isinstance(line, dict) and "step" in line for line in metrics):
            raise ValueError("a line has no step")
    parts = ["<h2>training</h2>"]
    for draw, keys in RUN_PLOTS.items():
        if any(points(metrics, key)[0].size for key in keys):
            parts.append(save_plot(draw, metrics, out / f"{draw.__name__}.png"))
    return parts


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--eval", type=Path, required=True, metavar="DIR", help="the --out of evaluate.py")
    add("--run", type=Path, metavar="DIR", help="the --out of fit.py")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures and index.html")
    add("--images", type=positive, default=5, help="best and worst images shown of each set")
    args = options.parse_args()
    require_matplotlib()
    folders = [args.eval, *(args.eval / split for split in HELD_OUT_SETS)]
    folders = [folder for folder in folders if (folder / "figures.json").exists()]
    if not folders:
        raise ValueError(f"--eval {args.eval}: no finished evaluation; make one with evaluate.py --out")
    sets = [Evaluated(folder) for folder in folders]
    args.out.mkdir(parents=True, exist_ok=True)
    body = [figures_table(sets)]
    for result, folder in zip(sets, folders, strict=True):
        prefix = "" if folder == args.eval else f"{folder.name}_"
        body += report_set(result, prefix, args.out, args.images)
    if args.run:
        body += report_run(args.run, args.out)
    page = args.out / "index.html"
    write_lines([PAGE.format(title="Evaluation", body="\n".join(body))], page)
    print(f"report: {shown(page)}")


if __name__ == "__main__":
    run(main, __file__)

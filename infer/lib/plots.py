"""Plots of an evaluation and of a training run. Each function draws on its axes and returns the caption."""

import contextlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np

from infer.lib.options import check_output
from model.io.names import shown
from model.io.writing import atomic_write, explain, open_regular, read_json
from train.measures import FIGURES, match_boxes, read_coco, run_cocoeval, without_images

# Okabe and Ito's colours, which colour-blind people can tell apart.
TRUTH, RIGHT, WRONG, MIDDLE = "#4d4d4d", "#0072b2", "#d55e00", "#009e73"
MOST_BARS = 27  # in a column of classes
NEEDED = {*FIGURES, "AP any class", "calibration error", "calibration"}  # of figures.json
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "text.parse_math": False,  # the $ in a class's name is a $
}


def require_matplotlib() -> None:
    """Complain before the work if its plots could not be drawn after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install matplotlib")


def check_plot(file: Path) -> None:
    """Complain before the work if its plot could not be written to --out after it."""
    require_matplotlib()
    check_output(file, "--out")
    from matplotlib.backend_bases import FigureCanvasBase

    if file.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--out {shown(file)}: no format of pictures by its suffix; take .png, for example")


@contextlib.contextmanager
def new_figure(file: Path, width: float, height: float):
    """A figure to draw on, in inches, which is then saved. Importing matplotlib takes a second: only here."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: needs no screen

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], dpi=130)


class Evaluated:
    """A folder that evaluate.py --out has finished: the objects, the boxes, and which boxes are right.

    `scores` and `right` [n] are of all boxes; `objects`, `found`, `correct` and `f1` of each image, in the
    order of `ids`. Boxes are found if their score is at least `threshold`, where F1 over the set is best.
    """

    def __init__(self, folder: Path):
        settings, self.figures = read_json(folder / "settings.json"), read_json(folder / "figures.json")
        with explain(f"{folder / 'settings.json'} is not evaluate.py's", KeyError, TypeError):
            self.name, self.images = shown(settings["name"]), folder / settings["images"]
            data = folder / settings["data"]
        with explain(f"{folder / 'figures.json'}: skipped must name pictures", ValueError, TypeError):
            skipped = set(map(int, self.figures.pop("skipped", {})))
        for key, value in self.figures.items():
            if key != "calibration" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{folder / 'figures.json'}: {key} is {value!r}, not a number")
        if missing := NEEDED - self.figures.keys():
            raise ValueError(f"{folder / 'figures.json'} is not evaluate.py's: it has no {min(missing)!r}")
        self.coco = without_images(read_coco(data), skipped)
        if skipped:
            self.name += f" ({len(skipped)} pictures left out as broken)"
        file = folder / "results.json"
        # Whatever pycocotools makes of other content: it raises plain Exceptions, too.
        with open_regular(file) as handle, explain(f"{file} is not evaluate.py's, of this set", Exception):
            results = json.loads(handle.read())
            self.evaluation = run_cocoeval(self.coco, results)
        self.truth = [a for a in self.coco.dataset["annotations"] if not a.get("iscrowd")]
        if not self.truth:
            raise ValueError(f"{folder}: its images have no objects, there is nothing to draw")
        self.ids = sorted(self.coco.imgs)
        self.scores, self.right, owners = match_boxes(self.evaluation)
        # F1 of the best n boxes, for every n, by the running number of right ones.
        order = np.argsort(-self.scores, kind="stable")
        f1 = 2 * self.right[order].cumsum() / (np.arange(1, len(order) + 1) + len(self.truth))
        self.threshold = float(self.scores[order[f1.argmax()]]) if len(order) else 0.5
        self.boxes = [result for result in results if result["score"] >= self.threshold]

        row = {image_id: i for i, image_id in enumerate(self.ids)}

        def count(image_ids) -> np.ndarray:
            return np.bincount([row[i] for i in image_ids], minlength=len(row))

        kept = self.scores >= self.threshold
        self.objects = count(a["image_id"] for a in self.truth)
        self.found, self.correct = count(owners[kept].tolist()), count(owners[kept & self.right].tolist())
        both = self.objects + self.found
        self.f1 = np.where(both > 0, 2 * self.correct / np.maximum(both, 1), 1.0)  # of an empty image, 1

        precision = self.evaluation.eval["precision"][..., 0, -1]  # of all sizes, 100 boxes an image
        occurs = np.flatnonzero(precision[0, 0] > -1)
        self.precision = precision[:, :, occurs]  # [IoU, recall, class]
        self.classes = [self.evaluation.params.catIds[k] for k in occurs]  # the category id of each
        self.names = {i: shown(category["name"]) for i, category in self.coco.cats.items()}


# ---- an evaluation -----------------------------------------------------------------------------------------


def precision_recall(axes, result: Evaluated) -> str:
    curves = result.precision.mean(-1)
    names = {"0.50": ("AP50", curves[0]), "0.75": ("AP75", curves[5])}
    names["0.50 to 0.95, mean"] = ("AP", curves.mean(0))
    for (name, (key, curve)), colour in zip(names.items(), (RIGHT, MIDDLE, WRONG), strict=True):
        label = f"IoU {name}: AP {result.figures[key]:.3f}"
        axes.plot(result.evaluation.params.recThrs, curve, color=colour, linewidth=2, label=label)
    axes.set(xlabel="recall", ylabel="precision, mean of classes", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("Precision and recall")
    axes.legend()
    return (
        "Precision against recall: the share of right boxes when the score threshold is low enough to find "
        "that share of the objects. The area under a curve is its AP."
    )


def score_distribution(axes, result: Evaluated) -> str:
    for name, chosen, colour in (("right", result.right, RIGHT), ("wrong", ~result.right, WRONG)):
        scores = result.scores[chosen]
        bars = dict(histtype="step", linewidth=2, color=colour, label=f"{name}: {len(scores)}")
        axes.hist(scores, np.linspace(0, 1, 26), **bars)
    axes.axvline(result.threshold, color=TRUTH, linestyle="--", label=f"threshold {result.threshold:.2f}")
    axes.set(xlabel="score", ylabel="boxes (logarithmic)", xlim=(0, 1), title="Scores, right and wrong")
    axes.set(ylim=(0.7, None), yscale="log")
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")  # powers of ten would need formulas
    axes.legend(loc="upper center", frameon=True, framealpha=1, edgecolor="none")
    return (
        'Scores of right and of wrong boxes. F1 is best at the threshold; "found" below means from there up.'
    )


def boxes_per_image(axes, result: Evaluated) -> str:
    top = int(max(result.objects.max(), result.found.max())) + 1
    table = np.histogram2d(result.objects, result.found, bins=np.arange(-0.5, top + 0.5))[0].T
    cells = axes.imshow(np.where(table, table, np.nan), origin="lower", cmap="Blues", vmin=0)
    axes.plot([-0.5, top - 0.5], [-0.5, top - 0.5], color=TRUTH, linewidth=1)
    axes.locator_params(integer=True)
    axes.grid(False)
    axes.set(xlabel="objects in the image", ylabel="boxes found", title="Boxes found in each image")
    axes.figure.colorbar(cells, label="images")
    return (
        "Boxes found against objects, image by image; on the line there are equally many. "
        f"Mean: {result.found.mean():.2f} boxes, {result.objects.mean():.2f} objects."
    )


def box_sizes(axes, result: Evaluated) -> str:
    truth, found = (
        np.array([b["bbox"][2:] for b in boxes]).reshape(-1, 2).prod(1) ** 0.5
        for boxes in (result.truth, result.boxes)
    )
    edges = np.linspace(0, max(truth.max(), found.max(initial=0)), 31)
    axes.hist(truth, edges, color=TRUTH, alpha=0.35, label=f"objects: {len(truth)}")
    axes.hist(found, edges, color=RIGHT, histtype="step", linewidth=2, label=f"boxes found: {len(found)}")
    axes.set(xlabel="square root of the box's area (pixels)", ylabel="boxes", xlim=(0, edges[-1]))
    axes.set_title("Sizes of boxes")
    axes.legend()
    return "Sizes of the objects and of the boxes found."


def calibration(axes, result: Evaluated) -> str:
    axes.plot([0, 1], [0, 1], color=TRUTH, linewidth=1, label="perfect")
    table = result.figures["calibration"]
    spots = [(row["mean_score"], row["right"]) for row in table] or [(np.nan, np.nan)]
    axes.plot(*zip(*spots), "o-", color=RIGHT, linewidth=2, label="measured (number of boxes)")
    for row, spot in zip(table, spots):
        above = dict(xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9, color=TRUTH)
        axes.annotate(row["boxes"], spot, **above)
    axes.set(xlabel="mean score", ylabel="share of right boxes", aspect="equal", title="Calibration")
    axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.09))
    axes.legend(loc="upper left")
    error = result.figures["calibration error"]
    return f"Do scores tell the truth? In ten bins of scores; expected calibration error {error:.3f}."


def ap_per_class(axes, result: Evaluated) -> str:
    ap, count = result.precision.mean((0, 1)), Counter(a["category_id"] for a in result.truth)
    order = np.argsort(-ap, kind="stable")
    names = [f"{result.names[result.classes[k]]} ({count[result.classes[k]]})" for k in order]
    columns = -(-len(names) // MOST_BARS)
    rows, figure = -(-len(names) // columns), axes.figure
    axes.remove()  # several instead: best classes first, from the left column's top
    figure.set_size_inches(max(5.5, 3.7 * columns), 1.2 + 0.19 * rows)
    figure.suptitle("AP of each class (number of its objects)", fontsize="large")
    for column, panel in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        of_column = slice(column * rows, (column + 1) * rows)
        bars = ap[order][of_column]
        panel.barh(range(len(bars)), bars, tick_label=names[of_column], color=RIGHT)
        panel.set(xlabel="AP", xlim=(0, 1), ylim=(rows - 0.4, -0.6))
        panel.tick_params(axis="y", labelsize=9, length=0)
        panel.grid(False, axis="y")
    return (
        "AP of each class that occurs, and the number of its objects: with few of them, AP is mostly chance."
    )


# ---- a training run ----------------------------------------------------------------------------------------


def points(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key. Where a resumed run repeated a step, the later value counts."""
    of_step = {line["step"]: line[key] for line in metrics if line.get(key) is not None}
    return np.array(sorted(of_step)), np.array([of_step[step] for step in sorted(of_step)])


def learning_curve(axes, metrics: list[dict]) -> str:
    (step, loss), rates = points(metrics, "loss"), points(metrics, "lr")
    width = max(5, len(loss) // 40) if len(loss) >= 20 else 1  # values that are averaged
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    lines = axes.plot(step, loss, color=RIGHT, alpha=0.35 if width > 1 else 1, label="loss")
    if width > 1:
        label = f"mean of the last {width} values"
        lines += axes.plot(step[width - 1 :], smooth, color=RIGHT, linewidth=2, label=label)
    axes.set(xlabel="step", ylabel="training loss", title="Training")
    if rates[0].size:
        rate = axes.twinx()
        lines += rate.plot(*rates, color=TRUTH, linewidth=1, label="learning rate")
        rate.set(ylabel="learning rate", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.tick_params(length=0)
        rate.grid(False)
    axes.legend(handles=lines, loc="upper right")
    return f"Training loss by step; {smooth[-1]:.3f} at the end."


def validation_curve(axes, metrics: list[dict]) -> str:
    last = []
    for key, words, colour in (("val_loss", "validation loss", RIGHT), ("val_mAP", "validation mAP", WRONG)):
        step, value = points(metrics, key)
        if len(step):
            side = axes.twinx() if last else axes
            side.plot(step, value, "o-", color=colour, linewidth=2, markersize=4)
            side.set_ylabel(words, color=colour)
            side.tick_params(axis="y", length=0, colors=colour)
            side.spines["right" if last else "left"].set(visible=True, color=colour)
            side.spines["left"].set_visible(not last)
            side.grid(not last)
            side.margins(y=0.1)
            if key == "val_mAP":  # a share: from nothing, so that its height can be seen
                side.set_ylim(0, max(1.1 * value.max(), 0.01))
            last.append(f"{words} {value[-1]:.3f}")
    axes.set(xlabel="step", title="Validation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return f"Validation during training; at the end: {', '.join(last)}."


EVALUATION_PLOTS = precision_recall, score_distribution, boxes_per_image, box_sizes
EVALUATION_PLOTS += calibration, ap_per_class
RUN_PLOTS = {learning_curve: ("loss",), validation_curve: ("val_loss", "val_mAP")}  # one of these is needed

"""The plots of report.py. Each function draws on its axes and returns the caption."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from infer.report import Evaluated

TRUTH, RIGHT, WRONG, MIDDLE = "#4d4d4d", "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's: safe for all eyes


def precision_recall(axes, e: "Evaluated") -> str:
    curves = e.precision.mean(-1)
    names = {"0.50": ("AP50", curves[0]), "0.75": ("AP75", curves[5])}
    names["0.50 to 0.95, mean"] = ("AP", curves.mean(0))
    for (name, (key, curve)), colour in zip(names.items(), (RIGHT, MIDDLE, WRONG), strict=True):
        label = f"IoU {name}: AP {e.figures[key]:.3f}"
        axes.plot(e.evaluation.params.recThrs, curve, color=colour, linewidth=2, label=label)
    axes.set(xlabel="recall", ylabel="precision, mean of classes", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return (
        "Precision against recall: the share of right boxes when the score threshold is low enough to find "
        "that share of the objects. The area under a curve is its AP."
    )


def score_distribution(axes, e: "Evaluated") -> str:
    for name, scores, colour in (("right", e.scores[e.right], RIGHT), ("wrong", e.scores[~e.right], WRONG)):
        bars = dict(histtype="step", linewidth=2, color=colour, label=f"{name}: {len(scores)}")
        axes.hist(scores, np.linspace(0, 1, 26), **bars)
    axes.axvline(e.threshold, color=TRUTH, linestyle="--", label=f"threshold {e.threshold:.2f}")
    axes.set(xlabel="score", ylabel="boxes (logarithmic)", xlim=(0, 1))
    axes.set(ylim=(0.7, None), yscale="log")
    axes.legend(loc="upper center")
    return (
        'Scores of right and of wrong boxes. F1 is best at the threshold; "found" below means from there up.'
    )


def boxes_per_image(axes, e: "Evaluated") -> str:
    top = int(max(e.objects.max(), e.found.max())) + 1
    table = np.histogram2d(e.objects, e.found, bins=np.arange(-0.5, top + 0.5))[0].T
    cells = axes.imshow(np.where(table, table, np.nan), origin="lower", cmap="Blues", vmin=0)
    axes.plot([-0.5, top - 0.5], [-0.5, top - 0.5], color=TRUTH, linewidth=1)
    axes.locator_params(integer=True)
    axes.grid(False)
    axes.set(xlabel="objects in the image", ylabel="boxes found")
    axes.figure.colorbar(cells, label="images")
    return (
        "Boxes found against objects, image by image; on the line they are as many. "
        f"Mean: {e.found.mean():.2f} boxes, {e.objects.mean():.2f} objects."
    )


def box_sizes(axes, e: "Evaluated") -> str:
    truth, found = (np.array([b["bbox"][2:] for b in x]).reshape(-1, 2) for x in (e.truth, e.boxes))
    truth, found = truth.prod(1) ** 0.5, found.prod(1) ** 0.5
    edges = np.linspace(0, max(truth.max(), found.max(initial=0)), 31)
    axes.hist(truth, edges, color=TRUTH, alpha=0.35, label=f"objects: {len(truth)}")
    axes.hist(found, edges, color=RIGHT, histtype="step", linewidth=2, label=f"boxes found: {len(found)}")
    axes.set(xlabel="square root of the box's area (pixels)", ylabel="boxes", xlim=(0, edges[-1]))
    axes.legend()
    return "Sizes of the objects and of the boxes found."


def calibration(axes, e: "Evaluated") -> str:
    axes.plot([0, 1], [0, 1], color=TRUTH, linewidth=1, label="perfect")
    table = e.figures["calibration"]
    spots = [(row["mean_score"], row["right"]) for row in table] or [(np.nan, np.nan)]
    axes.plot(*zip(*spots), "o-", color=RIGHT, linewidth=2, label="measured (number of boxes)")
    for row, spot in zip(table, spots):
        place = dict(xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9, color=TRUTH)
        axes.annotate(row["boxes"], spot, **place)
    axes.set(xlabel="mean score", ylabel="share of right boxes", aspect="equal")
    axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.09))
    axes.legend(loc="upper left")
    error = e.figures["calibration error"]
    return f"Do scores tell the truth? In ten bins of scores; expected calibration error {error:.3f}."


def ap_per_class(axes, e: "Evaluated") -> str:
    ap, count = e.precision.mean((0, 1)), Counter(a["category_id"] for a in e.truth)
    order = np.argsort(ap, kind="stable")
    names = [f"{e.names[e.classes[k]]} ({count[e.classes[k]]})" for k in order]
    axes.figure.set_figheight(1.5 + 0.19 * len(names))
    axes.barh(range(len(names)), ap[order], tick_label=names, color=RIGHT)
    axes.set(xlabel="AP", xlim=(0, 1), ylim=(-0.7, len(names) - 0.3))
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.grid(False, axis="y")
    return "AP of each class that occurs, and the number of its objects: where they are few, AP is chance."


def points(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key; of a step that was done twice, the later."""
    of_step = {line["step"]: line[key] for line in metrics if line.get(key) is not None}
    return np.array(sorted(of_step)), np.array([of_step[step] for step in sorted(of_step)])


def learning_curve(axes, metrics: list[dict]) -> str:
    (step, loss), rates = points(metrics, "loss"), points(metrics, "lr")
    width = min(len(loss), max(5, len(loss) // 40))
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    lines = axes.plot(step, loss, color=RIGHT, alpha=0.35, label="loss")
    lines += axes.plot(step[width - 1 :], smooth, color=RIGHT, linewidth=2, label=f"mean of {width} lines")
    axes.set(xlabel="step", ylabel="training loss")
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
            side.tick_params(length=0)
            side.grid(not last)
            last.append(f"{words} {value[-1]:.3f}")
    axes.set_xlabel("step")
    return f"Validation during training; at the end: {', '.join(last)}."

"""Draw how boxes are read in parallel: what nano finds in media/example.png, and who reads whom.

python media/branches.py    # writes branches.png beside this file
"""

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from figures import GREY, HERE, IMAGE, NETWORK, PREFIX, STYLE
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from model import Detector
from model.attention import branch_mask
from model.decoding.batches import network_images
from model.decoding.boxes import locs_to_boxes, nms
from model.decoding.parallel import COORDINATES, peaks
from model.io.image import load_image
from model.io.tokenizer import LOCS

NAMES = "y0", "x0", "y1", "x1"
COLOURS = "#d55e00", "#009e73", "#cc79a7", "#56b4e9"  # of the branches that are shown
OTHER = "#e8e8e8"  # boxes that are kept, of other branches
FADED, BAR = 0.72, 16  # how much whiter the pictures are; bins of a bar of p(y0)
SCORE, NMS_IOU = 0.55, 0.5  # of the boxes in the last picture
SMALL, TEXT, TITLE = 10.5, 11.5, 13


@dataclass
class Branch:
    """A box, and how it came about."""

    locs: list[int]  # y0, x0, y1, x1
    mass: list[float]  # of each one's peak
    label: str
    score: float
    colour: str = GREY


class Found:
    """What nano finds in a picture in parallel, best box first."""

    def __init__(self, file):
        detector = Detector.from_pretrained("nano", device="cpu", decode="parallel")
        self.model, decoder = detector.model, detector.closed_set.decode
        self.language, self.reading = decoder.language, decoder.reading
        self.picture = load_image(file)
        images = network_images(self.model, [self.picture])
        answer = decoder(images)
        self.image_tokens = self.model.encode(images)
        self.locs, self.scores = answer.locs[0], answer.scores[0].numpy()  # [K, 4], [K]
        at, mass = peaks(self.after(), len(self.locs), self.reading.radius)
        self.y0, self.y0_mass = at[0].tolist(), mass[0].tolist()
        # Boxes as detect.py would keep them, in 1/1024 of the sides.
        self.boxes, labels = locs_to_boxes(self.locs.numpy(), LOCS, LOCS), answer.labels[0].numpy()
        self.labels = [self.language.classes[c] for c in labels]
        self.kept = [i for i in nms(self.boxes, self.scores, labels, NMS_IOU) if self.scores[i] >= SCORE]

    def after(self, *locs: int) -> Tensor:
        """Probabilities [1, 1024] of the coordinate that follows `locs`, decoded on their own."""
        cache = self.model.new_cache(1, len(self.language.prompt) + COORDINATES)
        hidden = self.model.prefill(self.image_tokens, torch.tensor([self.language.prompt]), cache)
        first = self.language.loc0
        for loc in locs:
            hidden = self.model.step(torch.tensor([first + loc]), cache)
        return self.model.decoder.logits(hidden, first, first + LOCS).softmax(-1)

    def branches(self) -> list[Branch]:
        """Four of the boxes that are kept: first those that share the commonest y0, then the best others."""
        y0_of = [self.locs[i, 0].item() for i in self.kept]
        shared = max(y0_of, key=y0_of.count)
        order = sorted(self.kept, key=lambda i: self.locs[i, 0].item() != shared)[: len(COLOURS)]
        return [self.branch(i, colour) for i, colour in zip(order, COLOURS)]

    def branch(self, i: int, colour: str) -> Branch:
        locs, mass = self.locs[i].tolist(), []
        for depth, loc in enumerate(locs):
            at, held = peaks(self.after(*locs[:depth]), len(self.y0), self.reading.radius)
            mass.append(held[0, (at[0] - loc).abs().argmin()].item())
        return Branch(locs, mass, self.labels[i], float(self.scores[i]), colour)


# ---- the tree and its mask ---------------------------------------------------------------------------------


def cell(axes, x, y, text, colour, w=1.0, h=0.56, strong=False):
    """A token; x and y are its middle."""
    fill = matplotlib.colors.to_rgba(colour, 0.9 if strong else 0.14)
    shape = dict(boxstyle="round,pad=0,rounding_size=0.1", facecolor=fill, edgecolor=colour, linewidth=1.4)
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, **shape))
    size = TEXT * min(1, 14.5 / len(str(text)))  # long names fit into their cell
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if strong else "#111")


def tree(axes, found: Found, branches: list[Branch]) -> None:
    """The tokens of the branches, from the prompt to the class, with the mass of each peak."""
    x_of, class_x, prompt_x = [2.2, 4.05, 5.9, 7.75], 9.95, 0.3
    rows = [len(branches) - i for i in range(len(branches))]
    axes.set(xlim=(-0.35, 11.1), ylim=(-0.15, len(branches) + 1.0))
    axes.axis("off")
    middle = (rows[0] + rows[-1]) / 2
    for k, (x, name) in enumerate(zip([*x_of, class_x], [*NAMES, "class"], strict=True), 1):
        axes.text(x, rows[0] + 0.8, f"{k}. {name}", ha="center", va="center", fontsize=TITLE, weight="bold")

    def line(start, end, colour, mass=None, stem=None):
        """From the right side of a token to the left side of the next one; stem: the colour of its part that
        several branches share."""
        (x0, y0), (x1, y1) = start, end
        bend = x0 + 0.18
        axes.plot([bend, bend, x1], [y0, y1, y1], color=colour, linewidth=1.6, zorder=0)
        axes.plot([x0, bend], [y0, y0], color=stem or colour, linewidth=1.6, zorder=1)
        if mass is not None:
            text = dict(ha="right", va="bottom", fontsize=SMALL, color="#444")
            axes.text(x1 - 0.05, y1 + 0.07, f"{mass:.2f}", **text)

    cell(axes, prompt_x, middle, "image,\nprompt", IMAGE, w=1.2, h=1.0)
    seen = {}
    for y, branch in zip(rows, branches, strict=True):
        y0, *others = branch.locs
        shared = shared_colour(branches, branch.locs[:1])
        if y0 not in seen:
            seen[y0] = y
            line((prompt_x + 0.6, middle), (x_of[0] - 0.48, y), NETWORK, branch.mass[0])
            cell(axes, x_of[0], y, y0, shared or branch.colour)
        at, stem = (x_of[0] + 0.48, seen[y0]), shared
        for x, loc, mass in zip(x_of[1:], others, branch.mass[1:], strict=True):
            line(at, (x - 0.48, y), branch.colour, mass, stem)
            cell(axes, x, y, loc, branch.colour)
            at, stem = (x + 0.48, y), None
        line(at, (class_x - 1.1, y), branch.colour)
        cell(axes, class_x, y, f"{branch.label} {branch.score:.2f}", branch.colour, w=2.2, strong=True)
    notes = f"{len(branches)} of {len(found.locs)} branches; coordinates in 1/{LOCS} of the sides.\n"
    notes += "Above a line: the probability that its peak holds. Beside a class: the score."
    axes.text(prompt_x - 0.6, 0.5, notes, fontsize=SMALL, color="#444", va="top", linespacing=1.4)


def shared_colour(branches: list[Branch], locs: list[int]) -> str | None:
    """The colour of a token that several branches share; None if it belongs to one alone."""
    return NETWORK if sum(branch.locs[: len(locs)] == locs for branch in branches) > 1 else None


def mask(axes, found: Found, branches: list[Branch]) -> None:
    """Who reads whom, by attention.branch_mask: each row is a token of the branches, and what it reads."""
    parents, names, colours, number_of = [], [], [], {}
    for branch in branches:
        for depth, loc in enumerate(branch.locs):
            key = tuple(branch.locs[: depth + 1])
            if key not in number_of:
                number_of[key] = len(parents)
                parents.append(number_of[key[:-1]] if depth else len(parents))
                names.append(f"{NAMES[depth]} {loc}")
                colours.append(shared_colour(branches, list(key)) or branch.colour)
    N, reads = len(parents), branch_mask(torch.tensor([parents]))[0].tolist()
    above, edge = dict(ha="center", va="bottom", fontsize=SMALL), dict(edgecolor="white", linewidth=0.8)
    start = 0
    for width, colour, name in (
        (4.5, IMAGE, f"image\n{found.model.config.vision.tokens}"),
        (3.5, PREFIX, f"prompt\n{len(found.language.prompt)}"),
    ):
        for t in range(N):
            axes.add_patch(Rectangle((start, t), width, 1, facecolor=colour, **edge))
        axes.text(start + width / 2, -0.3, name, color=darker(colour), **above)
        start += width
    for t in range(N):
        for s in range(N):
            colour = colours[s] if reads[t][s] else "#f0f0f0"
            axes.add_patch(Rectangle((start + s, t), 1, 1, facecolor=colour, **edge))
        text = dict(ha="right", va="center", fontsize=SMALL, color=darker(colours[t]))
        axes.text(-0.3, t + 0.5, names[t], **text)
    axes.text(start + N / 2, -0.3, "the branches' tokens", **above)
    axes.set(xlim=(-4.2, start + N), ylim=(N + 0.1, -3.6), aspect="equal")
    axes.text(-4.2, -2.9, "Who reads whom", ha="left", va="bottom", fontsize=TITLE, weight="bold")
    axes.axis("off")


def darker(colour: str) -> tuple:
    """For text."""
    return tuple(0.75 * part for part in matplotlib.colors.to_rgb(colour))


# ---- the pictures ------------------------------------------------------------------------------------------


def picture(axes, found: Found, title: str, faded: float) -> None:
    pixels = np.asarray(found.picture) / 255
    axes.imshow(1 - (1 - pixels) * (1 - faded), extent=(0, LOCS, LOCS, 0), interpolation="bilinear")
    axes.set(xlim=(0, LOCS), ylim=(LOCS, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=TITLE, weight="bold")


def pictures(panels, found: Found, branches: list[Branch]) -> None:
    """The same steps on the picture; the four branches in their colours."""
    y0s, x0s, boxes, kept = panels
    K = len(found.locs)

    def colour_of(locs: list[int]) -> str | None:
        own = [branch.colour for branch in branches if branch.locs[: len(locs)] == locs]
        return shared_colour(branches, locs) or next(iter(own), None)

    def outline(axes, i: int, **style) -> None:
        x0, y0, x1, y1 = found.boxes[i]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))

    picture(y0s, found, f"1. {K} peaks of y0", FADED)
    bars = found.after()[0].view(-1, BAR).sum(-1).numpy()
    middles, lengths = BAR * (np.arange(len(bars)) + 0.5), bars / bars.max() * 0.3 * LOCS
    y0s.barh(middles, lengths, BAR * 0.9, color=IMAGE, zorder=3)
    for y0, mass in zip(found.y0, found.y0_mass, strict=True):
        strength = (mass / max(found.y0_mass)) ** 0.5
        style = dict(color=colour_of([y0]) or "#333", alpha=0.3 + 0.7 * strength)
        y0s.axhline(y0, linewidth=0.5 + 2.5 * strength, clip_on=False, **style)

    picture(x0s, found, f"2. the {K} best pairs with x0", FADED)
    for i in reversed(range(K)):
        y0, x0, *_ = found.locs[i].tolist()
        own = colour_of([y0, x0])
        style = dict(color=own or "#333", alpha=1 if own else 0.55)
        x0s.plot([0, LOCS], [y0, y0], color="#333", linewidth=0.5, alpha=0.3)
        x0s.plot([x0, x0], [y0, LOCS], linewidth=2.4 if own else 0.9, **style)
        x0s.plot(x0, y0, "o", markersize=7 if own else 4, zorder=5, clip_on=False, **style)

    picture(boxes, found, "3, 4. with y1 and x1", FADED)
    for i in reversed(range(K)):
        own = colour_of(found.locs[i].tolist())
        style = dict(edgecolor=own or "#333", linewidth=2.4 if own else 0.9, alpha=1 if own else 0.7)
        outline(boxes, i, **style)

    picture(kept, found, "5. with a class, after NMS", 0)
    for i in found.kept:
        colour = colour_of(found.locs[i].tolist()) or OTHER
        outline(kept, i, edgecolor=colour, linewidth=2.4)
        text = dict(fontsize=9, color="black" if colour == OTHER else "white", va="top")
        text["bbox"] = dict(facecolor=colour, edgecolor="none", pad=1.5)
        x0, y0, *_ = found.boxes[i]
        kept.text(max(x0, 0) + 8, y0 + 10, f"{found.labels[i]} {found.scores[i]:.2f}", **text)


@torch.inference_mode()
def main() -> None:
    found = Found(HERE / "example.png")
    branches = found.branches()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.8), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[4.3, 3.5])
        left, right = top.subplots(1, 2, width_ratios=[4.7, 7.3])
        mask(left, found, branches)
        tree(right, found, branches)
        pictures(bottom.subplots(1, 4), found, branches)
        figure.savefig(HERE / "branches.png", dpi=130)


if __name__ == "__main__":
    main()

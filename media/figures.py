"""Draw the two figures of the README's "How it detects" from the real configurations and the real masks.

python media/figures.py    # writes architecture.png and mask.png beside this file
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from model.attention import prefix_lm_mask, window_mask
from model.config import VARIANTS
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.hub import NANO
from model.io.image import load_image
from model.io.tokenizer import LOCS, Tokenizer
from model.io.weights import load_config

HERE = Path(__file__).parent
IMAGE, PREFIX, ANSWER = "#0072b2", "#e69f00", "#009e73"  # colours that colour-blind people can tell apart
NETWORK, GREY = "#4d4d4d", "#8a8a8a"
STYLE = {"font.size": 10, "font.family": "DejaVu Sans"}


def box(axes, x, y, w, h, title, lines=(), colour=NETWORK):
    """A rounded box with a bold title and smaller lines below it."""
    shape = dict(boxstyle="round,pad=0.02,rounding_size=0.08", edgecolor=colour, linewidth=1.5)
    axes.add_patch(FancyBboxPatch((x, y), w, h, facecolor=matplotlib.colors.to_rgba(colour, 0.08), **shape))
    step = 0.23
    top = y + h / 2 + step * len(lines) / 2
    axes.text(x + w / 2, top, title, ha="center", va="center", weight="bold", color=colour)
    for i, line in enumerate(lines, 1):
        axes.text(x + w / 2, top - step * i, line, ha="center", va="center", fontsize=8, color="#222")


def arrow(axes, start, end, colour=NETWORK, **shape):
    shape = dict(arrowstyle="-|>", mutation_scale=12, linewidth=1.3) | shape
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **shape))


def below(axes, x, y, text, colour):
    """A caption below a row of tokens."""
    axes.text(x, y - 0.08, text, ha="center", va="top", fontsize=8, color=colour)


def tokens(axes, x, y, texts, colour):
    """A row of token cells; returns the x after the last one."""
    w, h = 0.62, 0.34
    for text in texts:
        if text == "...":
            axes.text(x + 0.17, y + h / 2, "...", ha="center", va="center", color=colour)
            x += 0.34
            continue
        fill = matplotlib.colors.to_rgba(colour, 0.15)
        axes.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=colour))
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=7.5, color="#222")
        x += w + 0.04
    return x


def architecture(axes, nano, big, picture: Image.Image) -> None:
    """The path of a picture to a box, with nano's sizes and those of the 3B at 224 px."""

    def sizes(text: str, read) -> str:
        return text.format(f"{read(nano):,}", f"{read(big):,}")

    axes.set(xlim=(0, 13.3), ylim=(0.2, 6.0), aspect="equal")
    axes.axis("off")
    axes.text(0.1, 5.95, "sizes: nano  |  PaliGemma 2 3B, 224 px", fontsize=8, color=GREY, va="top")

    # The picture, cut into patches.
    axes.imshow(picture, extent=(0.1, 2.1, 3.6, 5.6), zorder=0)
    side = nano.vision.image_size // nano.vision.patch_size
    for i in range(side + 1):
        at = 2 * i / side
        axes.plot([0.1 + at] * 2, [3.6, 5.6], color="white", linewidth=0.5)
        axes.plot([0.1, 2.1], [3.6 + at] * 2, color="white", linewidth=0.5)
    patches = sizes("{}  |  {} patches", lambda c: c.vision.tokens)
    axes.text(1.1, 3.42, patches, ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, 13.3), ylim=(0.2, 6.0))

    box(axes, 2.9, 3.75, 2.5, 1.7, "SigLIP", [
        sizes("{}  |  {} layers", lambda c: c.vision.layers),
        sizes("width {}  |  {}", lambda c: c.vision.width),
        sizes("{}  |  {} heads", lambda c: c.vision.heads),
        "every patch sees every patch",
    ], IMAGE)  # fmt: skip
    box(axes, 6.2, 4.05, 1.9, 1.1, "projector", [
        "one Linear, for each token",
        sizes("to width {}  |  {}", lambda c: c.text.width),
    ], IMAGE)  # fmt: skip
    arrow(axes, (2.15, 4.6), (2.85, 4.6))
    arrow(axes, (5.45, 4.6), (6.15, 4.6))

    # The sequence.
    y = 2.62
    end = tokens(axes, 0.1, y, ["image", "image", "...", "image"], IMAGE)
    below(axes, (0.1 + end) / 2, y, sizes("{}  |  {} image tokens", lambda c: c.vision.tokens), IMAGE)
    start = end + 0.12
    end = tokens(axes, start, y, ["<bos>", "detect", "all", "classes", r"\n"], PREFIX)
    below(axes, (start + end) / 2, y, "prompt (prefix)", PREFIX)
    start = end + 0.12
    end = tokens(axes, start, y, ["y0", "x0", "y1", "x1", "class", "y0", "x0", "...", "class"], ANSWER)
    groups = sizes("answer (suffix): {}  |  {} groups of five tokens", lambda c: c.groups)
    below(axes, start + 1.6, y, groups, ANSWER)
    arrow(axes, (7.15, 4.0), (1.5, 3.02), colour=IMAGE, connectionstyle="arc3,rad=-0.12")

    # The decoder and the head.
    box(axes, 0.1, 0.35, 8.0, 1.55, "Gemma 2", [
        sizes("{}  |  {} blocks, in turn local (sliding window) and global", lambda c: c.text.layers),
        sizes("width {}  |  {}", lambda c: c.text.width),
        sizes("{}  |  {} query heads", lambda c: c.text.heads)
        + sizes(" share {}  |  {} heads of keys and values", lambda c: c.text.kv_heads),
        "RoPE, soft caps, norms before and after; image and prompt read each other, the answer is causal",
    ])  # fmt: skip
    arrow(axes, (4.1, 2.35), (4.1, 1.97))
    box(axes, 9.0, 0.35, 4.2, 1.55, "restricted head", [
        f"hidden state  x  {LOCS:,} rows of the embedding",
        "(a coordinate), or",
        f"x  {len(nano.classes) + 1} rows (a class, or noise)",
        f"never all {nano.text.vocab_size:,}  |  {big.text.vocab_size:,}",
    ], ANSWER)  # fmt: skip
    arrow(axes, (8.15, 1.1), (8.95, 1.1))
    arrow(axes, (12.4, 1.95), (12.4, 2.58), colour=ANSWER)
    axes.text(12.3, 2.2, "the next token", ha="right", fontsize=8, color=ANSWER)
    box(axes, 9.0, 3.75, 4.2, 1.7, "a box", [
        "coordinates: y0/1024 of the height, x0/1024 of the width ...",
        "label: the likeliest class that is not noise",
        "score: its probability, noise counted",
    ], ANSWER)  # fmt: skip
    arrow(axes, (11.1, 3.05), (11.1, 3.68), colour=ANSWER)


def mask_figure(figure: Figure, config, language: ClosedSet) -> None:
    """Who reads whom in nano: the masks of model/attention.py, of the global and of the local layers."""
    image, prompt, answer = config.vision.tokens, len(language.prompt), GROUP * config.groups
    ends = np.cumsum([0, image, prompt, answer])
    S = int(ends[-1])
    positions = torch.arange(1, S + 1)[None]
    suffix = positions > image + prompt
    full = prefix_lm_mask(torch.ones_like(suffix), suffix)
    local = window_mask(full, positions, positions, suffix, config.text.sliding_window)
    titles = "global layers", f"local layers: a window of {config.text.sliding_window} positions"
    for axes, mask, title in zip(figure.subplots(1, 2), (full, local), titles, strict=True):
        shown = np.ones((S, S, 3))
        for first, last, colour in zip(ends, ends[1:], (IMAGE, PREFIX, ANSWER)):
            rows = mask[0].numpy() & (np.arange(S)[:, None] >= first) & (np.arange(S)[:, None] < last)
            shown[rows] = matplotlib.colors.to_rgb(colour)
        axes.imshow(shown, interpolation="nearest")
        for edge in ends[1:-1] - 0.5:
            axes.axvline(edge, color="white", linewidth=1)
            axes.axhline(edge, color="white", linewidth=1)
        names = f"image\n{image}", f"prompt\n{prompt}", f"answer\n{answer}"
        axes.set_xticks((ends[:-1] + ends[1:]) / 2 - 0.5, names)
        axes.set_yticks((ends[:-1] + ends[1:]) / 2 - 0.5, names)
        axes.tick_params(length=0)
        axes.set(title=title, xlabel="is read (key)", ylabel="reads (query)")


def main() -> None:
    nano, big = load_config(NANO), VARIANTS["paligemma2-3b-224"]
    language = ClosedSet.of(nano, Tokenizer(NANO))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.4), layout="constrained")
        architecture(figure.subplots(), nano, big, load_image(HERE / "example.png"))
        figure.savefig(HERE / "architecture.png", dpi=130)
        figure = Figure(figsize=(9.5, 4.8), layout="constrained")
        mask_figure(figure, nano, language)
        figure.savefig(HERE / "mask.png", dpi=110)


if __name__ == "__main__":
    main()

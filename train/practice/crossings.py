"""Two lines that cross 0, 1 or 2 times: small for a person, hard for models ("Vision language models are
blind", arXiv 2407.06581).

A blue and a red line have two straight parts each and bend at the same x, as in
github.com/ariG23498/fine-tune-paligemma. They cross between two neighbours of the three x if another line is
above at the second than at the first. Positions are fractions of the picture's side.
"""

import numpy as np
from PIL import Image, ImageDraw

from train.practice.sentences import answer_prompt

PROMPT = answer_prompt("how many times do the lines cross?")
MOST = 2
XS = (0.06, 0.5, 0.94)
YS = (0.06, 0.94)  # range
MIN_GAP = 0.12  # between the lines where they begin, bend and end: whether they cross is never in doubt
WIDTHS = (2.5, 4.0)  # range, in pixels of a picture of 128
FINER = 4  # the picture is drawn so many times larger, which makes its edges soft


def crossings(ys: np.ndarray) -> int:
    """How often two lines [2, 3], given by their y, cross."""
    above = ys[0] < ys[1]
    return int((above[1:] != above[:-1]).sum())


def draw_lines(rng: np.random.Generator, count: int) -> np.ndarray:
    """The y [2, 3] of two lines that cross `count` times."""
    while True:
        ys = rng.uniform(*YS, (2, len(XS)))
        if abs(ys[0] - ys[1]).min() >= MIN_GAP and crossings(ys) == count:
            return ys


def make_crossing(rng: np.random.Generator, size: int) -> tuple[Image.Image, dict]:
    """A picture of size x size pixels, and its line of JSONL without "image"; every count is as likely."""
    count, side = int(rng.integers(MOST + 1)), size * FINER
    image = Image.new("RGB", (side, side), "white")
    pen, width = ImageDraw.Draw(image), round(rng.uniform(*WIDTHS) * side / 128)
    lines = list(zip(("blue", "red"), draw_lines(rng, count), strict=True))
    for colour, ys in lines if rng.random() < 0.5 else lines[::-1]:
        pen.line([(x * side, y * side) for x, y in zip(XS, ys)], colour, width, joint="curve")
    return image.reduce(FINER), dict(kind=f"{count} crossings", prefix=PROMPT, suffix=str(count))

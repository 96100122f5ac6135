"""Made-up creatures: of one colour, with legs, eyes and perhaps horns, and a caption that says so.

    a blue creature with four legs, two eyes and horns

Positions are fractions of the creature's side until they are drawn.
"""

import numpy as np
from PIL import Image, ImageDraw

from train.practice.backgrounds import TEXTURES, draw_texture, pick
from train.practice.sentences import CAPTION, NUMBERS

LABEL = "creature"
COLOURS = dict(
    red="#d62828", orange="#f58a1f", yellow="#f2d21b", green="#2f9e44", blue="#2b6fd6", purple="#7b3fb5",
    pink="#f29ac0", brown="#7a4a24",
)  # fmt: skip
LEGS, EYES = (2, 5), (1, 3)  # fewest and most
SIDES = (0.55, 0.9)  # range of the creature's side, in sides of the picture
PALE = 0.4  # of a background's contrast is left
FINER = 4  # the picture is drawn so many times larger, which makes its edges soft


def caption_of(colour: str, legs: int, eyes: int, horns: bool) -> str:
    seen, article = f"{NUMBERS[eyes]} eye{'s' * (eyes > 1)}", "an" if colour == "orange" else "a"
    return f"{article} {colour} {LABEL} with {NUMBERS[legs]} legs, {seen} and {'' if horns else 'no '}horns"


def make_creature(rng: np.random.Generator, size: int) -> tuple[Image.Image, dict]:
    """A picture of size x size pixels, and its line of JSONL without "image", with the creature's "mask", an
    image that is 0 or 255."""
    colour, horns = pick(rng, list(COLOURS)), bool(rng.random() < 0.5)
    legs, eyes = (int(rng.integers(low, high + 1)) for low, high in (LEGS, EYES))
    fine = size * FINER
    ground = 255 - PALE * (255 - draw_texture(rng, size, TEXTURES))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((fine, fine))
    mask = Image.new("L", image.size)
    side = rng.uniform(*SIDES) * fine
    left, top = rng.uniform(0, fine - side, 2)
    pens = ImageDraw.Draw(image), ImageDraw.Draw(mask)

    def draw(shape: str, fill: str, *points: float, outline: str | None = "black") -> None:
        """On the picture, and all of it on the mask."""
        xy = [value * side + (left, top)[i % 2] for i, value in enumerate(points)]
        getattr(pens[0], shape)(xy, fill, outline, width=max(1, round(side / 60)))
        getattr(pens[1], shape)(xy, 255)

    for x in np.linspace(0.22, 0.78, legs):
        draw("rectangle", COLOURS[colour], x - 0.045, 0.7, x + 0.045, 1)
    for x in (0.3, 0.7) if horns else ():
        draw("polygon", "white", x - 0.09, 0.27, x + 0.09, 0.27, x + (x - 0.5) / 2, 0)
    draw("ellipse", COLOURS[colour], 0.08, 0.16, 0.92, 0.84)
    for x in 0.5 + 0.22 * (np.arange(eyes) - (eyes - 1) / 2):
        draw("ellipse", "white", x - 0.09, 0.34, x + 0.09, 0.52)
        draw("ellipse", "black", x - 0.04, 0.39, x + 0.04, 0.47, outline=None)
    mask = mask.reduce(FINER).point(lambda value: 255 * (value > 127))
    return image.reduce(FINER), dict(prefix=CAPTION, suffix=caption_of(colour, legs, eyes, horns), mask=mask)

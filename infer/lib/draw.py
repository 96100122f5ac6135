"""Boxes and masks on pictures."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.decoding.boxes import areas

MASK_OPACITY = 0.5
FRAME = "#9a9a9a"
MIN_SIDE = 640  # pixels: a picture whose longest side is shorter is enlarged, as captions need room


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour of its own for every class."""
    # Hues a golden angle apart never meet again; three brightnesses separate those that come close.
    hue, value = index * 0.618034 % 1, (0.95, 0.75, 0.85)[index % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.85, value))


def draw_boxes(image: Image.Image, boxes, captions: list[str], labels, masks=None) -> Image.Image:
    """A copy with boxes [n, 4] in pixels, each with a caption, coloured by label; small images are enlarged.

    masks: bool [H, W], one for each box, laid over the image in its colour.
    """
    scale = max(1.0, MIN_SIDE / max(image.size))
    width, height = (round(side * scale) for side in image.size)
    canvas = image.resize((width, height), Image.Resampling.LANCZOS) if scale > 1 else image.copy()
    for mask, label in zip(masks or (), labels):
        inside = Image.fromarray(mask.astype(np.uint8) * round(255 * MASK_OPACITY)).resize(canvas.size)
        canvas.paste(class_colour(int(label)), mask=inside)
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(width, height) / 320))
    font = ImageFont.load_default(max(12, round(max(width, height) / 45)))
    # Large boxes first, so that their lines do not cover smaller ones.
    for i in np.argsort(-areas(np.reshape(boxes, (-1, 4))), kind="stable"):
        corners = [round(side * scale) for side in boxes[i]]
        draw.rectangle(corners, outline=class_colour(int(labels[i])), width=line)
    taken = []  # where captions are
    for box, caption, label in zip(boxes, captions, labels, strict=True):  # last: no line crosses a caption
        if not caption:
            continue
        colour = class_colour(int(label))
        left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
        w, h = right - left + 2 * line, bottom - top + 2 * line
        x, y = place(np.multiply(box, scale).round().astype(int).tolist(), (w, h), (width, height), taken)
        taken.append((x, y, x + w, y + h))
        draw.rectangle([x, y, x + w, y + h], fill=colour)
        # The luma of ITU-R BT.601.
        dark = sum(c * weight for c, weight in zip(colour, (0.3, 0.59, 0.11), strict=True)) < 140
        draw.text((x + line - left, y + line - top), caption, font=font, fill="white" if dark else "black")
    return canvas


def place(
    box: list[int], size: tuple[int, int], canvas: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int]:
    """The upper left corner of a caption, where it covers least of those in `taken`: above its box, inside
    its top, below it or inside its bottom, at its left or right end."""
    (x0, y0, x1, y1), (w, h) = box, size

    def hidden(at: tuple[int, int]) -> int:
        return sum(
            max(0, min(at[0] + w, right) - max(at[0], left)) * max(0, min(at[1] + h, low) - max(at[1], top))
            for left, top, right, low in taken
        )

    inside = [y for y in (y0 - h, y0, y1, y1 - h) if 0 <= y <= canvas[1] - h]
    ys = inside or [min(max(0, y0), max(0, canvas[1] - h))]
    xs = [min(max(0, x), max(0, canvas[0] - w)) for x in (x0, x1 - w)]
    return min(((x, y) for x in xs for y in ys), key=hidden)  # of equal ones, the first


def framed(image: Image.Image) -> Image.Image:
    """A copy with a thin grey line along its edge, so that a white picture can be told from the page."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle([0, 0, image.width - 1, image.height - 1], outline=FRAME)
    return image

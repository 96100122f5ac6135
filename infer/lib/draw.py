"""Boxes and masks on pictures."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.decoding.boxes import areas

MASK_OPACITY = 0.5
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
    for box, caption, label in zip(boxes, captions, labels, strict=True):  # last: no line crosses a caption
        colour = class_colour(int(label))
        left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
        w, h = right - left + 2 * line, bottom - top + 2 * line
        x = min(max(0, round(box[0] * scale)), max(0, width - w))
        y = round(box[1] * scale) - h  # above the box, or inside it at the picture's top edge
        y = y if y >= 0 else min(round(max(box[1], 0) * scale), max(0, height - h))
        draw.rectangle([x, y, x + w, y + h], fill=colour)
        # The luma of ITU-R BT.601.
        dark = sum(c * weight for c, weight in zip(colour, (0.3, 0.59, 0.11), strict=True)) < 140
        draw.text((x + line - left, y + line - top), caption, font=font, fill="white" if dark else "black")
    return canvas

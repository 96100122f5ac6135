"""A contact sheet of answers: pictures with what is right and what a model said."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infer.lib.draw import framed
from model.decoding.masks import MaskCodec, from_rle, mask_iou
from model.io.image import load_image
from model.io.names import shown
from train.data.jsonl import right_answers
from train.measures import first_mask, is_right

SIDE, GAP, PER_ROW = 240, 10, 4  # pixels of a picture and around it; pictures in a row
FONT, LINE, LETTERS, MOST = 13, 17, 36, 4  # of the text: pixels, pixels a line, letters a line, lines a text


def answer_sheet(lines: list[dict], images: Path, codec: MaskCodec | None, bins: int) -> Image.Image:
    """A sheet of lines of JSONL that have the model's "answer". Where that is a mask, the picture outside of
    it is darkened. bins: see locs_to_boxes."""
    tiles = [answer_tile(line, load_image(images / line["image"]), codec, bins) for line in lines]
    texts = [
        [row for part in text for row in textwrap.wrap(part, LETTERS, max_lines=MOST, placeholder=" ...")]
        for _, text in tiles
    ]
    width, height = SIDE + GAP, SIDE + GAP + LINE * max(map(len, texts))
    rows, font = -(-len(tiles) // PER_ROW), ImageFont.load_default(FONT)
    sheet = Image.new("RGB", (width * min(PER_ROW, len(tiles)) + GAP, height * rows + GAP), "white")
    for k, ((picture, _), text) in enumerate(zip(tiles, texts, strict=True)):
        tile = Image.new("RGB", (SIDE, height), "white")  # its text stays on it
        tile.paste(picture)
        style = dict(fill="black", font=font, spacing=LINE - FONT)
        ImageDraw.Draw(tile).text((0, SIDE + 2), "\n".join(text), **style)
        sheet.paste(tile, (k % PER_ROW * width + GAP, k // PER_ROW * height + GAP))
    return sheet


def answer_tile(
    line: dict, image: Image.Image, codec: MaskCodec | None, bins: int
) -> tuple[Image.Image, list[str]]:
    """The picture, SIDE pixels a side, and the texts below it."""
    if "mask" in line:
        right = from_rle(line["mask"])
        found = first_mask(line["answer"], right.shape, codec, bins)
        text = ["no mask found"] if found is None else [f"IoU {mask_iou(found, right):.2f}"]
        if found is not None:
            image = Image.composite(image, image.point(lambda value: value // 4), Image.fromarray(found))
    else:
        verdict = "right" if is_right(line["answer"], line) else "wrong"
        text = [f"{verdict}: {shown(line['answer'])}"]
        text += [f"should be: {shown(right_answers(line)[0])}"] * (verdict == "wrong")
    return framed(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)), text

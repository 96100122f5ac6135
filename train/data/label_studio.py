"""Boxes -> what Label Studio imports, in percent of the picture: annotations of a set, or predictions."""

import json
from collections.abc import Iterator
from pathlib import Path

from model.io.writing import explain
from train.data.coco import CocoIndex


def annotated_objects(index: CocoIndex) -> Iterator[tuple[str, tuple, list[tuple]]]:
    """Name and size of each image of a set, and its objects: box, label and score (None)."""
    for item in range(len(index)):
        boxes, labels = index.objects(item)
        names = [index.classes[label] for label in labels]
        rows = [(box, name, None) for box, name in zip(boxes.tolist(), names)]
        yield index.name(item), tuple(index.sizes[item].tolist()), rows


def predicted_objects(file: Path) -> Iterator[tuple[str, tuple, list[tuple]]]:
    """The same of the boxes in a file of detect.py --json, with their scores."""
    with explain(f"{file} is not what detect.py writes with --json", ValueError, RecursionError, *WRONG_FORM):
        for image in json.loads(file.read_bytes()):
            width, height = (int(image[side]) for side in ("width", "height"))
            if min(width, height) < 1:
                raise ValueError(f"a picture of {width} x {height} pixels")
            found = image["detections"]
            rows = [([float(x) for x in d["box"]], str(d["label"]), float(d["score"])) for d in found]
            yield str(image["image"]), (width, height), rows


WRONG_FORM = KeyError, TypeError, AttributeError  # raised by JSON of another form


def studio_box(number: int, size: tuple[int, int], box: list[float], label: str, score: float | None) -> dict:
    """A box in pixels of a picture of that width and height -> a region of Label Studio, in percent."""
    (width, height), (x0, y0, x1, y1) = size, box
    sides = dict(x=x0 / width, y=y0 / height, width=(x1 - x0) / width, height=(y1 - y0) / height)
    value = {side: 100 * share for side, share in sides.items()} | dict(rotation=0, rectanglelabels=[label])
    region = dict(id=str(number), type="rectanglelabels", from_name="label", to_name="image", value=value)
    region |= dict(original_width=width, original_height=height, image_rotation=0)
    return region if score is None else region | dict(score=score)

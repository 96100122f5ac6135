"""What is found in an image, as JSON; and in several, as a data set."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from model.decoding.detections import Detections
from model.decoding.masks import to_rle
from model.io.names import as_text


def make_record(file: Path, image: Image.Image, found: Detections, tokens: bool) -> dict:
    """One image's entry in the JSON file."""
    detections = [
        dict(label=label, class_id=c, score=round(score, 4), box=[round(x, 2) for x in box])
        for (label, score, box), c in zip(found, found.class_ids.tolist(), strict=True)
    ]
    for d, mask in zip(detections, found.masks or ()):
        d["segmentation"] = to_rle(mask)
    record = dict(image=as_text(file), width=image.width, height=image.height, detections=detections)
    return record | (dict(tokens=found.tokens.flatten().tolist()) if tokens else {})


def as_lists(records: list[dict], names: list[str], classes: Sequence[str]) -> dict:
    """Such entries as COCO's images, annotations and categories, for train/data/save.py. names: file names of
    the pictures. Each box keeps its score, and its mask if it has one; classes are numbered from 1."""
    images, annotations = [], []
    for i, (record, name) in enumerate(zip(records, names, strict=True), 1):
        images.append(dict(id=i, file_name=name, width=record["width"], height=record["height"]))
        for d in record["detections"]:
            x0, y0, x1, y1 = d["box"]
            box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            ids = dict(id=len(annotations) + 1, image_id=i, category_id=d["class_id"] + 1)
            mask = {"segmentation": d["segmentation"]} if "segmentation" in d else {}
            annotations.append(ids | dict(bbox=box, area=box[2] * box[3], iscrowd=0, score=d["score"]) | mask)
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    return dict(images=images, annotations=annotations, categories=categories)

"""What is found in an image, as JSON."""

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

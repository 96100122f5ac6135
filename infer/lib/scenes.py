"""Practice scenes that a program draws for itself, and the figures of a closed-set decoder on them."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infer.lib.predictions import evaluate
from model.decoding.closed_set import GroupDecoder
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector
from model.decoding.parallel import ParallelDecoder
from train.practice.write import write_coco

BATCH = 16  # images decoded together


@contextlib.contextmanager
def drawn_scenes(count: int, split: str, size: int) -> Iterator[Path]:
    """The COCO file of practice scenes in a temporary folder, with their pictures in images/ beside it. size:
    pixels a side."""
    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder), count, split, size)
        yield Path(folder, "instances.json")


def evaluate_scenes(decoder: GroupDecoder | ParallelDecoder, data: Path, title: str) -> dict:
    """All figures on the file of drawn_scenes, with NMS at an IoU of 0.5. title: of the progress bar."""
    detector = ClosedSetDetector(decoder, Selection(nms_iou=0.5))
    return evaluate(detector, data, data.parent / "images", BATCH, title)

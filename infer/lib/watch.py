"""Whether the answers to many pictures look like those of a collapsed model, where nobody knows the truth."""

import numpy as np
from PIL import Image

from model.decoding.detections import Detections
from train.collapse import FEW, REMEDY, SAMPLE, collapse

SIDE = 16  # pixels of the small grey copies by which pictures are compared
DIFFERENT = 4  # grey levels of 255, mean: pictures less apart are copies; one that varies less is blank
MOSTLY = 0.8  # of the pictures


class Watch:
    """What was found in up to SAMPLE pictures that differ and are not blank."""

    def __init__(self, closed_set: bool):
        """closed_set: all classes were asked for, so that most pictures should have something."""
        self.closed_set = closed_set
        self.copies: list[np.ndarray] = []
        self.answers: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, image: Image.Image, found: Detections) -> None:
        if len(self.answers) == SAMPLE:
            return
        copy = np.asarray(image.convert("L").resize((SIDE, SIDE)), float)
        others = (copy.mean(), *self.copies)
        if all(abs(copy - other).mean() >= DIFFERENT for other in others):
            self.copies.append(copy)
            self.answers.append((found.boxes / np.array([*image.size] * 2), found.class_ids))

    def warning(self) -> str:
        """One line, or ""."""
        if words := collapse(self.answers):
            return words
        count, empty = len(self.answers), sum(not len(boxes) for boxes, _ in self.answers)
        if not self.closed_set or count < FEW or empty < MOSTLY * count:
            return ""
        return (
            f"nothing found in {empty} of {count} pictures; if there is something in them: a lower "
            f"--score-threshold shows what is less certain; of a model that was fine-tuned, {REMEDY}"
        )

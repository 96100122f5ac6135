"""What a detector finds in an image, and which objects are kept."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.decoding.boxes import areas, locs_to_boxes, nms, vote
from model.decoding.generate import check_finite
from model.decoding.masks import paste_mask
from model.io.names import shown


class Detection(NamedTuple):
    label: str
    score: float
    box: list[float]


@dataclass(eq=False, repr=False)
class Detections:
    """The objects of an image, best first: print them, take a column, or loop over (label, score, box).

    boxes       float64 [n, 4]       x0, y0, x1, y1 in pixels of the upright image
    scores      float [n]            probabilities, 0 to 1
    class_ids   int64 [n]            which of the detector's classes
    labels      n names              of these classes
    tokens      int64                all ids of the answer, as generated
    masks       n of bool [H, W]     of detectors that segment, else None
    photograph  bool                 whether the image looks like one, to a model that knows drawings only
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    labels: list[str]
    tokens: np.ndarray
    masks: list[np.ndarray] | None = None
    photograph: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Detection]:
        return map(Detection, self.labels, self.scores.tolist(), self.boxes.tolist())

    def __str__(self) -> str:
        """A line for each object."""
        rows = [
            f"{shown(label):<16}{score:6.2f}   " + " ".join(f"{side:7.1f}" for side in box)
            for label, score, box in self
        ]
        return "\n".join(rows) or "nothing found"

    def __repr__(self) -> str:
        found = ", ".join(f"{shown(label)} {score:.2f}" for label, score, _ in self)
        return f"<Detections: {found or 'none'}>"

    def to_supervision(self):
        """The same as supervision.Detections, for its annotators, trackers and metrics; the names of the
        classes are data["class_name"]. ImportError if that package is not installed."""
        try:
            import supervision
        except ImportError:
            message = "to_supervision needs a package that is not installed: pip install supervision"
            raise ImportError(message) from None
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            mask=np.stack(self.masks) if self.masks else None,  # bool [n, H, W]
            confidence=np.asarray(self.scores, np.float32),
            class_id=np.asarray(self.class_ids, np.int64),
            data={"class_name": np.array(self.labels, str)},
        )


@dataclass(frozen=True)
class Selection:
    """Which objects of an image are kept.

    score_threshold: lowest score; nms_iou: of two boxes of a class that overlap more, the better one is kept
    (1: both) and averaged with the boxes that nearly coincide with it (boxes.vote; without masks only, as a
    mask lies in its box); min_size: shortest side in pixels.
    """

    score_threshold: float = 0.0
    nms_iou: float = 1.0
    min_size: float = 0.0

    def __post_init__(self):
        for name in ("score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be from 0 to 1")
        if not 0 <= self.min_size < math.inf:
            raise ValueError(f"min_size = {self.min_size}: must be a number of pixels, at least 0")

    def __call__(
        self,
        size: tuple[int, int],
        classes: Sequence[str],
        *,
        locs: np.ndarray,
        scores: np.ndarray,
        class_ids: np.ndarray,
        tokens: np.ndarray,
        masks: Sequence[np.ndarray] | None = None,
        photograph: bool = False,
    ) -> Detections:
        """size: width and height of the image; classes: the names that class_ids index. locs [n, 4],
        scores [n], class_ids int64 [n]; tokens: all ids of the answer; masks: n of MaskCodec.decode."""
        check_finite(np.isfinite(scores).all())
        boxes = locs_to_boxes(locs, *size)
        shortest = (boxes[:, 2:] - boxes[:, :2]).min(-1)
        good = (scores >= self.score_threshold) & (areas(boxes) > 0) & (shortest >= self.min_size)
        kept = np.flatnonzero(good)
        kept = kept[nms(boxes[kept], scores[kept], class_ids[kept], self.nms_iou)]
        voted = masks is None and self.nms_iou < 1
        return Detections(
            boxes=vote(boxes, scores, class_ids, kept) if voted else boxes[kept],
            scores=scores[kept],
            class_ids=class_ids[kept],
            labels=[classes[c] for c in class_ids[kept]],
            tokens=tokens,
            masks=None if masks is None else [paste_mask(masks[i], boxes[i], *size) for i in kept],
            photograph=photograph,
        )


KEEP_ALL = Selection()

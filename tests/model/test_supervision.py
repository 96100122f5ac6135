"""Detections.to_supervision, with a stand-in for the package, whose arguments are those of the real one."""

import sys
from types import ModuleType

import numpy as np
import pytest

from model.decoding.detections import Detections


class Stand(ModuleType):
    """supervision.Detections keeps its arguments; its own checks are those of shapes."""

    class Detections:
        def __init__(self, xyxy, mask=None, confidence=None, class_id=None, tracker_id=None, data=None):
            n = len(xyxy)
            assert xyxy.shape == (n, 4) and confidence.shape == class_id.shape == (n,)
            assert mask is None or (mask.ndim == 3 and len(mask) == n and mask.dtype == bool)
            assert all(len(column) == n for column in data.values())
            self.xyxy, self.mask, self.confidence, self.class_id, self.data = (
                xyxy,
                mask,
                confidence,
                class_id,
                data,
            )


def found(n, masks=False):
    boxes = np.arange(4 * n, dtype=float).reshape(n, 4)
    shapes = [np.full((6, 8), i % 2 == 0) for i in range(n)] if masks else None
    labels = ["cat", "traffic light", "dog"][:n]
    return Detections(boxes, np.linspace(0.9, 0.5, n), np.arange(n) + 3, labels, np.arange(5), shapes)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("masks", [False, True])
def test_all_columns_come_along(n, masks, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", Stand("supervision"))
    ours = found(n, masks)
    theirs = ours.to_supervision()
    assert theirs.xyxy.dtype == theirs.confidence.dtype == np.float32
    assert (theirs.xyxy == ours.boxes).all() and np.allclose(theirs.confidence, ours.scores)
    assert theirs.class_id.tolist() == ours.class_ids.tolist()
    assert theirs.data["class_name"].tolist() == ours.labels
    assert theirs.mask is None if not masks or n == 0 else (theirs.mask == np.stack(ours.masks)).all()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="^to_supervision needs .* pip install supervision$"):
        found(1).to_supervision()

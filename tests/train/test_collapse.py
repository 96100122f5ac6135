"""A detector that answers most pictures alike or with nothing, and what only looks like one."""

import numpy as np
import pytest

from train.collapse import collapse, collapse_of_set
from train.measures import make_coco

NOTHING = np.zeros((0, 4)), np.zeros(0, int)


def varied(rng, count: int) -> list:
    """Answers of one to four boxes anywhere."""
    answers = []
    for _ in range(count):
        corner = rng.uniform(0, 0.7, (rng.integers(1, 5), 2))
        boxes = np.concatenate((corner, corner + rng.uniform(0.05, 0.3, corner.shape)), axis=1)
        answers.append((boxes, rng.integers(0, 3, len(boxes))))
    return answers


def alike(rng, count: int, size: float = 0.3) -> list:
    """Answers with the same two boxes, but for a hundredth of their sides."""
    one = np.array([[0.1, 0.2, 0.1 + size, 0.2 + size], [0.5, 0.1, 0.6, 0.4]])
    return [(one + rng.uniform(-0.001, 0.001, one.shape), np.array([0, 2])) for _ in range(count)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_same_boxes(rng):
    answers, objects = alike(rng, 6) + varied(rng, 4), varied(rng, 10)
    assert "the same boxes in 6 of 10 pictures" in collapse(answers) == collapse(answers, objects)
    assert collapse(alike(rng, 5) + varied(rng, 5)) == "", "half of them are not most of them"
    assert collapse(varied(rng, 300)) == collapse(varied(rng, 300), varied(rng, 300)) == ""
    assert "the same boxes in 50 of 50" in collapse(alike(rng, 300)), "of many, some are looked at"


def test_other_classes_are_other_answers(rng):
    assert collapse([(boxes, classes + i) for i, (boxes, classes) in enumerate(alike(rng, 10))]) == ""


def test_no_boxes(rng):
    """Where something is to be found; without the truth nothing says that there is."""
    answers, objects = [NOTHING] * 6 + varied(rng, 4), varied(rng, 10)
    assert "no boxes in 6 of 10 pictures with objects" in collapse(answers, objects)
    assert collapse(answers) == "" == collapse(answers, [NOTHING] * 6 + varied(rng, 4))
    assert collapse([NOTHING] * 5 + varied(rng, 5), objects) == ""


def test_what_is_no_collapse(rng):
    assert collapse(alike(rng, 3)) == collapse([NOTHING] * 3, varied(rng, 3)) == "", "too few pictures"
    assert collapse(alike(rng, 10), alike(rng, 10)) == "", "the objects are in the same place"
    whole = [(np.array([[0, 0, 1, 1.0]]), np.array([0]))] * 10
    assert collapse(whole) == "", "pictures of one object each"
    assert collapse([]) == ""


def test_of_a_set(rng):
    """In pixels of pictures of different sizes; the best boxes are compared, whatever their order."""
    images = [dict(id=i, width=100 + 50 * i, height=100) for i in range(8)]
    truth, results = [], []
    for record, (boxes, _) in zip(images, varied(rng, 8)):
        scale = np.array([record["width"], 100, record["width"], 100])
        for x0, y0, x1, y1 in boxes * scale:
            box = dict(image_id=record["id"], category_id=1, bbox=[x0, y0, x1 - x0, y1 - y0], iscrowd=0)
            truth.append(dict(id=len(truth) + 1, area=1, **box))
        for score, box in rng.permutation([(0.9, 0.1), (0.8, 0.4), (0.7, 0.6), (0.01, rng.uniform(0, 0.8))]):
            box = [box * record["width"], 30, 0.15 * record["width"], 30]
            results.append(dict(image_id=record["id"], category_id=1, bbox=box, score=score))
    coco = make_coco(images, truth, [dict(id=1, name="cat")])
    assert "the same boxes in 8 of 8" in collapse_of_set(coco, results)
    right = [record | dict(score=0.5) for record in truth]
    assert collapse_of_set(coco, right) == "" and "no boxes in 8 of 8" in collapse_of_set(coco, [])

"""detect.py and evaluate.py say when a detector answers most pictures alike or with nothing."""

import numpy as np
import pytest
from helpers import call, picture
from PIL import Image

from infer import detect
from infer.lib.watch import Watch
from model.decoding.detections import Detections

BOX = np.array([[0.1, 0.2, 0.4, 0.7]])


def found(image: Image.Image, boxes: np.ndarray = BOX) -> Detections:
    """These boxes, in shares of the picture's sides."""
    n = len(boxes)
    return Detections(
        boxes * [*image.size, *image.size], np.full(n, 0.9), np.zeros(n, int), ["mouse"] * n, np.zeros(0)
    )


class Collapsed:
    """Finds the same in every picture."""

    def __init__(self, boxes=BOX):
        self.boxes, self.model, self.classes = boxes, None, ("mouse", "cat", "dog", "bird")

    def fitting_batch(self):
        return 4

    def __call__(self, images):
        return [found(image, self.boxes) for image in images]


def noise(seed: int, width=64, height=64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def watch(images, boxes=BOX, closed_set=True) -> str:
    watch = Watch(closed_set)
    for image in images:
        watch.add(image, found(image, boxes))
    return watch.warning()


def test_different_pictures_answered_alike():
    images = [noise(seed, 64 + 8 * seed) for seed in range(6)]
    assert "the same boxes in 6 of 6" in watch(images) and "the same boxes" in watch(images, closed_set=False)


@pytest.mark.parametrize(
    "images",
    [
        [noise(1)],
        [noise(1, 64 + i) for i in range(9)],
        [Image.new("RGB", (64, 64), (20 * i, 9, 9)) for i in range(9)],
    ],
    ids=["one picture", "copies of it", "blank ones"],
)
@pytest.mark.parametrize("boxes", [BOX, BOX[:0]], ids=["a box", "nothing"])
def test_pictures_that_tell_nothing(images, boxes):
    assert watch(images, boxes) == ""


def test_nothing_found():
    """Closed-set only: what is asked for by name may well be missing from all pictures."""
    images = [noise(seed) for seed in range(5)]
    words = watch(images, BOX[:0])
    assert (
        "nothing found in 5 of 5 pictures; if there is something in them" in words
        and "--score-threshold" in words
    )
    assert watch(images, BOX[:0], closed_set=False) == ""


def test_detect(monkeypatch, capsys, here):
    for seed in range(5):
        picture(here / "photos" / f"{seed}.png", 12, 10, seed)
    monkeypatch.setattr(detect, "load_detector", lambda *_: Collapsed())
    code, _, err = call(monkeypatch, capsys, detect, "--image", "photos")
    assert code == 0 and err.splitlines()[-1].startswith("detect.py: the same boxes in 5 of 5 pictures")
    code, _, err = call(monkeypatch, capsys, detect, "--image", "photos/1.png")
    assert code == 0 and "the same boxes" not in err


def test_evaluate(evaluate_data):
    """Figures all the same; nothing is said of a detector that looks."""
    code, out, err = evaluate_data(detector=Collapsed())
    assert code == 0 and "mAP" in out and "evaluate.py: the same boxes in 6 of 6 pictures" in err
    assert "evaluate.py: no boxes in 6 of 6" in evaluate_data(detector=Collapsed(BOX[:0]))[2]
    assert "evaluate.py:" not in evaluate_data()[2]

"""Pictures of all kinds, each between two good ones in a call of detect.py."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from infer import detect
from model.decoding.detections import Detections
from model.io.image import pixels_of
from model.io.names import shown
from trial import pictures
from trial.frame import Child, Ended, Kind, calling, fault_of

LARGE = (4000, 3000)  # of the picture from which is measured how much memory pixels take


class InTheMiddle:
    """Stands in for a detector, as pictures are what is tried: finds a cat, wherever it looks."""

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        boxes = [np.array([[x / 4, y / 4, x / 2, y / 2]]) for x, y in (image.size for image in images)]
        return [Detections(box, np.array([0.9]), np.array([0]), ["cat"], tokens=None) for box in boxes]


class Images(Kind):
    name, short, long = "images", 30, 2000

    def __init__(self, place: Path):
        super().__init__(place)
        for name in ("first.png", "last.png"):
            pictures.smooth(np.random.default_rng(0)).save(place / name)
        Image.new("RGB", LARGE).save(place / "large.png")
        self.detect("first.png", place)
        small = self.detect("first.png", place).memory
        large = self.detect("large.png", place).memory
        self.memory, self.of_pixel = small, max(0, large - small) / (LARGE[0] * LARGE[1])

    def detect(self, file: str, folder: Path) -> Ended:
        argv = ("--image", self.place / "first.png", file, self.place / "last.png")
        program = calling(detect, *argv, "--json", "out.json", "--out", "drawn", "--batch-size", 1)

        def action():
            detect.load_detector = lambda *_: InTheMiddle()
            detect.draw_boxes = lambda image, *_: image  # it enlarges them, which takes most of the time
            program()

        return Child(action, folder).wait()

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        maker = pictures.MAKERS[number % len(pictures.MAKERS)]
        file, what, must = maker(rng, folder)
        ended = self.detect(file, folder)
        # A good picture of as many pixels as this one says it has.
        memory = self.memory + self.of_pixel * pixels_of(file)
        names = (shown(file)[:200] or "''", shown(Path(file)))
        return what, fault_of(ended, folder, names, memory, must) or self.fault_in_results(ended, folder)

    def fault_in_results(self, ended: Ended, folder: Path) -> str:
        """The good pictures are done, whatever the third one is."""
        found = [Path(record["image"]).name for record in json.loads((folder / "out.json").read_text())]
        if found[0] != "first.png" or found[-1] != "last.png" or len(found) != 3 - (ended.code != 0):
            return f"exit code {ended.code}, and in the JSON file {found}"
        drawn = list((folder / "drawn").iterdir())
        for file in drawn:
            with Image.open(file) as image:
                image.load()
        return "" if len(drawn) == len(found) else f"{len(drawn)} pictures drawn of {len(found)}"

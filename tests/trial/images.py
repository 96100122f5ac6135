"""Pictures of all kinds, each between two good ones in a call of detect.py."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from infer import detect
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.decoding.packing import load_for_decoding
from model.io.image import pixels_of
from model.io.names import shown
from trial import pictures
from trial.frame import Child, Ended, Kind, calling, fault_of, tiny_model

LARGE = (4000, 3000)  # of the picture from which is measured how much memory pixels take


class Images(Kind):
    name, short, long = "images", 30, 2000

    def __init__(self, place: Path):
        super().__init__(place)
        for name in ("first.png", "last.png"):
            pictures.smooth(np.random.default_rng(0)).save(place / name)
        Image.new("RGB", LARGE).save(place / "large.png")
        sequence = closed_set_decoder(load_for_decoding(tiny_model(place)), "sequence", groups=1)
        self.detector = ClosedSetDetector(sequence, Selection(score_threshold=0))
        self.detect("first.png", place)
        small = self.detect("first.png", place).memory
        large = self.detect("large.png", place).memory
        self.memory, self.of_pixel = small, max(0, large - small) / (LARGE[0] * LARGE[1])

    def detect(self, file: str, folder: Path) -> Ended:
        argv = ("--image", self.place / "first.png", file, self.place / "last.png")
        program = calling(detect, *argv, "--json", "out.json", "--out", "drawn", "--batch-size", 1)

        def action():  # the model is loaded once for all cases: weights are a kind of their own
            detect.load_detector = lambda *_: self.detector
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

"""Single changed bytes in pictures of every format that is read."""

from pathlib import Path

import numpy as np

from model.io.image import load_image, pixels_of
from train.run import program
from trial import pictures
from trial.frame import Child, Kind, fault_of


class Flips(Kind):
    name, short, long = "single flips, six formats", 30, 6000

    def __init__(self, place: Path):
        super().__init__(place)
        rng = np.random.default_rng(0)
        self.whole = {form: pictures.encoded(rng, form) for form in pictures.FORMS}
        good = [pictures.write(place, whole) for whole in self.whole.values() for _ in range(2)]
        self.memory = max(Child(reading(file), place).wait().memory for file in good)

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        form = pictures.FORMS[number % len(pictures.FORMS)]
        damaged = bytearray(self.whole[form])
        at, change = int(rng.integers(len(damaged))), int(rng.integers(1, 256))
        damaged[at] ^= change
        file = pictures.write(folder, bytes(damaged))
        ended = Child(reading(file), folder).wait()
        # Four bytes a pixel, once as they are decoded and once in RGB: as many as any picture of this size.
        memory = self.memory + 8 * pixels_of(file)
        return f"{form}, byte {at} ^ {change}", fault_of(ended, folder, (file,), memory)


def reading(file: str):
    return lambda: program.run(lambda: load_image(file) and None, "load_image.py")

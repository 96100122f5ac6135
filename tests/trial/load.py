"""Many pictures in one call: what is held in memory does not grow."""

import json
from pathlib import Path

import numpy as np

from infer import detect
from trial.frame import Child, Kind, calling, complaints, resident, tiny_model
from trial.pictures import FORMS, SUFFIXES, smooth

GROWTH = 0.05


class Load(Kind):
    short, long = 1, 1

    def __init__(self, place: Path):
        super().__init__(place)
        self.count = 2000 if self.full else 60
        self.name = f"load: {self.count:,} pictures in one call"

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        count, within = self.count, folder / "in"
        within.mkdir()
        for i in range(count):
            k = i % len(FORMS)
            size = rng.integers(20, 500, 2).tolist()
            smooth(rng, "RGB", *size).save(within / f"{i:05}{SUFFIXES[k]}", FORMS[k])
        argv = ("--model", tiny_model(self.place), "--image", within, "--json", "out.json", "--groups", 1)

        def action():
            held, real = [], detect.save_found

            def save_found(*args):
                held.append(resident())
                return real(*args)

            detect.save_found = save_found
            try:
                calling(detect, *argv, "--out", "drawn")()
            finally:
                (folder / "held.json").write_text(json.dumps(held))

        ended = Child(action, folder).wait(patience=3600)
        held = json.loads((folder / "held.json").read_text())
        first, last = max(held[: count // 2]), max(held[count // 2 :])
        what = f"{count} pictures, first half {first >> 20} MB, second {last >> 20} MB"
        said = [
            line for line in complaints(ended.err) if "nothing found in" not in line
        ]  # true, and no fault
        if ended.code or said:
            return what, f"exit code {ended.code}: {said[-1:]}"
        if len(json.loads((folder / "out.json").read_text())) != count:
            return what, "not all are in the JSON file"
        return what, "" if last <= (1 + GROWTH) * first else "memory grows"

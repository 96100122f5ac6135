"""Damaged files in a folder of evaluate.py, from which report.py draws and another evaluation goes on."""

import json
import shutil

import numpy as np

from trial.damage import damage_bytes, damage_json
from trial.data import Coco
from trial.frame import Child, fault_of

FILES = ("results.json", "figures.json", "settings.json", "predictions-0.jsonl")


class Evaluations(Coco):
    name, short, long = "folders of evaluations", 4, 200

    def __init__(self, place):
        super().__init__(place)
        boxes = [dict(image_id=i, category_id=i + 1, bbox=[5, 5, 30, 20], score=0.5) for i in range(3)]
        (place / "eval" / "results.json").write_text(json.dumps(boxes))

    def attempt(self, rng: np.random.Generator, number: int, folder) -> tuple[str, str]:
        evaluation = shutil.copytree(self.place / "eval", folder / "eval")
        files = shutil.copytree(self.good, folder / "files")
        settings = json.loads((evaluation / "settings.json").read_text())
        settings |= dict(data=str(files / "instances.json"), images=str(files / "images"))
        (evaluation / "settings.json").write_text(json.dumps(settings))
        name = FILES[number % len(FILES)]
        in_lines = name.endswith(".jsonl")
        way = damage_bytes if in_lines or rng.integers(2) else damage_json
        what, must = way(rng, evaluation / name)
        program = "evaluate" if in_lines else "report"
        work = folder / "work"
        work.mkdir()
        ended = Child(self.programs(files)[program], work).wait()
        must = "either" if in_lines else must  # predictions need not be there
        return what, fault_of(ended, work, ("/eval", "/files"), self.memory[program], must)

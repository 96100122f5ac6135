"""JSON lines and COCO files that are damaged, through every program that reads them."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
from helpers import BOX, CODES, disc
from PIL import Image

from infer import evaluate, evaluate_answers, report
from model.decoding.masks import to_rle
from model.io.hub import CODEC, NANO
from train import convert, fit
from trial.damage import VALUES, damage_bytes, damage_value
from trial.frame import Child, Ended, Kind, calling, fault_of, tiny_model
from trial.pictures import smooth
from trial.runs import warm_up

WIDTH, HEIGHT = 60, 50
ONE_STEP = (
    "--device cpu --workers 0 --batch-size 2 --steps 1 --warmup 1 --no-amp --lora --lora-rank 1".split()
)


def make_images(folder: Path) -> None:
    folder.mkdir()
    for i in range(3):
        smooth(np.random.default_rng(i), "RGB", WIDTH, HEIGHT).save(folder / f"{i}.png")


def good_coco() -> dict:
    """Objects with polygons, and run lengths as text and as a list."""
    mask = disc(WIDTH, HEIGHT, 30, 25, 12)
    runs = np.diff(np.flatnonzero(np.diff(np.r_[-1, mask.T.ravel(), -1])), prepend=0)
    outlines = [
        [[5, 5, 40, 5, 40, 30]],
        to_rle(mask),
        dict(size=[HEIGHT, WIDTH], counts=runs[runs > 0].tolist()),
    ]
    annotations = [
        dict(id=i + 1, image_id=i % 3, category_id=i % 3 + 1, bbox=[5, 5, 30, 20], area=600, iscrowd=0)
        | dict(segmentation=outlines[i % 3])
        for i in range(5)
    ]
    images = [dict(id=i, file_name=f"{i}.png", width=WIDTH, height=HEIGHT) for i in range(3)]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(("cat", "dog", "bird"))]
    return dict(images=images, categories=categories, annotations=annotations)


class Files(Kind):
    """A damaged file in a copy of a good set, given to each program. lines: of complaint; one a picture."""

    lines = 4

    def __init__(self, place: Path):
        super().__init__(place)
        warm_up()
        self.model = tiny_model(place)
        good = place / "good"
        good.mkdir()
        make_images(good / "images")
        self.make(good)
        self.good, self.memory = good, {}
        for name, ended in self.run_all(shutil.copytree(good, place / "copy"), place):
            if ended.code:
                raise RuntimeError(f"{name} refuses the good file: {ended.err}")
            self.memory[name] = ended.memory

    def make(self, folder: Path) -> None:
        """Write the good files."""
        raise NotImplementedError

    def programs(self, files: Path) -> dict:
        """{name: the program with its options}; each writes into the working folder."""
        raise NotImplementedError

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        raise NotImplementedError

    def run_all(self, files: Path, folder: Path):
        for name, program in self.programs(files).items():
            yield name, Child(program, folder).wait()

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        files = shutil.copytree(self.good, folder / "files")
        what, must = self.damage(rng, number, files)
        work, faults = folder / "work", []
        work.mkdir()
        for name, ended in self.run_all(files, work):
            fault = fault_of(ended, work, ("/files",), self.memory[name], must, lines=self.lines)
            faults += [f"{name}: {fault}"] if fault else self.faults_in_results(name, ended, work)
        return what, "; ".join(faults)

    def faults_in_results(self, name: str, ended: Ended, work: Path) -> list[str]:
        """What a program wrote must be whole; one that complains has written nothing."""
        written = work / f"{name}.out"
        if ended.code and written.exists():
            return [f"{name}: complains, and leaves {written.name}"]
        return []

    def fit(self, files: Path, data: str):
        argv = ("--model", self.model, "--data", files / data, "--out", "run", *ONE_STEP)
        return lambda: (shutil.rmtree("run", ignore_errors=True), calling(fit, *argv)())[1]


class Coco(Files):
    name, short, long = "COCO files, five programs", 4, 500

    def make(self, folder: Path) -> None:
        (folder / "instances.json").write_text(json.dumps(good_coco()))

    def programs(self, files: Path) -> dict:
        data, images = files / "instances.json", ("--images", files / "images")
        usual = ("--model", self.model, "--groups", 1, "--decode", "sequence", "--out", files.parent / "eval")

        def draw():
            report.report_set = lambda *_: []  # drawing is slow, and the file is read by then
            calling(report, "--eval", files.parent / "eval", "--out", "page")()

        return dict(
            evaluate=calling(evaluate, "--data", data, *images, *usual, "--json", "evaluate.out"),
            report=draw,
            fit=self.fit(files, data.name),
            lines=calling(convert, "coco-to-jsonl", "--data", data, "--out", "lines.out"),
            masks=calling(convert, "masks-to-jsonl", "--data", data, *images, "--out", "masks.out"),
        )

    def run_all(self, files: Path, folder: Path):
        """report.py reads what was evaluated: where nothing was, an evaluation of the good file is put."""
        for name, program in self.programs(files).items():
            if name == "report" and not (files.parent / "eval" / "figures.json").exists():
                shutil.rmtree(files.parent / "eval", ignore_errors=True)
                shutil.copytree(self.place / "eval", files.parent / "eval")
                settings = json.loads((files.parent / "eval" / "settings.json").read_text())
                settings |= dict(data=str(files / "instances.json"), images=str(files / "images"))
                (files.parent / "eval" / "settings.json").write_text(json.dumps(settings))
            yield name, Child(program, folder).wait()

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        file = files / "instances.json"
        if number % 8 == 7:
            return damage_bytes(rng, file, header=9999)
        if number % 8 == 6:
            return damage_bytes(rng, files / "images" / "1.png", header=60)[0], "either"
        data = good_coco()
        if number % 8 >= 4:
            what, must = harm(rng, data), "refused"
        else:
            (data, what), must = damage_value(rng, data), "either"
        file.write_text(json.dumps(data))
        return what, must


def harm(rng: np.random.Generator, data: dict) -> str:
    """Something that every program must refuse."""
    image, thing, kind = (data[key][0] for key in ("images", "annotations", "categories"))
    ways = {
        "unknown image": lambda: thing.update(image_id=99),
        "unknown category": lambda: thing.update(category_id=99),
        "id as text": lambda: thing.update(image_id="0"),
        "two images of an id": lambda: data["images"].append(copy.deepcopy(image)),
        "two objects of an id": lambda: data["annotations"].append(copy.deepcopy(thing)),
        "two categories of a name": lambda: data["categories"].append(dict(id=9, name=kind["name"])),
        "category without a name": lambda: kind.update(
            name=("", " ", None, 3, [], "a\nb", "\0")[rng.integers(7)]
        ),
        "name outside": lambda: image.update(
            file_name=("/etc/passwd", "../files/images/0.png", "a/../../b")[rng.integers(3)]
        ),
        "name that is none": lambda: image.update(
            file_name=(None, "", 3, [], "a\0b", "a\nb", "\ud800")[rng.integers(7)]
        ),
        "lists of other types": lambda: data.update(
            images=(None, {}, "x", [1], [None], [[]], [])[rng.integers(7)]
        ),
        "no list": lambda: data.pop(("images", "annotations", "categories")[rng.integers(3)]),
        "id that is none": lambda: image.update(id=(None, "a", 1.5, [], 2**70, True)[rng.integers(6)]),
        "width of 10**30": lambda: image.update(width=10**30),
        "iscrowd of another type": lambda: thing.update(iscrowd=(2, "no", [], {}, -1)[rng.integers(5)]),
    }
    what = list(ways)[rng.integers(len(ways))]
    ways[what]()
    return what


class Lines(Files):
    name, short, long = "JSON lines, four programs", 4, 500

    def make(self, folder: Path) -> None:
        mask = disc(WIDTH, HEIGHT, 30, 25, 12)
        pairs = [
            dict(image="0.png", prefix="caption en", suffix="a cat"),
            dict(image="1.png", prefix="answer en what is it?", suffix=["a dog", "dog"], kind="what"),
            dict(image="2.png", prefix="segment cat", suffix=f"{BOX}{CODES} cat", mask=to_rle(mask)),
        ]
        Image.fromarray(mask).save(folder / "mask.png")
        masks = [dict(image=f"{i}.png", label="cat", mask="mask.png") for i in range(3)]
        for name, lines in (("pairs.jsonl", pairs), ("masks.jsonl", masks)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def programs(self, files: Path) -> dict:
        data, images = files / "pairs.jsonl", ("--images", files / "images")
        asked = ("--model", self.model, "--codec", NANO / CODEC, "--max-tokens", 2, "--json", "answers.out")
        to_coco = ("jsonl-to-coco", "--data", data, *images, "--out", "coco.out")
        of_masks = ("masks-to-jsonl", "--data", files / "masks.jsonl", *images, "--out", "masks.out")
        programs = dict(
            fit=self.fit(files, data.name),
            answers=calling(evaluate_answers, "--data", data, *images, *asked),
            coco=calling(convert, *to_coco),
            masks=calling(convert, *of_masks),
        )
        return {name: programs[name] for name in self.chosen}

    chosen = ("fit", "answers", "coco", "masks")

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        of_masks = number % 4 == 3
        self.chosen = ("masks",) if of_masks else ("fit", "answers", "coco")
        file = files / ("masks.jsonl" if of_masks else "pairs.jsonl")
        if number % 8 >= 6:
            return damage_bytes(rng, file, header=9999)
        if number % 16 == 5:
            name = ("mask.png", "images/1.png")[rng.integers(2)]
            return damage_bytes(rng, files / name, header=60)[0], "either"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        row, must = int(rng.integers(len(lines))), "either"
        if rng.random() < 0.3:
            outside = ("../good/images/0.png", "/etc/passwd", "", 3, None, [], {}, "a\0b", "/dev/zero")
            lines[row]["image"], must = outside[rng.integers(len(outside))], "refused"
            what = f"image {lines[row]['image']!a}"
        elif rng.random() < 0.2:
            lines[row], what = VALUES[rng.integers(len(VALUES))], "a line of another type"
        else:
            lines[row], what = damage_value(rng, lines[row])
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"line {row + 1}: {what}", must

"""What several test files share: programs run as the shell runs them, small files, and comparisons.

Fixtures are in conftest.py, the models of transformers in reference.py.
"""

import base64
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from zygote import stand_in

from model import PaliGemma
from model.config import COCO_CLASSES, PaliGemmaConfig
from model.decoding.closed_set import ClosedSet
from model.decoding.detections import Detections
from model.decoding.parallel import COORDINATES, Reading, peaks
from model.io.tokenizer import Tokenizer
from train.nano.untrained import nano_config
from train.run import program as frame

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Programs ---------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, program, *argv) -> tuple[int, str, str]:
    """Run a program in this process: exit code, stdout, stderr, as the shell would see them."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__.rpartition('.')[2]}.py", *map(str, argv)])
    try:
        frame.run(program.main, program.__file__)
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    if isinstance(code, str):  # what Python prints before it exits with 1
        code, err = 1, f"{err}{code}\n"
    return code, out, err


def python(*argv, cwd: Path | None = None, **environment: str) -> str:
    """What python prints in a process of its own, which must succeed."""
    one = str(stand_in())
    done = subprocess.run(
        [one, *map(str, argv)], cwd=cwd, env=ENVIRONMENT | dict(PYTHON_EXEC=one) | environment,
        capture_output=True, text=True, timeout=1200,  # a busy machine takes ten times as long
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout


def torchrun(processes: int, *options) -> list:
    """What stands between python and the program to start it in several processes."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", processes, *(options or ["--standalone"])]


def complaint(function, *args, **kwargs) -> str:
    """The message of the ValueError that a call must end in."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    print(error.value)
    return str(error.value)


def complaint_about(file: Path, function, **options) -> str:
    """The same of a function that reads a file: one line, with the file's name."""
    message = complaint(function, file, **options)
    assert file.name in message and "\n" not in message
    return message


# Checkpoints ------------------------------------------------------------------------------------------------


def tiny_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    """nano's form with 0.2 million parameters."""
    full = nano_config(tokenizer)
    vision = replace(full.vision, image_size=64, width=32, layers=2, heads=2, mlp=64)
    text = replace(full.text, width=48, layers=2, head_dim=16, query_scale=0.25, mlp=96, sliding_window=16)
    return replace(full, vision=vision, text=text)


def save_tiny_model(folder: Path, tokenizer_file: Path) -> None:
    """A checkpoint of that form, with weights that answer each picture in its own way."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tokenizer_file, folder)
    tiny = PaliGemma(tiny_config(Tokenizer(folder)))
    generator = torch.Generator().manual_seed(6)
    for name, weight in tiny.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:  # Gemma's norms multiply by 1 + weight
            weight.data = 0.3 * noise + (3 if name == "decoder.norm.weight" else name.startswith("vision"))
        else:
            gain = 0.5 if "embed." in name else 2.0
            weight.data = 0.2 * noise if weight.ndim == 1 else gain * noise / weight[0].numel() ** 0.5
    tiny.decoder.embed.weight.data[7 + len(COCO_CLASSES)] *= 3  # so that noise is an answer, at times
    tiny.save_pretrained(folder)


def load(folder, adapter=None, dtype=torch.float32, **overrides) -> PaliGemma:
    adapter = adapter and str(adapter)
    return PaliGemma.from_pretrained(str(folder), dtype=dtype, adapter=adapter, **overrides)


def language_of(folder: Path) -> ClosedSet:
    """nano's closed-set language in a checkpoint's tokenizer."""
    tokenizer = Tokenizer(folder)
    return ClosedSet.of(nano_config(tokenizer), tokenizer)


# Files ------------------------------------------------------------------------------------------------------


def picture(file: Path, width=90, height=60, seed=11) -> Path:
    """A file of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def edit_json(file: Path, change) -> None:
    """Rewrite a JSON file after change(content)."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def write_jsonl(file: Path, *lines) -> Path:
    """A line for each record; strings as they are."""
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


# A detection set, and a detector that needs no model --------------------------------------------------------

LISTED_CLASSES = ("mouse", "cat", "dog", "bird")  # those of the detector; the set has the last three
LISTED_IMAGES = 8  # number 3 and 7 have no objects


def write_listed_set(folder: Path) -> Path:
    """A COCO set of noise images, 100 x 80, some of them with objects of three classes."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in (i for i in range(LISTED_IMAGES) if i % 4 != 3):
        for _ in range(rng.integers(1, 5)):
            w, h = rng.integers(10, 60, 2).tolist()
            x, y = int(rng.integers(0, 100 - w)), int(rng.integers(0, 80 - h))
            ids = dict(id=len(annotations) + 1, image_id=image, category_id=int(rng.integers(1, 4)))
            annotations.append(ids | dict(bbox=[x, y, w, h], area=w * h, iscrowd=0))
    images = [dict(id=i, file_name=f"{i}.png", width=100, height=80) for i in range(LISTED_IMAGES)]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(LISTED_CLASSES[1:])]
    (folder / "images").mkdir(parents=True)
    for i in range(LISTED_IMAGES):
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    data = dict(images=images, annotations=annotations, categories=categories)
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"


class FromAList:
    """Finds the objects of a set, moved a little, and some that are not there, whatever the batch.

    Counts what it is asked for, and fails after `limit` images.
    """

    classes, model = LISTED_CLASSES, None

    def __init__(self, data: Path, limit: int | None = None):
        coco, rng = json.loads(data.read_text()), np.random.default_rng(1)
        self.answers = {}  # by the first pixels of the image
        for record in coco["images"]:
            with Image.open(data.parent / "images" / record["file_name"]) as image:
                key = image.tobytes()[:60]
            truth = [a for a in coco["annotations"] if a["image_id"] == record["id"]]
            rows = [[*a["bbox"], a["category_id"]] for a in truth] + [[5, 5, 20, 30, rng.integers(0, 4)]]
            rows = np.array(rows, float)
            rows[:, 2:4] += rows[:, :2] + rng.integers(-3, 4, (len(rows), 2))
            scores = np.sort(rng.random(len(rows)))[::-1]
            class_ids = rows[:, 4].astype(int)
            labels = [self.classes[c] for c in class_ids]
            self.answers[key] = Detections(rows[:, :4], scores, class_ids, labels, tokens=None)
        self.seen, self.limit = 0, limit

    def fitting_batch(self):
        return 4

    def __call__(self, images):
        self.seen += len(images)
        if self.limit is not None and self.seen > self.limit:
            raise KeyboardInterrupt
        return [self.answers[image.tobytes()[:60]] for image in images]


# Boxes and masks --------------------------------------------------------------------------------------------


def slow_iou(a, b) -> float:
    """Of one pair, counted from the sides of their intersection."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def random_objects(rng, n: int, width: int, height: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole-pixel boxes [n, 4] with sides of 4 to 40 pixels, and labels [n]."""
    sides = rng.integers(4, 41, (n, 2))
    low = (rng.random((n, 2)) * (np.array([width, height]) - sides + 1)).astype(int)
    return np.concatenate((low, low + sides), axis=1).astype(np.float32), rng.integers(0, classes, n)


def unpack(packed: dict) -> np.ndarray:
    """The array that infer/inside/page.py packed, as web/page.js unpacks it."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, f"<u{packed['bits'] // 8}").reshape(packed["shape"])


def disc(width, height, x, y, r) -> np.ndarray:
    """The pixels whose middle is nearer than r to (x, y)."""
    rows, columns = np.mgrid[:height, :width]
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < r**2


# Comparisons ------------------------------------------------------------------------------------------------


def same(a: dict, b: dict) -> bool:
    """The same tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a, b) -> bool:
    """Two answers of a decoder, tensor by tensor."""
    return same(vars(a), vars(b))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()


# Boxes in parallel ------------------------------------------------------------------------------------------


class PlainSteps:
    """The boxes of model/decoding/parallel.py without branches: each is a text of its own, token by token."""

    def __init__(self, model: PaliGemma, language: ClosedSet, image: torch.Tensor):
        """image [1, 3, S, S]"""
        self.model, self.language = model, language
        self.cache = model.new_cache(1, len(language.prompt) + COORDINATES)
        self.hidden = model.prefill(model.encode(image), torch.tensor([language.prompt]), self.cache)

    def after(self, *locs: int) -> torch.Tensor:
        """Prompt and coordinates -> the hidden state [1, D] that predicts what follows."""
        cache, hidden = copy.deepcopy(self.cache), self.hidden
        for loc in locs:
            hidden = self.model.step(torch.tensor([self.language.loc0 + loc]), cache)
        return hidden

    def probabilities(self, *locs: int) -> torch.Tensor:
        """Of what follows: [1, 1024] of a coordinate, or after four of them [1, C + 1] of a class."""
        first, last = self.language.allowed(len(locs))
        return self.model.decoder.logits(self.after(*locs), first, last).softmax(-1)

    def boxes(self, count: int, reading: Reading) -> list[tuple[list[int], int]]:
        """The coordinates and the class of each box, best first."""
        y0s, y0_masses = peaks(self.probabilities(), count, reading.radius)
        pairs = []
        for y0, y0_mass in zip(y0s[0].tolist(), y0_masses[0].tolist()):
            x0s, masses = peaks(self.probabilities(y0), reading.x0_peaks, reading.radius)
            pairs += [(-y0_mass * mass, y0, x0) for x0, mass in zip(x0s[0].tolist(), masses[0].tolist())]
        found = []
        for _, *locs in sorted(pairs)[:count]:
            for _ in range(2):
                locs.append(peaks(self.probabilities(*locs), 1, reading.radius)[0].item())
            found.append((locs, self.probabilities(*locs)[0, :-1].argmax().item()))
        return found


# Answers in words -------------------------------------------------------------------------------------------

BOX, OTHER_BOX = "<loc0000><loc0128><loc0512><loc0640>", "<loc0256><loc0256><loc1023><loc1023>"
CODES = "".join(f"<seg{code:03d}>" for code in range(16))


class CannedAnswers:
    """Stands in for Prompter: canned answers by prompt; remembers what it was asked."""

    def __init__(self, tokenizer, by_prompt, p=0.9):
        self.model = SimpleNamespace(tokenizer=tokenizer, photograph_test=None)
        self.by_prompt, self.p = by_prompt, p
        self.asked, self.max_tokens = [], 50

    def __call__(self, images, asked):
        self.asked += asked
        tokens = [self.model.tokenizer.encode(self.by_prompt.get(prompt, "")) for _, prompt in asked]
        return [(row, [math.log(self.p)] * len(row)) for row in tokens]

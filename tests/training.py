"""What the tests of training share: runs in this process and in others, what they leave, a plain loss."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, apart, complaint, python
from safetensors.torch import load_file

from model import PaliGemma
from model.io.image import to_network
from train import fit, loss
from train.data.samples import StepSampler
from train.data.targets import Noise

FIT = ROOT / "train" / "fit.py"
USUAL = "--steps 8 --batch-size 4 --lr 1e-3 --warmup 2 --patch-weight 1 --log-every 1 --save-every 8 --no-amp"
PLAIN = "--patch-weight 0"  # for data from files: only practice scenes have the helper head


def run(model, out, options="", *more):
    """fit.py in this process, without worker processes. Later options win."""
    argv = f"--model {model} --out {out} --device cpu --workers 0 {USUAL} {options}".split()
    fit.train(fit.arguments([*argv, *more]))


def run_complaint(model, out, options) -> str:
    """The message that ends such a run."""
    return complaint(run, model, out, f"{PLAIN} {options}")


class Killed(BaseException):
    """Stands for a lost machine: nothing in the program expects it."""


def run_until_killed(monkeypatch, step: int, model, out, options="") -> None:
    """Such a run that dies in the middle of step number `step`, counted from where it starts."""
    steps, to_network = iter(range(1, step + 1)), loss.to_network

    def to_network_or_death(image):
        if next(steps) == step:
            raise Killed
        return to_network(image)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loss, "to_network", to_network_or_death)
        run(model, out, options)


def command(model, out, options, launcher=(), program=FIT) -> list[str]:
    """The same program in processes of its own; program: another one with its options."""
    usual = "--device cpu --workers 0 --batch-size 4 --lr 1e-3 --warmup 2 --log-every 1 --no-amp "
    # As run(), which takes no defaults of few pictures.
    usual += "--no-augment --weight-decay 0 --min-lr 1e-6 --location-smoothing 0"
    files = [sys.executable, *launcher, program, "--model", model, "--out", out]
    return [*map(str, files), *f"{usual} {options}".split()]


def launch(*args, **kwargs) -> str:
    """Run such a command, which must succeed; returns what it prints."""
    return python(*command(*args, **kwargs)[1:])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_apart(one: dict, two: dict) -> float:
    """The largest difference of two checkpoints. The keys' biases only add a constant to the scores: their
    gradient is rounding noise, and AdamW takes steps of full length whatever a gradient's size."""
    assert one.keys() == two.keys()
    return max(apart(one[name], two[name]) for name in one if "k_proj.bias" not in name)


def parsed(options: str):
    """The options of a run that is not started."""
    return fit.arguments(f"--model x --out x --device cpu {options}".split())


# The published closed-set run -------------------------------------------------------------------------------

PUBLISHED = Noise(weight=1, disguise=0, near=0, apart=True, skip_empty=True)
AS_OPTIONS = "--noise-weight 1 --noise-disguise 0 --noise-near 0 --noise-apart --skip-empty"


# A loss to compare with -------------------------------------------------------------------------------------


def plain_loss(folder, samples: list[dict], mean: str, **overrides) -> float:
    """The loss over the whole vocabulary, one example after the other, means in float64."""
    model = PaliGemma.from_pretrained(str(folder), dtype=torch.float32, **overrides)
    losses, totals = [], []
    for sample in samples:
        with torch.no_grad():
            logits = model(to_network(sample["image"][None]), sample["text"][None], int(sample["prefix_len"]))
        each = F.cross_entropy(logits[0].double(), sample["labels"], reduction="none")
        losses.append((each * sample["weights"].double()).sum().item())
        totals.append(sample["weights"].double().sum().item())
    if mean == "example":
        return np.mean([loss / total for loss, total in zip(losses, totals, strict=True)])
    return sum(losses) / sum(totals)


def first_batch(data) -> list[dict]:
    """The samples of the first step."""
    (keys,) = StepSampler(len(data), range(1), 4)
    return [data[key] for key in keys]


# Small data sets --------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 90, 60
CAT = dict(image="a.png", prefix="caption en", suffix="a cat")
LIGHT = dict(
    image="sub/c.png", prefix="detect traffic light", suffix="<loc0000><loc0001><loc0002><loc1023> bé"
)


def instances(**changes) -> dict:
    """Three images, the second without objects; ids with gaps and out of order, as COCO's are."""
    data = dict(
        images=[
            dict(id=70, file_name="a.png", width=WIDTH, height=HEIGHT),
            dict(id=5, file_name="b.png", width=40, height=40),
            dict(id=9, file_name="sub/c.png", width=50, height=80.0),
        ],
        categories=[dict(id=90, name="bird"), dict(id=2, name="traffic light"), dict(id=13, name="cat")],
        annotations=[
            dict(id=1, image_id=9, category_id=90, bbox=[5, 5, 100, 10], segmentation=[[1, 2, 3]]),  # cut
            dict(id=2, image_id=70, category_id=2, bbox=[10, 20, 30, 30], iscrowd=0),
            dict(id=3, image_id=70, category_id=13, bbox=[50.5, 0, 20.25, 59]),
            dict(id=4, image_id=9, category_id=2, bbox=[0, 0, 9, 9], iscrowd=1),
            dict(id=5, image_id=9, category_id=2, bbox=[0, 0, 9, 0]),
            dict(id=6, image_id=9, category_id=2, bbox=[60, 0, 9, 9]),  # beside the image
            dict(id=7, image_id=9, category_id=2, bbox=[30, 5, -9, 9]),
            dict(id=8, image_id=9, category_id=13, bbox=[-10, -5, 20, 20]),
        ],
    )
    return data | changes


def broken(key: str, row: int, **changes) -> dict:
    """The file with a record changed; None takes a field away."""
    data = instances()
    changed = data[key][row] | changes
    data[key][row] = {name: value for name, value in changed.items() if value is not None}
    return data

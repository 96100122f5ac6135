"""Fit the test by which nano tells photographs from practice scenes (model/decoding/photographs.py).

    python train/nano/photographs.py --photographs FOLDER --test FOLDER FOLDER

Ridge regression on the mean of a picture's image tokens: random crops of the photographs on one side, scenes
of the train and development splits on the other. The threshold is set on other development scenes. Writes the
test into the folder of the checkpoint, and prints which share of each held-out practice set it takes for
photographs, and of each folder of --test. After any training of the checkpoint it must be fitted again.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import PaliGemma
from model.decoding.batches import network_images
from model.io.hub import PHOTOGRAPHS, resolve
from model.io.image import load_image
from model.io.names import shown
from model.io.writing import check_writable, save_tensors
from train.practice.scenes import make_scene
from train.practice.write import HELD_OUT_SETS
from train.run.program import complain, parser, positive, run

CROPS, SHARES = 25, (0.35, 1.0)  # crops of each photograph; range of their sides, in those of the photograph
RIDGE = 0.3
FALSE_ALARMS = 0.005  # of the scenes that set the threshold
# The first of the scenes, which no training and no other decision has seen.
FIRST = {"train": 50_000_000, "development": 100_000}
BATCH = 50


@torch.inference_mode()
def mean_tokens(model: PaliGemma, images: Iterable[Image.Image]) -> np.ndarray:
    """The mean image token of each, float64 [n, D]."""
    rest = iter(images)
    batches = iter(lambda: list(islice(rest, BATCH)), [])
    means = [model.encode(network_images(model, batch)).mean(1) for batch in batches]
    if not means:
        raise ValueError("no pictures")
    return torch.cat(means).double().numpy()


def scenes(split: str, first: int, count: int, size: int) -> Iterator[Image.Image]:
    return (Image.fromarray(make_scene(first + i, size, split).image) for i in range(count))


def photographs(folder: Path) -> Iterator[Image.Image]:
    """All pictures in a folder that can be read."""
    for file in sorted(folder.iterdir()):
        try:
            yield load_image(file)
        except ValueError as error:
            complain(error, __file__)


def crops(rng: np.random.Generator, images: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """Each image, and CROPS - 1 random parts of it with nearly its aspect ratio, half of them mirrored."""
    for image in images:
        yield image
        for _ in range(CROPS - 1):
            share = rng.uniform(*SHARES)
            w, h = int(image.width * share), int(image.height * min(1, share * rng.uniform(0.8, 1.25)))
            x, y = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
            part = image.crop((x, y, x + w, y + h))
            yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def ridge(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight [D] and bias of a linear test that should give 1 on `positive` and -1 on `negative`, [n, D].
    Both weigh the same, however many they are."""
    x = np.concatenate((positive, negative))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = np.c_[(x - mean) / deviation, np.ones(len(x))]
    ends = len(positive), len(negative)
    target, share = np.repeat((1.0, -1.0), ends), np.repeat([0.5 / n for n in ends], ends)
    solved = np.linalg.solve((x.T * share) @ x + RIDGE * np.eye(x.shape[1]), (x.T * share) @ target)
    weight = solved[:-1] / deviation
    return weight, float(solved[-1] - weight @ mean)


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--model", default="nano", help="the folder of a checkpoint, or nano")
    add("--photographs", type=Path, required=True, metavar="DIR", help="those that the test is fitted to")
    add("--test", type=Path, nargs="*", default=[], metavar="DIR", help="others, on which it is tried")
    count = "scenes to fit to, and to set the threshold; half as many of each held-out set"
    add("--count", type=positive, default=2000, help=count)
    args = options.parse_args()
    folder = resolve(args.model)
    check_writable(folder)
    model = PaliGemma.from_pretrained(folder, dtype=torch.float32)
    size, half = model.config.vision.image_size, -(-args.count // 2)

    def of_scenes(split: str, first: int, count: int) -> np.ndarray:
        return mean_tokens(model, scenes(split, first, count, size))

    fitted_to = np.concatenate([of_scenes(split, first, half) for split, first in FIRST.items()])
    taken = mean_tokens(model, crops(np.random.default_rng(0), photographs(args.photographs)))
    weight, bias = ridge(taken, fitted_to)
    others = of_scenes("development", FIRST["development"] + half, args.count)
    bias -= np.quantile(others @ weight + bias, 1 - FALSE_ALARMS)
    test = dict(weight=torch.tensor(weight).float(), bias=torch.tensor(bias).float())
    save_tensors(test, folder / PHOTOGRAPHS)

    sets = {name: of_scenes(split, 0, half) for split, name in HELD_OUT_SETS.items()}
    sets |= {shown(place): mean_tokens(model, photographs(place)) for place in args.test}
    for name, means in sets.items():
        print(f"{name}: {(means @ weight + bias > 0).sum()} of {len(means)} taken for photographs")


if __name__ == "__main__":
    run(main, __file__)

"""Training samples: which data set a file is, who takes which sample, and how samples become a batch.

A sample is asked for by (draw, item): its number in the whole run, and its number in the data. All that is
random about it comes from `draw`, so it is the same in every run, on every worker and rank.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from model import PaliGemma
from model.decoding.closed_set import ClosedSet
from model.decoding.masks import MaskCodec
from model.io.tokenizer import Tokenizer
from train.data.coco import CocoDetections, CocoIndex, answer_sample, closed_set_sample
from train.data.jsonl import JsonlPairs, is_jsonl
from train.data.targets import NANO_NOISE, Noise, closed_set_target, text_target
from train.nano.patch_head import patch_targets
from train.practice.scenes import Scene, make_scene
from train.practice.tasks import SHARES, tasks

PROMPTS = 3  # of a scene, when there are several tasks: it is drawn and encoded once
IN_WORDS = ("caption", "answer")
SHORT = 10  # tokens that a shorter answer in words weighs: or else a "yes" would drown among boxes
ROUND = 16  # texts of a batch are padded to a multiple: few shapes to compile for


# Which object is meant is decided by its first location or two; the 16 codes behind must not drown that.
LOC_WEIGHT, SEG_WEIGHT = 3.0, 0.5


class PracticeScenes(Dataset):
    """Scenes drawn as they are asked for: endless, the item is the scene's number from `first` on.

    A sample is of closed-set detection; with a tokenizer and a mask codec there are PROMPTS, the others of
    any tasks in train/practice/tasks.py.
    """

    def __init__(
        self,
        language: ClosedSet,
        size: int,
        patch: int,
        first: int = 0,
        split: str = "train",
        tokenizer: Tokenizer | None = None,
        codec: MaskCodec | None = None,
        noise: Noise = NANO_NOISE,
    ):
        self.language, self.size, self.patch = language, size, patch
        self.first, self.split, self.tokenizer = first, split, tokenizer
        self.tasks, self.noise = codec and tasks(codec), noise

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """answer_sample's tensors, lists of them for several samples; and of the image patch_labels int64 [P]
        and patch_boxes float32 [P, 4]."""
        seed, size = self.first + key[1], self.size
        scene = make_scene(seed, size, self.split)
        rng = np.random.default_rng([seed, 1])  # another stream than the scene's own
        if self.tasks:
            drawn = rng.choice(list(SHARES), PROMPTS - 1, p=list(SHARES.values()))
            samples = [self._sample(rng, scene, task) for task in ("closed-set", *drawn)]
            sample = {name: [each[name] for each in samples] for name in samples[0]}
            sample["image"] = samples[0]["image"]
        else:
            sample = self._sample(rng, scene, "closed-set")
        labels, boxes = patch_targets(scene, self.patch, background=len(self.language.classes))
        return sample | dict(patch_labels=torch.tensor(labels), patch_boxes=torch.tensor(boxes))

    def _sample(self, rng: np.random.Generator, scene: Scene, task: str) -> dict[str, Tensor]:
        if task == "closed-set":
            real = scene.boxes, scene.labels, self.size, self.size
            target = closed_set_target(rng, *real, self.language, grid=1, noise=self.noise)
            return closed_set_sample(scene.image, target, self.language)
        prefix, suffix = self.tasks[task](rng, scene)
        target = text_target(self.tokenizer, suffix)
        if task in IN_WORDS:
            target.weights *= max(1, SHORT / len(target.weights))
        target.weights[target.tokens >= self.tokenizer.loc0] = LOC_WEIGHT
        target.weights[target.tokens >= self.tokenizer.seg0] = SEG_WEIGHT
        return answer_sample(scene.image, self.tokenizer.encode_prompt(prefix), target)

    @property
    def closed_set(self) -> bool:
        """Whether every answer is of the closed-set language."""
        return not self.tasks

    def name(self, item: int) -> str:
        return f"practice scene {self.first + item} ({self.split})"


@lru_cache(1)
def read_coco_index(file: Path, images: Path) -> CocoIndex:
    return CocoIndex.read(file, images)


def classes_for(file: Path, images: Path | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that a model trained on a COCO file should have: its own if they hold all the file's, or
    else the file's. They change what the model's class tokens mean, so this comes before it is loaded."""
    if is_jsonl(file):
        return known
    names = read_coco_index(file, images or file.parent / "images").classes
    return known if set(names) <= set(known) else tuple(names)


def open_data(
    file: Path,
    images: Path | None,
    model: PaliGemma,
    tokenizer: Tokenizer,
    seed: int,
    augment: bool,
    allow_outside: bool = False,
    noise: Noise = NANO_NOISE,
) -> Dataset:
    """The data set of a COCO instances file or of JSONL lines, told apart by content.

    images: folder of the pictures, by default images/ beside the file. Raises ValueError in words if the
    data is empty or does not fit the model.
    """
    images, size = images or file.parent / "images", model.config.vision.image_size
    if is_jsonl(file):
        if changed := noise.changed():
            what = f"{', '.join(changed)}: only closed-set detection has noise"
            raise ValueError(f"{what}, and {file} holds lines of text, not COCO instances")
        data = JsonlPairs(file, images, tokenizer, size, seed, augment, allow_outside)
    else:
        index, language = read_coco_index(file, images), ClosedSet.of(model.config, tokenizer)
        labels = [language.classes.index(name) for name in index.classes]
        data = CocoDetections(index, images, language, labels, size, seed, augment, noise)
    if not len(data):
        raise ValueError(f"{file} has no samples" + " with objects" * noise.skip_empty)
    check_length(data.text_tokens, model)
    return data


def check_length(text: int, model: PaliGemma) -> None:
    """Raise ValueError if image and text need more positions than the checkpoint has."""
    need, have = model.config.vision.tokens + text, model.config.text.max_positions
    if need > have:
        raise ValueError(
            f"{need} positions needed ({text} of text), the checkpoint has {have}: shorten the text, or take "
            "a checkpoint of a smaller image size"
        )


class StepSampler:
    """The (draw, item) pairs of one rank, a list for each micro-batch.

    Step s of the run takes draws s * batch ... of all ranks together, dealt to micro-batches and ranks in
    turn: what a step sees does not depend on how many share it. Data of `items` samples is shuffled anew in
    every epoch; endless data (None) is taken in order.
    """

    def __init__(
        self,
        items: int | None,
        steps: range,
        batch: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ):
        if batch % (world * accumulate):
            raise ValueError(
                f"--batch-size {batch} is not a multiple of {world} processes x {accumulate} --accumulate"
            )
        self.items, self.steps, self.batch, self.seed = items, steps, batch, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self._order: tuple[int, np.ndarray | None] = (-1, None)  # epoch, its permutation

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self):
        for step in self.steps:
            yield from self.keys(step)

    def keys(self, step: int) -> list[list[tuple[int, int]]]:
        """The pairs of a step, a list for each micro-batch."""
        micro, first = self.batch // self.accumulate, step * self.batch
        return [
            [(draw, self.item(draw)) for draw in range(start + self.rank, start + micro, self.world)]
            for start in range(first, first + self.batch, micro)
        ]

    def item(self, draw: int) -> int:
        if self.items is None:
            return draw
        epoch, place = divmod(draw, self.items)
        if epoch != self._order[0]:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.items)
        return int(self._order[1][place])


def collate(
    samples: list[dict[str, Tensor]], pad: int = 0, multiple: int = 1, per_example: bool = False
) -> dict[str, Tensor]:
    """Stacked samples; texts are padded on the right to the longest, rounded up to a multiple.

    Where a sample has a list of texts, they follow each other in the batch: as many times the images.
    per_example: each text's weights add up to 1, whatever its length. The sum of all weights, by which the
    loss is divided, is then the number of texts, and the loss the mean of their means.
    """
    batch = {}
    for name in samples[0]:
        column = [sample[name] for sample in samples]
        if isinstance(column[0], list):
            column = [x for of_sample in column for x in of_sample]
        if name in ("text", "labels", "weights"):
            fill = pad if name == "text" else 0
            batch[name] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill)
            batch[name] = F.pad(batch[name], (0, -batch[name].shape[1] % multiple), value=fill)
            if name == "weights" and per_example:
                batch[name] /= batch[name].sum(1, keepdim=True)  # never 0: eos always weighs 1
        else:
            batch[name] = torch.stack(column)
    return batch

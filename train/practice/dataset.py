"""Practice scenes as a data set: drawn when they are asked for, with closed-set targets or all tasks."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.decoding.closed_set import ClosedSet
from model.decoding.masks import MaskCodec
from model.io.tokenizer import Tokenizer
from train.data.samples import answer_sample, closed_set_sample
from train.data.targets import NANO_NOISE, Noise, closed_set_target, text_target
from train.practice.scenes import Scene, make_scene
from train.practice.tasks import TASK_SHARES, make_tasks

PROMPTS_PER_SCENE = 2  # when there are several tasks: the scene is drawn and encoded once
WORD_TASKS = ("caption", "answer")
SEQUENCE_SHARE = 0.15  # of the texts beside branches: closed-set detection in sequence, or it is forgotten
MIN_ANSWER_WEIGHT = 10  # in tokens: a "yes" that weighed one token would drown among boxes
# The first location or two decide which object is meant: the 16 codes after them must not drown them out.
LOC_WEIGHT, SEG_WEIGHT = 3.0, 0.5
MIN_COVER = 0.2  # share of a patch that an object must own to be its label


def patch_targets(scene: Scene, patch: int, background: int) -> tuple[np.ndarray, np.ndarray]:
    """Label int64 [P] and box float32 [P, 4], in fractions, of the object that owns most of each patch.

    patch: pixels a side; background: the label of a patch without an object. Axes: P patches, S a side.
    """
    side = scene.owner.shape[0] // patch
    tiles = scene.owner.reshape(side, patch, side, patch)
    ids = np.arange(len(scene.labels))
    cover = np.zeros((side * side, 1))
    if len(ids):
        cover = (tiles[..., None] == ids).mean((1, 3)).reshape(side * side, -1)  # [P, n]
    best = cover.argmax(1)
    owned = cover[np.arange(len(cover)), best] >= MIN_COVER
    labels = np.full(side * side, background, np.int64)
    boxes = np.zeros((side * side, 4), np.float32)
    labels[owned] = scene.labels[best[owned]]
    boxes[owned] = scene.boxes[best[owned]] / scene.owner.shape[0]
    return labels, boxes


class PracticeScenes(Dataset):
    """Endless training scenes: item i is scene number first + i of the split "train".

    A sample is one of closed-set detection. With a tokenizer and a mask codec it has PROMPTS_PER_SCENE texts:
    closed-set detection, and random tasks of train/practice/tasks.py. If it is taught in branches, some texts
    are closed-set detection in sequence.
    """

    def __init__(
        self,
        language: ClosedSet,
        size: int,
        patch: int,
        first: int = 0,
        tokenizer: Tokenizer | None = None,
        codec: MaskCodec | None = None,
        noise: Noise = NANO_NOISE,
        branches: int | None = None,
    ):
        """size: pixels a side; patch: of the vision tower, in pixels; noise: of closed-set targets; branches:
        objects that are taught in parallel, None: they are taught in sequence."""
        self.language, self.size, self.patch = language, size, patch
        self.first, self.tokenizer, self.noise, self.branches = first, tokenizer, noise, branches
        self.tasks = make_tasks(codec) if codec else {}
        self.closed_set = not self.tasks

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | list[Tensor]]:
        """A sample, its texts as lists if there are several; and patch_labels [P], patch_boxes [P, 4] of the
        image, see patch_targets."""
        seed = self.first + key[1]
        scene = make_scene(seed, self.size)
        rng = np.random.default_rng([seed, 1])  # another stream than the scene's own
        drawn = ()
        if not self.closed_set:
            drawn = rng.choice(list(TASK_SHARES), PROMPTS_PER_SCENE - 1, p=list(TASK_SHARES.values()))
        size, boxes = scene.owner.shape[::-1], scene.boxes
        grid = float((boxes == boxes.round()).all())  # made-up noise must not be told apart by its fractions
        sample = closed_set_sample(
            rng, scene.image, boxes, scene.labels, size, self.language, self.branches, grid, self.noise
        )
        if not self.closed_set:
            samples = [self._in_words(rng, scene, task) for task in drawn]
            if self.branches is None:  # a text, like the others
                samples.insert(0, sample)
            elif rng.random() < SEQUENCE_SHARE:
                samples[0] = self._in_sequence(rng, scene, grid)
            sample |= {name: [each[name] for each in samples] for name in samples[0] if name != "image"}
        labels, boxes = patch_targets(scene, self.patch, background=len(self.language.classes))
        return sample | dict(patch_labels=torch.tensor(labels), patch_boxes=torch.tensor(boxes))

    def _in_sequence(self, rng: np.random.Generator, scene: Scene, grid: float) -> dict[str, Tensor]:
        size = scene.owner.shape[::-1]
        target = closed_set_target(rng, scene.boxes, scene.labels, *size, self.language, grid)
        return answer_sample(scene.image, self.language.prompt, target)

    def _in_words(self, rng: np.random.Generator, scene: Scene, task: str) -> dict[str, Tensor]:
        prefix, suffix = self.tasks[task](rng, scene)
        target = text_target(self.tokenizer, suffix)
        if task in WORD_TASKS:
            target.weights *= max(1, MIN_ANSWER_WEIGHT / len(target.weights))
        target.weights[target.tokens >= self.tokenizer.loc0] = LOC_WEIGHT
        target.weights[target.tokens >= self.tokenizer.seg0] = SEG_WEIGHT  # ids of codes come after locations
        return answer_sample(scene.image, self.tokenizer.encode_prompt(prefix), target)

    def name(self, item: int) -> str:
        return f"practice scene {self.first + item}"

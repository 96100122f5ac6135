"""Training samples: dicts of tensors. Sample i is the same in every run, on every worker and rank."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.groups import ClosedSet
from model.image import pixels_to_tensor
from train.patch_head import patch_targets
from train.scenes import make_scene
from train.targets import closed_set_target


class PracticeScenes(Dataset):
    """Scenes drawn as they are asked for, `length` of them from number `first`: no sample is seen twice."""

    def __init__(
        self, language: ClosedSet, size: int, patch: int, first: int, length: int, split: str = "train"
    ):
        self.language, self.size, self.patch = language, size, patch
        self.first, self.length, self.split = first, length, split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """image uint8 [S, S, 3]; tokens, inputs int64 [T] and weights [T]; patch_labels, patch_boxes."""
        if index >= self.length:
            raise IndexError(index)
        seed = self.first + index
        scene = make_scene(seed, self.size, self.split)
        rng = np.random.default_rng([seed, 1])  # another stream than the scene's own
        target = closed_set_target(
            rng, scene.boxes, scene.labels, self.size, self.size, self.language, grid=1
        )
        patch_labels, patch_boxes = patch_targets(scene, self.patch, background=len(self.language.classes))
        arrays = dict(image=scene.image, tokens=target.tokens, inputs=target.inputs, weights=target.weights)
        arrays |= dict(patch_labels=patch_labels, patch_boxes=patch_boxes)
        return {name: torch.tensor(array) for name, array in arrays.items()}


def network_input(image: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], after the workers: bytes travel cheaper."""
    if image.device.type == "cpu":
        return pixels_to_tensor(image.numpy())
    return image.movedim(-1, -3) / 127.5 - 1


class StepSampler:
    """Indices of one rank: step s takes samples s*batch ... of the whole data, dealt to the ranks in turn."""

    def __init__(self, first_step: int, steps: int, batch: int, rank: int = 0, world: int = 1):
        self.first_step, self.steps, self.batch, self.rank, self.world = first_step, steps, batch, rank, world

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self):
        for step in range(self.first_step, self.steps):
            yield list(range(step * self.batch + self.rank, (step + 1) * self.batch, self.world))

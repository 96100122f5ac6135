"""Samples: what they are, which process takes which, and how they become a batch.

A sample is a dict of tensors. Axes: S image side, T text positions.
    image       uint8 [S, S, 3]
    text        int64 [T]       prompt and answer as fed to the network; the image comes before it
    labels      int64 [T]       the token to be predicted after each text position; 0 before the answer
    weights     float32 [T]     of each position in the loss
    prefix_len  int64 []        length of the prompt; its last position predicts the answer's first token
    uniform     float32 [G, 5]  where noise boxes become the model's own: the random numbers that draw them

A closed-set answer that is taught in parallel is no text, but the fields of a targets.BranchTarget:
    objects [n, 5], branches [M, 5], branch_weights [M, 5], own_weights [K], uniform [K, 4]

A data set is asked for a sample by its key (draw, item): the sample's number in the run, and its number in
the data. All randomness is derived from the seed and the key, so a sample is the same in every process. Data
sets have `closed_set` (whether all answers are in the closed-set language) and `name(item)` for messages;
those of files also have `len`, `text_tokens`, the largest T of their samples (branches count),
`text_positions`, the last position that they use, `picture(item)`, `same_picture(item)`, the first item with
the same picture, and `keep(items)`, which leaves the others out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.decoding.closed_set import GROUP, ClosedSet
from train.data.targets import Noise, Target, branch_target, closed_set_target

TEXT_MULTIPLE = 16  # texts are padded to multiples of it where every new length costs a compilation
BRANCH_MULTIPLE = 4  # branches are padded to multiples of it
NOTHING = -1  # the class number of padding among objects


def answer_sample(image: np.ndarray, prompt: Sequence[int], target: Target) -> dict[str, Tensor]:
    """A sample of an image uint8 [S, S, 3], the ids of a prompt, and an answer, which ends in eos.

    Labels of weight 0 within the answer are kept: they say which range of ids the position has.
    """
    unsupervised = len(prompt) - 1
    return dict(
        image=torch.tensor(image),
        text=torch.from_numpy(np.concatenate((np.array(prompt, np.int64), target.inputs[:-1]))),
        labels=torch.from_numpy(np.concatenate((np.zeros(unsupervised, np.int64), target.tokens))),
        weights=torch.from_numpy(np.concatenate((np.zeros(unsupervised, np.float32), target.weights))),
        prefix_len=torch.tensor(len(prompt)),
        **({} if target.uniform is None else dict(uniform=torch.from_numpy(target.uniform))),
    )


def closed_set_sample(
    rng: np.random.Generator,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    size: tuple[float, float],
    language: ClosedSet,
    branches: int | None,
    grid: float,
    noise: Noise,
) -> dict[str, Tensor]:
    """A sample of closed-set detection: in sequence (branches None), or of at most that many branches.

    image: uint8 [S, S, 3]. boxes [n, 4]: in pixels of a picture of `size`, width and height. labels [n]:
    class numbers. grid, noise: see noise_boxes.
    """
    if branches is None:
        target = closed_set_target(rng, boxes, labels, *size, language, grid, noise)
        return answer_sample(image, language.prompt, target)
    target = branch_target(rng, boxes, labels, *size, language, branches, grid, noise)
    return dict(
        image=torch.tensor(image),
        objects=torch.from_numpy(target.objects),
        branches=torch.from_numpy(target.branches),
        branch_weights=torch.from_numpy(target.weights),
        own_weights=torch.from_numpy(target.own_weights),
        uniform=torch.from_numpy(target.uniform),
    )


def closed_set_lengths(
    prompt: int, groups: int, objects: int, branches: int | None, noise: Noise
) -> tuple[int, int]:
    """How many tokens prompt and answer have, and their last position. prompt: its tokens; groups: of an
    answer in sequence; objects: the most that a picture has."""
    if branches is None:
        return prompt + GROUP * groups, prompt + GROUP * groups
    # Each branch has the positions right after the prompt.
    return prompt + (GROUP - 1) * (min(branches, objects) + noise.boxes), prompt + GROUP - 1


def weight_of(batch: dict[str, Tensor]) -> Tensor:
    """The sum of all weights in a batch, by which its losses are divided."""
    return sum(column.sum() for name, column in batch.items() if name.endswith("weights"))


class StepSampler:
    """The keys (draw, item) of one rank's samples, as a list for each micro-batch.

    Step s of the run takes the draws s * batch ... (s + 1) * batch - 1. They are split into micro-batches and
    dealt to the ranks in turn, so the samples of a step do not depend on how many processes share it. Data of
    `items` samples is shuffled anew in every epoch; endless data (None) is taken in order.
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield from self.keys(step)

    def keys(self, step: int) -> list[list[tuple[int, int]]]:
        """The keys of a step, as a list for each micro-batch."""
        micro, first = self.batch // self.accumulate, step * self.batch  # micro: samples of all ranks
        return [
            [(draw, self.item(draw)) for draw in range(start + self.rank, start + micro, self.world)]
            for start in range(first, first + self.batch, micro)
        ]

    def item(self, draw: int) -> int:
        if self.items is None:
            return draw
        epoch, position = divmod(draw, self.items)
        if epoch != self._order[0]:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.items)
        return int(self._order[1][position])


def collate(
    samples: list[dict[str, Tensor]], pad: int = 0, multiple: int = 1, per_example: bool = False
) -> dict[str, Tensor]:
    """A batch of samples. Texts are padded on the right to the longest, rounded up to a multiple.

    The texts of samples that have several follow each other: the batch then has fewer images than texts.
    per_example: scale each text's weights to add up to 1, whatever its length. The sum of all weights, by
    which the loss is divided, is then the number of texts, and the loss is the mean of their means.
    """
    batch = {}
    for name in samples[0]:
        column = [sample[name] for sample in samples]
        if isinstance(column[0], list):
            column = [text for texts in column for text in texts]
        if name in ("text", "labels", "weights"):
            fill = pad if name == "text" else 0
            batch[name] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill)
            batch[name] = F.pad(batch[name], (0, -batch[name].shape[1] % multiple), value=fill)
            if name == "weights" and per_example:
                batch[name] /= batch[name].sum(1, keepdim=True)  # never 0: eos always weighs 1
        elif name in ("objects", "branches", "branch_weights"):
            fill = NOTHING if name == "objects" else 0
            batch[name] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill)
            batch[name] = F.pad(batch[name], (0, 0, 0, -batch[name].shape[1] % BRANCH_MULTIPLE), value=fill)
        else:
            batch[name] = torch.stack(column)
    return batch

"""Training on lines of text about an image (train/data/lines.py)."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.io.image import load_image
from model.io.tokenizer import Tokenizer
from train.data.augment import JITTER, jitter
from train.data.coco import answer_sample, square
from train.data.lines import answers, read_lines
from train.data.targets import text_target


class JsonlPairs(Dataset):
    """Samples as in train/data/coco.py: the prompt is the prefix, the answer the suffix and eos. A key is
    (draw, item): the running number of the sample in the run, and the number of the line."""

    def __init__(
        self,
        file: Path,
        images: Path,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        augment: bool = False,
        allow_outside: bool = False,
    ):
        """augment: colours only, since boxes and words like "left" are in the text.

        Raises ValueError "FILE:LINE: what is wrong" for the first bad line, OSError if there is no file.
        """
        self.file, self.images, self.tokenizer = file, images, tokenizer
        self.size, self.seed, self.augment = size, seed, augment
        offsets, self._longest = [], 0
        for offset, record in read_lines(file, images, allow_outside):
            offsets.append(offset)
            answer = max(len(tokenizer.encode(text)) for text in answers(record))
            self._longest = max(self._longest, len(tokenizer.encode_prompt(record["prefix"])) + answer)
        if not offsets:
            raise ValueError(f"{file} has no lines")
        self.offsets = torch.tensor(offsets).share_memory_()

    def __len__(self) -> int:
        return len(self.offsets)

    def longest(self) -> int:
        """Most text tokens T of any sample."""
        return self._longest

    def name(self, item: int) -> str:
        """The image's name as the line has it."""
        return self._record(item)["image"]

    def _record(self, item: int) -> dict:
        with open(self.file, "rb") as file:  # anew: processes would share the position of an open one
            file.seek(self.offsets[item])
            return json.loads(file.readline())

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """A sample. Raises ValueError for an image that is unreadable."""
        draw, item = key
        rng = np.random.default_rng([self.seed, draw])
        record = self._record(item)
        image = load_image(self.images / record["image"])
        if self.augment and rng.random() < JITTER:
            image = jitter(rng, image)
        right = answers(record)
        target = text_target(self.tokenizer, right[rng.integers(len(right))])
        return answer_sample(square(image, self.size), self.tokenizer.encode_prompt(record["prefix"]), target)

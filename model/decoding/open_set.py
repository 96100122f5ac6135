"""Open-set detection: classes by name, in words.

"detect cat ; traffic light" is answered by "<loc...> cat ; <loc...> traffic light"; "segment cat", by
"<loc...><seg...> cat". Any class that has a name can be asked for, a few in a prompt; the answers to all
prompts are put together.
"""

import difflib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from model.config import PaliGemmaConfig
from model.decoding.batches import fitting_batch
from model.decoding.boxes import ParsedBox, box_prompt, check_label, parse_answer
from model.decoding.closed_set import PROMPT
from model.decoding.detections import KEEP_ALL, Detections, Selection
from model.decoding.generate import Prompter
from model.decoding.masks import MaskCodec
from model.decoding.photographs import are_photographs
from model.io.tokenizer import Tokenizer

CLASSES_PER_PROMPT = 8
MAX_ANSWER_TOKENS = 200
NAME_TOKENS = 8  # of a class in a prompt, to estimate how long prompts are


def class_names(classes: str | Sequence[str], config: PaliGemmaConfig) -> tuple[str, ...]:
    """The names in "cat ; traffic light" or in a list, each once and each known to the model. "all": the
    checkpoint's own classes."""
    if isinstance(classes, str) and classes.strip() == "all":
        return config.classes
    parts = classes.split(";") if isinstance(classes, str) else classes
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f'{classes!r}: classes are given by their names, such as ["cat"]')
    names = ()
    for name in (" ".join(part.split()) for part in parts):
        if name and name.casefold() not in map(str.casefold, names):
            names += (name,)
    if not names:
        raise ValueError(f'{classes!r} names no class; write, for example, "cat ; traffic light"')
    for name in names:
        check_label(name)
        if name not in config.classes and not config.open_vocabulary:
            near = difflib.get_close_matches(name, config.classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "an official checkpoint may"
            raise ValueError(
                f"{name!r} is none of the {len(config.classes)} classes that this model knows; {hint}"
            )
    return names


def check_prompt(prompt: str, config: PaliGemmaConfig) -> None:
    """Refuse a prompt that asks for the boxes of classes that the model cannot know."""
    verb, _, names = prompt.partition(" ")
    if verb in ("detect", "segment") and prompt != PROMPT:
        class_names(names, config)


@dataclass(frozen=True)
class ScoredObject:
    """An object of an answer, its class among those asked for, and its score."""

    box: ParsedBox
    class_id: int
    score: float


def score_objects(
    tokenizer: Tokenizer, tokens: list[int], log_p: list[float], classes: Sequence[str]
) -> list[ScoredObject]:
    """The objects of an answer that are of the classes asked for, given its tokens and log-probabilities.

    A score is the geometric mean of the probabilities of the label's tokens. A box without a label is of the
    class if only one was asked for, and scored by all of its tokens; otherwise it is ignored.
    """
    # Where each token ends in the text: a label's characters give the tokens that it consists of.
    ends = [len(tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]
    ids = {name.casefold(): i for i, name in enumerate(classes)}
    objects = []
    for box in parse_answer(tokenizer.decode(tokens)):
        unlabelled = 0 if not box.label and len(classes) == 1 else None
        class_id = ids.get(box.label.casefold(), unlabelled)
        if class_id is not None:
            start, end = box.span
            own = log_p[bisect_right(ends, start) : bisect_right(ends, end - 1) + 1]
            objects.append(ScoredObject(box, class_id, math.exp(sum(own) / len(own))))
    return objects


class OpenSetDetector:
    """Detects classes given by name; with a mask codec it segments them.

    per_prompt: most classes of a prompt. Checkpoints are taught to segment one at a time.
    """

    def __init__(
        self,
        prompter: Prompter,
        classes: Sequence[str],
        per_prompt: int = 1,
        selection: Selection = KEEP_ALL,
        codec: MaskCodec | None = None,
    ):
        self.prompter, self.model, self.selection, self.codec = prompter, prompter.model, selection, codec
        self.classes = tuple(classes)
        ids = range(len(self.classes))
        self.chunks = [ids[start : start + per_prompt] for start in ids[::per_prompt]]  # of each prompt

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        names = [[self.classes[c] for c in chunk] for chunk in self.chunks]
        prompts = [box_prompt(chunk, masks=self.codec is not None) for chunk in names]
        answers = self.prompter(images, [(i, prompt) for i in range(len(images)) for prompt in prompts])
        per_image, photographs = len(prompts), are_photographs(self.model, len(images))
        return [
            self._select(image.size, answers[i * per_image : (i + 1) * per_image], names, photographs[i])
            for i, image in enumerate(images)
        ]

    def fitting_batch(self) -> int:
        """How many images to detect in at a time."""
        return fitting_batch(self.model, NAME_TOKENS * len(self.chunks[0]), self.prompter.max_tokens)

    def _select(
        self,
        size: tuple[int, int],
        answers: list[tuple[list[int], list[float]]],
        names: list[list[str]],
        photograph: bool,
    ) -> Detections:
        """The answers to an image's prompts, and the classes that each asked for -> what is found."""
        found = [
            (chunk[one.class_id], one)
            for (tokens, log_p), chunk, asked in zip(answers, self.chunks, names, strict=True)
            for one in score_objects(self.model.tokenizer, tokens, log_p, asked)
            if one.box.seg or self.codec is None  # an object without its 16 codes cannot be segmented
        ]
        masks = None
        if self.codec:
            codes = torch.tensor([one.box.seg for _, one in found])
            masks = self.codec.decode(codes).numpy() if found else []
        return self.selection(
            size,
            self.classes,
            locs=np.array([one.box.locs for _, one in found]).reshape(-1, 4),
            scores=np.array([one.score for _, one in found]),
            class_ids=np.array([class_id for class_id, _ in found], np.int64),
            tokens=np.array([token for tokens, _ in answers for token in tokens], np.int64),
            masks=masks,
            photograph=photograph,
        )

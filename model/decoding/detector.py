"""Detection of PIL images with a loaded model.

Closed-set: "detect all classes" is answered by location and class tokens (closed_set.py). Open-set, in words:
"detect cat ; traffic light" is answered by "<loc...> cat ; <loc...> traffic light"; "segment cat", by
"<loc...><seg...> cat". Any class that has a name can be asked for, a few in a prompt; the answers to all
prompts are put together.

Axes: P image tokens, D decoder width, n boxes.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import PaliGemma
from model.decoding.boxes import ParsedBox, areas, box_prompt, locs_to_boxes, nms, parse_answer
from model.decoding.closed_set import GROUP, GroupDecoder
from model.decoding.generate import GREEDY, Sampling, collect_answers, generate
from model.decoding.masks import MaskCodec, paste_mask
from model.io.image import square, to_network
from model.io.tokenizer import Tokenizer

MAX_BATCH = 16, 64  # images, on a CPU and on a GPU


@dataclass
class Detections:
    """Of one image, best first.

    boxes float64 [n, 4], x0, y0, x1, y1 in its pixels; scores [n]; labels int64 [n]; tokens, raw ids; masks
    bool [H, W], one a box, of segmentation.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    masks: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Selection:
    """Which boxes of an image are kept. nms_iou 1 keeps overlapping ones; min_size: shortest side, pixels."""

    score_threshold: float = 0.0
    nms_iou: float = 1.0
    min_size: float = 0.0

    def __call__(
        self,
        image: Image.Image,
        locs: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        tokens: np.ndarray,
        masks: Sequence[np.ndarray] | None = None,
    ) -> Detections:
        """locs [n, 4], scores [n], labels int64 [n], masks as model.decoding.masks.paste_mask takes them, and
        all raw ids of an image."""
        boxes = locs_to_boxes(locs, *image.size)
        shortest = (boxes[:, 2:] - boxes[:, :2]).min(-1)
        good = (scores >= self.score_threshold) & (areas(boxes) > 0) & (shortest >= self.min_size)
        kept = np.flatnonzero(good)
        kept = kept[nms(boxes[kept], scores[kept], labels[kept], self.nms_iou)]
        if masks is not None:
            masks = [paste_mask(masks[i], boxes[i], *image.size) for i in kept]
        return Detections(boxes[kept], scores[kept], labels[kept], tokens, masks)


KEEP_ALL = Selection()


class Detector:
    """Closed-set: "detect all classes"."""

    def __init__(self, decode: GroupDecoder, selection: Selection = KEEP_ALL):
        self.decode, self.model, self.selection = decode, decode.model, selection

    @property
    def classes(self) -> tuple[str, ...]:
        return self.decode.language.classes

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        answer = self.decode(network_images(self.model, images))
        columns = answer.locs, answer.scores, answer.labels, answer.tokens, answer.live
        rows = zip(images, *(column.cpu().numpy() for column in columns), strict=True)
        return [
            self.selection(image, locs[live], scores[live], labels[live], tokens)
            for image, locs, scores, labels, tokens, live in rows
        ]

    def fitting_batch(self) -> int:
        """A batch size that memory holds."""
        return fitting_batch(self.model, len(self.decode.language.prompt), GROUP * self.decode.groups)


def network_images(model: PaliGemma, images: list[Image.Image]) -> torch.Tensor:
    """Upright RGB images of any sizes -> float32 [B, 3, S, S] where the model is."""
    size, device = model.config.vision.image_size, model.projector.weight.device
    return torch.stack([to_network(square(image, size)) for image in images]).to(device)


def fitting_batch(model: PaliGemma, prompt: int, answer: int) -> int:
    """A batch size that half of the free memory holds; beyond MAX_BATCH nothing is gained.

    prompt, answer: their lengths in tokens.
    """
    weight, text, vision = model.projector.weight, model.config.text, model.config.vision
    if weight.is_cuda:
        free = torch.cuda.mem_get_info(weight.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    T = vision.tokens + prompt
    cached = 2 * text.layers * text.kv_heads * text.head_dim * (T + answer)
    scores = 3 * max(text.heads * T**2, vision.heads * vision.tokens**2)  # before, under and behind softmax
    mlp = 3 * max(text.mlp * T, vision.mlp * vision.tokens)
    image = weight.element_size() * (cached + max(scores, mlp)) + 4 * 3 * vision.image_size**2
    return max(1, min(MAX_BATCH[weight.device.type == "cuda"], free // (2 * image)))


# ---- classes by name -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """An object of an answer, its class among those asked for, and its score."""

    box: ParsedBox
    label: int
    score: float


def scored(tokenizer: Tokenizer, tokens: list[int], log_p: list[float], asked: Sequence[str]) -> list[Scored]:
    """The objects of an answer, given its tokens and their log-probabilities; of the classes asked for only.

    A score is the geometric mean of the probabilities of the label's tokens. A box without a label belongs to
    the class if only one was asked for, and is scored by all of its tokens; otherwise it is passed over.
    """
    ends = [len(tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]  # of each token in the text
    places = {name.casefold(): i for i, name in enumerate(asked)}
    found = []
    for box in parse_answer(tokenizer.decode(tokens)):
        label = places.get(box.label.casefold(), 0 if not box.label and len(asked) == 1 else None)
        if label is not None:
            start, end = box.span
            own = log_p[bisect_right(ends, start) : bisect_right(ends, end - 1) + 1]
            found.append(Scored(box, label, math.exp(sum(own) / len(own))))
    return found


class Asker:
    """Puts prompts to images, in batches; each image is encoded once, whatever is asked about it."""

    def __init__(
        self,
        model: PaliGemma,
        tokenizer: Tokenizer,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.max_tokens, self.sampling = model, tokenizer, max_tokens, sampling
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, images: list[Image.Image], asked: list[tuple[int, str]]
    ) -> list[tuple[list[int], list[float]]]:
        """asked: (which image, prompt) -> tokens and log-probabilities of each answer."""
        with torch.inference_mode():
            image_tokens = self.model.encode(network_images(self.model, images))
        prompts = [self.tokenizer.encode_prompt(prompt) for _, prompt in asked]
        size, said = fitting_batch(self.model, max(map(len, prompts)), self.max_tokens), []
        for start in range(0, len(asked), size):
            of_batch = [image for image, _ in asked[start : start + size]]
            said += self._answers(image_tokens[of_batch], prompts[start : start + size])
        return said

    def _answers(self, image_tokens: Tensor, prompts: list[list[int]]):
        options = self.max_tokens, self.sampling, self.generator
        return collect_answers(self.model, generate(self.model, image_tokens, prompts, *options))


class OpenSetDetector:
    """Has the form of Detector, for classes given by name; with a mask codec it segments."""

    def __init__(
        self,
        ask: Asker,
        classes: Sequence[str],
        per_call: int = 1,
        selection: Selection = KEEP_ALL,
        codec: MaskCodec | None = None,
    ):
        """per_call: classes of a prompt, at most; checkpoints are taught to segment one at a time."""
        self.ask, self.model, self.selection, self.codec = ask, ask.model, selection, codec
        self.classes = tuple(classes)
        self.chunks = [range(i, min(i + per_call, len(classes))) for i in range(0, len(classes), per_call)]

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        names = [[self.classes[c] for c in chunk] for chunk in self.chunks]
        prompts = [box_prompt(of_call, masks=self.codec is not None) for of_call in names]
        said = self.ask(images, [(i, prompt) for i in range(len(images)) for prompt in prompts])
        count = len(prompts)
        return [
            self._select(image, said[i * count : (i + 1) * count], names) for i, image in enumerate(images)
        ]

    def fitting_batch(self) -> int:
        """Images that are worth reading together."""
        return fitting_batch(self.model, 8 * len(self.chunks[0]), self.ask.max_tokens)

    def _select(self, image: Image.Image, said, names) -> Detections:
        """said, names: the answer to each call, and what it asked for. To be segmented, an object needs its
        16 codes."""
        found = [
            (one.box.locs, one.score, chunk[one.label], one.box.seg)
            for (tokens, log_p), of_call, chunk in zip(said, names, self.chunks, strict=True)
            for one in scored(self.ask.tokenizer, tokens, log_p, of_call)
            if one.box.seg or self.codec is None
        ]
        locs, scores, labels, codes = zip(*found) if found else ((), (), (), ())
        raw = np.array([token for tokens, _ in said for token in tokens], np.int64)
        columns = np.array(locs).reshape(-1, 4), np.array(scores), np.array(labels, np.int64)
        masks = None
        if self.codec:
            masks = self.codec.decode(torch.tensor(codes)).numpy() if found else []
        return self.selection(image, *columns, raw, masks)

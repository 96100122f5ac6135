"""Detection of PIL images with a loaded model, and what all programs that read many images share."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model import PaliGemma
from model.decoding.boxes import areas, locs_to_boxes, nms
from model.decoding.closed_set import GroupDecoder
from model.decoding.groups import GROUP
from model.decoding.masks import place
from model.io.image import load_image, to_tensor

MAX_BATCH = 16, 64  # images, on a CPU and on a GPU
READERS = 4  # threads that decode image files


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
        """locs [n, 4], scores [n], labels int64 [n], masks as model.decoding.masks.place takes them, and
        all raw ids of an image."""
        boxes = locs_to_boxes(locs, *image.size)
        shortest = (boxes[:, 2:] - boxes[:, :2]).min(-1)
        good = (scores >= self.score_threshold) & (areas(boxes) > 0) & (shortest >= self.min_size)
        kept = np.flatnonzero(good)
        kept = kept[nms(boxes[kept], scores[kept], labels[kept], self.nms_iou)]
        if masks is not None:
            masks = [place(masks[i], boxes[i], *image.size) for i in kept]
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
    return torch.stack([to_tensor(image, size) for image in images]).to(device)


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


def check_json(file: Path | None) -> None:
    """Raise ValueError, before the work, if --json FILE cannot be written after it."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--json {file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")


def read_ahead(items: Iterable, size: int) -> Iterator[list[tuple[Any, Future]]]:
    """Batches of (file, future of its image), the image being read in the background while the caller works.

    The future's result() is the image, or raises the ValueError of load_image.
    """
    with ThreadPoolExecutor(READERS) as pool:
        items, waiting = iter(items), deque()
        while True:
            more = islice(items, 2 * size - len(waiting))
            waiting.extend((item, pool.submit(load_image, item)) for item in more)
            if not waiting:
                return
            yield [waiting.popleft() for _ in range(min(size, len(waiting)))]

"""Closed-set detection of PIL images: what detect.py and evaluate.py share."""

import argparse
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from infer.loading import add_model_arguments, load_model
from model.boxes import areas, locs_to_boxes, nms
from model.decode import EarlyStop, GroupDecoder
from model.groups import GROUP, ClosedSet
from model.image import load_image, to_tensor

MAX_BATCH = 16, 64  # images, on a CPU and on a GPU
READERS = 4  # threads that decode image files


@dataclass
class Detections:
    """Of one image, best first.

    boxes float64 [n, 4], x0, y0, x1, y1 in its pixels; scores [n]; labels int64 [n]; tokens [G, 5], raw ids.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray


class Detector:
    def __init__(
        self,
        decode: GroupDecoder,
        score_threshold: float = 0.0,
        nms_iou: float = 1.0,
        min_size: float = 0.0,
    ):
        """min_size: shortest side of a box in pixels of its image."""
        self.decode, self.model = decode, decode.model
        self.score_threshold, self.nms_iou, self.min_size = score_threshold, nms_iou, min_size

    @property
    def classes(self) -> tuple[str, ...]:
        return self.decode.language.classes

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        size, device = self.model.config.vision.image_size, self.model.projector.weight.device
        answer = self.decode(torch.stack([to_tensor(image, size) for image in images]).to(device))
        columns = answer.locs, answer.scores, answer.labels, answer.tokens, answer.live
        rows = zip(images, *(column.cpu().numpy() for column in columns), strict=True)
        return [self._select(*row) for row in rows]

    def fitting_batch(self) -> int:
        """A batch size that half of the free memory holds; beyond MAX_BATCH nothing is gained."""
        weight, config = self.model.projector.weight, self.model.config
        if weight.is_cuda:
            free = torch.cuda.mem_get_info(weight.device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text, vision = config.text, config.vision
        T = vision.tokens + len(self.decode.language.prompt)
        cached = 2 * text.layers * text.kv_heads * text.head_dim * (T + GROUP * self.decode.groups)
        scores = 3 * max(
            text.heads * T**2, vision.heads * vision.tokens**2
        )  # before, under and behind softmax
        mlp = 3 * max(text.mlp * T, vision.mlp * vision.tokens)
        image = weight.element_size() * (cached + max(scores, mlp)) + 4 * 3 * vision.image_size**2
        return max(1, min(MAX_BATCH[weight.device.type == "cuda"], free // (2 * image)))

    def _select(self, image, locs, scores, labels, tokens, live) -> Detections:
        boxes = locs_to_boxes(locs, *image.size)
        shortest = (boxes[:, 2:] - boxes[:, :2]).min(-1)
        good = (scores >= self.score_threshold) & (areas(boxes) > 0) & (shortest >= self.min_size) & live
        boxes, scores, labels = boxes[good], scores[good], labels[good]
        kept = nms(boxes, scores, labels, self.nms_iou)
        return Detections(boxes[kept], scores[kept], labels[kept], tokens)


def add_detection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the model and of decoding, for every detection program."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--groups", type=int, help="boxes decoded an image instead of the checkpoint's number")
    add(
        "--nms-iou",
        type=float,
        default=0.5,
        help="of two boxes of a class that overlap more, the better stays; 1: off",
    )
    add("--min-size", type=float, default=0.0, help="drop boxes with a side shorter than this, in pixels")
    add(
        "--noise-feedback",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="feed the noise token back where it is likeliest, instead of the best class",
    )
    add(
        "--early-stop",
        nargs=2,
        type=float,
        metavar=("P", "K"),
        help="stop an image behind K boxes in a row whose noise probability exceeds P",
    )
    add(
        "--batch-size",
        type=int,
        help="pictures decoded together (default: what memory holds, at most 16 or 64)",
    )


def check_json(file: Path | None) -> None:
    """Raise ValueError, before the work, if --json FILE cannot be written after it."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--json {file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")


def load_detector(args: argparse.Namespace, score_threshold: float) -> Detector:
    """The detector that the arguments ask for. Raises ValueError for anything a user can get wrong."""
    model, tokenizer = load_model(args)
    for name in ("groups", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    stop = EarlyStop(*args.early_stop) if args.early_stop else None
    language = ClosedSet.of(model.config, tokenizer)
    decode = GroupDecoder(model, language, args.groups, args.noise_feedback, early_stop=stop)
    return Detector(decode, score_threshold, args.nms_iou, args.min_size)


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

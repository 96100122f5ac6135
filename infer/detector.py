"""Closed-set detection of PIL images: what detect.py and evaluate.py share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import PaliGemma
from model.boxes import areas, locs_to_boxes, nms
from model.groups import ClosedSet, decode_groups
from model.hub import resolve
from model.image import to_tensor
from model.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = 1 << 30  # bytes of weights up to which float32 is the faster choice on a CPU


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
        model: PaliGemma,
        tokenizer: Tokenizer,
        groups: int | None = None,
        score_threshold: float = 0.0,
        nms_iou: float = 1.0,
        min_size: float = 0.0,
        noise_feedback: bool = False,
    ):
        """groups: boxes decoded an image, None for the checkpoint's; min_size: shortest side in pixels."""
        self.model, self.language = model, ClosedSet.of(model.config, tokenizer)
        self.groups, self.noise_feedback = groups, noise_feedback
        self.score_threshold, self.nms_iou, self.min_size = score_threshold, nms_iou, min_size

    @property
    def classes(self) -> tuple[str, ...]:
        return self.language.classes

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        size, device = self.model.config.vision.image_size, self.model.projector.weight.device
        inputs = torch.stack([to_tensor(image, size) for image in images]).to(device)
        answer = decode_groups(self.model, inputs, self.language, self.groups, self.noise_feedback)
        columns = (
            column.cpu().numpy() for column in (answer.locs, answer.scores, answer.labels, answer.tokens)
        )
        return [self._select(image, *row) for image, *row in zip(images, *columns, strict=True)]

    def _select(self, image, locs, scores, labels, tokens) -> Detections:
        boxes = locs_to_boxes(locs, *image.size)
        shortest = (boxes[:, 2:] - boxes[:, :2]).min(-1)
        good = (scores >= self.score_threshold) & (areas(boxes) > 0) & (shortest >= self.min_size)
        boxes, scores, labels = boxes[good], scores[good], labels[good]
        kept = nms(boxes, scores, labels, self.nms_iou)
        return Detections(boxes[kept], scores[kept], labels[kept], tokens)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose and load a model, and those of decoding, for every detection program."""
    add = parser.add_argument
    add("--model", default="nano", help="a folder, a hub id (owner/name or owner/name@revision), or nano")
    add("--adapter", metavar="PATH_OR_ID", help="a LoRA adapter for it, as PEFT or train.py writes them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 for small models on a CPU")
    add("--attn-cap", type=float, help="soft cap of the attention scores instead of the checkpoint's; 0: off")
    add("--final-cap", type=float, help="soft cap of the logits instead of the checkpoint's; 0: off")
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
    add("--seed", type=int, default=0, help="of torch's random numbers; greedy decoding draws none")


def check_json(file: Path | None) -> None:
    """Raise ValueError, before the work, if --json FILE cannot be written after it."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--json {file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")


def load_detector(args: argparse.Namespace, score_threshold: float) -> Detector:
    """The detector that the arguments ask for. Raises ValueError for anything a user can get wrong."""
    torch.manual_seed(args.seed)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); try --device cpu") from error
    folder = resolve(args.model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    small_cpu = device == "cpu" and weights < SMALL
    dtype = DTYPES.get(args.dtype) or (torch.float32 if small_cpu else torch.bfloat16)
    overrides = dict(attn_cap=args.attn_cap, final_cap=args.final_cap)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    source = dict(dtype=dtype, device=device, adapter=args.adapter)
    model = PaliGemma.from_pretrained(str(folder), **source, **overrides)
    if args.groups is not None and args.groups < 1:
        raise ValueError(f"--groups {args.groups}: at least one box must be decoded")
    return Detector(
        model,
        Tokenizer(folder),
        args.groups,
        score_threshold,
        args.nms_iou,
        args.min_size,
        args.noise_feedback,
    )

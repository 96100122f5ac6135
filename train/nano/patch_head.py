"""A throw-away detection head on the image tokens: nano's stand-in for SigLIP's pre-training.

An official checkpoint's encoder has seen billions of captioned images before it meets a box: its tokens are
like the words for what they show. Nano's has seen nothing, and a decoder that reads noise learns little; so
each image token is also asked directly which class's name it is like, and where the box of the object under
its patch is. Dense and easy to learn; dropped after training.

Axes: B batch, P image tokens, C classes, D decoder width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.practice.scenes import Scene

MIN_COVER = 0.2  # share of a patch that an object must own to be its label


def patch_targets(scene: Scene, patch: int, background: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the object that owns most of a patch: labels int64 [P], boxes float32 [P, 4] as fractions."""
    side = scene.owner.shape[0] // patch
    tiles = scene.owner.reshape(side, patch, side, patch)
    ids = np.arange(len(scene.labels))
    cover = np.zeros((side * side, 1))
    if len(ids):
        cover = (tiles[..., None] == ids).mean((1, 3)).reshape(side * side, -1)
    best = cover.argmax(1)
    seen = cover[np.arange(len(cover)), best] >= MIN_COVER
    labels = np.full(side * side, background, np.int64)
    boxes = np.zeros((side * side, 4), np.float32)
    labels[seen] = scene.labels[best[seen]]
    boxes[seen] = scene.boxes[best[seen]] / scene.owner.shape[0]
    return labels, boxes


class PatchHead(nn.Module):
    def __init__(self, width: int, names: list[list[int]], tokens: int, hidden: int = 256):
        """names: the token ids of each class's name; tokens: P."""
        super().__init__()
        self.box = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 4)
        )
        self.sharpness = nn.Parameter(torch.tensor(10.0).log())  # of likeness, as in CLIP and SigLIP
        self.background = nn.Parameter(torch.zeros(1))  # the likeness that stands for no class
        lengths = torch.tensor([0, *map(len, names)])
        self.register_buffer("pieces", torch.tensor(sum(names, [])), persistent=False)
        self.register_buffer("starts", lengths.cumsum(0)[:-1], persistent=False)
        side = round(tokens**0.5)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        centres = (torch.stack((x, y), -1).reshape(-1, 2) + 0.5) / side
        self.register_buffer("centres", centres.repeat(1, 2), persistent=False)  # [P, 4]

    def forward(self, image_tokens: Tensor, embed: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Image tokens [B, P, D], the embedding [vocab, D], labels [B, P] (C is background), boxes [B, P, 4]
        -> cross-entropy + L1 and GIoU of boxes, a mean over all patches: equal parts of a batch have losses
        whose mean is that of the batch."""
        names = F.embedding_bag(self.pieces, embed, self.starts, mode="mean")  # [C, D]
        likeness = F.normalize(image_tokens.float(), dim=-1) @ F.normalize(names.float(), dim=-1).mT
        likeness = (
            torch.cat((likeness, self.background.expand(*labels.shape, 1)), dim=-1) * self.sharpness.exp()
        )
        class_loss = F.cross_entropy(likeness.float().flatten(0, 1), labels.flatten())
        own = image_tokens.to(self.box[1].weight.dtype)  # an adapter's base may be in bfloat16
        guess = self.box(own).float() * 0.25 + self.centres  # a box starts at its patch
        seen = (labels != len(self.starts)).float()
        per_patch = 5 * (guess - boxes).abs().sum(-1) + 1 - _giou(guess, boxes)
        return class_loss + (per_patch * seen).mean()


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU [...] of paired boxes [..., 4] (arXiv 1902.09630)."""

    def area(lo, hi):
        return (hi - lo).clamp(min=0).prod(-1)

    shared = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])).clamp(min=1e-6)
    union = (area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared).clamp(min=1e-6)
    return shared / union - (hull - union) / hull

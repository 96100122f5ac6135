"""A throw-away detection head on the image tokens: nano's stand-in for SigLIP's pre-training.

An official checkpoint's encoder has seen billions of captioned images before it meets a box: its tokens
resemble the words for what they show. Nano's encoder has seen nothing, and a decoder that reads noise learns
little. So each image token is also trained to resemble the name of the class under its patch and to predict
the box of the object there, which is a dense signal and easy to learn. The head is dropped after training.

Axes: B batch, P image tokens, C classes, D decoder width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchHead(nn.Module):
    def __init__(self, width: int, names: list[list[int]], tokens: int):
        """names: the token ids of each class's name; tokens: P."""
        super().__init__()
        self.box = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 4))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())  # of similarities, as in CLIP and SigLIP
        self.background = nn.Parameter(torch.zeros(1))  # the similarity of "no class"
        lengths = torch.tensor([0, *map(len, names)])
        self.register_buffer("pieces", torch.tensor(sum(names, [])), persistent=False)
        self.register_buffer("starts", lengths.cumsum(0)[:-1], persistent=False)
        side = round(tokens**0.5)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        centres = (torch.stack((x, y), -1).reshape(-1, 2) + 0.5) / side
        self.register_buffer("centres", centres.repeat(1, 2), persistent=False)  # [P, 4]

    def forward(self, image_tokens: Tensor, embed: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Image tokens [B, P, D], the embedding [vocab, D], labels [B, P] (C is background), boxes [B, P, 4]
        -> cross-entropy of the labels + L1 and GIoU of the boxes, a mean over all patches, so that a batch's
        loss is the mean of its micro-batches' losses."""
        names = F.embedding_bag(self.pieces, embed, self.starts, mode="mean")  # [C, D]
        similarity = F.normalize(image_tokens.float(), dim=-1) @ F.normalize(names.float(), dim=-1).mT
        similarity = torch.cat((similarity, self.background.expand(*labels.shape, 1)), dim=-1)  # [B, P, C+1]
        logits = similarity * self.log_scale.exp()
        class_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        if not torch.is_autocast_enabled(image_tokens.device.type):
            image_tokens = image_tokens.to(self.box[1].weight.dtype)  # an adapter's base may be in bfloat16
        predicted = self.box(image_tokens).float() * 0.25 + self.centres  # starts at the patch
        is_object = (labels != len(self.starts)).float()
        box_loss = 5 * (predicted - boxes).abs().sum(-1) + 1 - _giou(predicted, boxes)  # [B, P]
        return class_loss + (box_loss * is_object).mean()


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU [...] of paired boxes [..., 4] (arXiv 1902.09630)."""

    def area(lo, hi):
        return (hi - lo).clamp(min=0).prod(-1)

    shared = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])).clamp(min=1e-6)
    union = (area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared).clamp(min=1e-6)
    return shared / union - (hull - union) / hull

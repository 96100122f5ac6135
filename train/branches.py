"""Teaching closed-set detection in parallel: every object is a branch of its own after image and prompt.

So there is no order of objects to learn, only four locations and a class for each of them. The class token
must tell good boxes from bad ones, and learns it from the model's own boxes, drawn from the current weights.
The class of such a box is, with probability f, that of the object that it overlaps most, and else noise; f is
the share of COCO's ten IoU thresholds that the overlap reaches. So a score becomes the precision to be
expected of this very box, and noise is what this very model gets wrong, which cannot be made up. Two boxes of
one object both keep their f: a branch sees no other, and NMS removes the duplicates.

The noise boxes of answers in sequence can be the model's own, too (own_noise).

Axes: B batch, M branches, K own boxes, N objects, D width, R = 1,024 coordinates; in sequence, G groups of an
answer and T text positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import PaliGemma
from model.decoding.closed_set import GROUP, ClosedSet, edges
from model.decoding.generate import draw
from model.io.tokenizer import LOCS
from train.data.samples import NOTHING

THRESHOLDS = 0.5, 0.95, 10  # of COCO's mAP: the first, the last, how many


@torch.no_grad()
def own_boxes(model: PaliGemma, language: ClosedSet, image_tokens: Tensor, uniform: Tensor) -> Tensor:
    """Boxes drawn from the model's density over boxes, at temperature 1: bins int64 [B, K, 4].

    image_tokens [B, P, D]; uniform [B, K, 4]: random numbers in [0, 1).
    """
    (B, K, _), training = uniform.shape, model.training
    model.eval()  # without an adapter's dropout: boxes are drawn as they will be when detecting
    prompt = torch.tensor(language.prompt, device=uniform.device).expand(B, -1)
    cache = model.new_cache(B, prompt.shape[1] + (GROUP - 2) * K)  # the last coordinate is not fed back
    hidden = model.prefill(image_tokens, prompt, cache)[:, None].expand(-1, K, -1)  # [B, K, D]
    roots = torch.arange(K, device=uniform.device).expand(B, K)
    bins, parents = [], roots[:, :0]
    for depth in range(GROUP - 1):
        if depth:  # feed the last coordinates: the first of a branch is its own parent, others follow on
            parents = torch.cat((parents, roots + max(depth - 2, 0) * K), dim=1)
            hidden = model.step_branches(bins[-1] + language.loc0, parents, cache)
        p = model.decoder.logits(hidden, language.loc0, language.loc0 + LOCS).softmax(-1)  # [B, K, R]
        bins.append(draw(p.flatten(0, 1), uniform[..., depth].flatten()).view(B, K))
    model.train(training)
    return torch.stack(bins, dim=-1)


def expected_class(boxes: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """The class int64 [B, K] of the object that each box overlaps most, and f [B, K], its probability.

    boxes int64 [B, K, 4]: bins; objects int64 [B, N, 5]: bins and class number, which is NOTHING in padding.
    """
    there = objects[..., 4] != NOTHING
    overlap = _iou(boxes, objects[..., :4]) * there[:, None]  # [B, K, N]
    best, which = F.pad(overlap, (0, 1)).max(-1)  # [B, K]; the column of zeros is for images without objects
    thresholds = torch.linspace(*THRESHOLDS, device=boxes.device)
    reached = (best[..., None] >= thresholds - 1e-6).float().mean(-1)
    return F.pad(objects[..., 4], (0, 1)).gather(1, which).clamp(min=0), reached


@torch.no_grad()
def own_noise(
    model: PaliGemma, language: ClosedSet, image_tokens: Tensor, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Answers in sequence, with the model's own boxes in place of their made-up noise boxes.

    batch: text and labels int64 [B, T], uniform [B, G, 5]: returned with another text and other labels. The
    label of a box is the class of its object with probability f. Fed is that class if f is above 0, as the
    likeliest class is at inference; else what was fed for the box that it replaces.
    """
    text, labels, uniform = batch["text"], batch["labels"], batch["uniform"]
    start = len(language.prompt)
    end = start + GROUP * uniform.shape[1]
    fed = text[:, start:end].unflatten(1, (-1, GROUP))  # [B, G, 5]
    taught = labels[:, start - 1 : end - 1].unflatten(1, (-1, GROUP))
    noise = taught[..., 4:] == language.noise  # [B, G, 1]
    numbers = torch.where(noise, NOTHING, taught[..., 4:] - language.class0)
    boxes = own_boxes(model, language, image_tokens, uniform[..., :4])
    number, f = expected_class(boxes, torch.cat((taught[..., :4] - language.loc0, numbers), dim=-1))

    def with_boxes(groups: Tensor, classes: Tensor) -> Tensor:
        own = torch.cat((boxes + language.loc0, classes[..., None]), dim=-1)
        return torch.where(noise, own, groups).flatten(1)

    classes = number + language.class0
    fed = with_boxes(fed, torch.where(f > 0, classes, fed[..., 4]))
    taught = with_boxes(taught, torch.where(uniform[..., 4] < f, classes, language.noise))
    return batch | dict(
        text=torch.cat((text[:, :start], fed, text[:, end:]), dim=1),
        labels=torch.cat((labels[:, : start - 1], taught, labels[:, end - 1 :]), dim=1),
    )


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes in bins: [B, K, 4], [B, N, 4] -> [B, K, N]."""

    def area(low, high):
        return (high - low).clamp(min=0).prod(-1)

    a, b = edges(a).float()[:, :, None], edges(b).float()[:, None]
    shared = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared
    return shared / union.clamp(min=1e-6)


def branches_loss(
    model: PaliGemma,
    language: ClosedSet,
    image_tokens: Tensor,
    batch: dict[str, Tensor],
    smoothed: Tensor | None = None,
) -> Tensor:
    """The weighted sum of cross-entropies over the ids that each position allows.

    batch: the fields of a BranchTarget (train/data/targets.py), batched; smoothed: see location_losses.
    """
    branches, weights, own_weights = batch["branches"], batch["branch_weights"], batch["own_weights"]
    certainty = torch.ones_like(weights[..., 0])  # [B, M]: the probability of the class; noise has the rest
    if own_weights.shape[1]:
        boxes = own_boxes(model, language, image_tokens, batch["uniform"])
        label, precision = expected_class(boxes, batch["objects"])
        branches = torch.cat((branches, torch.cat((boxes, label[..., None]), dim=-1)), dim=1)
        weights = torch.cat((weights, F.pad(own_weights[..., None], (GROUP - 1, 0))), dim=1)
        certainty = torch.cat((certainty, precision), dim=1)

    prompt = torch.tensor(language.prompt, device=branches.device)
    bins, labels = branches[..., :4], branches[..., 4]  # [B, M, 4], [B, M]
    end, hidden = model.read_branches(image_tokens, prompt, bins + language.loc0)  # [B, D], [B, M, 4, D]
    before = torch.cat((end[:, None, None].expand_as(hidden[:, :, :1]), hidden[:, :, :3]), dim=2)
    taught = weights[..., :4] > 0  # indexing with it is a GPU sync
    logits = model.decoder.logits(before[taught], language.loc0, language.loc0 + LOCS)  # [n, R]
    loss = (location_losses(logits, bins[taught], smoothed) * weights[..., :4][taught]).sum()

    logits = model.decoder.logits(hidden[:, :, 3], language.class0, language.noise + 1)  # [B, M, classes + 1]
    log_p = logits.log_softmax(-1)
    of_class, of_noise = log_p.gather(-1, labels[..., None])[..., 0], log_p[..., -1]
    return loss - ((certainty * of_class + (1 - certainty) * of_noise) * weights[..., 4]).sum()


def smoothed_locations(sigma: float) -> Tensor:
    """float32 [R, R]: row i is the target for bin i, a Gaussian around it with a sigma in bins."""
    bins = torch.arange(LOCS, dtype=torch.float32)
    rows = torch.exp(-0.5 * ((bins - bins[:, None]) / sigma) ** 2)
    return rows / rows.sum(-1, keepdim=True)


def location_losses(logits: Tensor, bins: Tensor, smoothed: Tensor | None) -> Tensor:
    """Cross-entropies [n] of logits [n, R] against bins int64 [n], or against their rows of `smoothed`."""
    return F.cross_entropy(logits, bins if smoothed is None else smoothed[bins], reduction="none")

"""What a step of training minimises: the loss of the answers, and of the helper head on the image tokens.

Logits are computed at supervised positions only; for the closed-set loss, of the allowed ids only.
The losses of answers are weighted sums; Objective divides them by the weights of the whole batch, of which a
process or a micro-batch has only a part.

Axes: B batch, T text positions, n supervised positions, D width. hidden [B, T, D]; labels int64 [B, T]: the
token that follows each position; weights float32 [B, T], 0 where nothing is taught.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import PaliGemma
from model.decoding.closed_set import GROUP, ClosedSet
from model.gemma import Gemma
from model.io.image import to_network
from train.branches import branches_loss, location_losses, own_noise, smoothed_locations
from train.data.samples import TEXT_MULTIPLE
from train.nano.patch_head import PatchHead

CHUNK = 128  # positions whose full-vocabulary logits are in memory together, 132 MB for the official sizes


class Objective(nn.Module):
    """The loss of a batch: the model's, and that of the helper head on its image tokens."""

    def __init__(
        self,
        model: PaliGemma,
        language: ClosedSet | None,
        patch_weight: float = 0.0,
        micro_batches: int = 1,
        names: list[list[int]] | None = None,
        branches: ClosedSet | None = None,
        location_smoothing: float = 0.0,
    ):
        """language: texts are taught over the ids that it allows; None: over the whole vocabulary.
        patch_weight: of the helper head's loss; 0: no such head. micro_batches: of a step. names: the token
        ids of each class's name, which the helper head needs. branches: the language of answers in branches,
        if there are any. location_smoothing: in bins, see smoothed_locations; 0: none."""
        super().__init__()
        self.model, self.language, self.branches = model, language, branches
        self.patch_weight = patch_weight
        self.micro_batches = micro_batches
        width, image_tokens = model.config.text.width, model.config.vision.tokens
        smoothed = smoothed_locations(location_smoothing) if location_smoothing else None
        self.register_buffer("smoothed", smoothed, persistent=False)
        self.patch_head = PatchHead(width, names, image_tokens) if patch_weight else None

    def forward(self, batch: dict[str, Tensor], patch_only: bool = False) -> tuple[Tensor, Tensor]:
        """A micro-batch (train/data/samples.py) -> (what to minimise, the model's own loss for the log), both
        float32 []. batch["total"]: the sum of weights of the whole batch; each micro-batch is divided by it,
        so that their losses add up to the mean. patch_only: the loss of the helper head alone."""
        image_tokens = self.model.encode(to_network(batch["image"]))  # bytes until now; [B, P, D]
        patch_loss = batch["total"].new_zeros(())  # float32, as all losses are
        if self.patch_head is not None:
            embed = self.model.decoder.embed.weight
            patch_loss = self.patch_head(image_tokens, embed, batch["patch_labels"], batch["patch_boxes"])
            patch_loss = patch_loss / self.micro_batches  # a mean already, so the parts' means are averaged
        if patch_only:
            return patch_loss, patch_loss.detach()
        loss = batch["total"].new_zeros(())
        if "branches" in batch:
            loss = branches_loss(self.model, self.branches, image_tokens, batch, self.smoothed)
        # Texts are [B * prompts, T], those about an image next to each other.
        prompts = len(batch.get("text", ())) // len(image_tokens)
        if prompts == 1 and "branches" not in batch:
            if "uniform" in batch:
                batch = own_noise(self.model, self.language, image_tokens, batch)
            loss = loss + self._answers_loss(image_tokens, batch)
        elif prompts:
            # Several tasks, whose texts differ much in length. The shorter half of the batch is read
            # separately, so that it need not be padded to the length of the longer half.
            lengths = (batch["text"] != self.model.config.pad).sum(-1)
            for rows in lengths.argsort(stable=True).chunk(2):
                end = -(-int(lengths[rows].max()) // TEXT_MULTIPLE) * TEXT_MULTIPLE  # a GPU sync
                texts = {name: batch[name][rows, :end] for name in ("text", "labels", "weights")}
                texts["prefix_len"] = batch["prefix_len"][rows]
                loss = loss + self._answers_loss(image_tokens[rows // prompts], texts)
        loss = loss / batch["total"]
        return loss + self.patch_weight * patch_loss, loss.detach()

    def _answers_loss(self, image_tokens: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum over the answers, one for each row of image_tokens."""
        hidden = self.model.read(image_tokens, batch["text"], batch["prefix_len"])  # [B, T, D]
        labels, weights = batch["labels"], batch["weights"]
        if self.language is not None:
            return allowed_loss(self.model.decoder, hidden, labels, weights, self.language, self.smoothed)
        return vocabulary_loss(self.model.decoder, hidden, labels, weights)


def allowed_loss(
    decoder: Gemma,
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    language: ClosedSet,
    smoothed: Tensor | None = None,
) -> Tensor:
    """Closed-set: cross-entropy over the ids allowed at each position, a weighted sum. The eos after the last
    group is the only id allowed there, so it teaches nothing. smoothed: see location_losses."""
    total = weights.new_zeros((), dtype=torch.float32)
    for slot in (0, GROUP - 1):  # coordinates, whose four slots allow the same ids, and the class
        first, last = language.allowed(slot)
        chosen = (weights > 0) & (labels >= first) & (labels < last)  # [B, T]; indexing with it is a GPU sync
        logits = decoder.logits(hidden[chosen], first, last)  # [n, last - first]
        losses = location_losses(logits, labels[chosen] - first, None if slot else smoothed)
        total = total + (losses * weights[chosen]).sum()  # no matmul: autocast would round it
    return total


def vocabulary_loss(decoder: Gemma, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy over the whole vocabulary, a weighted sum, by chunks of positions."""
    chosen = weights > 0  # [B, T]
    return ChunkedCrossEntropy.apply(
        decoder.embed.weight, decoder.config.final_cap, hidden[chosen], labels[chosen], weights[chosen]
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of `softcap(hidden @ embed.T)`, for n positions of a huge vocabulary.

    The gradient follows from the loss's own softmax, so it is computed with it: a chunk's logits are made
    once, used for both, and overwritten in place. What is kept is the gradient of hidden [n, D].
    """

    @staticmethod
    def forward(ctx, embed: Tensor, cap: float | None, hidden: Tensor, labels: Tensor, weights: Tensor):
        grad_hidden = torch.zeros_like(hidden)
        grad_embed = torch.zeros_like(embed) if ctx.needs_input_grad[0] else None
        loss = weights.new_zeros((), dtype=torch.float32)
        for h, label, weight, grad in zip(*(x.split(CHUNK) for x in (hidden, labels, weights, grad_hidden))):
            logits = F.linear(h, embed)
            x = logits.float()  # [chunk, vocab], overwritten at every line below
            tanh = x.div_(cap).tanh_().clone() if cap else None
            x = x.mul_(cap) if cap else x
            x -= x.amax(-1, keepdim=True)  # or exp would overflow
            chosen = x.gather(-1, label[:, None])[:, 0]  # [chunk]
            total = x.exp_().sum(-1)  # [chunk]
            loss += ((total.log() - chosen) * weight).sum()
            x *= (weight / total)[:, None]  # from here on the gradient: weight * (softmax - one-hot)
            x[torch.arange(len(label), device=x.device), label] -= weight
            if cap:
                x.addcmul_(x, tanh.square_(), value=-1)  # the cap's slope is 1 - tanh^2
            x = x.to(logits.dtype)
            grad.copy_(x @ embed)
            if grad_embed is not None:
                grad_embed += x.T @ h
        ctx.save_for_backward(grad_hidden, grad_embed)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        of_hidden, of_embed = ctx.saved_tensors
        return None if of_embed is None else grad * of_embed, None, grad * of_hidden, None, None

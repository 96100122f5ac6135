"""What a step of training minimises: the loss of the answers, and of the helper head on the image tokens."""

from torch import Tensor, nn

from model import PaliGemma
from model.decoding.closed_set import ClosedSet
from model.io.image import to_network
from train.data.samples import ROUND
from train.loss import allowed_loss, vocabulary_loss
from train.nano.patch_head import PatchHead


class Objective(nn.Module):
    """The loss of a batch: the model's, and that of the helper head on its image tokens."""

    def __init__(
        self,
        model: PaliGemma,
        language: ClosedSet | None,
        patch_weight: float = 0.0,
        parts: int = 1,
        names: list[list[int]] | None = None,
    ):
        """language: the loss is over the ids that it allows; None: over the whole vocabulary. parts:
        micro-batches a step. names: the token ids of each class's name, for the helper head."""
        super().__init__()
        self.model, self.language, self.patch_weight, self.parts = model, language, patch_weight, parts
        config = model.config
        self.patch_head = PatchHead(config.text.width, names, config.vision.tokens) if patch_weight else None

    def forward(self, batch: dict[str, Tensor], patch_only: bool = False) -> tuple[Tensor, Tensor]:
        """A micro-batch -> (what to minimise, the model's own loss for the log). batch["total"]: the weights
        of the whole batch, by which each part is divided, so that the parts add up to its mean."""
        image_tokens = self.model.encode(to_network(batch["image"]))  # bytes until here: they travel cheaper
        patch_loss = image_tokens.new_zeros(())
        if self.patch_head is not None:
            targets = batch["patch_labels"], batch["patch_boxes"]
            patch_loss = self.patch_head(image_tokens, self.model.decoder.embed.weight, *targets) / self.parts
        if patch_only:
            return patch_loss, patch_loss.detach()
        prompts = len(batch["text"]) // len(image_tokens)  # of an image
        if prompts == 1:
            loss = self._answers_loss(image_tokens, batch)
        else:  # the shorter half need not be padded as far as the longer one
            lengths = (batch["text"] != self.model.config.pad).sum(-1)
            loss = image_tokens.new_zeros(())
            for rows in lengths.argsort(stable=True).chunk(2):
                end = -(-int(lengths[rows].max()) // ROUND) * ROUND
                texts = {name: batch[name][rows, :end] for name in ("text", "labels", "weights")}
                texts["prefix_len"] = batch["prefix_len"][rows]
                loss = loss + self._answers_loss(image_tokens[rows // prompts], texts)
        loss = loss / batch["total"]
        return loss + self.patch_weight * patch_loss, loss.detach()

    def _answers_loss(self, image_tokens: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum over the answers to a prompt for each row of the image tokens."""
        hidden = self.model.read(image_tokens, batch["text"], batch["prefix_len"])
        supervised = hidden, batch["labels"], batch["weights"]
        if self.language is not None:
            return allowed_loss(self.model.decoder, *supervised, self.language)
        return vocabulary_loss(self.model.decoder, *supervised)

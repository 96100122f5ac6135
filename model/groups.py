"""The closed-set language: `detect all classes` is answered by G groups of five tokens, and eos.

    <loc y0> <loc x0> <loc y1> <loc x1> <unused c>        c a class, or the last one: noise

The position in the group says which ids are allowed, so decoding looks at 1,024 or at classes + 1 logits
only. The answer always has G groups; the noise class counts in a class's probability, which is the box's
score, but is never the answer. Axes: B batch, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import PaliGemmaConfig
from model.head import choose
from model.paligemma import PaliGemma
from model.tokenizer import LOCS, Tokenizer

PROMPT = "detect all classes"
GROUP = 5  # tokens: four coordinates and a class


@dataclass(frozen=True)
class ClosedSet:
    """The ids of a checkpoint's closed-set language."""

    prompt: tuple[int, ...]  # bos, the words, newline
    loc0: int
    class0: int
    eos: int
    classes: tuple[str, ...]
    groups: int

    @classmethod
    def of(cls, config: PaliGemmaConfig, tokenizer: Tokenizer) -> "ClosedSet":
        prompt = tuple(tokenizer.encode_prompt(PROMPT))
        return cls(prompt, tokenizer.loc0, tokenizer.unused0, tokenizer.eos, config.classes, config.groups)

    @property
    def noise(self) -> int:
        """The id of the noise class, right after the real ones."""
        return self.class0 + len(self.classes)

    def allowed(self, position: int) -> tuple[int, int]:
        """First and last + 1 of the ids allowed at a position of the answer (0 is the first y0)."""
        if position == GROUP * self.groups:
            return self.eos, self.eos + 1
        return (self.class0, self.noise + 1) if position % GROUP == 4 else (self.loc0, self.loc0 + LOCS)


@dataclass
class Answer:
    """What was decoded.

    tokens int64 [B, G, 5] as fed back; locs int64 [B, G, 4], y0, x0, y1, x1 in 0..1023; labels int64 [B, G],
    the best real class; scores float32 [B, G], its probability; noise [B, G], that of noise.
    """

    tokens: Tensor
    locs: Tensor
    labels: Tensor
    scores: Tensor
    noise: Tensor


@torch.inference_mode()
def decode_groups(
    model: PaliGemma,
    images: Tensor,
    language: ClosedSet,
    groups: int | None = None,
    noise_feedback: bool = False,
) -> Answer:
    """Greedy closed-set detection of images [B, 3, S, S].

    noise_feedback: where noise is likelier than every class, True feeds the noise token back, False the best
    real class.
    """
    groups = groups or language.groups
    prompt = torch.tensor(language.prompt, device=images.device).expand(len(images), -1)
    hidden, cache = model.prefill(images, prompt, GROUP * groups)
    tokens, labels, scores, noise = [], [], [], []
    for position in range(GROUP * groups):
        token, probabilities = choose(model.decoder, hidden, *language.allowed(position))
        if position % GROUP == 4:
            score, label = probabilities[:, :-1].max(-1)  # noise is the last
            labels.append(label), scores.append(score), noise.append(probabilities[:, -1])
            if not noise_feedback:
                token = language.class0 + label
        tokens.append(token)
        if position + 1 < GROUP * groups:
            hidden = model.step(token, cache)
    fed = torch.stack(tokens, dim=1).unflatten(1, (groups, GROUP))
    columns = (torch.stack(column, dim=1) for column in (labels, scores, noise))
    return Answer(fed, fed[..., :4] - language.loc0, *columns)

"""The closed-set language: `detect all classes` is answered by G groups of five tokens, and eos.

    <loc y0> <loc x0> <loc y1> <loc x1> <unused c>        c a class, or the last one: noise

The position in the group says which ids are allowed, so decoding looks at 1,024 or at classes + 1 logits
only. The answer always has G groups; the noise class counts in a class's probability, which is the box's
score, but is never the answer. Axes: B batch, G groups.
"""

from dataclasses import dataclass

from model.config import PaliGemmaConfig
from model.io.tokenizer import LOCS, Tokenizer

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

"""Text answers, token by token, to a batch of images and prompts.

    for tokens, log_probabilities in generate(model, model.encode(images), prompts, 50): ...

`Prompter` does so with PIL images and prompts in words.

Axes: B batch, P image tokens, D decoder width, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from model.decoding.batches import fitting_batch, network_images
from model.paligemma import PaliGemma


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p 1 and top_k 0 leave nothing out.

    eos_offset is subtracted from the logit of eos: longer answers, as Pix2seq (arXiv 2109.10852, section 2.3)
    delays the end of its detection sequences.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    eos_offset: float = 0.0

    def __post_init__(self):
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}: "
                "must be at least 0, at least 0, and in (0, 1]"
            )
        if not self.eos_offset > -math.inf:
            raise ValueError(f"eos-offset {self.eos_offset}: must be a number")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top-k and top-p need a temperature above 0, such as 1: at 0 nothing is drawn")


GREEDY = Sampling()


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] with all set to 0 except the largest, which together reach top_p. Equal ones are
    kept or dropped together."""
    ordered, _ = p.sort(descending=True)
    reached = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return torch.where(p >= ordered.gather(-1, reached), p, 0)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Weights [B, V], uniform [B] in [0, 1) -> int64 [B]: the first column whose running sum exceeds
    uniform * sum."""
    running = p.cumsum(-1)
    above = (running > uniform[:, None] * running[:, -1:]) & (p > 0)
    return above.int().argmax(-1)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Logits [B, V], uniform [B] in [0, 1) -> the chosen columns int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    p = torch.softmax(logits / sampling.temperature, dim=-1)
    return draw(nucleus(p, sampling.top_p), uniform)


def check_finite(finite: bool) -> None:
    """Refuse an answer with probabilities that are not finite: it would look as if nothing was found."""
    if not finite:
        why = "its weights or adapter are damaged, or do not belong together"
        raise ValueError(f"the model computes NaN instead of probabilities: {why}")


@torch.inference_mode()
def generate(
    model: PaliGemma,
    image_tokens: Tensor,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens int64 [B] and their log-probabilities float32 [B], until all answers have ended.

    image_tokens [B, P, D] come from PaliGemma.encode; prompts, ids of any lengths with bos and newline, from
    Tokenizer.encode_prompt. The last token of an answer is eos; after it, while others go on, come padding
    tokens with log-probability 0. Log-probabilities are those of the model's own distribution, whatever
    sampling leaves out. generator: a torch.Generator on the CPU, from which sampling draws. If logits are not
    finite, ValueError is raised after the last token.
    """
    config, device = model.config, image_tokens.device
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    prompt_length = max(map(len, prompts))
    length, room = prompt_length + max_new_tokens, config.text.max_positions - config.vision.tokens
    if length > room:
        raise ValueError(
            f"prompt and answer have {length} tokens, the model has positions for {max(0, room)} after those "
            "of the image: shorten the prompt, allow fewer new tokens, or take a smaller image size"
        )
    padded = [ids + [config.pad] * (prompt_length - len(ids)) for ids in prompts]
    cache = model.new_cache(len(prompts), length)
    hidden = model.prefill(image_tokens, torch.tensor(padded, device=device), cache)  # [B, D]
    ended = broken = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for count in range(1, max_new_tokens + 1):
        logits = model.decoder.logits(hidden)  # [B, V]
        log_p = logits.log_softmax(-1)
        logits[:, config.eos] -= sampling.eos_offset
        logits[:, config.image_token :] = -torch.inf  # rows of the embedding that stand for no text
        # Drawn on the CPU: a seed gives the same answer on every device.
        tokens = sample(logits, sampling, torch.rand(len(prompts), generator=generator).to(device))
        log_p = log_p.gather(-1, tokens[:, None])[:, 0].masked_fill(ended, 0)
        yield tokens.masked_fill(ended, config.pad), log_p
        broken = broken | ~log_p.isfinite()  # looked at when all have ended
        ended = ended | (tokens == config.eos) | broken
        if count == max_new_tokens or ended.all():  # a GPU sync at every token
            check_finite(not broken.any())
            return
        hidden = model.step(tokens, cache)


def collect_answers(
    model: PaliGemma, steps: Iterator[tuple[Tensor, Tensor]]
) -> list[tuple[list[int], list[float]]]:
    """What `generate` yields, regrouped by answer: tokens and log-probabilities, without eos and padding."""
    tokens, log_p = (torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True))
    lengths = [row.index(model.config.eos) if model.config.eos in row else len(row) for row in tokens]
    return [(ids[:n], log_ps[:n]) for ids, log_ps, n in zip(tokens, log_p, lengths, strict=True)]


class Prompter:
    """Answers prompts about images in batches. An image is encoded once, however many prompts are about it.

    max_tokens: the longest answer; seed: of the random numbers that sampling draws.
    """

    def __init__(self, model: PaliGemma, max_tokens: int, sampling: Sampling = GREEDY, seed: int = 0):
        self.model, self.max_tokens, self.sampling = model, max_tokens, sampling
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, images: list[Image.Image], prompts: list[tuple[int, str]]
    ) -> list[tuple[list[int], list[float]]]:
        """Upright RGB images, and (index of an image, prompt) pairs -> tokens and log-probabilities of each
        answer."""
        with torch.inference_mode():
            image_tokens = self.model.encode(network_images(self.model, images))
        ids = [self.model.tokenizer.encode_prompt(prompt) for _, prompt in prompts]
        size, answers = fitting_batch(self.model, max(map(len, ids)), self.max_tokens), []
        for start in range(0, len(prompts), size):
            of_batch = [image for image, _ in prompts[start : start + size]]
            steps = generate(
                self.model,
                image_tokens[of_batch],
                ids[start : start + size],
                self.max_tokens,
                self.sampling,
                self.generator,
            )
            answers += collect_answers(self.model, steps)
        return answers

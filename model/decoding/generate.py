"""Any text: the answers to a batch of images and prompts, token by token.

    for tokens, log_probabilities in generate(model, model.encode(images), prompts, 50): ...

Axes: B batch, P image tokens, D decoder width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
                "want at least 0, at least 0, and in (0, 1]"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top-k and top-p need a temperature above 0, such as 1: at 0 nothing is drawn")


GREEDY = Sampling()


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, R], zero but for the likeliest that reach top_p; equal ones stay together."""
    ordered, _ = p.sort(descending=True)
    reached = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return torch.where(p >= ordered.gather(-1, reached), p, 0)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Weights [B, R], uniform [B] in [0, 1) -> int64 [B]: where the running sum exceeds uniform * sum."""
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


@torch.inference_mode()
def generate(
    model: PaliGemma,
    image_tokens: Tensor,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields tokens int64 [B] and their log-probabilities float32 [B], until all answers have ended.

    image_tokens [B, P, D], of PaliGemma.encode; prompts: ids with bos and newline (Tokenizer.encode_prompt),
    of any lengths. The last token of an answer is eos; what follows it, while others go on, is padding with
    log-probability 0. A log-probability is that of the model's own distribution, whatever sampling leaves
    out. Raises ValueError if a prompt and its answer exceed the positions that the model was made for.
    """
    config, device = model.config, image_tokens.device
    longest = max(map(len, prompts)) + max_new_tokens
    if config.vision.tokens + longest > config.text.max_positions:
        room = config.text.max_positions - config.vision.tokens
        raise ValueError(
            f"prompt and answer have {longest} tokens, the model has positions for {room}: "
            "shorten the prompt, or allow fewer new tokens"
        )
    padded = torch.tensor(
        [ids + [config.pad] * (longest - max_new_tokens - len(ids)) for ids in prompts], device=device
    )
    cache = model.new_cache(len(prompts), longest)
    hidden = model.prefill(image_tokens, padded, cache)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for count in range(1, max_new_tokens + 1):
        logits = model.decoder.logits(hidden)
        log_p = logits.log_softmax(-1)
        logits[:, config.eos] -= sampling.eos_offset
        logits[:, config.image_token :] = -torch.inf  # rows of the embedding that are no text
        tokens = sample(logits, sampling, torch.rand(len(prompts), generator=generator).to(device))
        log_p = log_p.gather(-1, tokens[:, None])[:, 0]
        yield tokens.masked_fill(ended, config.pad), log_p.masked_fill(ended, 0)
        ended = ended | (tokens == config.eos)
        if count == max_new_tokens or ended.all():
            return
        hidden = model.step(tokens, cache)


def collect_answers(
    model: PaliGemma, steps: Iterator[tuple[Tensor, Tensor]]
) -> list[tuple[list[int], list[float]]]:
    """What `generate` yields, an answer at a time: its tokens and their log-probabilities, without eos."""
    tokens, log_p = (torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True))
    lengths = [row.index(model.config.eos) if model.config.eos in row else len(row) for row in tokens]
    return [(row[:n], of_row[:n]) for row, of_row, n in zip(tokens, log_p, lengths, strict=True)]

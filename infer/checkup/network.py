"""Invariants of the network: who may change whose hidden state, however it is computed.

They hold for random weights as for trained ones, so every check passes a few tokens through the model in two
ways and compares hidden states. A gap is the length of the difference of two, divided by their length: 0
where they are the same, about 1e-6 in float32 and 1e-2 in bfloat16 where they are computed in another order.

Axes: B batch, P image tokens, T text tokens, S key, D width.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from infer.checkup.answers import Case
from infer.checkup.finding import Finding, Tally
from model import PaliGemma
from model.io.tensors import largest
from model.io.tokenizer import LOCS, SEGS, Tokenizer
from model.seam import attention_layers, attention_restored

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of gaps between two ways to compute the same
READ = 1e-6  # a gap above it: what was changed is read
FEW, MANY = 8, 512  # tokens of an answer; positions up to which one is made that leaves the window
PADS = 3
STAGES = r"(vision|decoder)(\.layers\.\d+)?|projector"  # modules whose outputs are looked at
OFFICIAL_VOCAB, OFFICIAL_LOC0 = (257_152, 257_216), 256_000  # rows of the embedding; the id of <loc0000>


@dataclass
class Patient:
    """A model, two pictures [2, 3, S, S], and a prompt and an answer as ids."""

    model: PaliGemma
    images: Tensor
    prompt: list[int]
    answer: list[int]

    @property
    def text(self) -> list[int]:
        return self.prompt + self.answer

    def tokens(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.images.device)

    def hidden(self, text: list[int], image: int = 0) -> Tensor:
        """Hidden states [1, T, D] of a text about a picture, all at once, as in training."""
        return self.model.hidden(self.images[[image]], self.tokens(text), len(self.prompt))

    @cached_property
    def usual(self) -> Tensor:
        """Hidden states [1, T, D] of its own text, all at once."""
        return self.hidden(self.text)

    @cached_property
    def usually_decoded(self) -> Tensor:
        return self.decoded()

    def decoded(self, pads: int = 0) -> Tensor:
        """Hidden states [1, 1 + n, D] of the end of the prompt and of the answer, computed token by token
        with a cache. pads: padding after the prompt, as in a batch with a longer one."""
        model, prompt = self.model, self.prompt + [self.model.config.pad] * pads
        cache = model.new_cache(1, len(prompt) + len(self.answer))
        states = [model.prefill(model.encode(self.images[:1]), self.tokens(prompt), cache)]
        states += [model.step(self.tokens([token])[0], cache) for token in self.answer]
        return torch.stack(states, dim=1)

    def changed(self, at: int) -> list[int]:
        """The text with another token at one place."""
        text, loc0 = self.text, self.model.tokenizer.loc0
        text[at] = loc0 + 5 if text[at] != loc0 + 5 else loc0 + 6
        return text


def patient_for(model: PaliGemma, cases: list[Case]) -> Patient:
    """The pictures and the words of two cases. The answer is long enough to leave the sliding window, if that
    does not take too long."""
    (first, second, *_), text = cases, model.config.text
    length, start = FEW, model.config.vision.tokens + len(first.prompt)
    if text.sliding_window and text.sliding_window + FEW + PADS <= min(MANY, text.max_positions):
        length = max(length, text.sliding_window - start + FEW)
    answer = [token for answer in first.answers for token in answer]
    answer = (answer * (1 + length // len(answer)))[:length]
    return Patient(model, torch.cat((first.image, second.image)), first.prompt, answer)


def gaps(a: Tensor, b: Tensor) -> Tensor:
    """Gaps [...] between hidden states [..., D]. What is not finite is infinitely far from everything."""
    a, b = a.float(), b.float()
    return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).nan_to_num(nan=torch.inf, posinf=torch.inf)


def worst(check: str, p: Patient, found: dict[str, Tensor]) -> Finding:
    """The largest of some gaps, each [..., n], by where they were measured."""
    where = max(found, key=lambda name: found[name].max())
    top, token = found[where].flatten(0, -2).amax(0).max(-1)
    passed = top.item() <= LIMITS[p.model.projector.weight.dtype]
    return Finding(check, passed, f"{top:.1e}", "" if passed else f"{where}, token {token}")


# ---- who reads whom ----------------------------------------------------------------------------------------


def suffix_is_causal(p: Patient) -> Finding:
    """A token of the answer that changed what comes before it would show the training what it should predict:
    the loss falls, and nothing is learnt."""
    found = {}
    for at in (len(p.prompt), len(p.prompt) + len(p.answer) // 2, len(p.text) - 1):
        found[f"token {at} of the text changed"] = gaps(p.hidden(p.changed(at))[:, :at], p.usual[:, :at])
    return worst("a suffix token never changes earlier logits", p, found)


class _Seen(Exception):
    """Enough is seen: the rest of the forward pass need not be computed."""


def masks_of(p: Patient, text: list[int]) -> list[Tensor]:
    """What the attention of the first local and the first global layer is given as mask, bool [T, S] each."""
    layers, masks = attention_layers(p.model)[:2], []

    def look(q, k, v, mask, scale, cap=None):
        masks.append(mask.expand(1, q.shape[1], -1)[0])
        if len(masks) == len(layers):
            raise _Seen
        return q.new_zeros(*q.shape[:3], v.shape[-1])

    with attention_restored(layers), contextlib.suppress(_Seen):
        for layer in layers:
            layer.attend = look
        p.hidden(text)
    return masks


def prefix_reads_itself(p: Patient) -> Finding:
    """Image and prompt were trained to read each other both ways. Libraries that build the mask from labels
    or token types fall back to a causal one when these are missing, and answers get worse, not wrong."""
    check, prefix = "the prefix reads all of itself", p.model.config.vision.tokens + len(p.prompt)
    for layer, mask in enumerate(masks_of(p, p.text)):
        closed = (~mask[:prefix, :prefix]).nonzero()
        if len(closed):
            query, key = closed[0].tolist()
            where = f"layer {layer}: position {query} does not read position {key}"
            return Finding(check, False, f"{len(closed):,} pairs closed", where)
    at = len(p.prompt) - 2  # the last word of the prompt
    gap = gaps(p.hidden(p.changed(at)), p.usual)[0, 0].item()
    where = "" if gap > READ else f"token {at} of the text does not reach token 0"
    return Finding(check, gap > READ, f"{gap:.1e}", where)


def window_is_crossed(p: Patient) -> Finding:
    """Of Gemma 2's layers, every second one loses what is a window back, the prefix excepted. No short text
    shows whether that is so: the masks are looked at for one that is long enough."""
    check, config = "local layers lose what is a window back, others do not", p.model.config
    window, tokens = config.text.sliding_window, config.vision.tokens
    length = max(len(p.text), (window or 0) - tokens + FEW)
    if window is None or tokens + length > config.text.max_positions or config.text.layers < 2:
        return Finding(check, None, where="no window" if window is None else "the positions end before it")
    text = (p.text * (1 + length // len(p.text)))[:length]
    local, everywhere = masks_of(p, text)
    position = torch.arange(tokens + length, device=local.device)
    kept = (position[:, None] - position < window) | (position[:, None] < tokens + len(p.prompt))
    if not (everywhere & ~kept).any():
        return Finding(check, False, "none lost", f"layer 1 reads nothing that is {window} positions back")
    if not len(wrong := (local != everywhere & kept).nonzero()):
        return Finding(check, True, "0 pairs wrong")
    query, key = wrong[0].tolist()
    what = "reads" if local[query, key] else "does not read"
    where = f"layer 0: position {query} {what} position {key}, window {window}"
    return Finding(check, False, f"{len(wrong):,} pairs wrong", where)


# ---- two ways to compute the same --------------------------------------------------------------------------


def padding_changes_nothing(p: Patient) -> Finding:
    """Texts of a batch have different lengths. Padding that is read, or that takes a position, makes an
    answer depend on its neighbours' lengths."""
    pads = [p.model.config.pad] * PADS
    found = {"padded text": gaps(p.hidden(p.text + pads)[:, : len(p.text)], p.usual)}
    found["step by step after a padded prompt"] = gaps(p.decoded(PADS), p.usually_decoded)
    return worst("padding changes nothing", p, found)


def batch_equals_single(p: Patient) -> Finding:
    """Two pictures with texts of different lengths, together and each by itself."""
    short = p.text[:-PADS]
    texts = torch.cat((p.tokens(p.text), p.tokens(short + [p.model.config.pad] * PADS)))
    together = p.model.hidden(p.images, texts, len(p.prompt))
    found = {"first picture": gaps(together[:1], p.usual)}
    found["second picture"] = gaps(together[1:, : len(short)], p.hidden(short, image=1))
    return worst("batch equals single", p, found)


def cached_equals_full(p: Patient) -> Finding:
    """An answer is decoded from a cache, token by token, and taught at once. A position, a slot or a mask
    that is off by one makes them differ, the more the longer the answer."""
    full = p.usual[:, len(p.prompt) - 1 :]
    return worst("cached equals full", p, {"answer": gaps(p.usually_decoded, full)})


def parallel_equals_sequence(p: Patient) -> Finding:
    """Branches share image and prompt and see nothing of each other: each must be what it is as the only
    answer. The ids allowed are read from a part of the head, which must give what the whole head does."""
    model, loc0, start = p.model, p.model.tokenizer.loc0, len(p.prompt)
    branches = torch.tensor([[[100, 200, 600, 700], [100, 500, 900, 0]]], device=p.images.device) + loc0
    alone = [p.hidden(p.prompt + branch) for branch in branches[0].tolist()]
    alone = torch.stack([states[:, start - 1 :] for states in alone], dim=1)  # [1, 2, 5, D]
    image_tokens, prompt = model.encode(p.images[:1]), p.tokens(p.prompt)
    end, taught = model.read_branches(image_tokens, prompt[0], branches)
    cache = model.new_cache(1, start + branches.numel())
    prompt_end, decoded, parents = model.prefill(image_tokens, prompt, cache), [], branches[:, 0, :0]
    for depth in range(4):
        roots = torch.arange(2, device=prompt.device)[None] + 2 * max(0, depth - 1)
        parents = torch.cat((parents, roots), dim=1)
        decoded.append(model.step_branches(branches[:, :, depth], parents, cache))
    found = {"prompt, taught": gaps(end[:, None], alone[:, 0, :1])}
    found |= {"prompt, decoded": gaps(prompt_end[:, None], alone[:, 0, :1])}
    found |= {"branches, taught": gaps(taught, alone[:, :, 1:])}
    found |= {"branches, decoded": gaps(torch.stack(decoded, dim=2), alone[:, :, 1:])}
    allowed = model.decoder.logits(taught, loc0, loc0 + LOCS)
    found["logits of locations"] = gaps(allowed, model.decoder.logits(taught)[..., loc0 : loc0 + LOCS])
    return worst("parallel equals sequence", p, found)


# ---- ids and numbers ---------------------------------------------------------------------------------------


def special_tokens(tokenizer: Tokenizer, rows: int) -> Finding:
    """<loc> and <seg> in a text must become one id each, the one that their row of the embedding was trained
    at. A tokenizer that lacks them splits them into letters, and says nothing. rows: of the embedding."""
    loc0 = OFFICIAL_LOC0 if rows in OFFICIAL_VOCAB else tokenizer.loc0
    wrong = Tally()
    for form, first, count in (("<loc{:04d}>", loc0, LOCS), ("<seg{:03d}>", loc0 + LOCS, SEGS)):
        for i, piece in enumerate(map(form.format, range(count)), first):
            ids = tokenizer.encode(piece)
            if ids != [i] or tokenizer.decode(ids) != piece or i >= rows:
                wrong.add(f"{piece} is {ids}, not [{i}]" + f", of {rows:,} rows" * (i >= rows))
    return wrong.finding("<loc> and <seg> are single tokens at their ids", LOCS + SEGS)


def all_is_finite(p: Patient) -> Finding:
    """One NaN or infinity in a weight, or on the way through the layers, becomes an answer in which nothing
    is found. Looks at all weights, and at what each layer makes of a picture and a text."""
    wrong, count = Tally(), 0
    for name, weight in p.model.named_parameters():
        count += 1
        if weight.is_floating_point() and not largest(weight).isfinite():
            wrong.add(name)

    def look_for(name: str) -> Callable:
        return lambda module, args, out: None if out.isfinite().all() else wrong.add(f"what {name} computes")

    stages = [(name, part) for name, part in p.model.named_modules() if re.fullmatch(STAGES, name)]
    hooks = [part.register_forward_hook(look_for(name)) for name, part in stages]
    try:
        logits = p.model.decoder.logits(p.hidden(p.text)[:, -FEW:])
    finally:
        for hook in hooks:
            hook.remove()
    if not logits.isfinite().all():
        wrong.add("the logits")
    return wrong.finding("no non-finite value", count + len(stages) + 1)


CHECKS = suffix_is_causal, padding_changes_nothing, batch_equals_single, cached_equals_full
CHECKS += parallel_equals_sequence, prefix_reads_itself, window_is_crossed, all_is_finite


@torch.inference_mode()
def check_network(p: Patient) -> Iterator[Finding]:
    yield from (check(p) for check in CHECKS)
    yield special_tokens(p.model.tokenizer, p.model.config.text.vocab_size)

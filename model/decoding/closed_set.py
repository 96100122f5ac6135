"""The closed-set language and how it is decoded: `detect all classes` is answered by G groups of five tokens.

    <loc y0> <loc x0> <loc y1> <loc x1> <unused c>        c a class, or the last one: noise

The position in the group says which ids are allowed: 1,024 coordinates or classes + 1. They are neighbouring
rows of the tied embedding, so `hidden @ embed[first:last].T` gives exactly the logits that matter, instead of
all 257,216. The answer always has G groups; the noise class counts in the softmax, but is never the answer:
the best real class is, and its probability is the box's score.

Axes: B batch, G groups, I = 5 slots of a group, R allowed rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import PaliGemmaConfig
from model.decoding.generate import GREEDY, Sampling, sample
from model.gemma import Gemma
from model.io.tokenizer import LOCS, Tokenizer
from model.paligemma import PaliGemma

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


# ---- the restricted head -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What was chosen at one position, [B] each.

    best int64, the chosen id, never noise; fed int64, what the model should read next; score float32, the
    probability of best among all allowed ids, noise too; noise float32, that of noise (0 for a coordinate).
    """

    best: Tensor
    fed: Tensor
    score: Tensor
    noise: Tensor


def choose(
    logits: Tensor, first: int, has_noise: bool, noise_feedback: bool, sampling: Sampling, uniform: Tensor
) -> Choice:
    """Logits [B, R] of the ids first, first + 1, ... -> Choice.

    has_noise: the last id is the noise class. It counts in the softmax, but is never chosen; where it is
    likelier than every other, noise_feedback feeds it back. uniform [B]: random numbers for sampling.
    """
    p = torch.softmax(logits, dim=-1)
    real = logits[:, :-1] if has_noise else logits
    best = sample(real, sampling, uniform)
    noise = p[:, -1] if has_noise else torch.zeros_like(p[:, 0])
    is_noise = noise > p[:, : real.shape[-1]].amax(-1)
    fed = torch.where(is_noise, first + real.shape[-1], first + best) if noise_feedback else first + best
    return Choice(first + best, fed, p.gather(-1, best[:, None])[:, 0], noise)


class Head:
    """`choose` at each slot of a group. allowed: first and last + 1 of the ids of each slot, the last with
    noise."""

    def __init__(
        self, decoder: Gemma, allowed: list[tuple[int, int]], noise_feedback: bool, sampling: Sampling
    ):
        self.decoder, self.allowed = decoder, allowed
        self.noise_feedback, self.sampling = noise_feedback, sampling

    def __call__(self, hidden: Tensor, slot: int, uniform: Tensor) -> Choice:
        """Hidden [B, D], slot 0 to I-1, uniform [B] -> Choice."""
        first, last = self.allowed[slot]
        logits = self.decoder.logits(hidden, first, last)
        has_noise = slot == len(self.allowed) - 1
        return choose(logits, first, has_noise, self.noise_feedback, self.sampling, uniform)


# ---- the decode loop ---------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What was decoded.

    tokens int64 [B, G, 5] as fed back; locs int64 [B, G, 4], y0, x0, y1, x1 in 0..1023; labels int64 [B, G],
    the best real class; scores float32 [B, G], its probability; noise [B, G], that of noise; live bool
    [B, G], False behind an early stop.
    """

    tokens: Tensor
    locs: Tensor
    labels: Tensor
    scores: Tensor
    noise: Tensor
    live: Tensor


@dataclass(frozen=True)
class EarlyStop:
    """Stop an image behind `patience` groups in a row whose noise is likelier than `noise`."""

    noise: float
    patience: int

    def __post_init__(self):
        if not (0 <= self.noise < 1 and self.patience >= 1 and self.patience == int(self.patience)):
            raise ValueError(
                f"early stop {self.noise} {self.patience}: want a probability and a count of groups"
            )


class GroupDecoder:
    """Detects in batches of images. The cache, and on a GPU its CUDA graph, serve the next batch too.

    groups: None for the checkpoint's. noise_feedback: where noise is likelier than every class, True feeds
    the noise token back, False the best real class. head: Head, or on a GPU
    the fused kernel, FusedHead of model/decoding/head_kernel.py.
    """

    def __init__(
        self,
        model: PaliGemma,
        language: ClosedSet,
        groups: int | None = None,
        noise_feedback: bool = False,
        sampling: Sampling = GREEDY,
        early_stop: EarlyStop | None = None,
        head: type = Head,
    ):
        self.model, self.language, self.groups = model, language, groups or language.groups
        self.early_stop = early_stop
        allowed = [language.allowed(slot) for slot in range(GROUP)]
        self.head = head(model.decoder, allowed, noise_feedback, sampling)
        self.batch_size = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Answer:
        """Images [B, 3, S, S] -> Answer. generator: of the random numbers of sampling, on the CPU."""
        with torch.cuda.device_of(images):  # its GPU takes the streams, the graph and the kernels
            return self._decode(images, generator)

    def _decode(self, images: Tensor, generator: torch.Generator | None) -> Answer:
        B, language = len(images), self.language
        if self.batch_size != B:
            self._prepare(B, images.device)
        uniform = torch.rand(self.groups, GROUP, B, generator=generator).to(images.device)
        prompt = torch.tensor(language.prompt, device=images.device).expand(B, -1)
        self.hidden.copy_(self.model.prefill(self.model.encode(images), prompt, self.cache))
        answers, live, quiet = [], torch.ones(B, dtype=torch.bool, device=images.device), 0
        for group in range(self.groups):
            self.uniform.copy_(uniform[group])
            answers.append((*(x.clone() for x in self.group(last=group + 1 == self.groups)), live))
            if self.early_stop:
                quiet = (answers[-1][-2] > self.early_stop.noise) * (quiet + 1)  # groups of noise in a row
                live = live & (quiet < self.early_stop.patience)
                if not live.any():  # the only wait for the GPU in the loop: a group is decided on the CPU
                    break
        fed, best, scores, noise, live = (torch.stack(column, dim=1) for column in zip(*answers, strict=True))
        return Answer(
            fed, best[..., :-1] - language.loc0, best[..., -1] - language.class0, scores, noise, live
        )

    def _prepare(self, batch_size: int, device: torch.device) -> None:
        """Everything that a step reads or writes, where it stays."""
        # The old buffers and graph go first, as there may be no room for both. If memory runs out all the
        # same, the next call starts afresh instead of with half of the new ones.
        self.batch_size = self.cache = self.group = None
        prompt = len(self.language.prompt)
        self.cache = self.model.new_cache(batch_size, prompt + GROUP * self.groups)
        self.hidden = self.model.projector.weight.new_zeros(batch_size, self.model.config.text.width)
        self.uniform = torch.zeros(GROUP, batch_size, device=device)  # the trial runs of the graph draw too
        self.group = self._group
        if device.type == "cuda":
            # The trial runs leave tokens in the cache, which the next prefill forgets.
            one = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
            replay = captured(self._group, prepare=lambda: self.cache.start(one, one.long()))
            self.group = lambda last: replay()  # the last token is read too: there is a slot for it
        self.batch_size = batch_size

    def _group(self, last: bool = False) -> tuple[Tensor, ...]:
        """Decode a group: fed [B, 5], best [B, 5], score and noise [B] of its class. last: none follows."""
        choices: list[Choice] = []
        for slot in range(GROUP):
            choices.append(self.head(self.hidden, slot, self.uniform[slot]))
            if not (last and slot + 1 == GROUP):
                self.hidden.copy_(self.model.step(choices[-1].fed, self.cache))
        fed, best = (torch.stack([getattr(c, name) for c in choices], dim=1) for name in ("fed", "best"))
        return fed, best, choices[-1].score, choices[-1].noise


def captured(function, prepare):
    """A function of tensors that stay in their places, as a CUDA graph; prepare() before each trial run.

    The tensors are on the current device, to which a stream and a graph belong. Calling the result costs one
    launch. It returns the same tensors each time, overwritten.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels, sets up cuBLAS
            prepare()
            function()
        prepare()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The stream is our own: the one that torch.cuda.graph would take belongs to the GPU that was current at
    # the first capture of the process. thread_local: otherwise what other threads do meanwhile (DataLoader's
    # pins memory, NCCL's watchdog asks for events) ends the capture with an error.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay

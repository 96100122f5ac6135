"""The closed-set language and how it is decoded: `detect all classes` is answered by G groups of five tokens.

    <loc y0> <loc x0> <loc y1> <loc x1> <unused c>        c: a class, or the number after the last one: noise

Position alone decides which ids are allowed: one of 1,024 locations four times, then a class or noise. Both
sets are contiguous rows of the tied embedding, so `hidden @ embed[first:last].T` computes exactly the logits
that matter instead of all 257,216.

The answer always has G groups. In training, groups without an object are filled with made-up boxes of class
noise: a model that may not stop early finds more objects (Pix2seq, arXiv 2109.10852). So noise counts in the
softmax: the less a box looks like an object, the less probability is left for the real classes. But noise is
never chosen: the best real class is, and its probability is the box's score. The user decides how low a score
may be.

Axes: B batch, G groups, I = 5 slots of a group, R allowed rows, D width.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.config import PaliGemmaConfig
from model.decoding.generate import GREEDY, Sampling, sample
from model.gemma import Gemma
from model.io.tokenizer import LOCS, Tokenizer
from model.paligemma import PaliGemma

PROMPT = "detect all classes"
GROUP = 5  # tokens: four locations and a class


@dataclass(frozen=True)
class ClosedSet:
    """The ids of a checkpoint's closed-set language.

    prompt    bos, the words of PROMPT, newline
    loc0      id of <loc0000>
    class0    id of the first class, <unused0>
    eos       id of the token after the last group
    classes   the names of the classes
    groups    boxes in an answer
    """

    prompt: tuple[int, ...]
    loc0: int
    class0: int
    eos: int
    classes: tuple[str, ...]
    groups: int

    @classmethod
    def of(cls, config: PaliGemmaConfig, tokenizer: Tokenizer) -> "ClosedSet":
        return cls(
            prompt=tuple(tokenizer.encode_prompt(PROMPT)),
            loc0=tokenizer.loc0,
            class0=tokenizer.unused0,
            eos=tokenizer.eos,
            classes=config.classes,
            groups=config.groups,
        )

    @property
    def noise(self) -> int:
        """The id of the noise class, right after the real ones."""
        return self.class0 + len(self.classes)

    def allowed(self, position: int) -> tuple[int, int]:
        """First and last + 1 of the ids allowed at a position of the answer (0 is the first y0)."""
        if position == GROUP * self.groups:
            return self.eos, self.eos + 1
        is_class = position % GROUP == GROUP - 1
        return (self.class0, self.noise + 1) if is_class else (self.loc0, self.loc0 + LOCS)


# ---- the restricted head -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What was chosen at one position of the answer.

    best    int64 [B]     the chosen id, never noise
    fed     int64 [B]     the id that the model reads next: best, or noise
    score   float32 [B]   probability of best among all allowed ids, noise included
    noise   float32 [B]   probability of noise; 0 where a location is chosen
    """

    best: Tensor
    fed: Tensor
    score: Tensor
    noise: Tensor


def choose(
    logits: Tensor, first: int, has_noise: bool, noise_feedback: bool, sampling: Sampling, uniform: Tensor
) -> Choice:
    """Logits [B, R] of the ids first, first + 1, ... -> Choice.

    has_noise: the last id is the noise class. noise_feedback: where noise is likelier than every class, it is
    what the model reads next (the published evaluation does so); False: the model reads what was chosen (so
    does the PaliGemma 2 paper). uniform [B]: random numbers for sampling.
    """
    p = torch.softmax(logits, dim=-1)  # [B, R], noise included: this makes the scores of bad boxes low
    real = logits[:, :-1] if has_noise else logits
    best = sample(real, sampling, uniform)
    noise = p[:, -1] if has_noise else torch.zeros_like(p[:, 0])
    is_noise = noise > p[:, : real.shape[-1]].amax(-1)
    fed = torch.where(is_noise, first + real.shape[-1], first + best) if noise_feedback else first + best
    return Choice(best=first + best, fed=fed, score=p.gather(-1, best[:, None])[:, 0], noise=noise)


class Head:
    """`choose` at each slot of a group.

    allowed: first and last + 1 of the ids of each slot, noise being the last id of the last slot.
    """

    def __init__(
        self, decoder: Gemma, allowed: list[tuple[int, int]], noise_feedback: bool, sampling: Sampling
    ):
        self.decoder, self.allowed = decoder, allowed
        self.noise_feedback, self.sampling = noise_feedback, sampling

    def __call__(self, hidden: Tensor, slot: int, uniform: Tensor) -> Choice:
        """Hidden [B, D], slot 0 to I-1, uniform [B] -> Choice."""
        first, last = self.allowed[slot]
        logits = self.decoder.logits(hidden, first, last)  # [B, R]
        has_noise = slot == len(self.allowed) - 1
        return choose(logits, first, has_noise, self.noise_feedback, self.sampling, uniform)


# ---- the decode loop ---------------------------------------------------------------------------------------


def edges(locs: Tensor) -> Tensor:
    """Where locations lie, in bins: the last one stands for the image's edge."""
    return torch.where(locs == LOCS - 1, LOCS, locs)


@dataclass
class Answer:
    """What was decoded; fewer than G groups if every image stopped early.

    tokens   int64 [B, G, 5]   as the model read them
    locs     int64 [B, G, 4]   y0, x0, y1, x1 in 0..1023
    labels   int64 [B, G]      the best real class
    scores   float32 [B, G]    its probability; NaN if any logits of the group were not finite
    noise    float32 [B, G]    probability of noise
    live     bool [B, G]       False after an image's early stop
    """

    tokens: Tensor
    locs: Tensor
    labels: Tensor
    scores: Tensor
    noise: Tensor
    live: Tensor

    def mirrored(self, loc0: int) -> "Answer":
        """The answer about the mirror images of what was seen. loc0: the id of location 0."""
        y0, x0, y1, x1 = edges(self.locs).unbind(-1)
        locs = torch.stack((y0, LOCS - x1, y1, LOCS - x0), dim=-1).clamp(max=LOCS - 1)
        return replace(self, locs=locs, tokens=torch.cat((loc0 + locs, self.tokens[..., -1:]), dim=-1))

    def __add__(self, other: "Answer") -> "Answer":
        """The groups of both."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Answer(*(torch.cat(pair, dim=1) for pair in pairs))


@dataclass(frozen=True)
class EarlyStop:
    """End an image's answer after `patience` consecutive groups whose noise probability exceeds `noise`."""

    noise: float
    patience: int

    def __post_init__(self):
        if not (0 <= self.noise < 1 and self.patience >= 1 and self.patience % 1 == 0):  # inf % 1 is nan
            what = f"early stop {self.noise} {self.patience}"
            raise ValueError(f"{what}: must be a probability and a number of groups")


class GroupDecoder:
    """Decodes the answers to batches of images. The cache, and on a GPU its CUDA graph, serve the next batch
    too if it has the same size.

    groups: None for the checkpoint's number. noise_feedback: see `choose`. head: Head, or on a GPU the fused
    kernel, FusedHead of model/decoding/head_kernel.py.
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
        """Images [B, 3, S, S] -> Answer. generator: on the CPU; sampling draws from it."""
        with torch.cuda.device_of(images):  # streams, the graph and kernels go to the images' GPU
            return self._decode(images, generator)

    def _decode(self, images: Tensor, generator: torch.Generator | None) -> Answer:
        B, language = len(images), self.language
        if self.batch_size != B:
            self._prepare(B, images.device)
        # Drawn on the CPU, so that a seed gives the same boxes on every device; and all in advance, as a
        # replaying graph cannot fetch anything from there.
        uniform = torch.rand(self.groups, GROUP, B, generator=generator).to(images.device)  # [G, I, B]
        prompt = torch.tensor(language.prompt, device=images.device).expand(B, -1)  # [B, tokens]
        self.hidden.copy_(self.model.prefill(self.model.encode(images), prompt, self.cache))
        answers, live = [], torch.ones(B, dtype=torch.bool, device=images.device)
        noise_run = 0  # consecutive groups of noise up to here, [B] once there is a group
        for group in range(self.groups):
            self.uniform.copy_(uniform[group])
            # Cloned, as the next replay of the graph writes to the same tensors.
            outputs = [x.clone() for x in self.decode_group(last=group + 1 == self.groups)]
            answers.append((*outputs, live))
            if self.early_stop:
                noise = outputs[-1]
                noise_run = (noise > self.early_stop.noise) * (noise_run + 1)
                live = live & (noise_run < self.early_stop.patience)
                # The only GPU sync of the loop: the CPU needs the result of this group before it can
                # launch the next one. Without early stop it runs ahead of the GPU.
                if not live.any():
                    break
        # From a tuple for each group to a tensor for each quantity: [B, G, 5] (fed, best) and [B, G].
        fed, best, scores, noise, live = (torch.stack(column, dim=1) for column in zip(*answers, strict=True))
        locs, labels = best[..., :-1] - language.loc0, best[..., -1] - language.class0
        return Answer(fed, locs, labels, scores, noise, live)

    def _prepare(self, batch_size: int, device: torch.device) -> None:
        """Allocate all that decoding a group reads and writes, and on a GPU capture it in a graph.

        A graph replays the same kernels on the same addresses. It can still decode every group, since where
        the next token goes is a number on the device (KVCache.slot), and a group's inputs are copied to where
        the graph reads them.
        """
        # The old buffers and graph go first, as there may be no room for both. If memory still runs out, the
        # next call starts afresh instead of with half of the new ones.
        self.release()
        prompt = len(self.language.prompt)
        self.cache = self.model.new_cache(batch_size, prompt + GROUP * self.groups)
        self.hidden = self.model.projector.weight.new_zeros(batch_size, self.model.config.text.width)
        self.uniform = torch.zeros(GROUP, batch_size, device=device)  # the trial runs of the graph draw too
        self.decode_group = self._decode_group
        if device.type == "cuda":
            # A trial run takes GROUP slots of the cache, so each begins with a cache that holds a single
            # token. The next prefill forgets what the runs leave in it.
            one = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
            replay = capture_graph(self._decode_group, prepare=lambda: self.cache.start(one, one.long()))
            self.decode_group = lambda last: replay()  # the last token is read too: there is a slot for it
        self.batch_size = batch_size

    def release(self) -> None:
        """Give back the cache and the graph's memory; the next call takes them anew."""
        self.batch_size = self.cache = self.decode_group = None

    def _decode_group(self, last: bool = False) -> tuple[Tensor, ...]:
        """Decode a group: fed [B, 5], best [B, 5], and the score and noise [B] of its class. last: no group
        follows, so its class need not be read."""
        choices: list[Choice] = []
        for slot in range(GROUP):
            choices.append(self.head(self.hidden, slot, self.uniform[slot]))
            if not (last and slot + 1 == GROUP):
                self.hidden.copy_(self.model.step(choices[-1].fed, self.cache))
        fed = torch.stack([choice.fed for choice in choices], dim=1)  # [B, 5]
        best = torch.stack([choice.best for choice in choices], dim=1)  # [B, 5]
        scores = torch.stack([choice.score for choice in choices])  # [5, B]
        # 0 * NaN is NaN: logits of locations that are not finite show in the score, too.
        return fed, best, scores[-1] + 0 * scores.sum(0), choices[-1].noise


def capture_graph(function, prepare):
    """Capture a function without arguments as a CUDA graph; prepare() is called before each of its runs.

    What the function reads and writes must stay where it is, on the current device, to which a stream and a
    graph belong. Calling the result costs one launch. It returns the same tensors each time, overwritten.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What happens only in the first runs cannot be captured: cuBLAS is set up, and kernels are compiled
        # (by torch.compile once more when it sees a number change).
        for _ in range(2):
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

"""The sides of the benchmark, and a turn of one of them: timed passes over the same images."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from infer.lib.measuring import language_of, now
from infer.lib.peers import LlamaCpp, Transformers
from model.decoding.closed_set import GroupDecoder, Head
from model.decoding.detector import head_for
from model.decoding.packing import load_for_decoding
from model.decoding.parallel import ParallelDecoder
from model.io.weights import DTYPES, load_config
from train.run.processes import peak_memory

LONG = 10  # seconds: a first pass that takes longer is counted, as little of it is warming up
PARALLEL = ", parallel"  # after a side's name: its boxes in five steps


# ---- the sides ---------------------------------------------------------------------------------------------


class Ours:
    set_threads = staticmethod(torch.set_num_threads)
    batches = True  # reads several images at once

    def __init__(self, folder: Path, args: argparse.Namespace, int8=False, compiled=False, fused_head=True):
        options = dict(dtype=DTYPES[args.dtype], device=args.device, int8=int8, compiled=compiled)
        self.model = load_for_decoding(folder, **options)
        self.language, self.branches = language_of(folder), args.branches
        self.head = head_for(self.model) if fused_head else Head
        self.decoders, prefill = {}, self.model.prefill

        def clocked(*inputs) -> Tensor:
            hidden = prefill(*inputs)
            self.prefilled = now(args.device)
            return hidden

        self.model.prefill = clocked

    def decode(self, images: Tensor, groups: int) -> Tensor:
        """Images [B, 3, S, S] -> tokens [B, 5 * groups]; self.prefilled: when the prefill ended."""
        return self._decoder(GroupDecoder, groups)(images).tokens.flatten(1)

    def decode_parallel(self, images: Tensor) -> Tensor:
        """All boxes in five steps: tokens [B, 5 * branches]."""
        return self._decoder(ParallelDecoder, self.branches)(images).tokens.flatten(1)

    def _decoder(self, kind: type, boxes: int | None) -> GroupDecoder | ParallelDecoder:
        """Made once: it keeps what it captures and allocates."""
        if (kind, boxes) not in self.decoders:
            self.decoders[kind, boxes] = kind(self.model, self.language, boxes, head=self.head)
        return self.decoders[kind, boxes]


def transformers(folder: Path, args: argparse.Namespace) -> Transformers:
    return Transformers(folder, args.device, args.dtype)


def llama_cpp(folder: Path, args: argparse.Namespace, name: str = "llama.cpp") -> LlamaCpp:
    return LlamaCpp(gguf_file(name, args), load_config(folder), len(language_of(folder).prompt), args.groups)


def gguf_file(name: str, args: argparse.Namespace) -> Path:
    """The file that this side, one of llama.cpp's, reads."""
    return args.scratch / f"{'int8' if 'int8' in name else args.dtype}.gguf"


SIDES = {
    "ours": Ours,
    "ours, int8": partial(Ours, int8=True),
    "ours, compiled": partial(Ours, compiled=True),
    "ours, plain head": partial(Ours, fused_head=False),
    "llama.cpp": llama_cpp,
    "llama.cpp, int8": partial(llama_cpp, name="llama.cpp, int8"),
    "transformers": transformers,
}


# ---- its turn ----------------------------------------------------------------------------------------------


def random_images(folder: Path, batch: int, device: str) -> Tensor:
    size = load_config(folder).vision.image_size
    generator = torch.Generator().manual_seed(batch)
    return (2 * torch.rand(batch, 3, size, size, generator=generator) - 1).to(device)


def timed_pass(side, decode: Callable[[], Tensor], device: str) -> tuple[float, float, Tensor]:
    """Seconds of the prefill, seconds of the whole pass, and its tokens."""
    start = now(device)
    tokens = decode()
    return side.prefilled - start, now(device) - start, tokens


def turn(name: str, folder: Path, args: argparse.Namespace) -> Iterator[dict]:
    """A row for each batch size, number of threads and form of answer: the medians of passes that are
    repeated for --seconds. Peak memory is that of loading and of the first pass."""
    side, peak = SIDES[name](folder, args), None
    compiles = name == "ours, compiled" or args.device.startswith("cuda")  # there, graphs are captured
    for batch in [batch for batch in args.batch_size if batch == 1 or side.batches]:
        images = random_images(folder, batch, args.device)
        forms = {name: partial(side.decode, images, args.groups)}
        if args.parallel and name in ("ours", "ours, int8", "ours, compiled"):
            forms[name + PARALLEL] = partial(side.decode_parallel, images)
        for threads in args.threads:
            side.set_threads(threads)
            for form, decode in forms.items():
                passes = [timed_pass(side, decode, args.device)]
                peak = peak or peak_memory(args.device)
                if threads == args.threads[0] and (compiles or passes[0][1] < LONG):
                    passes.clear()  # it has warmed up
                while not passes or sum(whole for _, whole, _ in passes) < args.seconds:
                    passes.append(timed_pass(side, decode, args.device))
                prefills, wholes, tokens = zip(*passes)
                row = dict(side=form, batch=batch, threads=threads, tokens=tokens[0].flatten().tolist())
                row |= dict(prefill=statistics.median(prefills), whole=statistics.median(wholes))
                first = form == name and batch == args.batch_size[0]
                yield row | dict(peak=peak if first else None)

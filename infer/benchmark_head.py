"""One choice among the ids that a position allows, three ways, on random hidden states.

    python infer/benchmark_head.py                             # nano's and the 3B's width, batch 1 and 32
    python infer/benchmark_head.py --device cuda --dtype bfloat16

full: the logits of the whole vocabulary, those not allowed masked. slice: the allowed rows alone, in plain
PyTorch (model/decoding/closed_set.py). kernel: the same fused in one launch (model/decoding/head_kernel.py),
on a GPU only. On a GPU each is timed inside a CUDA graph, as in the decode loop.
"""

import argparse

import torch
from torch import nn

from infer.benchmark import seconds
from infer.lib.options import DTYPES, usable_device
from model.decoding.closed_set import Head, capture_graph
from model.decoding.generate import GREEDY

LOC0, CLASS0, CLASSES, CAP = 256_000, 7, 80, 30.0  # official
ALLOWED = [(LOC0, LOC0 + 1024)] * 4 + [(CLASS0, CLASS0 + CLASSES + 1)]
WIDTHS = {"nano": (160, 257_216), "3B": (2304, 257_216)}
REPEATS = 50


class TiedHead(nn.Module):
    """What a head needs of a decoder: the embedding and the cap."""

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype, device: str):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype, device=device)
        self.config = argparse.Namespace(final_cap=CAP)

    def logits(self, hidden, first=0, last=None):
        logits = nn.functional.linear(hidden, self.embed.weight[first:last]).float()
        return torch.tanh(logits / CAP) * CAP


def ways(decoder: TiedHead, hidden: torch.Tensor, slot: int) -> dict:
    """{name: a function without arguments} for one slot of the group."""
    uniform = torch.rand(len(hidden), device=hidden.device)
    first, last = ALLOWED[slot]
    mask = torch.full((decoder.embed.num_embeddings,), -torch.inf, device=hidden.device)
    mask[first:last] = 0
    options = decoder, ALLOWED, False, GREEDY
    plain = Head(*options)
    functions = {
        "full": lambda: torch.softmax(decoder.logits(hidden) + mask, dim=-1).max(-1),
        "slice": lambda: plain(hidden, slot, uniform),
    }
    if hidden.is_cuda:
        from model.decoding.head_kernel import FusedHead

        fused = FusedHead(*options)
        functions["kernel"] = lambda: fused(hidden, slot, uniform)
        functions = {name: capture_graph(function, lambda: None) for name, function in functions.items()}
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 32])
    args = parser.parse_args()
    usable_device(args.device)
    print(f"microseconds, {args.dtype}, {args.device}, torch {torch.__version__}")
    for name, (width, vocabulary) in WIDTHS.items():
        decoder = TiedHead(width, vocabulary, DTYPES[args.dtype], args.device)
        for batch in args.batch_size:
            hidden = torch.randn(batch, width, device=args.device, dtype=DTYPES[args.dtype])
            for slot, what in ((0, "1,024 coordinates"), (4, "81 classes")):
                line = f"{name:5} batch {batch:3} {what:18}"
                with torch.inference_mode():
                    for way, function in ways(decoder, hidden, slot).items():
                        times = sorted(seconds(function, args.device) for _ in range(REPEATS))
                        line += f"{way:>8}{1e6 * times[REPEATS // 2]:10.0f}"
                print(line)


if __name__ == "__main__":
    main()

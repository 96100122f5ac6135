"""The blocks of decoding steps compiled by torch.compile: norms, rotations and softmax become a few kernels.

    compile_steps(model)

One block is compiled and serves all layers, so that it takes seconds and not minutes. That happens at the
first steps, which is before a CUDA graph is captured: the graph then holds the fused kernels. A second size
of batch or cache compiles once more, for all sizes. The prefill stays as it is, and so does the head, which
has a kernel of its own.
"""

import inspect
import logging

import torch
from torch import Tensor

from model.cache import LayerCache
from model.gemma import Block, Rope
from model.paligemma import PaliGemma


def _run(block: Block, x: Tensor, rope: Rope, mask: Tensor, cache: LayerCache, only: None = None) -> Tensor:
    return block(x, rope, mask, cache)  # Gemma gives the last block an `only`, which is None in a step


class CompiledBlock:
    """Gemma.run_step compiled; where that fails, as on a machine without a compiler, it says so once and
    computes the same uncompiled."""

    def __init__(self, backend: str = "inductor"):
        # fullgraph: a graph break would be slow, and nobody would notice. No CUDA graphs of TorchInductor's
        # own: the steps are captured in one anyway.
        options = {"triton.cudagraphs": False} if backend == "inductor" else None
        own = dict(recompile_limit=32, isolate_recompiles=True)  # whatever other models were compiled for
        known = inspect.signature(torch.compile).parameters  # PyTorch 2.11 has neither, and counts all as one
        own = {name: value for name, value in own.items() if name in known}
        self.compiled = torch.compile(_run, fullgraph=True, backend=backend, options=options, **own)

    def __call__(self, block: Block, *args) -> Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(block, *args)
            # Any of three compilers may fail. An error that is not theirs is raised again below.
            except Exception as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                logging.getLogger(__name__).warning("torch.compile failed, steps run uncompiled: %.300s", why)
                self.compiled = None
        return _run(block, *args)  # a step that began writes to the same slots again


def compile_steps(model: PaliGemma) -> None:
    """Compile the steps of one token and of K branches. Another attention must be in place before; hooks are
    not called."""
    model.decoder.run_step = CompiledBlock()

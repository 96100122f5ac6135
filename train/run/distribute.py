"""How the objective is computed: recomputed, compiled, and its gradients shared between the processes."""

import argparse
import contextlib
import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def recomputed(forward, *args):
    """A block's forward that is run again for its gradient, instead of keeping what the gradient needs.

    Without a gradient it is the forward alone: checkpoint would read the GPU's random state first, which
    ends the capture of a CUDA graph, and validation decodes with one.
    """
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def distribute(objective: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The objective (train/loss.py) as the loop calls it."""
    model = objective.model
    blocks = [*model.vision.layers, *model.decoder.layers]
    if args.recompute:
        for block in blocks:
            block.forward = functools.partial(recomputed, block.forward)
    if args.compile:  # all but the loss, which picks a different number of positions in every batch
        # A form for each length of text (TEXT_MULTIPLE), twice: training and validation. Beyond the limit of
        # 8 PyTorch stops compiling and runs the plain code, without a word.
        torch._dynamo.config.recompile_limit = 64
        model.encode = torch.compile(model.encode, dynamic=False)
        model.read = torch.compile(model.read, dynamic=False)
        model.read_branches = torch.compile(model.read_branches, dynamic=False)
    if args.shard:
        compute = torch.bfloat16 if args.amp and args.dtype == "float32" else None
        # Weights are cast, inputs are not: the batch's totals and RoPE's angles would be rounded with them.
        policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # By default the mesh would be of GPUs wherever there are some, even for a model on the CPU.
        mesh = init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(objective, mesh=mesh, mp_policy=policy)
    if dist.is_initialized():
        # In the warm-up of the helper head the decoder gets no gradient, and DDP would wait for it forever.
        return DistributedDataParallel(objective, find_unused_parameters=args.patch_steps > 0)
    return objective


def exchange(compute: nn.Module, last: bool, args: argparse.Namespace):
    """A context for a micro-batch: gradients travel between processes once a step, with the last one."""
    if args.shard:
        compute.set_requires_gradient_sync(last)
    elif isinstance(compute, DistributedDataParallel) and not last:
        return compute.no_sync()
    return contextlib.nullcontext()

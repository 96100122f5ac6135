"""An estimate of the memory that a step of training will take."""

import argparse

import torch

from model import PaliGemma, lora
from model.config import PaliGemmaConfig
from model.io.weights import DTYPES
from model.paligemma import FUSED_FROM

GIB = 2**30
GROWTH = 0.12 * GIB  # what a program on a CPU loads and allocates besides, from its start to the first step


def skeleton(args: argparse.Namespace, config: PaliGemmaConfig) -> tuple[PaliGemma, int]:
    """The model as it will be trained, of tensors that have a shape and no memory, and how many adapters."""
    with torch.device("meta"):
        model, adapters = PaliGemma(config).to(DTYPES[args.dtype]), []
        if args.lora:
            adapters = lora.add_lora(model, args.lora_targets, rank=args.lora_rank)
    if args.freeze_vision and not args.lora:
        model.vision.requires_grad_(False)
    return model, len(adapters)


def memory_of(
    args: argparse.Namespace, config: PaliGemmaConfig, model: PaliGemma, world: int, text: int, program: int
) -> dict[str, float]:
    """Bytes of a process at its peak, by what they are for. model: the skeleton; text: tokens of a sample;
    program: what the process held before it loaded anything, 0 on a GPU."""
    split = world if args.shard else 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / split
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / split
    buckets = gradients if world > 1 and not args.shard else 0  # in which DDP sends them
    micro = args.batch_size // (world * args.accumulate)
    rows = dict(weights=weights, gradients=gradients + buckets, optimizer=2 * gradients)
    rows["activations"] = micro * activation_bytes(args, config, text)
    return rows | (dict(program=program + GROWTH) if program else {})


def activation_bytes(args: argparse.Namespace, config: PaliGemmaConfig, text: int) -> float:
    """What one sample takes: what the layers keep for the gradient, and what the backward pass holds besides.

    A block keeps about 14 tensors of its width, 4 of its MLP, and the attention scores three times; with
    recomputation only its input, and one block at a time in full. How far the whole estimate was from the
    peak of seven runs of nano: train/README.md, "What a run says, and what it leaves".
    """
    vision, decoder = config.vision, config.text
    # In bfloat16 some tensors stay float32: what norms and softmax compute.
    tokens, size = vision.tokens + text, 2.5 if args.amp or args.dtype == "bfloat16" else 4

    # A GPU holds no scores of patches, nor of long texts that this project's own attention reads.
    on_gpu, own = torch.device(args.device).type == "cuda", not (args.attention or args.mask)
    fused = on_gpu and own and vision.tokens >= FUSED_FROM

    def block(tokens: int, width: int, mlp: int, heads: int) -> float:
        return size * (tokens * (14 * width + 4 * mlp) + 3 * heads * tokens**2)

    of_vision = block(vision.tokens, vision.width, vision.mlp, 0 if on_gpu else vision.heads)
    of_text = block(tokens, decoder.width, decoder.mlp, 0 if fused else decoder.heads)
    if not args.recompute:
        return vision.layers * of_vision + decoder.layers * of_text
    inputs = size * (vision.layers * vision.tokens * vision.width + decoder.layers * tokens * decoder.width)
    return inputs + max(of_vision, of_text)

"""`fit.py --dry-run`: what a run would need. The model is built on the meta device; no weights are read."""

import argparse

import torch

from model import PaliGemma, lora
from model.io.hub import folder_of, resolve
from model.io.tokenizer import Tokenizer
from model.io.weights import DTYPES, load_config
from train.data.open import check_length, classes_for, open_data, read_coco_index
from train.data.samples import closed_set_lengths
from train.run.options import branches_of, noise_of, overrides_of

GIB = 2**30


def print_plan(args: argparse.Namespace, world: int) -> int:
    """Print sizes, memory and steps; returns the exit code."""
    source = resolve(args.model, weights=False)
    folder, config = folder_of(source), load_config(source)
    index = read_coco_index(args.data, args.images) if args.data else None
    config = config.override(classes=classes_for(index, config.classes), **overrides_of(args))
    with torch.device("meta"):
        model = PaliGemma(config).to(DTYPES[args.dtype])
        if args.lora:
            matrices = lora.add_lora(model, args.lora_targets, rank=args.lora_rank)
    if args.freeze_vision:
        model.vision.requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    print(f"model       {args.model}: {total:,} parameters, {config.vision.image_size} px, {args.dtype}")
    print(f"trained     {trainable:,} parameters" + (f" in {len(matrices)} adapters" if args.lora else ""))

    tokenizer = folder / "tokenizer.model"
    # Of the closed-set language: its prompt has five tokens or a few more.
    text, positions = closed_set_lengths(8, config.groups, config.groups, branches_of(args), noise_of(args))
    if args.data and tokenizer.exists():
        data = open_data(
            args.data,
            args.images,
            model,
            Tokenizer(folder),
            allow_outside=args.allow_outside,
            noise=noise_of(args),
            index=index,
            branches=branches_of(args),
            flip_vertical=args.flip_vertical,
        )
        epochs = args.steps * args.batch_size / len(data)
        print(f"data        {args.data}: {len(data):,} samples, {epochs:.2f} epochs")
        text, positions = data.text_tokens, data.text_positions
    check_length(positions, model)
    tokens = config.vision.tokens + text
    micro = args.batch_size // (world * args.accumulate)
    print(f"a sample    {config.vision.tokens} image tokens + {text} text tokens = {tokens} tokens")
    print(f"a step      {args.batch_size} samples = {world} processes x {args.accumulate} x {micro}")
    print(f"steps       {args.steps:,}, learning rate {args.lr:g} to {args.min_lr:g}, {args.warmup} warm-up")

    split = world if args.shard else 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / split
    gradients = sum(p.numel() * p.element_size() for p in trained) / split
    moments = 2 * gradients
    activations = micro * activation_bytes(model, tokens, args.recompute)
    rows = dict(weights=weights, gradients=gradients, optimizer=moments, activations=activations)
    for name, size in rows.items():
        print(f"{name:<12}{size / GIB:8.2f} GiB a process{' (estimate)' if name == 'activations' else ''}")
    print(f"{'memory':<12}{sum(rows.values()) / GIB:8.2f} GiB a process (estimate)")
    return 0


def activation_bytes(model: PaliGemma, tokens: int, recompute: bool) -> float:
    """A rough figure for one sample: two bytes each for what the layers keep for the gradient.

    A block keeps about 14 tensors of its width, 4 of its MLP, and the attention scores three times; with
    recomputation only its input, and one block at a time in full.
    """
    vision, text = model.config.vision, model.config.text

    def block(tokens, width, mlp, heads):
        return 2 * tokens * (14 * width + 4 * mlp) + 2 * 3 * heads * tokens**2

    encoder = block(vision.tokens, vision.width, vision.mlp, vision.heads)
    decoder = block(tokens, text.width, text.mlp, text.heads)
    if not recompute:
        return vision.layers * encoder + text.layers * decoder
    inputs = 2 * (vision.layers * vision.tokens * vision.width + text.layers * tokens * text.width)
    return inputs + max(encoder, decoder)

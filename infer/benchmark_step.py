"""A LoRA step of a full-size model, beside transformers + peft (which only tests and this program need).

    python infer/benchmark_step.py                                # 3B, 224 px, batch 1: minutes, 7 GB of disk
    python infer/benchmark_step.py --variant paligemma2-3b-448 --batch-size 8 --device cuda

Builds a random checkpoint in bfloat16, without a hub, and runs the same step on it in turns: rank 16 on the
published matrices, a suffix of 256 tokens, AdamW. Every turn is a new process, so that peaks do not mix. The
losses of the first step, on the same weights and tokens, show that the two compute the same thing.
"""

import argparse
import functools
import json
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infer.lib.measuring import installed, print_table, random_checkpoint, run_child, seconds
from infer.lib.options import add_device_argument, check_output, usable_device, write_output
from model import PaliGemma, lora
from model.config import VARIANTS, PaliGemmaConfig
from model.io.weights import load_config
from train.loss import vocabulary_loss
from train.run.processes import peak_memory
from train.run.program import complain, parser, positive, run

PREFIX_LEN, SUFFIX_LEN = 8, 256  # tokens
NEWLINE = 108  # the id that ends the prefix
PEER_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj out_proj".split()
SIDES = ["ours", "peer", "ours, recompute", "peer, recompute"]


def random_batch(config: PaliGemmaConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] and text [B, T]: bos, prefix, newline, suffix, eos."""
    generator, size = torch.Generator().manual_seed(1), config.vision.image_size
    images = 2 * torch.rand(batch, 3, size, size, generator=generator) - 1
    tokens = torch.randint(300, config.image_token, (batch, PREFIX_LEN + SUFFIX_LEN), generator=generator)
    tokens[:, 0], tokens[:, PREFIX_LEN - 1], tokens[:, -1] = config.bos, NEWLINE, config.eos
    return images.to(device), tokens.to(device)


def our_step(folder: Path, args: argparse.Namespace, recompute: bool):
    """A function that does forward and backward and returns the loss; and what is trained."""
    model = PaliGemma.from_pretrained(folder, device=args.device)
    lora.add_lora(model, lora.TARGETS["published"], rank=16, alpha=16)
    for block in (*model.vision.layers, *model.decoder.layers) if recompute else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    images, tokens = random_batch(model.config, args.batch_size, args.device)
    weights = torch.zeros(tokens[:, 1:].shape, device=args.device)
    weights[:, PREFIX_LEN - 1 :] = 1

    def step() -> float:
        hidden = model.train().hidden(images, tokens[:, :-1], PREFIX_LEN)
        loss = vocabulary_loss(model.decoder, hidden, tokens[:, 1:], weights) / weights.sum()
        loss.backward()
        return loss.item()

    return step, [p for p in model.parameters() if p.requires_grad]


def peer_step(folder: Path, args: argparse.Namespace, recompute: bool):
    """The same with transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).to(args.device)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=PEER_TARGETS)).train()
    config = load_config(folder)
    images, tokens = random_batch(config, args.batch_size, args.device)
    image = tokens.new_full((len(tokens), config.vision.tokens), config.image_token)
    ids = torch.cat((image, tokens), dim=1)
    suffix = torch.arange(ids.shape[1], device=args.device) >= config.vision.tokens + PREFIX_LEN
    batch = dict(
        input_ids=ids,
        pixel_values=images.bfloat16(),
        attention_mask=torch.ones_like(ids),
        token_type_ids=suffix.long().expand_as(ids),
        labels=ids.where(suffix, -100),
    )

    def step() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item()

    return step, [p for p in model.parameters() if p.requires_grad]


def measure(side: str, folder: Path, args: argparse.Namespace) -> dict:
    """One side's turn: the first loss, the seconds of the fastest step after the first, the peak memory."""
    torch.manual_seed(0)
    make = our_step if side.startswith("ours") else peer_step
    forward_backward, trained = make(folder, args, recompute="recompute" in side)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-5), []

    def step() -> None:
        losses.append(forward_backward())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = [seconds(step, args.device) for _ in range(1 + args.steps)]
    trainable, peak = sum(p.numel() for p in trained), peak_memory(args.device) / 1e9
    return dict(side=side, loss=losses[0], trainable=trainable, seconds=min(times[1:]), peak_gb=peak)


def flops(config: PaliGemmaConfig, batch_size: int) -> float:
    """Floating-point operations of a step without recomputation: 2 per weight and token forward, and as many
    backward through the frozen weights (those of adapters and attention scores are left out)."""
    with torch.device("meta"):
        model = PaliGemma(config)
    text_tokens = config.vision.tokens + PREFIX_LEN + SUFFIX_LEN - 1
    layers = sum(p.numel() for p in model.decoder.layers.parameters())
    head = model.decoder.embed.weight.numel()
    vision = sum(p.numel() for p in model.vision.parameters())
    per_image = vision * config.vision.tokens + layers * text_tokens + head * SUFFIX_LEN
    return 4.0 * batch_size * per_image


def take_turns(folder: Path, args: argparse.Namespace) -> list[dict]:
    """The figures of every turn, each in a process of its own. A side that fails has none."""
    own = ["--variant", args.variant, "--batch-size", args.batch_size, "--steps", args.steps]
    own += ["--device", args.device, "--folder", folder]
    sides = [side for side in SIDES if args.peer or side.startswith("ours")]
    rows = []
    for side in sides * args.turns:  # not all of one side's first, as the machine's speed drifts
        try:
            rows += run_child(__file__, *own, "--child", side)
            print(rows[-1], flush=True)
        except ChildProcessError as error:
            complain(error, __file__)
    return rows


def print_best(rows: list[dict], config: PaliGemmaConfig, args: argparse.Namespace) -> None:
    """A table of the fastest turn of each side."""
    table = []
    for side in dict.fromkeys(row["side"] for row in rows):
        best = min((row for row in rows if row["side"] == side), key=lambda row: row["seconds"])
        tokens = args.batch_size * (config.vision.tokens + PREFIX_LEN + SUFFIX_LEN)
        text = {"": side, "s a step": f"{best['seconds']:.2f}", "tokens/s": f"{tokens / best['seconds']:.0f}"}
        text |= {"peak GB": f"{best['peak_gb']:.2f}", "first loss": f"{best['loss']:.4f}"}
        if args.peak_tflops:
            used = flops(config, args.batch_size) / best["seconds"] / args.peak_tflops / 1e12
            text["MFU"] = f"{used:.1%}"
        table.append(text)
    print_table(table)


def main() -> int | None:
    options = parser(__doc__)
    add = options.add_argument
    variants = [name for name in VARIANTS if "28b" not in name]
    add("--variant", choices=variants, default="paligemma2-3b-224")
    add("--batch-size", type=positive, default=1)
    add("--steps", type=positive, default=2, help="timed in each turn, after one that is not")
    add("--turns", type=positive, default=1, help="of each side")
    add("--peer", action=argparse.BooleanOptionalAction, default=installed("peft"), help="transformers, too")
    add_device_argument(options)
    add("--peak-tflops", type=float, help="of the device in bfloat16: prints the share that is used (MFU)")
    add("--folder", type=Path, help="a random checkpoint is built there, or found and used")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = options.parse_args()
    args.device = usable_device(args.device)
    check_output(args.json)
    if args.child:
        print(json.dumps(measure(args.child, args.folder, args)))
        return None
    with random_checkpoint(args.variant, args.folder) as folder:
        config, rows = load_config(folder), take_turns(folder, args)
    packages = ("torch", "transformers", "peft") if args.peer else ("torch",)
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"\n{args.variant}, batch {args.batch_size}, {args.device}, {versions}")
    if not rows:
        raise ValueError("no side has ended a turn")
    print_best(rows, config, args)
    if args.json:
        write_output(dict(versions=versions, device=args.device, rows=rows), args.json)
    return None


if __name__ == "__main__":
    run(main, __file__)

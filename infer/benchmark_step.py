"""A LoRA step of a full-size model, beside transformers + peft (which only tests and this program need).

    python infer/benchmark_step.py                                # 3B, 224 px, batch 1: minutes, 7 GB of disk
    python infer/benchmark_step.py --variant paligemma2-3b-448 --batch-size 8 --device cuda

Builds a random checkpoint in bfloat16, without a hub, and runs the same step on it in turns: rank 16 on the
published matrices, a suffix of 256 tokens, AdamW. Every turn is a new process, so that peaks do not mix. The
losses of the first step, on the same weights and tokens, say that the two compute the same thing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from infer.benchmark import peak_bytes
from infer.lib.measuring import build
from infer.lib.options import usable_device
from model import PaliGemma, lora
from model.config import VARIANTS
from model.io.writing import write_json

PREFIX, SUFFIX = 8, 256  # tokens
PEER_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj out_proj".split()
SIDES = ["ours", "peer", "ours, recompute", "peer, recompute"]


def inputs(config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, S, S] and text [B, T]: bos, prefix, newline, suffix, eos."""
    generator, size = torch.Generator().manual_seed(1), config.vision.image_size
    images = 2 * torch.rand(batch, 3, size, size, generator=generator) - 1
    tokens = torch.randint(300, config.image_token, (batch, PREFIX + SUFFIX), generator=generator)
    tokens[:, 0], tokens[:, PREFIX - 1], tokens[:, -1] = config.bos, 108, config.eos
    return images.to(device), tokens.to(device)


def our_step(folder: Path, args: argparse.Namespace, recompute: bool):
    """A function that does forward and backward and returns the loss; and what is trained."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    from train.loss import vocabulary_loss

    model = PaliGemma.from_pretrained(str(folder), device=args.device)
    lora.add_lora(model, lora.TARGETS["published"], rank=16, alpha=16)
    for block in (*model.vision.layers, *model.decoder.layers) if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    images, tokens = inputs(model.config, args.batch_size, args.device)
    weights = torch.zeros(tokens[:, 1:].shape, device=args.device)
    weights[:, PREFIX - 1 :] = 1

    def step() -> float:
        hidden = model.train().hidden(images, tokens[:, :-1], PREFIX)
        loss = vocabulary_loss(model.decoder, hidden, tokens[:, 1:], weights) / weights.sum()
        loss.backward()
        return loss.item()

    return step, [p for p in model.parameters() if p.requires_grad]


def peer_step(folder: Path, args: argparse.Namespace, recompute: bool):
    """The same of transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).to(args.device)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=PEER_TARGETS)).train()
    config = VARIANTS[args.variant]
    images, tokens = inputs(config, args.batch_size, args.device)
    image = tokens.new_full((len(tokens), config.vision.tokens), config.image_token)
    ids = torch.cat((image, tokens), dim=1)
    suffix = torch.arange(ids.shape[1], device=args.device) >= config.vision.tokens + PREFIX
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
    """One side's turn: the first loss, seconds of each step after the first, the peak memory."""
    usable_device(args.device)
    torch.manual_seed(0)
    make = our_step if side.startswith("ours") else peer_step
    step, trained = make(folder, args, recompute="recompute" in side)
    optimizer, seconds, losses = torch.optim.AdamW(trained, lr=1e-5), [], []
    for _ in range(1 + args.steps):
        start = time.perf_counter()
        losses.append(step())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes(args.device)
    trainable = sum(p.numel() for p in trained)
    return dict(side=side, loss=losses[0], trainable=trainable, seconds=min(seconds[1:]), peak_gb=peak / 1e9)


def flops(args: argparse.Namespace) -> float:
    """Of a step, without recomputation: 2 per weight and token forward, as many backward through the frozen
    weights to what is before them (adapters and attention scores are left out)."""
    config = VARIANTS[args.variant]
    with torch.device("meta"):
        model = PaliGemma(config)
    text_tokens = config.vision.tokens + PREFIX + SUFFIX - 1
    layers = sum(p.numel() for p in model.decoder.layers.parameters())
    head = model.decoder.embed.weight.numel()
    vision = sum(p.numel() for p in model.vision.parameters())
    per_image = vision * config.vision.tokens + layers * text_tokens + head * SUFFIX
    return 4.0 * args.batch_size * per_image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--variant", choices=[name for name in VARIANTS if "28b" not in name], default="paligemma2-3b-224")
    add("--batch-size", type=int, default=1)
    add("--steps", type=int, default=2, help="timed in each turn, after one that is not")
    add("--turns", type=int, default=1, help="of each side")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--peak-tflops", type=float, help="of the device in bfloat16: prints the share that is used (MFU)")
    add("--folder", type=Path, help="a random checkpoint is built there, or found and used")
    add("--json", type=Path, help="write the figures there")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.folder, args)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="paligemma-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            build(args.variant, folder)
        for side in SIDES * args.turns:
            own = ["--variant", args.variant, "--batch-size", args.batch_size, "--steps", args.steps]
            command = [sys.executable, __file__, *own, "--device", args.device, "--folder", folder]
            done = subprocess.run([*map(str, command), "--child", side], stdout=subprocess.PIPE)
            if done.returncode:
                print(f"{side}: ended with exit code {done.returncode} (-9: out of memory)")
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"\n{args.variant}, batch {args.batch_size}, {args.device}, {versions}")
    print(f"{'':18}{'s a step':>10}{'tokens/s':>10}{'peak GB':>10}{'first loss':>12}")
    for side in SIDES:
        mine = [row for row in rows if row["side"] == side]
        if mine:
            best = min(mine, key=lambda row: row["seconds"])
            tokens = args.batch_size * (VARIANTS[args.variant].vision.tokens + PREFIX + SUFFIX)
            line = f"{side:18}{best['seconds']:10.2f}{tokens / best['seconds']:10.0f}{best['peak_gb']:10.2f}"
            line += f"{best['loss']:12.4f}"
            if args.peak_tflops:
                line += f"   MFU {flops(args) / best['seconds'] / args.peak_tflops / 1e12:.1%}"
            print(line)
    if args.json:
        write_json(dict(versions=versions, device=args.device, rows=rows), args.json)


if __name__ == "__main__":
    main()

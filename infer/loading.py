"""From options to a model: what every program of infer/ shares."""

import argparse

import torch

from model import PaliGemma
from model.hub import resolve
from model.lora import fold
from model.repack import can_pack, pack, quantize
from model.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = 1 << 30  # bytes of weights up to which float32 is the faster choice on a CPU


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose and load a model."""
    add = parser.add_argument
    add("--model", default="nano", help="a folder, a hub id (owner/name or owner/name@revision), or nano")
    add("--adapter", metavar="PATH_OR_ID", help="a LoRA adapter for it, as PEFT or train.py writes them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 for small models on a CPU")
    add("--attn-cap", type=float, help="soft cap of the attention scores instead of the checkpoint's; 0: off")
    add("--final-cap", type=float, help="soft cap of the logits instead of the checkpoint's; 0: off")
    add("--int8", action="store_true", help="the decoder's matrices in 8 bits: half the memory")
    add("--compile", action="store_true", help="torch.compile the decoder: slow to start, meant for a GPU")
    add("--seed", type=int, default=0, help="of torch's random numbers; greedy decoding draws none")


def load_model(args: argparse.Namespace) -> tuple[PaliGemma, Tokenizer]:
    """What the arguments ask for. Raises ValueError for anything a user can get wrong."""
    torch.manual_seed(args.seed)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); try --device cpu") from error
    folder = resolve(args.model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    small_cpu = device == "cpu" and weights < SMALL
    dtype = DTYPES.get(args.dtype) or (torch.float32 if small_cpu else torch.bfloat16)
    overrides = dict(attn_cap=args.attn_cap, final_cap=args.final_cap)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    source = dict(dtype=dtype, device=device, adapter=args.adapter)
    model = PaliGemma.from_pretrained(str(folder), **source, **overrides)
    if args.int8:
        quantize(fold(model))
    elif can_pack(model) and not args.compile:
        pack(model)
    if args.compile:
        model.decoder.compile()
    return model, Tokenizer(folder)

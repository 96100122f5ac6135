"""LoRA (arXiv 2106.09685): to each frozen matrix, the product of two thin trained ones is added.

    names = add_lora(model, TARGETS["published"], rank=16, alpha=16)    # only A and B are trainable now
    fold(model)                                                         # merged: plain Linears again

Adapters on disk: model/io/adapter.py.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODER = r"decoder\.layers\.\d+\.(attn|mlp)\.\w+_proj"
TARGETS = {  # regular expressions for full paths of modules, such as decoder.layers.0.attn.q_proj
    "decoder": DECODER,
    "published": rf"{DECODER}|vision\.layers\.\d+\.attn\.\w+_proj",  # 402 matrices of the 10B
}


class LoRALinear(nn.Module):
    """Replaces a Linear: x W^T + b + scale * dropout(x) A^T B^T. It holds the Linear's own W and b.

    A [rank, in] starts random and B [out, rank] at zero, so at first nothing changes. Both are float32,
    whatever the dtype of W, so that small steps are not rounded away; they compute in the dtype of x. scale:
    alpha / rank, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        # A base without memory is loaded later (train/setup.py); A and B have their values from the start.
        device = None if base.weight.is_meta else base.weight.device
        new = dict(dtype=torch.float32, device=device)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        y = F.linear(x, self.weight, self.bias)
        thin = F.linear(self.dropout(x), self.A.to(x.dtype)) * self.scale  # [..., rank]
        # Added in place, through a view of y: no second tensor of its size.
        y.flatten(0, -2).addmm_(thin.flatten(0, -2).to(y.dtype), self.B.to(y.dtype).T)
        return y


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{full path: layer}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(
    model: nn.Module, targets: str, rank: int = 16, alpha: float = 16, dropout: float = 0.0, rslora=False
) -> list[str]:
    """Freeze the model and replace every Linear whose full path matches `targets` by a LoRALinear.

    Returns the paths. Other modules can be given requires_grad afterwards: they are then trained in full, and
    saved with the adapter.
    """
    if rank < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        want = "want a rank of at least 1, a finite alpha, a dropout in [0, 1)"
        raise ValueError(f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: {want}")
    try:
        chosen = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    except re.error as error:
        raise ValueError(f"LoRA targets {targets!r}: not a regular expression ({error})") from error
    if not chosen:
        raise ValueError(f"LoRA targets {targets!r} match no module, such as decoder.layers.0.attn.q_proj")
    model.requires_grad_(False)
    for name in chosen:
        replace_linear(model, name, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
    return chosen


def replace_linear(model: nn.Module, name: str, **options) -> LoRALinear:
    """Replace one Linear by a LoRALinear, which is returned."""
    base = model.get_submodule(name)
    if type(base) is not nn.Linear:
        raise ValueError(f"LoRA cannot be put on {name}: it is a {type(base).__name__}, not a Linear")
    layer = LoRALinear(base, **options).train(base.training)
    model.set_submodule(name, layer)
    return layer


def fold(model: nn.Module) -> nn.Module:
    """Add every product to its W for good: plain Linears again, and as fast. Returns the model."""
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            merged = (layer.weight + layer.scale * (layer.B @ layer.A)).to(layer.weight.dtype)
        linear = nn.Linear(*reversed(merged.shape), bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(merged, requires_grad=False), layer.bias
        model.set_submodule(name, linear)
    return model

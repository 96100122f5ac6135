"""NumPy's .npz files: those of any arrays, and PaliGemma's weights as big_vision and Kaggle publish them.

No pickle is read, and headers are not trusted: arrays are stored uncompressed, so they are mapped from the
file, and one that does not fill its place there is refused before memory is allocated. bfloat16, which NumPy
does not know, is stored as two bytes without a meaning (V2).

Layers are stacked, matrices are the transposes of PyTorch's, and heads have an axis of their own. The file
holds no config: it is that of the official variant with the same shapes.

Axes: L layers, N query heads, K kv heads, H head dim, D width, F width of the MLP, V vocabulary.
"""

import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import VARIANTS, PaliGemmaConfig
from model.io.hub import replacement
from model.io.tensors import AGAIN
from model.io.writing import explain

_BFLOAT16 = "|V2", "<V2", "<u2", "<i2"  # the spellings that files have for it
_KINDS = {"<f4": "<f4", "<f2": "<f2"} | dict.fromkeys(_BFLOAT16, "<i2")  # {the file's: what NumPy reads}
# What np.savez writes before the numbers. np.load would evaluate a damaged header, and ask for as much memory
# as it says.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|]\w\d)', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)
_MOST_HEADER = 1 << 10  # bytes


def open_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, mapped: float32, float16, or int16 for bfloat16."""
    fault = f"{file} is not a numpy file{replacement(file, AGAIN)}"
    errors = ValueError, OSError, RuntimeError, OverflowError, EOFError, zipfile.BadZipFile
    with explain(fault, *errors), zipfile.ZipFile(file) as archive, open(file, "rb") as content:
        return {
            entry.filename.removesuffix(".npy"): _map(file, content, entry) for entry in archive.infolist()
        }


def _map(file: Path, content, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename} is compressed: write it again with np.savez")
    content.seek(entry.header_offset + 26)  # its own copy of the name, and more, stand before the array
    start = entry.header_offset + 30 + sum(int.from_bytes(content.read(2), "little") for _ in range(2))
    content.seek(start)
    header = _HEADER.match(content.read(min(entry.file_size, _MOST_HEADER)))
    if not header or header[1].decode() not in _KINDS:
        raise ValueError(f"{entry.filename} is not an array of float32, float16 or bfloat16")
    kind, shape = np.dtype(_KINDS[header[1].decode()]), [int(x) for x in header[3].split(b",") if x.strip()]
    place = entry.file_size - header.end()
    inside = start + entry.file_size <= file.stat().st_size
    if not place or not inside or math.prod(shape) * kind.itemsize != place:
        raise ValueError(f"{entry.filename} has the shape {shape}, which does not fill its {place:,} bytes")
    order = "F" if header[2] == b"True" else "C"
    return np.memmap(file, kind, "c", start + header.end(), tuple(shape), order)


# ---- PaliGemma ---------------------------------------------------------------------------------------------


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor) -> Tensor:  # [in, out] -> [out, in]
    return x.T


def _to_heads(x: Tensor) -> Tensor:  # [N, D, H] -> [N * H, D]
    return x.mT.flatten(0, 1)


def _from_heads(x: Tensor) -> Tensor:  # [N, H, D] -> [D, N * H]
    return x.flatten(0, 1).T


_IMAGE, _BLOCK = "img/Transformer/encoder_norm", "img/Transformer/encoderblock"
_ATTENTION, _MLP, _LAYERS = f"{_BLOCK}/MultiHeadDotProductAttention_0", f"{_BLOCK}/MlpBlock_0", "llm/layers"
# our name -> the file's, and what becomes of the array, or of a layer's part of it; {} stands for the layer
_ARRAYS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "vision.patch_embedding.weight": ("img/embedding/kernel", lambda x: x.permute(3, 2, 0, 1)),
    "vision.patch_embedding.bias": ("img/embedding/bias", _same),
    "vision.position_embedding.weight": ("img/pos_embedding", lambda x: x[0]),
    "vision.norm.weight": (f"{_IMAGE}/scale", _same),
    "vision.norm.bias": (f"{_IMAGE}/bias", _same),
    **{
        f"vision.layers.{{}}.norm{i + 1}.{ours}": (f"{_BLOCK}/LayerNorm_{i}/{theirs}", _same)
        for i in range(2)
        for ours, theirs in (("weight", "scale"), ("bias", "bias"))
    },
    **{
        f"vision.layers.{{}}.attn.{name[0]}_proj.{ours}": (f"{_ATTENTION}/{name}/{theirs}", change)
        for name in ("query", "key", "value")
        for ours, theirs, change in (
            ("weight", "kernel", lambda x: x.flatten(1).T),  # [D, N, H] -> [N * H, D]
            ("bias", "bias", lambda x: x.flatten()),
        )
    },
    "vision.layers.{}.attn.out_proj.weight": (f"{_ATTENTION}/out/kernel", _from_heads),
    "vision.layers.{}.attn.out_proj.bias": (f"{_ATTENTION}/out/bias", _same),
    **{
        f"vision.layers.{{}}.mlp.fc{i + 1}.{ours}": (f"{_MLP}/Dense_{i}/{theirs}", change)
        for i in range(2)
        for ours, theirs, change in (("weight", "kernel", _turned), ("bias", "bias", _same))
    },
    "projector.weight": ("img/head/kernel", _turned),
    "projector.bias": ("img/head/bias", _same),
    "decoder.embed.weight": ("llm/embedder/input_embedding", _same),
    "decoder.norm.weight": ("llm/final_norm/scale", _same),
    "decoder.layers.{}.attn.q_proj.weight": (f"{_LAYERS}/attn/q_einsum/w", _to_heads),
    "decoder.layers.{}.attn.k_proj.weight": (f"{_LAYERS}/attn/kv_einsum/w", lambda x: _to_heads(x[0])),
    "decoder.layers.{}.attn.v_proj.weight": (f"{_LAYERS}/attn/kv_einsum/w", lambda x: _to_heads(x[1])),
    "decoder.layers.{}.attn.o_proj.weight": (f"{_LAYERS}/attn/attn_vec_einsum/w", _from_heads),
    "decoder.layers.{}.mlp.gate_proj.weight": (f"{_LAYERS}/mlp/gating_einsum", lambda x: x[0].T),
    "decoder.layers.{}.mlp.up_proj.weight": (f"{_LAYERS}/mlp/gating_einsum", lambda x: x[1].T),
    "decoder.layers.{}.mlp.down_proj.weight": (f"{_LAYERS}/mlp/linear", _turned),
    "decoder.layers.{}.pre_attn_norm.weight": (f"{_LAYERS}/pre_attention_norm/scale", _same),
    "decoder.layers.{}.post_attn_norm.weight": (f"{_LAYERS}/post_attention_norm/scale", _same),
    "decoder.layers.{}.pre_mlp_norm.weight": (f"{_LAYERS}/pre_ffw_norm/scale", _same),
    "decoder.layers.{}.post_mlp_norm.weight": (f"{_LAYERS}/post_ffw_norm/scale", _same),
}


def _shapes_of(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays that tell the variants apart."""
    vision, text = config.vision, config.text
    heads = (text.layers, text.heads, text.width, text.head_dim)
    shapes = {
        "img/pos_embedding": (1, vision.tokens, vision.width),
        f"{_BLOCK}/MlpBlock_0/Dense_0/kernel": (vision.layers, vision.width, vision.mlp),
        f"{_LAYERS}/attn/q_einsum/w": heads,
        f"{_LAYERS}/attn/kv_einsum/w": (text.layers, 2, text.kv_heads, *heads[2:]),
        f"{_LAYERS}/mlp/linear": (text.layers, text.mlp, text.width),
    }
    return shapes | ({f"{_LAYERS}/post_ffw_norm/scale": heads[::2]} if text.version == 2 else {})


def variant_of(file: Path) -> str:
    """The name of the official variant whose shapes the arrays of a file have: "paligemma2-3b-224"."""
    arrays = _paligemma(file)
    for name, config in VARIANTS.items():
        wanted = _shapes_of(config)
        norms = f"{_LAYERS}/post_ffw_norm/scale" in arrays
        if norms == (config.text.version == 2) and all(
            key in arrays and arrays[key].shape == shape for key, shape in wanted.items()
        ):
            return name
    key = f"{_LAYERS}/attn/q_einsum/w"
    found = f"{key} {list(arrays[key].shape)}" if key in arrays else f"no {key}"
    raise ValueError(f"{file} has the shapes of none of {', '.join(VARIANTS)}: it has {found}")


def npz_config(file: Path) -> PaliGemmaConfig:
    """The config of the file's variant, with as many ids as its embedding has rows: 257,152, as only the
    hub's files are padded."""
    config, embedding = VARIANTS[variant_of(file)], _paligemma(file).get("llm/embedder/input_embedding")
    rows = config.text.vocab_size if embedding is None else len(embedding)
    return replace(config, text=replace(config.text, vocab_size=rows))


def _paligemma(file: Path) -> dict[str, np.ndarray]:
    return {name.removeprefix("params/"): array for name, array in open_arrays(file).items()}


@dataclass(frozen=True)
class _Slice:
    """Stands in for safetensors' slices: it knows the shape of a tensor."""

    shape: list[int]

    def get_shape(self) -> list[int]:
        return self.shape


class NpzTensors:
    """The tensors of a file, each made when it is asked for, with the methods of safetensors' safe_open.
    Arrays that belong to no tensor of ours keep their names."""

    def __init__(self, file: Path, name_of: Callable[[str], str]):
        """name_of: the name to give to a tensor that has ours."""
        self.file, self.arrays = file, _paligemma(file)
        self.parts = {}  # name -> array, its layer or None, what becomes of it
        for name, (key, change) in _ARRAYS.items():
            layers = range(len(self.arrays.get(key, ()))) if "{}" in name else [None] * (key in self.arrays)
            self.parts |= {name_of(name.format(i)): (key, i, change) for i in layers}
        others = self.arrays.keys() - {key for key, *_ in self.parts.values()}
        self.parts |= {key: (key, None, _same) for key in others}

    def keys(self):
        return self.parts.keys()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(list(self._make(name, lambda array: torch.empty(array.shape, device="meta")).shape))

    def get_tensor(self, name: str) -> Tensor:
        return self._make(name, _tensor).contiguous()

    def _make(self, name: str, tensor_of: Callable[[np.ndarray], Tensor]) -> Tensor:
        key, layer, change = self.parts[name]
        array = self.arrays[key]
        try:
            whole = tensor_of(array)
            return change(whole if layer is None else whole[layer])
        except (RuntimeError, IndexError):
            shape = list(array.shape)
            raise ValueError(f"{self.file}: {key} has the shape {shape}, with too few axes") from None


def _tensor(array: np.ndarray) -> Tensor:
    made = torch.from_numpy(array)
    return made.view(torch.bfloat16) if made.dtype == torch.int16 else made

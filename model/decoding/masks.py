"""Masks: the codec that turns them into sixteen tokens and back, run-length encoding, boxes and overlaps.

The codec is the vector-quantised autoencoder behind <seg000> to <seg127> (arXiv 2301.02229). An object's mask
is cut out at its box, resized to 64 x 64 and encoded as a 4 x 4 grid of codes out of 128; box and codes give
the mask back. Layers and names are those of big_vision's vae-oid.npz.

Axes: n masks, C channels, H, W pixels of the image.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model.io.hub import OFFICIAL_CODEC, replacement
from model.io.npz import open_arrays
from model.io.tensors import AGAIN, check_numbers, read_tensors
from model.io.tokenizer import SEGS
from model.io.writing import explain, save_tensors

SIDE = 64  # pixels of the square that is encoded
OFFICIAL_BYTES = 8_479_556  # gs://big_vision/paligemma/vae-oid.npz
OFFICIAL_SHA256 = "5586010257b8536dddefab65e7755077f21d5672d5674dacf911f73ae95a4447"
_CODEBOOK = "_vq_vae._embedding"  # the official name of `codebook`
_TRAINING_STATE = {"_vq_vae._ema_cluster_size", "_vq_vae._ema_w"}


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskCodec(nn.Module):
    """channels: at the 4 x 4 grid, a multiple of 8; width: of a code. The official codec has 128 and 512."""

    def __init__(self, channels: int = 128, width: int = 512):
        super().__init__()
        c = channels
        self.encoder = nn.Sequential(  # 64 x 64 pixels, halved four times -> 4 x 4
            *_relu(nn.Conv2d(1, c // 8, 4, 2, 1)),
            *_relu(nn.Conv2d(c // 8, c // 4, 4, 2, 1)),
            *_relu(nn.Conv2d(c // 4, c // 2, 4, 2, 1)),
            *_relu(nn.Conv2d(c // 2, c, 4, 2, 1)),
            Residual(c),
            Residual(c),
            nn.Conv2d(c, width, 1),
        )
        self.decoder = nn.Sequential(
            *_relu(nn.Conv2d(width, c, 1)),
            Residual(c),
            Residual(c),
            *_relu(nn.ConvTranspose2d(c, c, 4, 2, 1)),
            *_relu(nn.ConvTranspose2d(c, c // 2, 4, 2, 1)),
            *_relu(nn.ConvTranspose2d(c // 2, c // 4, 4, 2, 1)),
            *_relu(nn.ConvTranspose2d(c // 4, c // 8, 4, 2, 1)),
            nn.Conv2d(c // 8, 1, 1),
        )
        self.register_buffer("codebook", torch.randn(SEGS, width))

    def features(self, masks: Tensor) -> Tensor:
        """Masks [n, 64, 64] in [-1, 1] -> features [n, 16, width] to be quantised, the grid row by row."""
        return self.encoder(masks[:, None]).flatten(2).mT

    def nearest(self, features: Tensor) -> Tensor:
        """Features [n, 16, width] -> the nearest codes int64 [n, 16]."""
        # |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and |f|^2 is the same for every code.
        distances = self.codebook.square().sum(-1) - 2 * features @ self.codebook.T  # [n, 16, 128]
        return distances.argmin(-1)

    def reconstruct(self, quantised: Tensor) -> Tensor:
        """Quantised features [n, 16, width] -> masks [n, 64, 64], about -1 to 1."""
        grid = quantised.mT.unflatten(2, (4, 4))
        return self.decoder(grid)[:, 0]

    @torch.no_grad()
    def encode(self, masks: Tensor) -> Tensor:
        """Masks [n, 64, 64] in [-1, 1] -> codes int64 [n, 16] in 0..127."""
        return self.nearest(self.features(masks))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, 16] -> masks [n, 64, 64], positive inside the object."""
        return self.reconstruct(self.codebook[codes])

    @classmethod
    def load(cls, file: str | Path, check_sha256: bool = False) -> "MaskCodec":
        """Read vae-oid.npz, or a .safetensors file that `save` wrote. check_sha256: accept only the official
        file."""
        file = Path(file)
        tensors = _read(file, check_sha256)
        shape = tensors["decoder.0.weight"].shape if "decoder.0.weight" in tensors else ()
        if len(shape) != 4:
            raise ValueError(f"{file} is not a mask codec: it has no decoder.0.weight of four axes")
        channels, width = shape[:2]
        if channels < 8 or channels % 8 or width < 1:
            raise ValueError(f"{file}: decoder.0.weight has {channels} channels, not a multiple of 8")
        with torch.device("meta"):
            codec = cls(channels, width)
        with explain(f"{file} is not a mask codec of {channels} channels", RuntimeError):
            codec.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return codec.eval().requires_grad_(False)

    def save(self, file: str | Path) -> None:
        """Write a .safetensors file in bfloat16."""
        state = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in self.state_dict().items()}
        save_tensors(state, Path(file))


def _relu(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer, nn.ReLU()


def _read(file: Path, check_sha256: bool) -> dict[str, Tensor]:
    """The tensors of a file by our names."""
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; a mask codec is {OFFICIAL_CODEC}, or made by train/nano/codec.py"
        )
    if check_sha256 and (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != OFFICIAL_SHA256:
        raise ValueError(f"{file} is not big_vision's {OFFICIAL_CODEC}: its sha256 is {digest}")
    if file.suffix != ".npz":
        return read_tensors(file)
    if (size := file.stat().st_size) != OFFICIAL_BYTES:
        raise ValueError(
            f"{file} has {size:,} bytes, {OFFICIAL_CODEC} has {OFFICIAL_BYTES:,}{replacement(file, AGAIN)}"
        )
    arrays = open_arrays(file)
    names = {name: "codebook" if name == _CODEBOOK else name for name in arrays.keys() - _TRAINING_STATE}
    tensors = {ours: torch.from_numpy(arrays[theirs].astype("f4")) for theirs, ours in names.items()}
    check_numbers(tensors, file)
    return tensors


# ---- masks as pixels ---------------------------------------------------------------------------------------


def crop(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A mask bool [H, W] and its box in pixels -> float32 [64, 64] in [-1, 1] for `encode`."""
    x0, y0, x1, y1 = np.round(box).astype(int).clip(0, [*mask.shape[::-1]] * 2).tolist()
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"the box {x0}, {y0}, {x1}, {y1} holds no pixel of the mask")
    part = Image.fromarray(mask[y0:y1, x0:x1].astype(np.float32))
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) * 2 - 1


def paste_mask(mask: np.ndarray, box: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask of `decode`, float [64, 64], and its box in pixels -> bool [height, width].

    Coordinates are truncated to whole pixels, as in big_vision's evaluation; a box without a pixel gives an
    empty mask.
    """
    whole = np.zeros((height, width), bool)
    x0, y0, x1, y1 = np.asarray(box).clip(0, [width, height] * 2).astype(int).tolist()
    if x1 > x0 and y1 > y0:
        part = Image.fromarray(np.asarray(mask, np.float32))
        part = part.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        whole[y0:y1, x0:x1] = np.asarray(part) > 0
    return whole


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The box float64 [4] around the pixels of a mask bool [H, W], which must not be empty."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], float)


def mask_iou(a, b):
    """Intersection over union of masks bool [..., H, W], arrays or tensors -> [...]; 0 if both are empty."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clip(min=1)


def to_rle(mask: np.ndarray) -> dict:
    """A mask bool [H, W] in COCO's run-length encoding, ready for JSON."""
    from pycocotools.mask import encode  # late, as only writing masks needs it

    rle = encode(np.asfortranarray(mask, np.uint8))
    return rle | dict(counts=rle["counts"].decode())


def from_rle(rle: dict, size: tuple[int, int] | None = None) -> np.ndarray:
    """COCO's run-length encoding, its counts as text or as a list -> mask bool [H, W].

    size: width and height of the image; a mask of another size is refused before anything so large is made.
    """
    width, height, runs = _checked_runs(rle)
    if size not in (None, (width, height)):
        raise ValueError(f"the mask has {width} x {height} pixels, its image {size[0]} x {size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def rle_size(rle: dict) -> tuple[int, int]:
    """Width and height of a run-length encoding whose runs fill them. The mask itself is not made."""
    return _checked_runs(rle)[:2]


def _checked_runs(rle: dict) -> tuple[int, int, list[int]]:
    with explain("not a run-length encoding", KeyError, TypeError, ValueError):
        height, width = rle["size"]
        runs = _runs(rle["counts"]) if isinstance(rle["counts"], str) else rle["counts"]
        whole = isinstance(runs, list) and all(type(x) is int and x >= 0 for x in (height, width, *runs))
        # pycocotools reads memory that it never wrote when the runs do not fill the picture.
        if not whole or height * width == 0 or sum(runs) != height * width:
            raise ValueError(f"its runs do not fill {width} x {height} pixels")
    return width, height, runs


def _runs(text: str) -> list[int]:
    """Run lengths from COCO's text: five bits a character, low ones first, and a sixth bit if more follow.
    From the fourth run on, what is stored is the difference from the run before the last."""
    runs, value, shift = [], 0, 0
    for byte in text.encode():
        byte -= 48
        if shift > 60:
            raise ValueError("a run of more than 60 bits")
        value |= (byte & 31) << shift
        shift += 5
        if not byte & 32:
            value -= (byte >> 4 & 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs

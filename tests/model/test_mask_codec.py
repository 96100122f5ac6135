"""The mask codec: its layers against numpy, its files, and masks on their way there and back."""

import io
import zipfile

import numpy as np
import pytest
import torch
from helpers import complaint_about, disc
from PIL import Image
from pycocotools.mask import decode as from_rle

from model.decoding import masks as mask_codec
from model.decoding.masks import OFFICIAL_BYTES, MaskCodec, crop, mask_iou, paste_mask, tight_box, to_rle

SMALL = 16, 24  # channels and width


@pytest.fixture
def codec():
    return MaskCodec(*SMALL).eval()


@pytest.fixture
def masks():
    return torch.rand(5, 64, 64) * 2 - 1


# Layers, written out anew -----------------------------------------------------------------------------------


def conv(x, weight, bias, stride=1, pad=0):
    """[n, C, H, W] with weight [O, C, k, k]: a dot product at every place."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k = weight.shape[-1]
    size = (x.shape[-1] - k) // stride + 1
    out = np.zeros((len(x), len(weight), size, size))
    for i in range(size):
        for j in range(size):
            patch = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, :, i, j] = np.einsum("ncij,ocij->no", patch, weight)
    return out + bias[:, None, None]


def transposed(x, weight, bias):
    """[n, C, H, W] with weight [C, O, 4, 4], stride 2: each pixel adds a 4 x 4 stamp; a border of 1 goes."""
    n, _, size, _ = x.shape
    out = np.zeros((n, weight.shape[1], 2 * size + 2, 2 * size + 2))
    for i in range(size):
        for j in range(size):
            stamp = np.einsum("nc,coij->noij", x[:, :, i, j], weight)
            out[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += stamp
    return out[:, :, 1:-1, 1:-1] + bias[:, None, None]


def relu(x):
    return np.maximum(x, 0)


class ByHand:
    """The codec as facts.md tells it, from its tensors by name."""

    def __init__(self, codec):
        self.t = {name: x.double().numpy() for name, x in codec.state_dict().items()}

    def layer(self, name):
        return self.t[f"{name}.weight"], self.t[f"{name}.bias"]

    def residual(self, x, name):
        y = relu(conv(x, *self.layer(f"{name}.net.0"), pad=1))
        y = relu(conv(y, *self.layer(f"{name}.net.2"), pad=1))
        return x + conv(y, *self.layer(f"{name}.net.4"))

    def encode(self, masks):
        x = masks[:, None].astype(float)
        for i in (0, 2, 4, 6):
            x = relu(conv(x, *self.layer(f"encoder.{i}"), stride=2, pad=1))
        x = self.residual(self.residual(x, "encoder.8"), "encoder.9")
        x = conv(x, *self.layer("encoder.10"))
        return [
            [
                ((self.t["codebook"] - grid[:, row, column]) ** 2).sum(1).argmin()
                for row in range(4)
                for column in range(4)
            ]
            for grid in x
        ]

    def decode(self, codes):
        x = np.stack([self.t["codebook"][row].T.reshape(-1, 4, 4) for row in codes])
        x = relu(conv(x, *self.layer("decoder.0")))
        x = self.residual(self.residual(x, "decoder.2"), "decoder.3")
        for i in (4, 6, 8, 10):
            x = relu(transposed(x, *self.layer(f"decoder.{i}")))
        return conv(x, *self.layer("decoder.12"))[:, 0]


def test_layers(codec, masks):
    codec.codebook.copy_(
        codec.features(masks).flatten(0, 1)[::2][:40].repeat(4, 1)[:128]
    )  # near the features
    codec.codebook += 0.01 * torch.randn_like(codec.codebook)
    by_hand, codes = ByHand(codec), codec.encode(masks)
    assert codes.shape == (5, 16) and codes.tolist() == by_hand.encode(masks.numpy())
    assert len(codes.unique()) > 8, "the test needs different codes"
    random = torch.randint(0, 128, (5, 16))
    decoded = codec.decode(random)
    assert decoded.shape == (5, 64, 64) and np.abs(decoded.numpy() - by_hand.decode(random)).max() < 1e-5


# Files ------------------------------------------------------------------------------------------------------


def npz(codec) -> dict[str, np.ndarray]:
    """The official file's arrays, with this codec's weights."""
    arrays = {name: x.numpy() for name, x in codec.state_dict().items()}
    codebook = arrays.pop("codebook")
    arrays["_vq_vae._embedding"] = arrays["_vq_vae._ema_w"] = codebook
    return arrays | {"_vq_vae._ema_cluster_size": np.ones(128, np.float32)}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of the official form and size, with weights of our own."""
    file, codec = tmp_path_factory.mktemp("codec") / "vae-oid.npz", MaskCodec()
    np.savez(file, **npz(codec))
    return file, codec


def test_official_file(official, masks):
    """All official names and shapes, which give exactly the published file's size."""
    file, codec = official
    assert file.stat().st_size == OFFICIAL_BYTES
    loaded = MaskCodec.load(file)
    assert torch.equal(loaded.decode(loaded.encode(masks)), codec.decode(codec.encode(masks)))
    assert not any(p.requires_grad for p in loaded.parameters())
    shapes = {name: tuple(x.shape) for name, x in loaded.state_dict().items()}
    assert shapes["encoder.0.weight"] == (16, 1, 4, 4) and shapes["encoder.10.weight"] == (512, 128, 1, 1)
    assert shapes["decoder.10.weight"] == (32, 16, 4, 4) and shapes["decoder.12.weight"] == (1, 16, 1, 1)


def test_only_the_official_file_has_its_sha256(official, monkeypatch):
    file, _ = official
    assert "sha256" in complaint_about(file, MaskCodec.load, check_sha256=True)
    digest = mask_codec.hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(mask_codec, "OFFICIAL_SHA256", digest)
    MaskCodec.load(file, check_sha256=True)


def test_own_file(codec, masks, tmp_path):
    """bfloat16 on disk, float32 in use; nothing else is left in the folder."""
    codec.save(tmp_path / "codec.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["codec.safetensors"]
    loaded = MaskCodec.load(tmp_path / "codec.safetensors")
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.float32}
    rounded = codec.bfloat16().float()
    assert torch.equal(loaded.decode(loaded.encode(masks)), rounded.decode(rounded.encode(masks)))


def test_bad_files(codec, official, tmp_path):
    """Each says what is wrong with it."""
    file = tmp_path / "codec.safetensors"
    assert "no such file" in complaint_about(file, MaskCodec.load)
    file.write_bytes(b"no tensors")
    assert "safetensors" in complaint_about(file, MaskCodec.load)
    codec.decoder[2].net[0].bias = torch.nn.Parameter(torch.zeros(9))
    codec.save(file)
    message = complaint_about(file, MaskCodec.load)
    assert "decoder.2.net.0.bias" in message and "[9]" in message
    del codec.decoder[0]
    codec.save(file)
    assert "decoder.0.weight" in complaint_about(file, MaskCodec.load)

    cut = tmp_path / "vae-oid.npz"
    whole = official[0].read_bytes()
    cut.write_bytes(whole[:-100])
    assert f"{OFFICIAL_BYTES:,}" in complaint_about(cut, MaskCodec.load)
    cut.write_bytes(b"x" * len(whole))
    assert "numpy" in complaint_about(cut, MaskCodec.load)


def test_pickles_are_refused(tmp_path):
    """A file of the right size with an object array in it."""
    file, inside = tmp_path / "vae-oid.npz", io.BytesIO()
    np.save(inside, np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("decoder.0.weight.npy", inside.getvalue())
    padding = OFFICIAL_BYTES - file.stat().st_size
    file.write_bytes(b"\0" * padding + file.read_bytes())  # a zip file may begin anywhere
    assert file.stat().st_size == OFFICIAL_BYTES and "numpy" in complaint_about(file, MaskCodec.load)


# Masks ------------------------------------------------------------------------------------------------------


def test_crop():
    """The rounded box, antialiased to 64 x 64, inside 1 and outside -1."""
    mask = disc(200, 100, 60, 50, 40)
    part = crop(mask, np.array([20.4, 9.6, 99.6, 90.4]))
    assert part.shape == (64, 64) and part.dtype == np.float32
    assert part[32, 32] == 1 and part[0, 0] == -1 and ((part > -1) & (part < 1)).any()
    pixels = Image.fromarray(mask[10:90, 20:100].astype(np.float32))
    assert np.array_equal(part, np.asarray(pixels.resize((64, 64), Image.Resampling.BILINEAR)) * 2 - 1)
    with pytest.raises(ValueError, match="no pixel"):
        crop(mask, np.array([10.1, 10, 10.4, 30]))


def test_paste_mask():
    """Resized to the box cut to whole pixels; above 0 is inside; nothing beyond the box."""
    everything = np.ones((64, 64))
    mask = paste_mask(everything, np.array([10.9, 5.9, 30.9, 12.9]), 50, 40)
    rows, columns = np.nonzero(mask)
    assert mask.shape == (40, 50) and (rows.min(), rows.max(), columns.min(), columns.max()) == (
        5,
        11,
        10,
        29,
    )
    assert mask.sum() == 20 * 7 and not paste_mask(-everything, np.array([10, 5, 30, 12]), 50, 40).any()
    assert not paste_mask(everything, np.array([10.1, 5, 10.8, 12]), 50, 40).any()
    assert not paste_mask(everything, np.array([30, 5, 10, 12]), 50, 40).any()


@pytest.mark.parametrize(("width", "height", "x", "y", "r"), [(300, 200, 150, 100, 80), (64, 64, 20, 40, 15)])
def test_there_and_back(width, height, x, y, r):
    mask = disc(width, height, x, y, r)
    box = np.array([x - r, y - r, x + r, y + r])
    back = paste_mask(crop(mask, box), box, width, height)
    assert (mask & back).sum() / (mask | back).sum() > 0.97


@pytest.mark.parametrize("seed", range(20))
def test_tight_box(seed):
    """The smallest box that holds every pixel: one row or column less loses some."""
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 30, 2)) < 0.05
    mask.flat[rng.integers(mask.size)] = True
    x0, y0, x1, y1 = tight_box(mask).astype(int).tolist()
    assert mask[y0:y1, x0:x1].sum() == mask.sum() and tight_box(mask).dtype == np.float64
    for smaller in (mask[y0 + 1 : y1, x0:x1], mask[y0 : y1 - 1, x0:x1]):
        assert smaller.sum() < mask.sum()
    for smaller in (mask[y0:y1, x0 + 1 : x1], mask[y0:y1, x0 : x1 - 1]):
        assert smaller.sum() < mask.sum()


def test_mask_iou():
    """Counted pixel by pixel; arrays and tensors, one pair or many; two empty masks share nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 6, 9, 7)) < 0.4
    a[5], b[5] = False, False
    slow = []
    for one, other in zip(a, b):
        pairs = [(bool(x), bool(y)) for x, y in zip(one.flat, other.flat)]
        union = sum(x or y for x, y in pairs)
        slow.append(sum(x and y for x, y in pairs) / union if union else 0.0)
    assert mask_iou(a, b).tolist() == slow and slow[5] == 0 < min(slow[:5])
    assert np.allclose(mask_iou(torch.tensor(a), torch.tensor(b)).numpy(), slow)
    assert mask_iou(a[0], b[0]) == slow[0] and mask_iou(a[0], a[0]) == 1


def test_rle():
    mask = disc(70, 50, 30, 20, 12)
    rle = to_rle(mask)
    assert rle["size"] == [50, 70] and isinstance(rle["counts"], str)
    assert np.array_equal(from_rle(rle).astype(bool), mask)

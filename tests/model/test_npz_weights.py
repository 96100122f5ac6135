"""big_vision's and Kaggle's .npz checkpoints: the same logits as from safetensors, and what is refused."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import apart, call, complaint, load, picture, tiny_config

from infer import generate
from model import PaliGemma
from model.config import VARIANTS, TextConfig
from model.decoding.packing import load_for_decoding
from model.io.hub import NANO, codec_file, copy_companions
from model.io.npz import open_arrays, variant_of
from model.io.tokenizer import Tokenizer

CAPS = dict(attn_cap=5.0, final_cap=4.0, sliding_window=20)
FORMS = {  # query heads of another width than the decoder, and fewer kv heads than query heads
    "gemma1": TextConfig(1, 48, 3, 4, 1, 16, 80, 0.25, vocab_size=2560),
    "gemma2": TextConfig(2, 48, 3, 4, 2, 16, 80, 0.3, vocab_size=2560, **CAPS),
}


def stack(arrays: dict, name: str, count: int) -> np.ndarray:
    return np.stack([arrays[name.format(i)] for i in range(count)])


def to_big_vision(model: PaliGemma) -> dict[str, np.ndarray]:
    """The model's weights as JAX has them, written from the other side: by the shapes that big_vision has."""
    w = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    vision, text = model.config.vision, model.config.text
    D, N, K, H = text.width, text.heads, text.kv_heads, text.head_dim
    out = {
        "img/embedding/kernel": np.einsum("ocij->ijco", w["vision.patch_embedding.weight"]),
        "img/embedding/bias": w["vision.patch_embedding.bias"],
        "img/pos_embedding": w["vision.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": w["vision.norm.weight"],
        "img/Transformer/encoder_norm/bias": w["vision.norm.bias"],
        "img/head/kernel": w["projector.weight"].T,
        "img/head/bias": w["projector.bias"],
        "llm/embedder/input_embedding": w["decoder.embed.weight"],
        "llm/final_norm/scale": w["decoder.norm.weight"],
    }
    block, L, W, h = "img/Transformer/encoderblock", vision.layers, vision.width, vision.heads
    for i in range(2):
        for ours, theirs in (("weight", "scale"), ("bias", "bias")):
            out[f"{block}/LayerNorm_{i}/{theirs}"] = stack(w, f"vision.layers.{{}}.norm{i + 1}.{ours}", L)
        dense = f"{block}/MlpBlock_0/Dense_{i}"
        out[f"{dense}/kernel"] = np.einsum(
            "lio->loi", stack(w, f"vision.layers.{{}}.mlp.fc{i + 1}.weight", L)
        )
        out[f"{dense}/bias"] = stack(w, f"vision.layers.{{}}.mlp.fc{i + 1}.bias", L)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        weight = stack(w, f"vision.layers.{{}}.attn.{name[0]}_proj.weight", L).reshape(L, h, W // h, W)
        out[f"{attention}/{name}/kernel"] = np.einsum("lnhd->ldnh", weight)
        bias = stack(w, f"vision.layers.{{}}.attn.{name[0]}_proj.bias", L)
        out[f"{attention}/{name}/bias"] = bias.reshape(L, h, W // h)
    weight = stack(w, "vision.layers.{}.attn.out_proj.weight", L).reshape(L, W, h, W // h)
    out[f"{attention}/out/kernel"] = np.einsum("ldnh->lnhd", weight)
    out[f"{attention}/out/bias"] = stack(w, "vision.layers.{}.attn.out_proj.bias", L)

    def of(name):
        return stack(w, f"decoder.layers.{{}}.{name}.weight", text.layers)

    L = text.layers
    out["llm/layers/attn/q_einsum/w"] = np.einsum("lnhd->lndh", of("attn.q_proj").reshape(L, N, H, D))
    kv = np.stack((of("attn.k_proj"), of("attn.v_proj")), axis=1).reshape(L, 2, K, H, D)
    out["llm/layers/attn/kv_einsum/w"] = np.einsum("lskhd->lskdh", kv)
    out["llm/layers/attn/attn_vec_einsum/w"] = np.einsum("ldnh->lnhd", of("attn.o_proj").reshape(L, D, N, H))
    gating = np.stack((of("mlp.gate_proj"), of("mlp.up_proj")), axis=1)
    out["llm/layers/mlp/gating_einsum"] = np.einsum("lsfd->lsdf", gating)
    out["llm/layers/mlp/linear"] = np.einsum("ldf->lfd", of("mlp.down_proj"))
    norms = {"pre_attn_norm": "pre_attention_norm", "pre_mlp_norm": "pre_ffw_norm"}
    if text.version == 2:
        norms |= {"post_attn_norm": "post_attention_norm", "post_mlp_norm": "post_ffw_norm"}
    out |= {f"llm/layers/{theirs}/scale": of(ours) for ours, theirs in norms.items()}
    return {f"params/{name}": np.ascontiguousarray(array) for name, array in out.items()}


def as_bfloat16(array: np.ndarray, kind: str) -> np.ndarray:
    """As big_vision's files hold it: two bytes, of which NumPy knows nothing."""
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(kind)


@pytest.fixture(params=FORMS)
def case(request, tmp_path, monkeypatch):
    """A model, its folder of safetensors, and its arrays; the table of variants has its config."""
    config = replace(tiny_config(Tokenizer(NANO)), text=FORMS[request.param])
    config = replace(VARIANTS["paligemma-3b-224"], vision=config.vision, text=config.text)
    monkeypatch.setitem(VARIANTS, "tiny", config)
    model = PaliGemma(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.5 if "norm" in name or "embed" in name else 0.15)
    model.folder = NANO
    model.save_pretrained(tmp_path / "safetensors", dtype=torch.float32)
    return model, tmp_path / "safetensors", to_big_vision(model)


def inputs(model):
    size = model.config.vision.image_size
    return torch.rand(2, 3, size, size) * 2 - 1, torch.randint(300, 2400, (2, 9))


@torch.no_grad()
def test_the_same_logits(case, tmp_path):
    """From the file, from a folder with nothing else than it and a tokenizer, and decoding in parallel."""
    model, folder, arrays = case
    file = tmp_path / "npz" / "pt_224.npz"
    file.parent.mkdir()
    np.savez(file, **arrays)
    assert variant_of(file) == "tiny"
    images, tokens = inputs(model)
    expected = load(folder)(images, tokens, 4)
    copy_companions(NANO, file.parent)
    for source in (file, file.parent):
        loaded = load(source)
        assert torch.equal(loaded(images, tokens, 4), expected)
        assert loaded.tokenizer.size < 2560 and loaded.config.text == model.config.text
    assert load_for_decoding(str(file)).projector.weight.dtype == torch.float32
    assert codec_file(file).parent == file.parent
    larger = load(file, image_size=96), load(folder, image_size=96)
    images = torch.rand(1, 3, 96, 96)
    assert torch.equal(larger[0](images, tokens[:1], 4), larger[1](images, tokens[:1], 4))


def test_in_a_program(case, tmp_path, monkeypatch, capsys):
    """It says which variant it takes the file for."""
    _, _, arrays = case
    np.savez(tmp_path / "pt.npz", **arrays)
    copy_companions(NANO, tmp_path)
    options = "--model", tmp_path / "pt.npz", "--image", picture(tmp_path / "a.png"), "--prompt", "caption en"
    code, out, err = call(monkeypatch, capsys, generate, *options, "--max-tokens", 2)
    assert code == 0 and "pt.npz: tiny, by its shapes" in out, err


@pytest.mark.parametrize("kind", ["V2", "<u2", "<i2"])
@torch.no_grad()
def test_bfloat16(case, tmp_path, kind):
    model, folder, arrays = case
    file = tmp_path / "pt_224.bf16.npz"
    np.savez(file, **{name: as_bfloat16(array, kind) for name, array in arrays.items()})
    model.save_pretrained(folder, dtype=torch.bfloat16)
    images, tokens = inputs(model)
    for dtype in (torch.bfloat16, torch.float32):
        loaded, expected = load(file, dtype=dtype), load(folder, dtype=dtype)
        assert torch.equal(loaded(images, tokens, 4), expected(images, tokens, 4))


@torch.no_grad()
def test_float16_and_an_embedding_without_padding(case, tmp_path):
    """Fewer rows than the table has, as in the published files."""
    model, _, arrays = case
    arrays = {name: array.astype("f2") for name, array in arrays.items()}
    arrays["params/llm/embedder/input_embedding"] = arrays["params/llm/embedder/input_embedding"][:2500]
    np.savez(tmp_path / "a.npz", **arrays)
    loaded, (images, tokens) = load(tmp_path / "a.npz"), inputs(model)
    assert loaded.config.text.vocab_size == 2500
    assert apart(loaded(images, tokens, 4), model(images, tokens, 4)[..., :2500]) < 0.1


def test_what_does_not_fit(case, tmp_path):
    model, _, arrays = case
    version, file = model.config.text.version, tmp_path / "a.npz"
    prefix = "params/llm/layers"

    def say(changed):
        np.savez(file, **{name: array for name, array in changed.items() if array is not None})
        message = complaint(load, file)
        assert "\n" not in message and "a.npz" in message
        return message

    norm = "post_attention_layernorm" if version == 1 else "pre_feedforward_layernorm"
    message = say(arrays | {f"{prefix}/pre_ffw_norm/scale": None, "params/other": np.ones(3, "f4")})
    assert f"missing language_model.model.layers.1.{norm}.weight" in message and "unexpected other" in message
    gate = arrays[f"{prefix}/mlp/gating_einsum"]
    assert "mlp.gate_proj.weight has shape [79, 48]" in say(
        arrays | {f"{prefix}/mlp/gating_einsum": gate[..., :79]}
    )
    assert "gating_einsum has the shape [3]" in say(
        arrays | {f"{prefix}/mlp/gating_einsum": gate[:, 0, 0, 0]}
    )
    message = say(arrays | {f"{prefix}/attn/q_einsum/w": arrays[f"{prefix}/attn/q_einsum/w"][:2]})
    assert "none of paligemma-3b-224" in message and "q_einsum/w [2, 4, 48, 16]" in message
    scale = arrays["params/llm/final_norm/scale"].copy()
    scale[3] = np.nan
    assert "language_model.model.norm.weight (nan)" in say(arrays | {"params/llm/final_norm/scale": scale})


def test_files_that_lie(tmp_path):
    """Objects, compressed arrays, and headers of more than there is."""
    file = tmp_path / "a.npz"
    np.savez(file, a=np.array([{}], object))
    assert "a.npy is not an array of float32" in complaint(open_arrays, file)
    np.savez_compressed(file, a=np.zeros(1000, "f4"))
    assert "compressed" in complaint(open_arrays, file)
    np.savez(file, a=np.ones(300, "f4"))
    good = file.read_bytes()
    file.write_bytes(good.replace(b"(300,)", b"(999,)"))
    assert "does not fill its 1,200 bytes" in complaint(open_arrays, file)
    file.write_bytes(good)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    assert open_arrays(file)["a"].shape == (300,)
    file.write_bytes(b"no archive")
    assert "numpy" in complaint(open_arrays, file)

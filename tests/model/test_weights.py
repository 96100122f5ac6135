"""Checkpoints on disk: what is loaded, what is refused and how the refusal reads, and what is written."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import complaint, load, same
from huggingface_hub.errors import GatedRepoError
from reference import difference, random_inputs, reference_logits, save, tiny_paligemma, write_shards
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"
UP_PROJ = "language_model.model.layers.0.mlp.up_proj.weight"
FC1_BIAS = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
EMBED = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a good checkpoint in one file, in the official layout."""
    return save(tiny_paligemma(layers=2), tmp_path / "checkpoint")


def edit(folder, change):
    """Rewrite the tensors of a one-file checkpoint after change(state)."""
    state = load_file(folder / "model.safetensors")
    change(state)
    write_shards(state, folder)


def split(folder, shards=2):
    """Turn a one-file checkpoint into shards with an index; returns the index's path."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(state, folder, shards)
    return folder / "model.safetensors.index.json"


def same_weights(a, b) -> bool:
    return same(a.state_dict(), b.state_dict())


# Refused ----------------------------------------------------------------------------------------------------


def test_every_bad_tensor_is_named_at_once(checkpoint):
    def spoil(state):
        del state[Q_PROJ], state[FC1_BIAS]
        state["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
        state["vision_tower.vision_model.head.probe"] = torch.zeros(3)
        state[UP_PROJ] = state[UP_PROJ].T.contiguous()
        state["multi_modal_projector.linear.bias"] = torch.zeros(47)

    edit(checkpoint, spoil)
    message = complaint(load, checkpoint)
    assert str(checkpoint) in message
    for name in (Q_PROJ, FC1_BIAS):
        assert f"missing {name}" in message
    for name in ("language_model.model.layers.2.mlp.up_proj.weight", "vision_tower.vision_model.head.probe"):
        assert f"unexpected {name}" in message
    assert f"{UP_PROJ} has shape [48, 96], the config asks for [96, 48]" in message
    assert "multi_modal_projector.linear.bias has shape [47], the config asks for [48]" in message


def test_good_tensors_are_not_named(checkpoint):
    edit(checkpoint, lambda state: state.pop(Q_PROJ))
    message = complaint(load, checkpoint)
    assert message.count("language_model") == 1 and "vision_tower" not in message


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_wrong_version(family, tmp_path):
    """A norm means another thing in Gemma 2: the weights of one version are never taken for the other's."""
    folder = save(tiny_paligemma(family=family, layers=2), tmp_path / "this")
    other = save(
        tiny_paligemma(family="gemma" if family == "gemma2" else "gemma2", layers=2), tmp_path / "other"
    )
    shutil.copy(other / "config.json", folder)
    assert "layers.1.post_feedforward_layernorm.weight" in complaint(load, folder)


def test_stored_head(checkpoint):
    """A stored head must be the embedding: the model has no other."""
    edit(checkpoint, lambda state: state.update({HEAD: state[EMBED].clone()}))
    load(checkpoint)
    edit(checkpoint, lambda state: state[HEAD][3].add_(1))
    message = complaint(load, checkpoint)
    assert HEAD in message and "tied" in message


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_shard_outside_the_folder(file, checkpoint):
    index = split(checkpoint)
    raw = json.loads(index.read_text())
    raw["weight_map"][Q_PROJ] = file
    index.write_text(json.dumps(raw))
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", checkpoint.parent / "outside.safetensors")
    message = complaint(load, checkpoint)
    assert file in message and "outside" in message


def test_lost_shard(checkpoint):
    split(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in complaint(load, checkpoint)


def test_cut_shard(checkpoint):
    """A download that broke off."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in complaint(load, checkpoint)


def test_tensor_in_two_shards(checkpoint):
    split(checkpoint)
    file = checkpoint / "model-00002-of-00002.safetensors"
    other = load_file(checkpoint / "model-00001-of-00002.safetensors")
    save_file(load_file(file) | {Q_PROJ: torch.zeros(64, 48)} | {UP_PROJ: torch.zeros(96, 48)}, file)
    assert any(name in complaint(load, checkpoint) for name in (Q_PROJ, UP_PROJ) if name in other)


def test_one_tensor_under_two_names(checkpoint):
    """Two generations of names in one file: which of the two is meant cannot be known."""
    edit(checkpoint, lambda state: state.update({f"model.{FC1_BIAS}": state[FC1_BIAS] + 1}))
    assert f"model.{FC1_BIAS}" in complaint(load, checkpoint)


def test_config_that_is_missing_or_broken(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(config.read_text()[:-20])
    assert "config.json" in complaint(load, checkpoint)
    config.unlink()
    assert "config.json is missing" in complaint(load, checkpoint)


def test_folder_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "no *.safetensors" in complaint(load, checkpoint)


def test_float16_is_refused_with_the_reason(checkpoint):
    message = complaint(load, checkpoint, dtype=torch.float16)
    assert "float16" in message and "range" in message and "bfloat16" in message and "float32" in message


def test_unknown_override(checkpoint):
    assert "attn_softcap" in complaint(load, checkpoint, attn_softcap=None)


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "no/such/folder", "nobody/nothing"])
def test_no_such_folder(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = complaint(load, source)
    assert source in message and "folder" in message


# Loaded -----------------------------------------------------------------------------------------------------


def test_links_of_the_hub_cache(checkpoint):
    """The hub's cache is a folder of links to files elsewhere."""
    split(checkpoint)
    cache = checkpoint.parent / "snapshot"
    cache.mkdir()
    for file in checkpoint.iterdir():
        (cache / file.name).symlink_to(file)
    assert same_weights(load(cache), load(checkpoint))


def test_only_files_of_the_index(checkpoint):
    """A stray file beside the shards, the weights of an adapter for example, is none of ours."""
    split(checkpoint)
    save_file({"stray": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    save_file({"stray": torch.zeros(1)}, checkpoint / "stray.safetensors")
    load(checkpoint)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtype(wanted, stored, checkpoint):
    edit(checkpoint, lambda state: state.update({name: tensor.to(stored) for name, tensor in state.items()}))
    model = load(checkpoint, dtype=wanted)
    state = load_file(checkpoint / "model.safetensors")
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    assert torch.equal(model.decoder.embed.weight, state[EMBED].to(wanted))


def test_hub_source(checkpoint, monkeypatch):
    """A hub id with a revision downloads just that: config, weights, tokenizer, nothing that can run."""
    asked = {}

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load("google/paligemma2-3b-pt-224")
    assert asked["repo"] == "google/paligemma2-3b-pt-224" and asked["revision"] is None
    load("google/paligemma-3b-pt-224@bfloat16")
    assert asked["repo"] == "google/paligemma-3b-pt-224" and asked["revision"] == "bfloat16"
    kinds = {pattern.rpartition(".")[2] for pattern in asked["patterns"]}
    assert kinds == {"json", "safetensors", "model", "npz"}


def test_gated_hub_source(monkeypatch):
    def snapshot_download(*_, **__):
        raise GatedRepoError("403 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = complaint(load, "google/paligemma2-3b-pt-224")
    assert "licence" in message and "login" in message and "folder" in message


# Written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        (dict(family="gemma"), {}),
        (dict(), {}),
        (dict(window=6, query_scalar=9), {}),
        (dict(window=6), dict(attn_cap=None, final_cap=None, sliding_window=None)),
        (dict(window=6), dict(attn_cap=2.5, final_cap=3.5, sliding_window=4)),
    ],
    ids=["gemma1", "gemma2", "query scale", "caps and window off", "other caps and window"],
)
@torch.no_grad()
def test_transformers_loads_what_we_save(architecture, overrides, tmp_path):
    hf = tiny_paligemma(seed=3, layers=2, **architecture)
    ours = load(save(hf, tmp_path / "theirs"), **overrides)
    ours.save_pretrained(str(tmp_path / "ours"))
    again, report = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images, tokens = random_inputs(hf)
    assert difference(ours(images, tokens, 5), reference_logits(again, images, tokens, 5), tokens) <= 2e-4
    if not overrides:
        assert torch.equal(
            reference_logits(hf, images, tokens, 5), reference_logits(again, images, tokens, 5)
        )


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_saved_layout_is_the_official_one(family, tmp_path):
    hf = tiny_paligemma(family=family, layers=2)
    folder = save(hf, tmp_path / "theirs", names="A")
    load(folder).save_pretrained(str(tmp_path / "ours"))
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_save_and_load(dtype, checkpoint, tmp_path):
    """Weights and config come back as they were, fields of our own and overridden ones included."""
    model = load(checkpoint, dtype=dtype, attn_cap=None, groups=7, classes=("cat", "traffic light"))
    model.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved", dtype=dtype)
    assert same_weights(again, model)
    assert again.config == model.config
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_save_over_the_source(checkpoint):
    """A model can be saved to where it came from, and goes on working."""
    model = load(checkpoint, dtype=torch.bfloat16)
    model.decoder.norm.weight.data.add_(1)
    model.save_pretrained(str(checkpoint))
    assert same_weights(load(checkpoint, dtype=torch.bfloat16), model)


def test_save_over_shards(checkpoint):
    """What is read back is what was saved last, not the shards that were there before."""
    split(checkpoint)
    model = load(checkpoint)
    model.decoder.norm.weight.data.add_(1)
    model.save_pretrained(str(checkpoint))
    assert same_weights(load(checkpoint), model)


def test_save_in_another_dtype(checkpoint, tmp_path):
    model = load(checkpoint)
    model.save_pretrained(str(tmp_path / "half"), dtype=torch.bfloat16)
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert same_weights(load(tmp_path / "half", dtype=torch.bfloat16), model.bfloat16())

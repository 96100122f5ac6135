"""The training program in one process.

It runs on a checkpoint of nano's form that is much smaller; a step takes a few hundredths of a second.
"""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import language_of, same
from safetensors.torch import load_file
from training import (
    PLAIN,
    first_batch,
    metrics,
    parsed,
    plain_loss,
    run,
    run_complaint,
    weights,
    weights_apart,
)

from model import PaliGemma, gemma
from model.decoding.closed_set import GroupDecoder
from model.io.hub import CODEC
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config
from train import fit as train
from train import loss as objective
from train.data.open import open_data
from train.data.samples import collate
from train.loss import Objective

LAST = "step-0000008"


# Practice scenes --------------------------------------------------------------------------------------------


def test_loss_falls(tiny, tmp_path):
    """In thirty steps, with bfloat16 autocast as in real runs."""
    run(tiny, tmp_path / "run", "--steps 30 --lr 1e-2 --save-every 100 --amp")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 30 and all(0 < loss < 20 for loss in losses)  # a NaN is neither
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_what_a_run_leaves(tiny, tmp_path, capsys):
    """Whole checkpoints, the newest few, that any program loads; the result in bfloat16; no pickle."""
    out = tmp_path / "run"
    run(tiny, out, "--save-every 3 --keep 2")
    assert sorted(path.name for path in out.iterdir()) == [
        "final",
        "metrics.jsonl",
        "run.json",
        "step-0000006",
        LAST,
    ]
    model_files = ["config.json", "model.safetensors", "tokenizer.model"]
    assert sorted(path.name for path in (out / "final").iterdir()) == model_files
    assert sorted(path.name for path in (out / LAST).iterdir()) == sorted(
        [*model_files, "optimizer.safetensors", "trainer.json"]
    )
    assert {tensor.dtype for tensor in weights(out / LAST).values()} == {torch.float32}
    assert same(weights(out / "final"), {k: v.bfloat16() for k, v in weights(out / LAST).items()})
    assert not any("patch_head" in name for name in weights(out / LAST))
    loaded = PaliGemma.from_pretrained(str(out / LAST), dtype=torch.float32)
    before = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32).config
    assert loaded.config == before.override(closed_set_only=True) != before
    assert (out / "final" / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["lr"] < 1e-3
    assert str(out / "final") in capsys.readouterr().out


def test_training(with_codec, tmp_path):
    """The files beside the weights go along; the weights move."""
    run(with_codec, tmp_path / "run", "--tasks all --steps 2")
    assert {file.name for file in (tmp_path / "run" / "final").iterdir()} >= {
        "model.safetensors",
        "tokenizer.model",
        CODEC,
    }
    assert not load_config(tmp_path / "run" / "final").closed_set_only  # words were among the tasks
    before, after = weights(with_codec), weights(tmp_path / "run" / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name].float(), before[name].bfloat16().float()) for name in before)


# Runs on files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["allowed", "vocabulary"])
def test_coco(loss, tiny, scenes, tmp_path):
    """Closed-set training on files, with validation loss and mAP, and the weights of the best one beside."""
    options = f"--data {scenes} --val {scenes} --val-every 2 --val-count 4 --save-every 2 --keep 1 --augment"
    run(tiny, tmp_path / "run", f"{PLAIN} {options} --loss {loss} --lr 1e-2 --steps 6")
    lines = [line for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(0 <= line["val_mAP"] <= 1 for line in lines)
    assert all(line["val_loss"] > 0 for line in lines)
    best = json.loads((tmp_path / "run" / "step-0000006" / "trainer.json").read_text())["best"]
    first = max(lines, key=lambda line: (line["val_mAP"], -line["val_loss"]))
    assert best == dict(step=first["step"], score=[first["val_mAP"], -first["val_loss"]])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best", "final", "metrics.jsonl", "run.json", "step-0000006"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "run" / "best").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model"
    }  # fmt: skip
    final = weights(tmp_path / "run" / "final")
    assert same(weights(tmp_path / "run" / "best"), final) == (best["step"] == 6)


def test_other_classes(tiny, scenes, tmp_path):
    """A file with classes of its own: the checkpoint's become the file's, in the order of its ids."""
    data = json.loads(scenes.read_text())
    data["categories"] = [{"id": 90, "name": "bolt"}, {"id": 7, "name": "nut"}]
    for annotation in data["annotations"]:
        annotation["category_id"] = (7, 90)[annotation["category_id"] % 2]
    (tmp_path / "two.json").write_text(json.dumps(data))
    files = f"--data {tmp_path / 'two.json'} --images {scenes.parent / 'images'}"
    run(tiny, tmp_path / "run", f"{PLAIN} {files} --steps 2")
    assert PaliGemma.from_pretrained(str(tmp_path / "run" / "final")).config.classes == ("nut", "bolt")


def test_jsonl(tiny, pairs, tmp_path):
    """Prefixes and suffixes of different lengths in a batch; the answers are learnt."""
    run(tiny, tmp_path / "run", f"{PLAIN} --data {pairs} --val {pairs} --val-every 30 --lr 1e-2 --steps 30")
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics(tmp_path / "run")[-1]["val_loss"] < losses[0]


@pytest.mark.parametrize("adapter", [False, True])
def test_jsonl_brings_new_words(tiny, pairs, tmp_path, adapter):
    """A model that knew its classes only may now have heard of others."""
    assert not load_config(str(tiny)).open_vocabulary
    run(tiny, tmp_path / "run", f"{PLAIN} --data {pairs} --steps 1{' --lora' if adapter else ''}")
    final = tmp_path / "run" / "final"
    source = dict(source=str(tiny), adapter=str(final)) if adapter else dict(source=str(final))
    config = PaliGemma.from_pretrained(**source).config
    assert config.open_vocabulary and not config.closed_set_only


@pytest.mark.parametrize("option", ["--freeze-vision", "--lora --freeze-vision"])
def test_frozen_vision(option, tiny, scenes, tmp_path):
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} {option} --steps 2 --dtype float32")
    if "--lora" in option:
        names = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
        assert names and not any("vision" in name for name in names)
    else:
        before, after = weights(tiny), weights(tmp_path / "run" / "step-0000002")
        assert all(torch.equal(x, before[name]) == ("vision" in name) for name, x in after.items())


@pytest.mark.parametrize("caps", [dict(attn_cap=0.5), dict(final_cap=1.0), dict(attn_cap=0, final_cap=0)])
def test_caps(caps, tiny, pairs, tmp_path):
    """They are in the loss, and the trained checkpoint has them."""
    options = " ".join(f"--{name.replace('_', '-')} {cap}" for name, cap in caps.items())
    run(tiny, tmp_path / "run", f"--patch-weight 0 --data {pairs} --steps 1 {options}")
    model, tokenizer = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), Tokenizer(tiny)
    samples = first_batch(open_data(pairs, None, model, tokenizer, 0, False))
    loss = metrics(tmp_path / "run")[0]["loss"]
    assert loss == pytest.approx(plain_loss(tiny, samples, "token", **caps), abs=2e-4)
    if any(caps.values()):
        assert abs(loss - plain_loss(tiny, samples, "token")) > 2e-4
    text = PaliGemma.from_pretrained(str(tmp_path / "run" / "final")).config.text
    assert all(getattr(text, name) == (cap or None) for name, cap in caps.items())
    assert model.config.text.attn_cap == 50 and model.config.text.final_cap == 30


def test_an_adapter_keeps_its_caps(tiny, pairs, tmp_path):
    """It is run as it was trained, whatever its base has; asked for other caps, with those."""
    lora = f"--patch-weight 0 --data {pairs} --lora --dtype float32 --steps 1"
    run(tiny, tmp_path / "off", f"{lora} --attn-cap 0 --final-cap 0")
    run(tiny, tmp_path / "on", lora)
    caps = {}
    for name, overrides in (("off", {}), ("on", {}), ("off", dict(final_cap=20.0))):
        adapter = str(tmp_path / name / "final")
        text = PaliGemma.from_pretrained(str(tiny), adapter=adapter, **overrides).config.text
        caps[(name, *overrides)] = text.attn_cap, text.final_cap
    assert caps == {("off",): (None, None), ("on",): (50, 30), ("off", "final_cap"): (None, 20)}


# A step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--accumulate 2", "--accumulate 4", "--recompute"])
def test_less_memory_same_result(option, tiny, scenes, tmp_path):
    for name, more in (("plain", ""), ("other", option)):
        run(tiny, tmp_path / name, f"{PLAIN} --data {scenes} --steps 3 {more}")
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("plain", "other"))) < 1e-4
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "other"))
    assert one == pytest.approx(two, abs=2e-4)


def test_dropout(tiny, scenes, tmp_path, monkeypatch):
    """As much as is asked for, and other entries in every step."""
    dropped, real = [], F.dropout

    def watched(x, p, training, inplace):
        y = real(x, p, training, inplace)
        dropped.append((y == 0).float())
        return y

    monkeypatch.setattr(F, "dropout", watched)
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --lora --lora-dropout 0.3 --steps 2")
    assert torch.cat([x.flatten() for x in dropped]).mean().item() == pytest.approx(0.3, abs=0.01)
    half = len(dropped) // 2
    for one, two in zip(dropped[:half], dropped[half:], strict=True):
        assert (one != two).float().mean() > 0.3  # 2 x 0.3 x 0.7, if they are independent
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.3


@pytest.mark.parametrize("kind", ["COCO", "JSONL"])
def test_augment(kind, tiny, scenes, pairs, tmp_path):
    data = scenes if kind == "COCO" else pairs
    options = ["", "--augment", "--augment --flip-vertical"][: 3 if kind == "COCO" else 2]
    for i, option in enumerate(options):
        run(tiny, tmp_path / f"{i}", f"{PLAIN} --data {data} --steps 2 {option}")
    results = [weights(tmp_path / f"{i}" / "step-0000002") for i in range(len(options))]
    assert not any(same(one, two) for one, two in combinations(results, 2))


def test_autocast(tiny, scenes, tmp_path, monkeypatch):
    """Over float32 weights, in training and in validation's loss."""
    real, seen = gemma.attend, set()

    def watched(q, *rest):
        seen.add((q.requires_grad, torch.is_autocast_enabled("cpu"), q.dtype))
        return real(q, *rest)

    monkeypatch.setattr(gemma, "attend", watched)
    options = f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --steps 1"
    run(tiny, tmp_path / "with", f"{options} --amp")
    decoded = (False, False, torch.float32)  # for val_mAP, as evaluate.py would
    assert seen == {(True, True, torch.bfloat16), (False, True, torch.bfloat16), decoded}
    seen.clear()
    run(tiny, tmp_path / "without", options)
    assert seen == {(True, False, torch.float32), (False, False, torch.float32)}


def test_not_finite(tiny, scenes, tmp_path, monkeypatch):
    """The run stops with the names of the pictures, and the weights before the step are saved."""
    real, calls = objective.allowed_loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(objective, "allowed_loss", loss)
    message = run_complaint(tiny, tmp_path / "run", f"--data {scenes} --steps 5")
    assert "step 3" in message and ".png" in message
    saved = weights(tmp_path / "run" / "step-0000002")
    assert all(torch.isfinite(x).all() for x in saved.values())


def test_few_lengths_are_compiled(tiny, pairs, tmp_path, monkeypatch):
    """Lines of text have any lengths; --compile pads them, in training and in validation."""
    lengths, options = {True: set(), False: set()}, f"{PLAIN} --data {pairs} --val {pairs} --steps 3"

    def compile(function, dynamic):
        def compiled(*args):
            if len(args) > 1:  # `read`
                lengths[torch.is_grad_enabled()].add(args[1].shape[1])
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    run(tiny, tmp_path / "compiled", f"{options} --compile --batch-size 1")
    assert all(found and all(length % 16 == 0 for length in found) for found in lengths.values())
    run(tiny, tmp_path / "plain", f"{options} --batch-size 1")
    one, two = (weights(tmp_path / name / "step-0000003") for name in ("compiled", "plain"))
    assert weights_apart(one, two) < 1e-4
    assert torch._dynamo.config.recompile_limit >= 2 * max(max(found) for found in lengths.values()) / 16


def test_recomputation_is_for_gradients_only(tiny, scenes, monkeypatch):
    """It reads the state of the random generators in every block, which a CUDA graph of validation's decoder
    cannot capture."""
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    objective = Objective(model, None)
    train.distribute(objective, parsed("--recompute"))
    reads, real = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or real())
    GroupDecoder(model, language_of(tiny), groups=2)(torch.zeros(1, 3, 64, 64))
    assert not reads
    data = open_data(scenes, None, model, Tokenizer(tiny), seed=0, augment=False)
    objective(collate([data[0, 0]], model.config.pad) | {"total": torch.ones(())})
    assert len(reads) == len(model.vision.layers) + len(model.decoder.layers)

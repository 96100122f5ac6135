"""Training: samples, helper targets, optimizers, checkpoints, and the loop itself in one process and in two.

The loop runs on a checkpoint of nano's form that is much smaller; a step takes a few hundredths of a second.
"""

import shutil
import sys

import numpy as np
import pytest
import reference
import torch
from helpers import (
    USUAL,
    Killed,
    language_of,
    launch,
    metrics,
    run,
    run_until_killed,
    same,
    torchrun,
    weights,
    weights_apart,
)
from PIL import Image
from reference import difference, reference_logits
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma
from model.io.image import square, to_network
from model.io.tokenizer import Tokenizer
from train import fit as train
from train.data.samples import StepSampler, collate
from train.nano import untrained as nano
from train.nano.patch_head import PatchHead, _giou
from train.practice.dataset import MIN_COVER, PracticeScenes, patch_targets
from train.practice.scenes import Scene, make_scene
from train.run import checkpoint, program
from train.run import optimizers as schedule

LAST = "step-0000008"


# Samples ----------------------------------------------------------------------------------------------------


def test_samples_are_the_same_whatever_the_worker(tiny):
    """Drawn here, or by one of two workers; by number, not by order."""

    def samples(workers, first=5):
        data, sampler = PracticeScenes(language_of(tiny), 64, 16, first), StepSampler(None, range(6), 2)
        batches = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        return [{name: x[i] for name, x in batch.items()} for batch in batches for i in (0, 1)]

    here = samples(0)
    assert len(here) == 12 and all(same(a, b) for a, b in zip(here, samples(2), strict=True))
    assert all(same(a, b) for a, b in zip(here[2:], samples(0, first=7), strict=False))
    assert len({sample["text"].numpy().tobytes() for sample in here}) == 12


def test_sample(tiny):
    """A scene with its answer and its helper targets, as bytes and numbers of the right size."""
    language = language_of(tiny)
    sample, scene = PracticeScenes(language, 64, 16, 3)[9, 1], make_scene(4, 64)
    text, prompt = len(language.prompt) + 60, len(language.prompt)
    assert (sample["image"].numpy() == scene.image).all()
    assert {name: (tuple(t.shape), t.dtype) for name, t in sample.items()} == {
        "image": ((64, 64, 3), torch.uint8),
        "text": ((text,), torch.int64),
        "labels": ((text,), torch.int64),
        "weights": ((text,), torch.float32),
        "prefix_len": ((), torch.int64),
        "patch_labels": ((16,), torch.int64),
        "patch_boxes": ((16, 4), torch.float32),
    }
    assert (sample["weights"][prompt - 1 : -1].view(12, 5)[:, 0] == 1).sum() == len(scene.labels)
    assert tuple(sample["text"][:prompt]) == language.prompt and sample["prefix_len"] == prompt
    assert sample["labels"][-1] == language.eos and (sample["weights"][: prompt - 1] == 0).all()


def test_training_sees_what_detection_sees():
    """An image goes into the network alike, whether drawn for training or read from a file."""
    pixels = make_scene(0).image
    ours = to_network(torch.tensor(pixels)[None])
    assert torch.equal(ours[0], to_network(square(Image.fromarray(pixels), 128)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sampler(world, accumulate):
    """The processes and micro-batches share every batch, each sample is taken once, after a resume too."""
    parts = [list(StepSampler(None, range(5), 8, rank, world, accumulate)) for rank in range(world)]
    for step in range(5):
        now = slice(step * accumulate, (step + 1) * accumulate)
        dealt = sorted(key for rank in parts for part in rank[now] for key in part)
        assert dealt == [(i, i) for i in range(8 * step, 8 * step + 8)]
        assert {len(part) for rank in parts for part in rank[now]} == {8 // world // accumulate}
    for rank in range(world):
        later = StepSampler(None, range(3, 5), 8, rank, world, accumulate)
        assert list(later) == parts[rank][3 * accumulate :] and len(later) == 2 * accumulate


def test_epochs():
    """Each epoch takes every item once, in an order of its own, that only the seed decides."""
    keys = [key for part in StepSampler(6, range(9), 4, seed=1) for key in part]
    assert [draw for draw, _ in keys] == list(range(36))
    epochs = [tuple(item for _, item in keys[i : i + 6]) for i in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(epochs)) > 3
    assert [key for part in StepSampler(6, range(2, 9), 4, seed=1) for key in part] == keys[8:]
    assert [key for part in StepSampler(6, range(9), 4, seed=2) for key in part] != keys
    with pytest.raises(ValueError, match="--batch-size 6"):
        StepSampler(None, range(9), 6, world=2, accumulate=2)


# The helper head's targets ----------------------------------------------------------------------------------


def slow_patch_targets(scene, patch, background):
    """Patch by patch: count the pixels of every object, take the one with most."""
    size = len(scene.owner)
    labels, boxes = [], []
    for top in range(0, size, patch):
        for left in range(0, size, patch):
            tile = scene.owner[top : top + patch, left : left + patch]
            counts = [int((tile == k).sum()) for k in range(len(scene.labels))]
            best = max(range(len(counts)), key=lambda k: counts[k], default=None)
            if best is None or counts[best] / patch**2 < MIN_COVER:
                labels.append(background)
                boxes.append([0.0] * 4)
            else:
                labels.append(int(scene.labels[best]))
                boxes.append([float(side) / size for side in scene.boxes[best]])
    return labels, boxes


@pytest.mark.parametrize("patch", [16, 8])
def test_patch_targets(patch):
    seen = set()
    for seed in range(15):
        scene = make_scene(seed, 64, "crowded" if seed % 2 else "train")
        labels, boxes = patch_targets(scene, patch, background=80)
        slow_labels, slow_boxes = slow_patch_targets(scene, patch, 80)
        assert labels.dtype == np.int64 and boxes.dtype == np.float32
        assert labels.tolist() == slow_labels and np.allclose(boxes, slow_boxes, atol=1e-7)
        seen |= {label == 80 for label in slow_labels}
    assert seen == {True, False}


def test_patch_targets_by_hand():
    """Row by row from the top left; a fifth of a patch is enough, less is background."""
    owner = np.full((20, 20), -1, np.int8)
    owner[:10, 10:20] = 0
    owner[10:12, :10] = 1  # exactly a fifth
    owner[10:11, 10:20] = 1
    scene = Scene(None, np.array([[10, 0, 20, 10], [0, 10, 20, 12]], np.float32), np.array([7, 3]), owner)
    labels, boxes = patch_targets(scene, 10, background=80)
    assert labels.tolist() == [80, 7, 3, 80]
    assert np.allclose(boxes, [[0] * 4, [0.5, 0, 1, 0.5], [0, 0.5, 1, 0.6], [0] * 4])
    nothing = Scene(None, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.full((20, 20), -1, np.int8))
    assert patch_targets(nothing, 10, 80)[0].tolist() == [80] * 4


def test_patch_head():
    """Image tokens that are like the names of what they show cost less, those far from all are background."""
    embed, names = torch.randn(50, 16), [[3], [7, 8], [20]]
    head = PatchHead(16, names, tokens=4)
    labels, boxes = torch.tensor([[0, 1, 2, 3]]), torch.rand(1, 4, 4)
    tokens = torch.stack((embed[3], (embed[7] + embed[8]) / 2, embed[20], torch.zeros(16)))[None]

    def classes_only(tokens, labels):
        """The boxes' part depends on the tokens too: it is taken off."""
        both = head(tokens, embed, labels, boxes)
        guess = head.box(tokens) * 0.25 + head.centres
        per_patch = 5 * (guess - boxes).abs().sum(-1) + 1 - _giou(guess, boxes)
        return (both - (per_patch * (labels != 3)).mean()).item()

    alike = torch.nn.functional.normalize(tokens[0], dim=-1)
    logits = torch.cat((10 * alike @ alike[:3].mT, torch.zeros(4, 1)), dim=1)
    expected = torch.nn.functional.cross_entropy(logits, labels[0]).item()
    assert classes_only(tokens, labels) == pytest.approx(expected, abs=1e-4)
    assert classes_only(tokens * 5, labels) == pytest.approx(expected, abs=1e-4)
    assert classes_only(tokens.roll(1, 1), labels) > expected + 1


# Optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [0, 1e-3], ids=["AdamW", "Muon and AdamW"])
def test_optimizers(muon, tiny):
    """Each parameter belongs to one optimizer and moves; the matrices of the layers are Muon's."""
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    language = language_of(tiny)
    names = [[200 + i] for i in range(80)]
    objective = train.Objective(model, language, patch_weight=1.0, names=names).train()
    args = train.arguments(
        ["--model", "x", "--out", "x", "--device", "cpu", "--lr", "1e-3", "--muon-lr", str(muon)]
    )
    optimizers = train.make_optimizers(objective, args)
    assert [type(o).__name__ for o in optimizers] == (["Muon", "AdamW"] if muon else ["AdamW"])
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(objective.parameters()))
    if muon:
        names = {p: name for name, p in objective.named_parameters()}
        of_muon = {names[p] for p in optimizers[0].param_groups[0]["params"]}
        assert {
            "model.decoder.layers.1.mlp.up_proj.weight",
            "model.vision.layers.0.attn.q_proj.weight",
        } <= of_muon
        assert not any("embed" in name or "norm" in name or name.endswith("bias") for name in of_muon)

    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    batch = collate([PracticeScenes(language, 64, 16)[i, i] for i in range(4)])
    loss, logged = objective(batch | {"total": batch["weights"].sum()})
    assert loss > logged > 0
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    still = {name for name, p in objective.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if not name.endswith("k_proj.bias")}  # a constant in the softmax


def test_decay_spares_vectors_and_embeddings(tiny):
    objective = train.Objective(
        PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), language_of(tiny), 0.0
    )
    args = train.arguments(["--model", "x", "--out", "x", "--device", "cpu", "--weight-decay", "0.1"])
    (optimizer,) = train.make_optimizers(objective, args)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in objective.named_parameters():
        assert decay[p] == (0.1 if p.ndim == 2 and "embed" not in name else 0), name


def test_learning_rate():
    """Up in a line, down in half a cosine, from lr to min-lr."""
    argv = "--model x --out x --steps 110 --warmup 10 --lr 2e-3 --min-lr 2e-4".split()
    args = train.arguments(argv)
    factors = [schedule.lr_factor(step, args) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1) and factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1) and factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule.lr_factor(0, train.arguments([*argv, "--warmup", "0"])) == pytest.approx(1)


# The loop ---------------------------------------------------------------------------------------------------


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
    assert loaded.config == PaliGemma.from_pretrained(str(tiny), dtype=torch.float32).config
    assert (out / "final" / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["lr"] < 1e-3
    assert str(out / "final") in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", ["", "--muon-lr 2e-3 --weight-decay 0.01", "--patch-steps 5"], ids=["AdamW", "Muon", "warm-up"]
)
def test_killed_and_resumed(options, tiny, tmp_path, monkeypatch):
    """A run that goes on from a checkpoint ends with the weights of one that never stopped, bit for bit."""
    start = shutil.copytree(tiny, tmp_path / "start")
    run(tiny, tmp_path / "straight", options)
    run_until_killed(monkeypatch, 6, start, tmp_path / "killed", f"--save-every 3 {options}")
    assert sorted(path.name for path in (tmp_path / "killed").glob("step*")) == ["step-0000003"]
    shutil.rmtree(start)  # the checkpoint has all that is needed
    run(start, tmp_path / "killed", f"--save-every 3 {options}", "--resume")
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / name / LAST / file) for name in ("straight", "killed"))
        assert same(a, b), file
    assert (tmp_path / "killed" / "final" / "config.json").exists()


def test_resume_in_the_middle_of_a_log_line(tiny, tmp_path, monkeypatch):
    """The first loss after going on is a mean over the steps since then, not over all of the line's."""
    run_until_killed(monkeypatch, 4, tiny, tmp_path / "run", "--log-every 4 --save-every 3")
    run(tiny, tmp_path / "run", "--log-every 4 --save-every 3", "--resume")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 2 and losses[0] > 0.7 * losses[1]


def test_killed_while_saving(tiny, tmp_path, monkeypatch):
    """Half a checkpoint is none: the one before is gone on from."""
    whole = checkpoint.write_json

    def write_or_death(value, path):
        if value == {"step": 6}:
            raise Killed
        whole(value, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_json", write_or_death)
        run(tiny, tmp_path / "run", "--save-every 3")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000003"
    run(tiny, tmp_path / "run", "--save-every 3", "--resume")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "final", "metrics.jsonl", "run.json", "step-0000006", LAST
    ]  # fmt: skip


def test_a_run_is_not_overwritten(tiny, tmp_path, monkeypatch, capsys):
    """Without --resume, a folder that holds a run is refused, in words; nothing in it changes."""
    run(tiny, tmp_path / "run", "--steps 2")
    files = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    argv = ["fit.py", *f"--model {tiny} --out {tmp_path / 'run'} --device cpu".split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        program.run(train.main, train.__file__)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "holds a run already" in said and "--resume" in said
    assert files == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))


@pytest.mark.parametrize("model", ["no/such/one", "empty"])
def test_bad_model(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["fit.py", "--model", model, "--out", "run", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        program.run(train.main, train.__file__)
    (said,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and said.startswith("fit.py: ") and model in said
    assert not (tmp_path / "run").exists()


def test_two_processes(tiny, tmp_path):
    """Two processes with half of each batch do what one does with all of it."""
    options = "--steps 4 --warmup 1"
    run(tiny, tmp_path / "one", options)
    launch(tiny, tmp_path / "two", f"{USUAL} {options}", torchrun(2))
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) <= 1e-4
    moved = [(one[name] - tensor).abs().max() for name, tensor in weights(tiny).items()]
    assert max(moved) > 1e-3, "the test needs steps longer than its tolerance"


# The untrained nano -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano.main(["--out", str(folder)])
    return folder


def test_nano_is_small(untrained, tmp_path):
    """The whole checkpoint, as it is shipped, has at most 12 MB."""
    PaliGemma.from_pretrained(str(untrained)).save_pretrained(tmp_path, torch.bfloat16)
    shutil.copy(untrained / "tokenizer.model", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 12e6


def test_nano_is_the_same_every_time(untrained, tmp_path):
    nano.main(["--out", str(tmp_path)])
    for file in ("config.json", "model.safetensors", "tokenizer.model"):
        assert (tmp_path / file).read_bytes() == (untrained / file).read_bytes(), file


def test_nano_has_every_trait(untrained):
    """What the official ones have: grouped heads, both caps, a window that is in use, Gemma's ids."""
    tokenizer = Tokenizer(untrained)
    config = PaliGemma.from_pretrained(str(untrained)).config
    text = config.text
    assert text.version == 2 and 1 < text.kv_heads < text.heads and text.layers >= 3
    assert text.attn_cap == 50 and text.final_cap == 30
    assert text.sliding_window < config.vision.tokens + 5 * config.groups <= text.max_positions
    assert config.groups >= 12 and len(config.classes) == 80
    assert tokenizer.size == config.image_token < text.vocab_size and text.vocab_size % 64 == 0


@torch.no_grad()
def test_transformers_reads_nano(untrained, monkeypatch):
    """The same logits, for the prompt and an answer long enough for the window to matter."""
    ours = PaliGemma.from_pretrained(str(untrained), dtype=torch.float32)
    hf, report = PaliGemmaForConditionalGeneration.from_pretrained(
        untrained, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    monkeypatch.setattr(reference, "IMAGE", ours.config.image_token)
    prompt = language_of(untrained).prompt
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(200, ours.config.image_token, (2, 60), generator=generator)
    tokens = torch.cat((torch.tensor(prompt).expand(2, -1), answer), dim=1)
    images = 2 * torch.rand(2, 3, 128, 128, generator=generator) - 1
    theirs = reference_logits(hf, images, tokens, len(prompt))
    assert difference(ours(images, tokens, len(prompt)), theirs, tokens) <= 2e-4
    unlimited = PaliGemma.from_pretrained(str(untrained), dtype=torch.float32, sliding_window=None)
    assert difference(unlimited(images, tokens, len(prompt)), theirs, tokens) > 1e-3, "the window is in use"

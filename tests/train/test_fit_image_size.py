"""fit.py --image-size: every kind of run at another resolution than the checkpoint's, and its checkpoints."""

import json

import pytest
import torch
from helpers import call, complaint, load, same
from safetensors.torch import load_file
from training import PLAIN, metrics, parsed, run, run_complaint, run_until_killed, weights

from model import PaliGemma
from model.config import VARIANTS
from model.io.adapter import DETECTION
from model.io.config_json import config_to_json
from model.io.weights import load_config
from train import merge

SIZE = 96  # of tiny's 64: 36 patches of 16 pixels for its 16, and a window of 36 positions for its 16
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(
    "options",
    ["", "--tasks all", "--data SCENES --augment", "--data PAIRS", "--data SCENES --loss vocabulary"],
)
def test_runs(options, with_codec, scenes, pairs, tmp_path):
    """On practice scenes with the helper head, boxes and words; validated at that size, and saved with it."""
    options = options.replace("SCENES", str(scenes)).replace("PAIRS", str(pairs))
    if "--data" in options:
        options += f" {PLAIN} --val {options.split()[1]}"
    out = tmp_path / "run"
    run(with_codec, out, f"{options} --image-size {SIZE} --steps 2 --val-every 2 --val-count 2")
    assert all(line.get("val_loss", 1) > 0 for line in metrics(out)) and "val_loss" in metrics(out)[-1]
    config = load(out / "final").config
    assert config.vision.image_size == SIZE and config.text.sliding_window == 16 + 36 - 16
    assert weights(out / "final")[POSITIONS].shape == (36, 32)


def test_position_embeddings_are_trained(tiny, scenes, tmp_path):
    """From where resampling leaves them."""
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --image-size {SIZE} --steps 1 --warmup 0 --lr 1e-3")
    start = load(tiny, image_size=SIZE).vision.position_embedding.weight
    moved = (weights(tmp_path / "run" / "step-0000001")[POSITIONS] - start).abs()
    assert 0 < moved.max() < 2e-3


@pytest.mark.parametrize("lora", ["", "--lora --lora-dropout 0.3"])
def test_killed_and_resumed(lora, tiny, scenes, tmp_path, monkeypatch):
    """Neither the checkpoint, which is of the new size, nor the base under the adapter gets there twice."""
    options = f"{PLAIN} --data {scenes} --image-size {SIZE} --steps 6 --save-every 3 {lora}"
    run(tiny, tmp_path / "straight", options)
    run_until_killed(monkeypatch, 5, tiny, tmp_path / "killed", options)
    run(tiny, tmp_path / "killed", options, "--resume")
    file = "step-0000006/adapter_model.safetensors" if lora else "step-0000006/model.safetensors"
    assert same(*(load_file(tmp_path / name / file) for name in ("straight", "killed")))
    sizes = ("", f"--image-size {SIZE + 16}") if lora else ("", "--image-size 64")
    for other in sizes:
        again = options.replace(f"--image-size {SIZE}", other)
        assert f"--image-size {SIZE}: it cannot go on" in run_complaint(
            tiny, tmp_path / "killed", f"{again} --resume"
        )


def test_a_run_goes_on_from_a_run(tiny, scenes, tmp_path):
    """A checkpoint of another size is one like any other: its size is the default."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(tiny, first, f"{PLAIN} --data {scenes} --image-size {SIZE} --steps 1")
    run(first / "final", second, f"{PLAIN} --data {scenes} --steps 1")
    assert load_config(second / "final") == load_config(first / "final")


def test_adapter_and_merge(tiny, scenes, tmp_path, monkeypatch, capsys):
    """Trained at another size, the adapter brings it along, into the merged checkpoint too."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    run(tiny, out, f"{PLAIN} --data {scenes} --lora --lr 1e-1 --image-size {SIZE} --steps 3")
    assert json.loads((out / "final" / DETECTION).read_text())["image_size"] == SIZE
    code, *_ = call(
        monkeypatch, capsys, merge,
        "--model", tiny, "--adapter", out / "final", "--out", merged, "--dtype", "float32",
    )  # fmt: skip
    adapted, whole = load(tiny, out / "final"), load(merged)
    assert code == 0 and whole.config == adapted.config and whole.config.vision.image_size == SIZE
    images, tokens = torch.rand(1, 3, SIZE, SIZE), torch.randint(10, 99, (1, 7))
    with torch.no_grad():
        assert torch.allclose(whole(images, tokens, 3), adapted(images, tokens, 3), atol=1e-4)


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-3b-224"])
def test_dry_run(name, scenes, tmp_path, capsys):
    """Of an official checkpoint, by its config alone: the sizes of the one that is published at 448."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(VARIANTS[name], "bfloat16")))
    run(tmp_path, tmp_path / "run", "--lora --image-size 448 --dry-run")
    with torch.device("meta"):
        count = sum(p.numel() for p in PaliGemma(VARIANTS[name.replace("224", "448")]).parameters())
    printed = capsys.readouterr().out
    adapters = int(printed.split("trained")[1].split()[0].replace(",", ""))
    assert f"{count + adapters:,} parameters, 448 px" in printed and "1024 image tokens + 263" in printed


def test_refusals(tiny, scenes, tmp_path, capsys):
    """In words that say which sizes work; in the dry run too."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        parsed("--image-size 0")
    assert "--image-size: 0 is too small" in capsys.readouterr().err
    for dry in ("", "--dry-run"):
        for data in (PLAIN, f"{PLAIN} --data {scenes}"):
            message = run_complaint(tiny, out, f"{data} --image-size 100 {dry}")
            assert "image_size = 100: not a multiple of patch_size 16; the nearest are 96 and 112" in message
            message = run_complaint(tiny, out, f"{data} --image-size 512 {dry}")
            assert "1024 of an image of 512 px" in message and "--image-size of at most 336" in message
            assert "the checkpoint has 512" in message
    run(tiny, out, "--image-size 336 --dry-run")
    assert not out.exists()


def test_text_alone_is_too_long(tiny, pairs, tmp_path):
    """No image size would help."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(dict(image="0.png", prefix="x", suffix="cat dog " * 600)) + "\n")
    options = f"--data {long} --images {pairs.parent / 'images'}"
    assert run_complaint(tiny, tmp_path / "run", options).endswith("the checkpoint has 512: shorten the text")


def test_complaint_names_the_model(tiny):
    assert str(tiny) in complaint(load, tiny, image_size=100)

"""The options of training: what a dry run prints, and what is refused before anything is trained."""

import json
import re
import shutil
import sys

import pytest
from training import AS_OPTIONS, PLAIN, PUBLISHED, parsed, run, run_complaint

from model import PaliGemma
from train import fit as train
from train.run import program


def test_dry_run(tiny, scenes, pairs, tmp_path, capsys):
    """Sizes, memory and steps of a run, without one: nothing is written."""
    for data, words in ((scenes, "80.00 epochs"), (pairs, "6 samples")):
        run(tiny, tmp_path / "run", f"{PLAIN} --data {data} --lora --steps 160 --dry-run")
        out = capsys.readouterr().out
        assert words in out and "22 adapters" in out and "GiB" in out
    assert not (tmp_path / "run").exists()


def test_refusals(tiny, scenes, pairs, tmp_path, capsys):
    """Before anything is trained, in one line that names the option or the file."""
    out = tmp_path / "run"
    empty, long = tmp_path / "empty.json", tmp_path / "long.jsonl"
    empty.write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    long.write_text(json.dumps(dict(image="0.png", prefix="x", suffix="cat dog " * 600)) + "\n")
    images = pairs.parent / "images"
    assert "empty.json" in run_complaint(tiny, out, f"--data {empty}  --images {images}")
    message = run_complaint(tiny, out, f"--data {long} --images {images}")
    assert message.startswith(f"{long}: ") and "positions" in message
    assert "float16" in run_complaint(tiny, out, "--dtype float16")
    assert "--batch-size 4" in run_complaint(tiny, out, "--accumulate 3")
    with pytest.raises(SystemExit):  # argparse's own complaint
        run(tiny, out, "--steps 0")
    assert "--steps: 0" in capsys.readouterr().err
    assert "--val" in run_complaint(tiny, out, f"--data {scenes} --val-every 2")
    assert "practice scenes" in run_complaint(tiny, out, f"--data {scenes} --patch-weight 1")
    assert "practice scenes" in run_complaint(tiny, out, f"--data {scenes} --tasks all")
    assert "no module" in run_complaint(tiny, out, "--lora --lora-targets nothing")
    assert not list(out.glob("*"))


def test_options_without_effect(tiny, scenes, pairs, tmp_path):
    """Where an option would have no effect, or its value makes no sense; in the dry run too."""
    out = tmp_path / "run"
    for option in PUBLISHED.changed():
        words = re.search(rf"{option}( [\d.]+)?", AS_OPTIONS)[0]
        for dry in ("", "--dry-run"):
            message = run_complaint(tiny, out, f"--data {pairs} {words} {dry}")
            assert option in message and "pairs.jsonl" in message
    assert "--images" in run_complaint(tiny, out, f"--images {tmp_path}")
    assert "--skip-empty" in run_complaint(tiny, out, "--skip-empty")
    assert "--flip-vertical" in run_complaint(tiny, out, "--flip-vertical --augment")
    assert "--flip-vertical" in run_complaint(tiny, out, f"--data {scenes} --flip-vertical")
    assert "pairs.jsonl" in run_complaint(tiny, out, f"--data {pairs} --augment --flip-vertical")
    assert "--patch-weight" in run_complaint(tiny, out, "--patch-steps 2")
    for option in (
        "--noise-weight -1", "--noise-weight nan", "--noise-disguise 1.5", "--noise-near -0.1", "--beta2 1",
        "--clip -1", "--weight-decay -0.1", "--muon-lr -1", "--patch-weight nan",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=option.split()[0]):
            train.arguments(f"--model x --out x --data x {option}".split())
    for dry in ("", "--dry-run"):
        assert "attn_cap" in run_complaint(tiny, out, f"--data {scenes} --attn-cap -1 {dry}")
    assert not out.exists()


def test_vocabulary_too_small(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    small = PaliGemma.from_pretrained(str(tiny)).config
    config = small.override(vocab_size=1024)
    PaliGemma(config).save_pretrained(model)
    assert "ids" in run_complaint(model, tmp_path / "run", "")


def test_all_tasks_need_a_codec(tiny, tmp_path):
    with pytest.raises(ValueError, match="no mask codec: download"):
        run(tiny, tmp_path / "run", "--tasks all --steps 2")


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


def test_all_weights_in_bfloat16_are_refused():
    """Most steps would be smaller than what bfloat16 can add to a weight."""
    with pytest.raises(ValueError, match="--dtype float32"):
        parsed("--dtype bfloat16")
    assert parsed("--dtype bfloat16 --lora").dtype == "bfloat16" and parsed("").dtype == "float32"


@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_by_default(has, monkeypatch):
    """In autocast and under adapters, where the CPU multiplies in it; on GPUs always; or as asked for."""
    monkeypatch.setattr("train.run.options.cpu_has_bfloat16", lambda: has)
    assert parsed("").amp is has and parsed("--device cuda").amp is True
    assert parsed("--amp").amp is True and parsed("--no-amp").amp is False
    assert parsed("--lora").dtype == ("bfloat16" if has else "float32")
    assert parsed("--lora --device cuda").dtype == "bfloat16" and parsed("").dtype == "float32"

"""Going on: killed, preempted or out of disk, a run ends with the weights of one that never stopped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, complaint, same, torchrun
from safetensors.torch import load_file, save_file
from training import PLAIN, Killed, command, launch, metrics, run, run_complaint, run_until_killed, weights

from model import PaliGemma
from model.lora import lora_layers
from train import fit as train
from train.run import checkpoint, program
from train.run.options import arguments
from train.setup import checkpoint_to_resume
from train.validate import Validation

# Killed in the middle of a step -----------------------------------------------------------------------------


LAST = "step-0000008"


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


def test_adapter_run(tiny, scenes, tmp_path, monkeypatch):
    """An adapter on a bfloat16 base; interrupted and resumed it is the same adapter, bit for bit."""
    options = f"{PLAIN} --data {scenes} --lora --lora-rank 4 --lr 1e-2 --save-every 3"
    run(tiny, tmp_path / "straight", f"{options} --steps 6")
    names = {"adapter_config.json", "adapter_model.safetensors", "detection.json"}
    assert {path.name for path in (tmp_path / "straight" / "final").iterdir()} == names
    run_until_killed(monkeypatch, 5, tiny, tmp_path / "killed", f"{options} --steps 6")
    run(tiny, tmp_path / "killed", f"{options} --steps 6", "--resume")
    one, two = (
        load_file(tmp_path / run_ / "final" / "adapter_model.safetensors") for run_ in ("straight", "killed")
    )
    assert same(one, two) and any(x.abs().max() > 0 for name, x in one.items() if "lora_B" in name)
    adapted = PaliGemma.from_pretrained(str(tiny), adapter=str(tmp_path / "straight" / "final"))
    assert len(lora_layers(adapted)) == 2 * 7 + 2 * 4


def test_resume_in_the_middle_of_a_log_line(tiny, tmp_path, monkeypatch):
    """The first loss after going on is a mean over the steps since then, not over all of the line's."""
    run_until_killed(monkeypatch, 4, tiny, tmp_path / "run", "--log-every 4 --save-every 3")
    run(tiny, tmp_path / "run", "--log-every 4 --save-every 3", "--resume")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 2 and losses[0] > 0.7 * losses[1]


# Killed for good --------------------------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen, seconds=200) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume(processes, tiny, scenes, tmp_path):
    """N + M steps in one go, or N, kill -9, and M: identical weights; with an adapter and its dropout."""
    launcher = torchrun(processes) if processes > 1 else ()
    options = f"--data {scenes} --lora --dtype float32 --save-every 4 --keep 9 --steps"
    launch(tiny, tmp_path / "straight", f"{options} 12", launcher)
    process = subprocess.Popen(
        command(tiny, tmp_path / "killed", f"{options} 12", launcher),
        env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for(tmp_path / "killed" / "step-0000004", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in (tmp_path / "killed").glob("step-*"):  # as if it had died right after step 4
        if folder.name != "step-0000004":
            shutil.rmtree(folder)
    launch(tiny, tmp_path / "killed", f"{options} 12 --resume", launcher)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(tmp_path / name / "step-0000012" / file) for name in ("straight", "killed"))
        assert same(one, two), file


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_preemption(number, tiny, scenes, tmp_path):
    """To the workers too: the step is finished, everything saved, and the exit code says so."""
    process = subprocess.Popen(
        command(tiny, tmp_path / "run", f"--data {scenes} --steps 100000 --save-every 100000 --workers 2"),
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    while not (tmp_path / "run" / "metrics.jsonl").read_text():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.communicate(timeout=200)
    assert process.returncode == 128 + number
    last = metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.newest(tmp_path / "run").name == f"step-{last:07d}"


# Checkpoints on disk ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("damage", ["cut", "empty", "no json"])
def test_damaged_checkpoint(damage, tiny, scenes, tmp_path, capsys):
    """The newest checkpoint cannot be read: a warning, and the one before is gone on from."""
    options = f"{PLAIN} --data {scenes} --steps 4 --save-every 2"
    run(tiny, tmp_path / "run", options)
    whole, newest = weights(tmp_path / "run" / "step-0000004"), tmp_path / "run" / "step-0000004"
    file = newest / ("trainer.json" if damage == "no json" else "optimizer.safetensors")
    file.write_bytes({"cut": file.read_bytes()[:-1000], "empty": b"", "no json": b"{"}[damage])
    run(tiny, tmp_path / "run", options, "--resume")
    assert "step-0000004 is damaged" in capsys.readouterr().err
    assert same(weights(newest), whole)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4], "no step is logged twice"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_optimizer_that_is_not_finite(value, tiny, scenes, tmp_path):
    """Refused by the name of its tensor; the checkpoint before it can be gone on from."""
    options = f"{PLAIN} --data {scenes} --steps 4 --save-every 2"
    run(tiny, tmp_path / "run", options)
    whole = weights(tmp_path / "run" / "step-0000004")
    file = tmp_path / "run" / "step-0000004" / "optimizer.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("q_proj.weight/exp_avg"))
    state[name].view(-1)[5] = value
    state[name.replace("exp_avg", "step")].fill_(2e6)  # a large number is none of its faults
    save_file(state, file)
    message = run_complaint(tiny, tmp_path / "run", f"{options} --steps 4 --resume")
    assert (
        str(file) in message and f"{name} ({abs(value)})" in message and "step" not in message.split(": ")[-1]
    )
    assert "remove" in message
    shutil.rmtree(file.parent)
    run(tiny, tmp_path / "run", options, "--resume")
    assert same(weights(file.parent), whole)


def test_full_disk(tiny, scenes, tmp_path, monkeypatch):
    """The checkpoints from before are whole, and nothing half written stays."""
    real = checkpoint.save_tensors

    def save(tensors, path):
        if ".step-0000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    with pytest.raises(OSError, match="No space"):
        run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --steps 4 --save-every 2 --keep 1")
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"
    assert not list((tmp_path / "run").glob(".*"))


# Another run ------------------------------------------------------------------------------------------------


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


def test_a_result_is_not_overwritten(tmp_path):
    """Somebody who needs room removes the checkpoints, and forgets that the folder is in use."""

    def begin(*options):
        return checkpoint_to_resume(arguments(["--model", "", "--out", str(tmp_path), *options]))

    (tmp_path / "final").mkdir()
    for options in ((), ("--resume",)):
        assert "without a checkpoint" in complaint(begin, *options)
    (tmp_path / "final").rename(tmp_path / "best")  # is there before the first checkpoint
    assert "without a checkpoint" in complaint(begin) and begin("--resume") == (None, {})
    (tmp_path / "step-0000500").mkdir()  # damaged: what is saved from step 0 on would be deleted as older
    assert "without a checkpoint" in complaint(begin, "--resume")


def test_what_a_person_calls_alike_is_no_checkpoint(tmp_path):
    """A copy of one is neither gone on from nor deleted as an old one."""
    for name in ("step-0000500", "step-0000500-good", "step-10000000", "step-9999999", "step-notes"):
        (tmp_path / name).mkdir()
    names = [folder.name for folder in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-0000500", "step-9999999", "step-10000000"]


def test_data_that_has_grown_is_not_gone_on_with(tiny, pairs, tmp_path):
    """Which sample comes next depends on how many there are."""
    file = tmp_path / "grown.jsonl"
    file.write_text(pairs.read_text())
    options = f"{PLAIN} --data {file} --images {pairs.parent / 'images'}"
    run(tiny, tmp_path / "run", f"{options} --steps 1")
    file.write_text(pairs.read_text() * 2)
    said = run_complaint(tiny, tmp_path / "run", f"{options} --steps 1 --resume")
    assert "grown.jsonl has 12 samples, and had 6" in said


def test_another_run_is_not_resumed(tiny, scenes, tmp_path):
    out, options = tmp_path / "run", f"--data {scenes}"
    run(tiny, out, f"{PLAIN} {options} --steps 1")
    assert "--batch-size" in run_complaint(tiny, out, f"{options} --batch-size 2 --resume")
    assert "--resume" in run_complaint(tiny, out, options)


def test_resuming_with_another_value_is_refused(tiny, scenes, tmp_path):
    run(tiny, tmp_path / "run", f"--patch-weight 0 --data {scenes} --steps 1")
    options = (
        "--noise-weight 1;--noise-disguise 0;--noise-near 0;--noise-apart;--skip-empty;--loss-mean example;"
    )
    options += "--attn-cap 0;--final-cap 0;--beta2 0.999"
    for option in options.split(";"):
        message = run_complaint(tiny, tmp_path / "run", f"--data {scenes} --resume {option}")
        assert option.split()[0] in message and "cannot go on" in message


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--lr 2e-3", "--lr"), ("--min-lr 1e-4", "--min-lr"), ("--muon-lr 1e-2", "--muon-lr"),
        ("--steps 9", "--steps"), ("--warmup 3", "--warmup"), ("--weight-decay 0.1", "--weight-decay"),
        ("--clip 2", "--clip"), ("--loss vocabulary", "--loss"), ("--augment", "--augment"),
        ("--amp", "--amp"), ("--freeze-vision", "--freeze-vision"), ("--lora", "--lora"),
        ("--patch-steps 1 --patch-weight 1", "--patch-steps"), ("--seed 1", "--seed"),
    ],
    ids=lambda value: value.split()[0],
)  # fmt: skip
def test_other_options_are_refused(option, name, begun):
    """Whatever changes the weights that a run ends with."""
    model, scenes, out = begun
    with pytest.raises(ValueError, match=f"{name} "):
        run(model, out, f"{PLAIN} --data {scenes} --steps 2 {option} --resume")


@pytest.fixture(scope="module")
def begun(tiny, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    run(tiny, out, f"{PLAIN} --data {scenes} --steps 2")
    return tiny, scenes, out


def test_the_machine_and_the_watching_may_change(tiny, scenes, tmp_path, monkeypatch):
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --steps 4 --save-every 2"
    run_until_killed(monkeypatch, 4, tiny, out, options)
    more = f"--accumulate 2 --recompute --val {scenes} --val-every 1 --val-count 2 --keep 1 --log-every 2"
    run(tiny, out, f"{options} {more}", "--resume")
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 4]


def test_a_run_from_before_an_option_goes_on(tiny, scenes, tmp_path):
    """Its run.json does not have the option: that is as good as its default, and as nothing else."""
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --steps 2"
    run(tiny, out, options)
    before = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({name: x for name, x in before.items() if name != "rslora"}))
    with pytest.raises(ValueError, match="--rslora False"):
        run(tiny, out, f"{options} --rslora", "--resume")
    run(tiny, out, options, "--resume")


def test_the_best_is_of_one_measure(tiny, scenes, tmp_path, monkeypatch):
    """A score on other pictures says nothing about which checkpoint is better."""
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --save-every 1"
    scores = iter((0.5, 0.9, 0.8, 0.1, 0.3, 0.4, 0.2))
    monkeypatch.setattr(Validation, "run", lambda self: (dict(val_loss=1.0, val_mAP=next(scores)), ""))
    run_until_killed(monkeypatch, 3, tiny, out, f"{options} --steps 5")
    run(tiny, out, f"{options} --steps 5 --val-count 2", "--resume")
    best = json.loads((out / "step-0000005" / "trainer.json").read_text())["best"]
    assert best == dict(step=4, score=[0.4, -1.0])

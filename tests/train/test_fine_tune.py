"""fit.py on files: COCO and JSONL, adapters, micro-batches, several processes, and all that can go wrong.

Tiny checkpoints and pictures that the tests make; every run is a few steps long.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    PLAIN,
    ROOT,
    command,
    language_of,
    launch,
    metrics,
    run,
    run_complaint,
    run_until_killed,
    same,
    torchrun,
    weights,
    weights_apart,
)
from safetensors.torch import load_file
from torch.distributed import HashStore

from model import PaliGemma
from model.config import VARIANTS
from model.gemma import Gemma
from model.io.config_json import config_to_json
from model.io.weights import load_config
from model.lora import lora_layers
from train import loss as objective
from train.loss import allowed_loss, vocabulary_loss
from train.run import checkpoint, processes

# Losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_cap", [None, 3.0])
def test_vocabulary_loss(final_cap, tiny, monkeypatch):
    """Equals the loss of all logits at once, gradients included, whatever the chunks."""
    torch.manual_seed(0)
    config = PaliGemma.from_pretrained(str(tiny), final_cap=final_cap).config.text
    decoder = Gemma(config)
    hidden = torch.randn(2, 9, config.width)
    labels, weights_ = torch.randint(config.vocab_size, (2, 9)), torch.rand(2, 9).round(decimals=1)
    weights_[:, :3] = 0
    ours, theirs, weight = (
        hidden.clone().requires_grad_(),
        hidden.clone().requires_grad_(),
        decoder.embed.weight,
    )
    want = torch.nn.functional.cross_entropy(
        decoder.logits(theirs).flatten(0, 1), labels.flatten(), reduction="none"
    )
    want = (want * weights_.flatten()).sum()
    (0.5 * want).backward()
    want_weight, weight.grad = weight.grad, None
    monkeypatch.setattr("train.loss.CHUNK", 5)
    loss = vocabulary_loss(decoder, ours, labels, weights_)
    (0.5 * loss).backward()
    assert abs(loss.item() - want.item()) < 1e-3 and torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert torch.allclose(weight.grad, want_weight, atol=1e-5) and want_weight.abs().max() > 1e-2
    weight.requires_grad_(False)  # as under an adapter
    again = hidden.clone().requires_grad_()
    (0.5 * vocabulary_loss(decoder, again, labels, weights_)).backward()
    assert torch.equal(again.grad, ours.grad)


def test_no_logits_of_all_positions(tiny, monkeypatch):
    """Only supervised positions meet the head, and in closed-set training only the allowed rows of it."""
    torch.manual_seed(0)
    decoder = Gemma(PaliGemma.from_pretrained(str(tiny)).config.text)
    sizes = []
    whole = decoder.logits
    monkeypatch.setattr(
        decoder, "logits", lambda h, *r: sizes.append((len(h), whole(h, *r).shape[-1])) or whole(h, *r)
    )
    language = language_of(tiny)
    labels = torch.tensor([[5, language.loc0 + 3, language.noise, language.loc0, language.eos]])
    weights_ = torch.tensor([[0.0, 1, 0.5, 0, 1]])
    allowed_loss(decoder, torch.randn(1, 5, 48), labels, weights_, language)
    assert sizes == [(1, 1024), (1, 81)]
    linear = torch.nn.functional.linear
    monkeypatch.setattr("train.loss.F.linear", lambda h, w: sizes.append((len(h), len(w))) or linear(h, w))
    monkeypatch.setattr("train.loss.CHUNK", 2)
    vocabulary_loss(decoder, torch.randn(1, 5, 48), labels, weights_)
    assert sizes[2:] == [(2, decoder.config.vocab_size), (1, decoder.config.vocab_size)]


# Runs on files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["allowed", "vocabulary"])
def test_coco(loss, tiny, scenes, tmp_path):
    """Closed-set training on files, with validation loss and mAP; the best checkpoint outlives the newest."""
    options = f"--data {scenes} --val {scenes} --val-every 2 --val-count 4 --save-every 2 --keep 1 --augment"
    run(tiny, tmp_path / "run", f"{PLAIN} {options} --loss {loss} --lr 1e-2 --steps 6")
    lines = [line for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6] and all(0 <= line["val_mAP"] <= 1 for line in lines)
    assert all(line["val_loss"] > 0 for line in lines)
    best = json.loads((tmp_path / "run" / "step-0000006" / "trainer.json").read_text())["best"]["step"]
    kept = {path.name for path in (tmp_path / "run").glob("step-*")}
    assert kept == {f"step-{best:07d}", "step-0000006"}


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
    assert PaliGemma.from_pretrained(**source).config.open_vocabulary


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


@pytest.mark.parametrize("option", ["--freeze-vision", "--lora --freeze-vision"])
def test_frozen_vision(option, tiny, scenes, tmp_path):
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} {option} --steps 2 --dtype float32")
    if "--lora" in option:
        names = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
        assert names and not any("vision" in name for name in names)
    else:
        before, after = weights(tiny), weights(tmp_path / "run" / "step-0000002")
        assert all(torch.equal(x, before[name]) == ("vision" in name) for name, x in after.items())


@pytest.mark.parametrize("option", ["--accumulate 2", "--accumulate 4", "--recompute"])
def test_less_memory_same_result(option, tiny, scenes, tmp_path):
    for name, more in (("plain", ""), ("other", option)):
        run(tiny, tmp_path / name, f"{PLAIN} --data {scenes} --steps 3 {more}")
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("plain", "other"))) < 1e-4
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "other"))
    assert one == pytest.approx(two, abs=2e-4)


def test_dry_run(tiny, scenes, pairs, tmp_path, capsys):
    """Sizes, memory and steps of a run, without one: nothing is written."""
    for data, words in ((scenes, "80.00 epochs"), (pairs, "6 samples")):
        run(tiny, tmp_path / "run", f"{PLAIN} --data {data} --lora --steps 160 --dry-run")
        out = capsys.readouterr().out
        assert words in out and "22 adapters" in out and "GiB" in out
    assert not (tmp_path / "run").exists()


RECIPES = {  # what the dry run must tell
    "coco_closed_set_lora_10b": ("paligemma2-10b-448", ["402 adapters", "1024 image tokens + 26", "21,987"]),
    "coco_closed_set_full_3b": ("paligemma2-3b-448", ["92,412", "64 samples"]),
    "captions_3b": ("paligemma2-3b-224", ["256 samples", "2,213"]),
    "refcoco_segmentation_3b": ("paligemma2-3b-224", ["10,000", "64 samples"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tiny, scenes, pairs, tmp_path):
    """Each command for the official weights, dry: their config, a tokenizer, and no weights at all."""
    variant, words = RECIPES[name]
    model, coco = tmp_path / "model", tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True), (coco / "train2017").mkdir(), model.mkdir()
    shutil.copy(scenes, coco / "annotations" / "instances_train2017.json")
    shutil.copy(tiny / "tokenizer.model", model)
    (model / "config.json").write_text(json.dumps(config_to_json(VARIANTS[variant], "bfloat16")))
    own = dict(MODEL=model, COCO=coco, OUT=tmp_path / "run", DATA=pairs, IMAGES=pairs.parent / "images")
    own |= dict(LAUNCH=sys.executable)
    recipe = ROOT / "train" / "recipes" / f"{name}.sh"
    done = subprocess.run(
        ["bash", recipe, "--dry-run", "--device", "cpu"],
        env=ENVIRONMENT | {key: str(value) for key, value in own.items()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(word in done.stdout for word in words) and "GiB" in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


# What can go wrong ------------------------------------------------------------------------------------------


def test_refusals(tiny, scenes, pairs, tmp_path, capsys):
    """Before anything is trained, in one line that names the option or the file."""
    out = tmp_path / "run"
    empty, long = tmp_path / "empty.json", tmp_path / "long.jsonl"
    empty.write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    long.write_text(json.dumps(dict(image="0.png", prefix="x", suffix="cat dog " * 600)) + "\n")
    images = pairs.parent / "images"
    assert "empty.json" in run_complaint(tiny, out, f"--data {empty}  --images {images}")
    assert "positions" in run_complaint(tiny, out, f"--data {long} --images {images}")
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


def test_vocabulary_too_small(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    small = PaliGemma.from_pretrained(str(tiny)).config
    config = small.override(vocab_size=1024)
    PaliGemma(config).save_pretrained(model)
    assert "ids" in run_complaint(model, tmp_path / "run", "")


def test_another_run_is_not_resumed(tiny, scenes, tmp_path):
    out, options = tmp_path / "run", f"--data {scenes}"
    run(tiny, out, f"{PLAIN} {options} --steps 1")
    assert "--batch-size" in run_complaint(tiny, out, f"{options} --batch-size 2 --resume")
    assert "--resume" in run_complaint(tiny, out, options)


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


# Processes --------------------------------------------------------------------------------------------------


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


def test_preemption(tiny, scenes, tmp_path):
    """SIGTERM: the step is finished, everything saved, and the exit code says so."""
    process = subprocess.Popen(
        command(tiny, tmp_path / "run", f"--data {scenes} --steps 100000 --save-every 100000"),
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    while not (tmp_path / "run" / "metrics.jsonl").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    last = metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.newest(tmp_path / "run").name == f"step-{last:07d}"


def test_sharded(tiny, scenes, tmp_path):
    """FSDP2 on two processes, interrupted by the end of its steps and resumed, against one process."""
    options = f"--data {scenes} --save-every 2 --keep 5"
    run(tiny, tmp_path / "one", f"{PLAIN} {options} --steps 4 --warmup 2")
    for steps in (2, 4):
        more = f"{options} --shard --steps 4" + (" --resume" if steps == 4 else "")
        launch(tiny, tmp_path / "two", more, torchrun(2))
        if steps == 2:
            shutil.rmtree(tmp_path / "two" / "step-0000004")
            shutil.rmtree(tmp_path / "two" / "final")
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4
    assert PaliGemma.from_pretrained(str(tmp_path / "two" / "final")).config.groups == 12


def test_processes_of_a_restart_find_each_other():
    """Whatever the dead processes left in the store, and in whatever order the new ones come."""
    store, dice, names = HashStore(), random.Random(0), []
    for _ in range(20):
        with ThreadPoolExecutor(3) as pool:
            ranks = dice.sample(range(3), 3)
            starts = []
            for rank in ranks:
                starts.append(pool.submit(processes._name_of_this_start, store, rank, 3))
                time.sleep(dice.random() * 0.03)
            found = {start.result(timeout=20) for start in starts}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 20


def test_two_nodes_and_a_lost_rank(tiny, scenes, tmp_path):
    """Two torchrun agents on this machine; the first time a rank dies after step 2, and --max-restarts goes
    on by itself from the checkpoint of step 2. The result is that of one process."""
    options = f"--data {scenes} --save-every 2 --steps 4"
    run(tiny, tmp_path / "one", f"{PLAIN} {options} --warmup 2")
    nodes = []
    dying = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}  # python imports sitecustomize when it starts
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
        "    import threading, time, pathlib\n"
        f"    run = pathlib.Path({str(tmp_path / 'two')!r})\n"
        "    def die():\n"
        "        while not (run / 'step-0000002').exists():\n"
        "            time.sleep(0.005)\n"
        "        os._exit(9)\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for node in range(2):
        launcher = torchrun(
            1, "--nnodes=2", f"--node_rank={node}", "--max-restarts=2", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
        )  # fmt: skip
        nodes.append(subprocess.Popen(
            command(tiny, tmp_path / "two", options, launcher), env=dying, stderr=subprocess.PIPE, text=True
        ))  # fmt: skip
    errors = [node.communicate(timeout=400)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4

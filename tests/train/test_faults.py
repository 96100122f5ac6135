"""What goes wrong during a run, or before it: broken pictures, full disks, removed files, lost processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import ENVIRONMENT, edit_json, same, torchrun
from safetensors import SafetensorError
from training import FIT, PLAIN, command, metrics, parsed, run, run_complaint, run_until_killed, weights

from model.io import writing
from model.io.tokenizer import Tokenizer
from train.data.jsonl import JsonlPairs
from train.run import checkpoint, processes
from train.run.log import Log
from train.run.pictures import broken_pictures
from train.validate import Validation


def damage(file: Path) -> None:
    """Half of a picture: its header can be read."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def damaged(scenes, tmp_path) -> Path:
    """Eight scenes, of which the third and the sixth picture cannot be used."""
    data = Path(shutil.copytree(scenes.parent, tmp_path / "set")) / "instances.json"
    names = [record["file_name"] for record in json.loads(data.read_text())["images"]]
    damage(data.parent / "images" / names[2])
    edit_json(data, lambda content: content["images"][5].update(width=63))
    return data


# Broken pictures --------------------------------------------------------------------------------------------


def test_broken_pictures_are_found_before_the_first_step(damaged, tiny, tmp_path, capsys):
    """All of them, each in a line; --no-check meets them when their step comes."""
    options = f"{PLAIN} --data {damaged} --steps 1 --batch-size 8"
    message = run_complaint(tiny, tmp_path / "run", options)
    assert (
        "000002.png: not a readable image" in message and "1 more" in message and "--skip-broken" in message
    )
    assert "has 64x64 pixels (upright), its annotations are for 63x64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run_complaint(tiny, tmp_path / "run", f"{options} --no-check")
    assert (tmp_path / "run").exists()


def test_broken_pictures_of_the_validation_are_found_too(damaged, scenes, tiny, tmp_path):
    options = f"{PLAIN} --data {scenes} --val {damaged} --val-every 1 --steps 1"
    assert "000002.png" in run_complaint(tiny, tmp_path / "run", f"{options} --val-count 3")
    assert not (tmp_path / "run").exists()
    run(tiny, tmp_path / "run", f"{options} --val-count 2")  # pictures that are not used do no harm
    run(tiny, tmp_path / "skip", f"{options} --val-count 3 --skip-broken")
    assert list(json.loads((tmp_path / "skip" / "run.json").read_text())["skipped_val"]) == ["2"]


def test_skip_broken(damaged, tiny, tmp_path, monkeypatch):
    """As if they were not in the file; a resumed run leaves out the same ones, whatever can be read now."""
    without = damaged.with_name("without.json")
    content = json.loads(damaged.read_text())
    kept = [record for i, record in enumerate(content["images"]) if i not in (2, 5)]
    ids = {record["id"] for record in kept}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    without.write_text(json.dumps(content | dict(images=kept, annotations=annotations)))
    options = "--steps 4 --save-every 2"
    run(tiny, tmp_path / "without", f"{PLAIN} --data {without} {options}")
    options = f"{PLAIN} --data {damaged} {options} --skip-broken"
    run_until_killed(monkeypatch, 4, tiny, tmp_path / "run", options)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["skipped"]
    assert list(record) == ["2", "5"] and "not a readable image" in record["2"]
    edit_json(damaged, lambda content: content["images"][5].update(width=64))
    run(tiny, tmp_path / "run", options, "--resume")
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("without", "run"))
    assert same(one, two)
    damage(damaged.parent / "images" / kept[0]["file_name"])
    message = run_complaint(tiny, tmp_path / "run", f"{options} --resume")
    assert "000000.png" in message and "cannot go on with fewer" in message


def test_skip_broken_needs_the_check():
    with pytest.raises(ValueError, match="--skip-broken needs --check"):
        parsed("--skip-broken --no-check")


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_is_opened_once(workers, pairs, tokenizer_file, tmp_path):
    """However many lines name it; all lines of a broken one go. Training's random numbers stay the same."""
    shutil.copytree(pairs.parent / "images", tmp_path / "images")
    lines = pairs.read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines + lines[::-1]))
    (tmp_path / "images" / "2.png").write_text("no picture")
    data = JsonlPairs(tmp_path / "pairs.jsonl", tmp_path / "images", Tokenizer(tokenizer_file), 64)
    state, opened, real = processes.torch.get_rng_state(), [], data.picture
    data.picture = lambda item: opened.append(item) or real(item)
    found = broken_pictures(data, range(len(data)), workers)
    assert list(found) == [2, 9] and "2.png: not a readable image" in found[9]
    assert (processes.torch.get_rng_state() == state).all()
    assert workers or opened == [*range(6)]
    data.keep([item for item in range(12) if item not in found])
    assert [data.name(i)[0] for i in range(len(data))] == [*"0134554310"]
    assert [data.same_picture(i) for i in range(len(data))] == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]


# Errors that end a run --------------------------------------------------------------------------------------


def test_a_checkpoint_is_saved_before_validation(tiny, scenes, tmp_path, monkeypatch):
    figures = iter([(dict(val_loss=1.0), "")])  # of the model as it came, before the first step

    def fail(self):
        for found in figures:
            return found
        assert (tmp_path / "run" / "step-0000002").exists()
        raise ValueError("b.png: not a readable image")

    monkeypatch.setattr(Validation, "run", fail)
    options = f"--data {scenes} --val {scenes} --val-every 2 --steps 4 --save-every 100"
    assert "b.png" in run_complaint(tiny, tmp_path / "run", options)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"


def test_a_checkpoint_is_saved_when_an_error_ends_the_run(tiny, scenes, tmp_path):
    """Here, a picture that breaks after it was checked. The run goes on to the weights it would have had."""
    data = Path(shutil.copytree(scenes.parent, tmp_path / "set")) / "instances.json"
    options = f"--data {data} --steps 4 --save-every 100"
    run(tiny, tmp_path / "straight", f"{PLAIN} {options}")
    pictures = data.parent / "images"
    last, real = data.parent / "last", Log.line

    def line(self, step, *args, **kwargs):
        real(self, step, *args, **kwargs)
        if step == 3:
            pictures.rename(last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "line", line)
        assert "no such file" in run_complaint(tiny, tmp_path / "run", options)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000003"
    last.rename(pictures)
    run(tiny, tmp_path / "run", f"{PLAIN} {options}", "--resume")
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("straight", "run"))
    assert same(one, two)


def saver(tmp_path, calls) -> checkpoint.Saver:
    trainer = dict(step=3)
    run = checkpoint.Run(tmp_path, "nano", {}, keep=2)
    return checkpoint.Saver(lambda: calls.append(trainer["step"]), run, trainer, {}, sharded=False)


def test_half_an_update_is_not_saved(tmp_path):
    calls = []
    with pytest.raises(MemoryError), saver(tmp_path, calls) as saving:
        with saving.step():
            pass
        with saving.step():
            raise MemoryError
    assert calls == []
    with pytest.raises(MemoryError), saver(tmp_path, calls) as saving:
        with saving.step():
            pass
        raise MemoryError
    assert calls == [4]


# Disks and files --------------------------------------------------------------------------------------------


def test_a_full_disk_is_named(tiny, scenes, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    real = writing.save_file

    def save(tensors, file, **options):
        if ".step-0000004" in str(file):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, file, **options)

    options = f"{PLAIN} --data {scenes} --steps 4 --save-every 2"
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(writing, "save_file", save)
        run(tiny, tmp_path / "run", options)
    assert "model.safetensors cannot be written" in str(error.value) and "No space left" in str(error.value)
    assert checkpoint.newest(tmp_path / "run").name == "step-0000002"
    run(tiny, tmp_path / "run", options, "--resume")


def test_a_full_disk_says_no_name_itself(tmp_path):
    with pytest.raises(OSError) as error, writing.atomic_write(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == f"{tmp_path / 'a.json'} cannot be written (No space left on device)"
    with (
        pytest.raises(OSError, match="/a.json cannot"),
        writing.atomic_write(tmp_path / "a.json") as temporary,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
    with pytest.raises(FileNotFoundError, match="other.json"), writing.atomic_write(tmp_path / "a.json"):
        (tmp_path / "other.json").read_text()  # an error of another file keeps its words


@pytest.mark.parametrize("place", ["/proc/run", "a-file"])
def test_an_out_that_cannot_be_written_is_named_before_the_work(place, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    monkeypatch.setattr("train.fit.load_model", lambda *args: pytest.fail("the work has begun"))
    assert f"{place} cannot be written" in run_complaint(tiny, place, "")


def test_out_removed_during_training(tiny, scenes, tmp_path, monkeypatch):
    """The run ends and says so; what is saved by then can be gone on from."""
    out, real = tmp_path / "run", checkpoint.save_checkpoint

    def save(run, trainer, *rest):
        if trainer["step"] == 2:
            shutil.rmtree(out)
        real(run, trainer, *rest)

    monkeypatch.setattr("train.fit.save_checkpoint", save)
    options = f"--data {scenes} --steps 4 --save-every 2"
    assert "metrics.jsonl was removed during the run" in run_complaint(tiny, out, options)
    monkeypatch.undo()
    assert checkpoint.newest(out).name == "step-0000003"
    run(tiny, out, f"{PLAIN} {options}", "--resume")
    assert [line["step"] for line in metrics(out)] == [4] and (out / "final").exists()


@pytest.mark.parametrize("line", ['{"step": 1, "lo{"step": 2}', "[]", "{}", '{"step": "1"}', "\udcff"])
def test_a_broken_line_of_the_log_is_named(line, tiny, scenes, tmp_path, monkeypatch):
    out, options = tmp_path / "run", f"--data {scenes} --steps 1"
    run(tiny, out, f"{PLAIN} {options}")
    with open(out / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    monkeypatch.setattr("train.fit.load_model", lambda *args: pytest.fail("the work has begun"))
    assert "metrics.jsonl:2: not a line of a run's log" in run_complaint(tiny, out, f"{options} --resume")


# Lost processes ---------------------------------------------------------------------------------------------


def test_the_watch_names_who_is_silent(monkeypatch, capsys):
    """And ends its process; one that gives signs of life is not missing."""
    store, ends = dist.HashStore(), threading.Event()

    def end(status):
        ends.status = status
        ends.set()
        threading.Event().wait()  # the thread does nothing more

    monkeypatch.setattr(processes.os, "_exit", end)
    one, two, _ = (processes.Watch(store, rank, 3, 0.5, ends=rank == 0) for rank in range(3))
    one.start()
    for _ in range(600):
        two.look()
        if ends.wait(0.05):
            break
    assert ends.status == 1 and "no sign of life from process 2 of 3 for" in capsys.readouterr().err
    assert one.missing(0.4) and not one.missing(60)


def test_a_stopped_process_is_named(tiny, scenes, tmp_path):
    """SIGSTOP: the other process says which one is missing, saves, and ends."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        f"runpy.run_path({str(FIT)!r}, run_name='__main__')\n"
    )
    options = f"--data {scenes} --steps 100000 --save-every 100000 --timeout 0.1"
    argv = command(tiny, tmp_path / "run", options, torchrun(2), program)
    with subprocess.Popen(argv, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        stopped = int((tmp_path / "pid-1").read_text())
        os.kill(stopped, signal.SIGSTOP)
        said = ""
        for line in process.stderr:
            said += line
            if "no sign of life" in line:  # torchrun would give the stopped process half a minute
                os.kill(stopped, signal.SIGKILL)
        assert process.wait() != 0
    assert "fit.py: no sign of life from process 1 of 2 for 0.1 minutes" in said
    assert "RuntimeError" not in said  # the rest is torchrun's own words
    # Stopped between a step and its line of the log: the step is saved, its line is not written.
    last = metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.newest(tmp_path / "run").name in (f"step-{last:07d}", f"step-{last + 1:07d}")

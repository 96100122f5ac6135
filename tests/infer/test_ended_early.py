"""detect.py that is stopped, fails, or is given names of nothing: what is done stays, whole.

The detector answers from a list, so that a test says after how many pictures something happens.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ENVIRONMENT, ROOT, call, picture
from PIL import Image

from infer import detect
from model.decoding.detections import Detections
from train.run import program


class Everywhere:
    """Finds a cat in the middle of every picture; calls `at_last` when it is given picture number `count`."""

    classes = ("cat",)

    def __init__(self, count=None, at_last=None):
        self.left, self.at_last = count, at_last

    def fitting_batch(self):
        return 1

    def __call__(self, images):
        if self.left is not None:
            self.left -= len(images)
            if self.left <= 0:
                self.at_last()
        box = np.array([[10.0, 10.0, 50.0, 40.0]])
        return [Detections(box, np.array([0.9]), np.array([0]), ["cat"], np.zeros(5, int)) for _ in images]


@pytest.fixture
def run_detect(monkeypatch, capsys, here):
    """detect.py with such a detector: exit code, stdout, lines of stderr."""

    def run(*argv, detector=None):
        monkeypatch.setattr(detect, "load_detector", lambda args, masks: detector or Everywhere())
        code, out, err = call(monkeypatch, capsys, detect, *argv)
        return code, out, err.splitlines()

    return run


def listed(file: Path) -> list[str]:
    """The names of the pictures in a JSON file."""
    return [Path(record["image"]).name for record in json.loads(file.read_text())]


def half_written(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.name.startswith(".")]


def fail(error: BaseException):
    raise error


# ---- stopped -----------------------------------------------------------------------------------------------


ENDS = {  # how: what happens, the exit code, and words of the last line
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), 130, None),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143, None),
    "SIGHUP": (lambda: signal.raise_signal(signal.SIGHUP), 129, None),
    "disk": (lambda: fail(OSError(28, "No space left")), 1, "No space left"),
    "memory": (lambda: fail(MemoryError()), 1, "MemoryError"),
    "pipe": (lambda: fail(BrokenPipeError(32, "Broken pipe")), 141, "nobody reads the output"),
}
PLACES = [("detecting", end) for end in ENDS] + [("drawing", end) for end in ENDS if end != "pipe"]


@pytest.mark.parametrize(("where", "end"), PLACES)
def test_what_is_done_stays(where, end, run_detect, here, monkeypatch):
    """Two pictures of four: both in the JSON file, both drawn; of the third, nothing."""
    at_last, code, words = ENDS[end]
    files = [picture(here / f"{i}.png") for i in range(4)]
    detector, real, saved = Everywhere(), Image.Image.save, []

    def save(image, file, *args):
        saved.append(file)
        if len(saved) == 3:
            Path(file).write_bytes(b"half a picture")
            at_last()
        real(image, file, *args)

    if where == "detecting":
        detector = Everywhere(3, at_last)
    else:
        monkeypatch.setattr(Image.Image, "save", save)
    status, _, err = run_detect("--image", *files, "--json", "out.json", "--save", "yolo", detector=detector)
    assert status == code and err[0] == "detect.py: ended early: 2 of 4 pictures are done"
    assert len(err) == 1 + bool(words) and (words is None or words in err[1])
    assert listed(here / "out.json") == ["0.png", "1.png"]
    assert sorted(file.name for file in (here / "detections").iterdir()) == ["0.png", "1.png", "yolo"]
    assert [file.name for file in sorted((here / "detections/yolo/labels").iterdir())] == ["0.txt", "1.txt"]
    assert not half_written(here)


def test_nothing_is_done_yet(run_detect, here):
    """The JSON file of an earlier run stays as it is."""
    (here / "out.json").write_text("[]")
    stopped = Everywhere(1, lambda: fail(KeyboardInterrupt()))
    assert run_detect("--image", picture(here / "a.png"), "--json", "out.json", detector=stopped)[0] == 130
    assert (here / "out.json").read_text() == "[]"


def test_handlers_are_put_back(run_detect, here):
    before = signal.getsignal(signal.SIGTERM)
    run_detect("--image", picture(here / "a.png"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_closed_pipe_in_a_process_of_its_own(model, tmp_path):
    """detect.py ... | head -1: no traceback, and no words of Python's own at its exit."""
    for i in range(30):
        picture(tmp_path / "in" / f"{i:02}.png")
    command = [sys.executable, "-u", ROOT / "infer" / "detect.py", "--image", "in", "--json", "out.json"]
    command += ["--model", model, "--score-threshold", "0", "--batch-size", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*map(str, command)], cwd=tmp_path, env=ENVIRONMENT, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("in/00.png")
        process.stdout.close()
        err = process.stderr.read()
    done = listed(tmp_path / "out.json")
    assert process.returncode == 141 and 1 <= len(done) < 30 and not half_written(tmp_path)
    assert err.splitlines() == [
        f"detect.py: ended early: {len(done)} of 30 pictures are done",
        "detect.py: stopped: nobody reads the output any more",
    ]


# ---- names of nothing, names that are too long -------------------------------------------------------------


def test_names_that_bring_no_picture(run_detect, here):
    """Each costs a line, and the others are done."""
    (here / "loop.png").symlink_to("loop.png")
    (here / "folder-loop").symlink_to("folder-loop")
    os.mkfifo(here / "pipe.png")
    longest = picture(here / f"{'x' * 250}.png")
    bad = ["", "a\0b", "y" * 300, "loop.png", "folder-loop", "pipe.png", "/dev/zero", "none.png/"]
    good = [picture(here / "first.png"), longest, picture(here / "last.png")]
    code, _, err = run_detect("--image", good[0], *bad, *good[1:], "--json", "out.json")
    assert code == 1 and len(err) == len(bad)
    assert listed(here / "out.json") == [file.name for file in good]
    assert sorted(map(len, os.listdir(here / "detections"))) == [8, 9, 254]


def test_long_names_do_not_overwrite_each_other(run_detect, here):
    """Cut to what a file system takes: 255 bytes, with the number, in characters of three bytes."""
    files = [picture(here / folder / f"{'日' * 83}a.png") for folder in "123"]
    code, _, err = run_detect("--image", *files, "--json", "out.json")
    assert (code, err) == (0, []) and len(os.listdir(here / "detections")) == 3
    assert detect.fitting("日" * 90, ".png") == "日" * 83 + ".png"


def test_a_folder_that_cannot_be_listed(run_detect, here, monkeypatch):
    """Tests may be run by root, who may list every folder."""
    (here / "in").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda path: fail(PermissionError(13, "Permission denied")))
    code, _, err = run_detect("--image", "in", picture(here / "a.png"), "--overwrite")
    assert (code, err) == (1, ["detect.py: in: Permission denied"])


# ---- names that are shown ----------------------------------------------------------------------------------


def test_hostile_names(run_detect, here):
    """Line ends, terminal escapes and bytes that are no text: escaped on stdout, stderr and in JSON."""
    hostile = ["a\n\x1b[31mb", os.fsdecode(b"caf\xe9"), "\u202egnp"]
    files = [picture(here / f"{name}.png") for name in hostile]
    broken = here / f"broken{hostile[0]}.png"
    broken.write_text("no picture")
    code, out, err = run_detect("--image", *files, broken, here / hostile[0], "--json", "out.json")
    assert code == 1 and len(err) == 2 and len(out.splitlines()) == 2 * len(files)
    assert all(line.isprintable() for line in out.splitlines() + err)
    assert "a\\n\\x1b[31mb.png" in out and "caf\\xe9.png" in out and "brokena\\n\\x1b[31mb.png" in err[0]
    first, second, _ = json.loads((here / "out.json").read_text())
    assert Path(first["image"]) == files[0] and second["image"].endswith("caf\\xe9.png")
    assert json.dumps([first, second], ensure_ascii=False).encode("utf-8")
    assert sorted(os.listdir(here / "detections")) == sorted(f"{name}.png" for name in hostile)


@pytest.mark.parametrize("label", ["../../escaped", "/etc/escaped", "..", "a\0b", "x" * 300])
def test_no_label_leads_out_of_the_folder(label, run_detect, here):
    """A checkpoint's config names the classes, and each mask is written to a file named after its class."""

    class Segments(Everywhere):
        def __call__(self, images):
            found = super().__call__(images)
            for one, image in zip(found, images):
                one.labels, one.masks = [label], [np.full((image.height, image.width), 255, np.uint8)]
            return found

    file = picture(here / "in" / "a.png")
    before = {path for path in here.parent.rglob("*")}
    code, _, err = run_detect("--image", file, "--out", "in/out", "--json", "out.json", detector=Segments())
    assert (code, err) == (0, [])
    new = {path for path in here.parent.rglob("*")} - before
    assert new - {here / "out.json", here / "in" / "out"} == set((here / "in" / "out").iterdir())
    assert len(list((here / "in" / "out").iterdir())) == 2 and not Path("/etc/escaped.png").exists()


def test_hostile_options(run_detect, capsys):
    """A file whose name begins like an option, as a shell's * brings it."""
    code, _, err = run_detect("--image", "a.png", "-\x1b[31m\udcff")
    assert code == 2 and "\\x1b[31m\\xff" in err[-1] and err[-1].isprintable()
    program.complain("a\x1b[31m\udcff", "detect.py")
    assert capsys.readouterr().err == "detect.py: a\\x1b[31m\\xff\n"


# ---- what is there already ---------------------------------------------------------------------------------


def test_a_folder_that_has_files(run_detect, here):
    """The next number, as ultralytics' predict, predict2; --overwrite replaces what has the same name."""
    file = picture(here / "a.png")
    for folder in ("detections", "detections2", "detections3"):
        code, out, _ = run_detect("--image", file)
        assert code == 0 and f"-> {folder}/a.png" in out.replace("  ", " ")
    (here / "empty").mkdir()
    assert "empty/a.png" in run_detect("--image", file, "--out", "empty")[1]
    before = (here / "empty" / "a.png").read_bytes()
    other = picture(here / "in" / "a.png", seed=5)
    assert "empty/a.png" in run_detect("--image", other, "--out", "empty/", "--overwrite")[1]
    assert (here / "empty" / "a.png").read_bytes() != before and os.listdir(here / "empty") == ["a.png"]


def test_folders_without_a_next_number(run_detect, here):
    file = picture(here / "a.png")
    for folder, words in ((".", "has files in it"), ("a.png", "is not a folder")):
        code, _, err = run_detect("--image", file, "--out", folder)
        assert code == 1 and len(err) == 1 and f"--out {folder}: {words}" in err[0]
    assert os.listdir(here) == ["a.png"]


def test_json_that_is_there(run_detect, here):
    """Replaced, and said; a device would be replaced by a file."""
    argv = "--image", picture(here / "a.png"), "--json"
    assert "replaced" not in run_detect(*argv, "out.json")[1]
    assert run_detect(*argv, "out.json")[1].endswith("\nout.json: replaced\n")
    os.mkfifo(here / "pipe")
    code, _, err = run_detect(*argv, "pipe")
    assert code == 1 and "--json pipe: is a FIFO" in err[0] and (here / "pipe").is_fifo()

"""The trial in its short form, and what its judge must not let pass."""

import os
import sys
import time

import pytest
from helpers import ROOT, python
from trial import frame

from train.run import program


def test_trial():
    """A few cases of each kind, none wrong. Its output says how to try a wrong one again."""
    python(ROOT / "tests" / "run_trial.py")


def complain(text: str, code: int = 1):
    print(text, file=sys.stderr)
    return code


def refuse():
    raise ValueError("bad.png: not a readable image")


def leave_half():
    with open(".half", "w"):
        refuse()


WRONG = {  # what is judged wrong, by words of the verdict
    "traceback": lambda: 1 / 0,
    "names no file": lambda: complain("a.py: something is wrong"),
    "0 lines of complaint": lambda: 1,
    "2 lines of complaint": lambda: complain("a.py: bad.png\na.py: once more"),
    "exit code 3": lambda: complain("a.py: bad.png", 3),
    "exit code -9": lambda: os.kill(os.getpid(), 9),
    "accepted": lambda: 0,
    "left behind": lambda: program.run(leave_half, "a.py"),
    "MB, a good file takes": lambda: program.run(lambda: bytearray(b"x") * (60 << 20) and refuse(), "a.py"),
    "not printable": lambda: complain("a.py: bad.png \x1b[2J"),
    "for 1 s and more": lambda: time.sleep(30),
    "s of computing": lambda: compute(1.2) or complain("a.py: bad.png"),
}


def compute(seconds: float) -> None:
    while time.process_time() < seconds:
        pass


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong(words, tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "PATIENCE", 1 if "more" in words else 60)
    monkeypatch.setattr(frame, "SECONDS", 1)
    ended = frame.Child(WRONG[words], tmp_path).wait(frame.PATIENCE)
    assert words in frame.fault_of(ended, tmp_path, ("bad.png",), memory=0, must="refused")


def test_what_is_right(tmp_path):
    ended = frame.Child(lambda: program.run(refuse, "a.py"), tmp_path).wait()
    assert frame.fault_of(ended, tmp_path, ("bad.png",), memory=0, must="refused") == ""
    assert frame.fault_of(ended, tmp_path, ("bad.png",), memory=0, must="good").startswith("refused")
    done = frame.Child(lambda: 0, tmp_path).wait()
    assert frame.fault_of(done, tmp_path, ("bad.png",), memory=0, must="good") == ""


def test_a_case_follows_from_its_number():
    one, two = (frame.random_numbers(0, kind, 3).integers(1 << 40) for kind in ("images", "flips"))
    assert one != two and one == frame.random_numbers(0, "images", 3).integers(1 << 40)

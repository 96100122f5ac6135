"""How programs end: their common frame, train/run/program.py, and that every program stands in it."""

import argparse
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, picture
from torch.utils.data import DataLoader, Dataset

from model.io.writing import atomic_write, explain
from train.run import program

PROGRAMS = [file.name for file in sorted((ROOT / "infer").glob("*.py")) if file.name != "__init__.py"]


def ending(main, capsys) -> tuple[int, str]:
    """Exit code and stderr of a program with this main()."""
    with pytest.raises(SystemExit) as stop:
        program.run(main, "/somewhere/detect.py")
    return stop.value.code, capsys.readouterr().err


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize("code", [0, 1, 143])
def test_exit_codes(code, capsys):
    assert ending(lambda: code, capsys) == (code, "") and ending(lambda: None, capsys) == (0, "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--json out: is a folder\nand more"), "--json out: is a folder"),
        (FileNotFoundError(2, "No such file", "a.json"), "[Errno 2] No such file: 'a.json'"),
        (torch.OutOfMemoryError("CUDA out of memory.\nA table of allocations"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_cause_is_one_line(error, line, capsys):
    assert ending(lambda: fail(error), capsys) == (1, f"detect.py: {line}\n")


def test_too_little_memory_on_a_cpu(capsys):
    """torch has no class of its own for it."""
    code, err = ending(lambda: torch.empty(1 << 50), capsys)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith(f"detect.py: can't allocate memory: you tried to allocate {4 << 50} bytes")


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, item):
        with explain("b.png: not a readable image", OSError):
            raise OSError("truncated: at byte 7")


def test_an_error_in_a_worker_of_the_data_loader(capsys):
    """Its own words, not those of the traceback that they come in."""
    loader = DataLoader(Unreadable(), num_workers=1)
    line = "b.png: not a readable image (truncated: at byte 7)"
    assert ending(lambda: next(iter(loader)), capsys) == (1, f"detect.py: {line}\n")


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(KeyError):
        program.run(lambda: fail(KeyError("x")), "detect.py")


def test_ctrl_c(capsys):
    """130, as the shell has it, and no traceback."""
    assert ending(lambda: fail(KeyboardInterrupt()), capsys) == (130, "")


def test_ctrl_c_in_a_process_of_its_own(model, tmp_path):
    command = [sys.executable, ROOT / "infer" / "generate.py", "--model", model, "--image"]
    command.append(picture(tmp_path / "a.png"))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*map(str, command)], env=ENVIRONMENT, text=True, **pipes) as process:
        assert "ask about the image" in process.stdout.readline()  # it waits for a prompt now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str)
def test_other_signals(end, code, capsys, tmp_path):
    """What Ctrl-C would clean up is cleaned up; a signal that is ignored, as under nohup, stays ignored."""

    def main():
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            signal.raise_signal(end)

    assert ending(main, capsys) == (code, "") and not list(tmp_path.iterdir())
    before = signal.signal(end, signal.SIG_IGN)
    try:
        assert ending(main, capsys) == (0, "") and (tmp_path / "a.json").read_text() == "half"
    finally:
        signal.signal(end, before)


def test_the_processes_of_torchrun_die_as_the_system_has_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    assert ending(lambda: int(signal.getsignal(signal.SIGTERM) != before), capsys) == (0, "")


@pytest.mark.parametrize(
    ("code", "options", "status", "err"),
    [
        ("print('日\\udcff')", {"PYTHONIOENCODING": "latin-1"}, 0, ""),
        ("print(*range(9**5))", {}, 141, "a.py: stopped: nobody reads the output any more\n"),
        ("print('at the end')", {}, 141, "a.py: stopped: nobody reads the output any more\n"),
    ],
    ids=["encoding", "pipe", "pipe at the end"],
)
def test_output_that_cannot_be_printed(code, options, status, err):
    """A letter is escaped; an output that nobody reads ends the program, without words of Python's own."""
    command = f"from train.run.program import run\nrun(lambda: {code}, 'a.py')"
    with subprocess.Popen(
        [sys.executable, "-c", command], env=ENVIRONMENT | options, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        if status:
            process.stdout.close()
        else:
            assert process.stdout.read() == "\\u65e5\\udcff\n"
        assert process.stderr.read() == err
    assert process.returncode == status


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_stands_in_the_frame(name, monkeypatch):
    """python infer/NAME does nothing but run(main, its own file)."""
    calls = []
    monkeypatch.setattr(program, "run", lambda main, file: calls.append((main.__name__, file)))
    runpy.run_path(str(ROOT / "infer" / name), run_name="__main__")
    assert calls == [("main", str(ROOT / "infer" / name))]


def test_positive():
    assert program.positive("1") == 1 and program.positive("250") == 250 and program.not_negative("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is too small: must be at least 0"):
        program.not_negative("-1")
    for text in ("0", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is too small: must be at least 1"):
            program.positive(text)
    for text in ("1.5", "", "three"):  # argparse has words for a ValueError: "invalid positive value"
        with pytest.raises(ValueError):
            program.positive(text)


def test_parser():
    """The docstring as it stands is the help; options cannot be abbreviated."""
    options = program.parser("Find objects.\n\n    python infer/detect.py   # and columns")
    options.add_argument("--score-threshold")
    assert "\n    python infer/detect.py   # and columns\n" in options.format_help()
    with pytest.raises(SystemExit) as stop:
        options.parse_args(["--score", "1"])
    assert stop.value.code == 2


def test_defaults_are_in_the_help():
    """Each once: appended, or in the words of the option's own help; not of flags that are given or not."""
    options = program.parser("")
    add, switch = options.add_argument, argparse.BooleanOptionalAction
    add("--rate", type=float, default=0.5), add("--sets", nargs="+", default=["a", "b%"])
    (
        add("--mine", default=None, help="who (default: nobody)"),
        add("--other", default=3, help="(default: three)"),
    )
    add("--on", action=switch, default=True, help="x"), add("--off", action=switch, default=False, help="y")
    add("--flag", action="store_true", help="z"), add("--none"), add("--empty", default="", help="w")
    words = " ".join(options.format_help().partition("options:")[2].split())
    assert words.count("(default") == 6
    for part in (
        "(default: 0.5)",
        "(default: a b%)",
        "who (default: nobody)",
        "x (default: on)",
        "y (default: off)",
    ):
        assert part in words
    commands = options.add_subparsers()
    assert commands.add_parser("one").formatter_class is program.Layout


@pytest.mark.parametrize("name", [f"infer/{name}" for name in PROGRAMS] + ["train/fit.py", "train/merge.py"])
def test_every_program_says_its_defaults(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(program.Parser, "exit", lambda self, *_: fail(KeyError(self)))
    monkeypatch.setattr(program, "run", lambda main, file: main())
    with pytest.raises(KeyError) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    actions = [
        action
        for action in ended.value.args[0]._actions
        if action.default not in (None, False, [], "==SUPPRESS==")
    ]
    assert all("(default: " in action.help for action in actions)

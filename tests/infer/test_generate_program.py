"""generate.py: one answer, and a conversation."""

import io

import pytest
from helpers import call
from PIL import Image

from infer import generate as program


@pytest.fixture
def ask(model, tmp_path, monkeypatch, capsys):
    """Run generate.py on a picture, in this process: exit code, standard output, lines of standard error."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)

    def ask(*options, lines=None):
        """lines: of standard input, text or bytes."""
        typed = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines or [])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        argv = "--image", "a.png", "--model", model, *options
        code, out, err = call(monkeypatch, capsys, program, *argv)
        return code, out, err.splitlines()

    return ask


def test_one_answer(ask):
    """The tokens of the library, as text, and nothing else on standard output; a seed repeats."""
    code, out, err = ask("--prompt", "detect all classes", "--max-tokens", "9")
    assert code == 0 and len(out.splitlines()) >= 1 and "9 tokens" in err[-1]
    assert ask("--prompt", "detect all classes", "--max-tokens", "9")[1] == out
    assert ask("--prompt", " detect all classes\n", "--max-tokens", "9")[1] == out
    hot = ["--prompt", "a", "--temperature", "2", "--max-tokens", "9"]
    assert ask(*hot)[1] == ask(*hot)[1] != ask(*hot, "--seed", "1")[1]
    assert len(ask(*hot, "--samples", "3", "--eos-offset", "99")[1].splitlines()) >= 3


def test_answers_do_not_control_the_terminal(ask, monkeypatch):
    said = "two\nlines\t\u200c\x1b[31m\x9b"
    monkeypatch.setattr(program.Speaker, "decode", lambda speaker, answer: said)
    for more in ([], ["--samples", 2, "--temperature", 1]):
        out = ask("--prompt", "a", "--max-tokens", "3", *more)[1]
        assert out.startswith("two\nlines\t\u200c\\x1b[31m\\x9b\n") and "\x1b" not in out


def test_conversation(ask):
    """Commands, mistakes and prompts in turn: each costs a line, and the end of input ends it."""
    lines = ["a", "", "/help", "/image none.png", "/image a.png", "/nonsense"]
    lines += ["word " * 2000, "detect zebras", b"\xff", "a"]
    code, out, err = ask("--max-tokens", "5", lines=[*lines, "/image "])
    assert code == 0 and out.count("/image FILE") == 4
    answers = [line for line in err if line.endswith("a second")]
    mistakes = [line for line in err if line.startswith("generate.py: ")]
    assert len(answers) == 2 and len(mistakes) == 4
    for line, words in zip(mistakes, ("none.png: no such file", "positions", "zebra", "UTF-8"), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--image", "none.png", "--prompt", "a"], "no such file"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens"),
        (["--prompt", "a", "--top-p", "2"], "top-p"),
        (["--prompt", "word " * 2000], "positions"),
        (["--prompt", "cat \udcff"], "UTF-8"),
        (["--prompt", "detect zebras"], "did you mean 'zebra'"),
        (["--prompt", "a", "--top-k", "3"], "temperature"),
        (["--prompt", "a", "--eos-offset", "nan"], "eos-offset nan"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["--prompt", "a", "--device", "meta"], "--device meta cannot be used"),
        (["--prompt", "a", "--samples", "3"], "temperature"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "a", "--model", "nowhere/"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(ask, options, complaint):
    code, _, err = ask(*options)
    assert code and err[-1].startswith("generate.py: ") and complaint in err[-1]
    assert len(err) == 1 or err[0].startswith("usage: ")

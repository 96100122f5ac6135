"""Names from outside: on one line, printable, and in JSON that every parser takes."""

import json
import os
from pathlib import Path

import pytest

from model.io.names import as_text, shown


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("photo 1.jpg", "photo 1.jpg"),
        ("été 日本.png", "été 日本.png"),
        ("C:\\photos\\a.png", "C:\\photos\\a.png"),
        ("a\nb\r\t.png", "a\\nb\\r\\t.png"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202egnp.exe\u2028\u200b", "\\u202egnp.exe\\u2028\\u200b"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("half \ud800", "half \\ud800"),
        ("", ""),
    ],
    ids=ascii,
)
def test_shown(name, line):
    assert shown(name) == line and line.isprintable()
    assert shown(Path(name)) == line or not name


def test_as_text():
    """As it is, if it is text, since JSON and HTML have escapes of their own."""
    assert as_text("a\n\x1b日.png") == "a\n\x1b日.png"
    assert as_text(Path(os.fsdecode(b"in/\xff\xc3.png"))) == "in/\\xff\\xc3.png"
    assert json.loads(json.dumps(as_text("half \ud800")).encode("utf-8")) == "half \\ud800"

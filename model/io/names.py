"""How names and texts from outside are shown.

A file may be called anything: a name can hold line ends, the escape sequences of a terminal, characters that
turn the direction of writing, and bytes that are no text at all. What is printed goes through `shown`, what
is written to a file through `as_text`. Neither is meant to be turned back into the name.
"""

from pathlib import Path


def as_text(name: str | Path) -> str:
    r"""A name as text that can be encoded: a byte that is not UTF-8 becomes \xff."""
    # Python keeps such bytes as halves of surrogate pairs; JSON parsers and UTF-8 files refuse those.
    return "".join(_escape(c) if "\ud800" <= c <= "\udfff" else c for c in str(name))


def shown(name: str | Path) -> str:
    r"""A name as printable characters on one line: a line end becomes \n, an escape character \x1b."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(name))


def _escape(c: str) -> str:
    of_a_byte = "\udc80" <= c <= "\udcff"  # as os.fsdecode writes a byte that is not UTF-8
    return f"\\x{ord(c) - 0xDC00:x}" if of_a_byte else c.encode("unicode_escape").decode()

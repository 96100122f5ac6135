"""Files on disk: errors explained in words, JSON, and writing that never leaves half a file."""

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.io.hub import replacement
from model.io.names import shown

MAX_JSON_BYTES = 1 << 24  # of a config, an index, a line: the longest, masks of many runs, have some MB


@contextlib.contextmanager
def explain(what: str, *errors: type[BaseException]) -> Iterator[None]:
    """Turn errors of a library into a ValueError for the user: "WHAT (the library's own words)", one line."""
    try:
        yield
    except errors as error:
        words = " ".join(str(error).split()) or type(error).__name__  # some errors have no text
        raise ValueError(f"{what} ({words:.500})") from error


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Say where a ValueError was met: "FILE:LINE: what is wrong"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def open_regular(file: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    A FIFO or a device is refused before it is opened: either could wait, or deliver, without end.
    """
    name = shown(file) or "''"
    try:
        mode = os.stat(file).st_mode
        if stat.S_ISREG(mode):
            return open(file, "rb")
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:  # a loop of links, too long a name, no permission; a NUL in it
        raise ValueError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
    raise ValueError(f"{name}: is {kind}, not a regular file")


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing" if not path.exists() else f"{path} is no file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; this kind of file has at most {MAX_JSON_BYTES:,}")
    # JSON's errors and Unicode's are ValueErrors; RecursionError is for brackets in brackets in brackets.
    with explain(f"{path} is not readable JSON{replacement(path)}", OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def each_line(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, byte offset and content of every line that is not blank."""
    offset = 0
    with open_regular(file) as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_JSON_BYTES + 1), b""), 1):
            if len(line) > MAX_JSON_BYTES:
                raise ValueError(f"{file}:{number}: a line of more than {MAX_JSON_BYTES:,} bytes")
            if line.strip():
                yield number, offset, line
            offset += len(line)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed when everything is written: no reader ever sees half a file."""
    # In the same folder, as renaming is atomic there; cut, as a name may have 255 bytes and no more.
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}")
    try:
        with named(path, temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name the file that could not be written: a full disk's own words do not, and others name the temporary
    file. Errors of other files pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        about = getattr(error, "filename", None)
        if about is not None and Path(os.fsdecode(about)) not in (path, temporary):
            raise
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"{path} cannot be written ({' '.join(words.split())})") from error


def replace_folder(new: Path, final: Path) -> None:
    """Give a folder its name, in place of one that has it. Both are whole until the new one has the name: a
    program that is killed between the two renames leaves the old one beside it, as .NAME.old."""
    old = final.with_name(f".{final.name[:50]}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Complain before the work if a folder cannot be written to afterwards, or cannot be made."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with explain(f"{folder} cannot be written", OSError), tempfile.TemporaryFile(dir=nearest):
        pass


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write text atomically; each line brings its own line end."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)


def write_json(value: dict | list, path: Path) -> None:
    """Write a JSON file atomically."""
    write_lines([json.dumps(value, indent=2), "\n"], path)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})

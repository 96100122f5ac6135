"""What all kinds of trouble share: a case is tried in a process of its own, and judged.

Right is a program that did its work, or said in one line what is wrong with which file, exited as documented,
showed no traceback, left nothing half written, and took no more than SECONDS and twice the memory of a good
file. A case follows from the seed, the kind and its number alone, so each can be tried again by itself.
"""

import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from helpers import save_tiny_model

from model.io.hub import NANO
from train.run import program as programs

SECONDS = 10  # of computing: waiting for a busy machine is no fault
PATIENCE = 120  # seconds by the clock, after which a process is taken to hang
SLACK = 16 << 20  # bytes: code that is read from the disk when it is first called counts as memory, too
BAR = re.compile(r"\d+%\||\[\d\d:\d\d")  # of tqdm
# libtiff prints a line of its own about some damaged files, which Pillow cannot stop.
LIBTIFF = re.compile(r"(?!\w+\.py: )[\w.]+: .*\.")


class Skipped(Exception):
    """A kind that cannot be tried here, and why."""


class Kind:
    """A kind of trouble. short, long: how many cases the two forms of the trial try."""

    name, short, long = "", 0, 0
    full = False  # whether this is the long form

    def __init__(self, place: Path):
        """place: an empty folder for good files, which all cases share."""
        self.place = place

    def close(self) -> None:
        """Give back what no removal of `place` would."""

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        """Make a case in an empty folder and try it. What it is, and what went wrong; "" if it is right."""
        raise NotImplementedError


# ---- processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit status, negative for a signal, None if it had to be killed."""

    code: int | None
    out: str
    err: str
    seconds: float  # of computing
    memory: int  # bytes at its peak, beyond what it began with; 0 if it could not say


class Child:
    """A function that runs in a process of its own, in a working folder, as a program does in a shell."""

    def __init__(self, action: Callable[[], int | None], folder: Path):
        self.streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - stdout, stderr, memory
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action, folder)

    def _run(self, action, folder) -> None:
        before, status = resident(), 1
        try:
            os.chdir(folder)
            for number, stream in enumerate(self.streams[:2], start=1):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(stream, write_through=True) for stream in self.streams[:2]
            )
            try:
                status = action() or 0
            except SystemExit as end:
                status = end.code or 0
            if isinstance(status, str):  # what Python prints before it exits with 1
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            self.streams[2].write(str(resident("VmHWM") - before).encode())
            self.streams[2].flush()
            os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Wait for the end; after `patience` seconds, bring it about."""
        end, hangs = time.monotonic() + patience, False
        while not (waited := os.wait4(self.pid, os.WNOHANG))[0]:
            if not hangs and time.monotonic() > end:
                hangs = True
                self.kill()
            time.sleep(0.003)
        _, status, usage = waited
        code = None if hangs else os.waitstatus_to_exitcode(status)
        texts = []
        for stream in self.streams:
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        seconds = usage.ru_utime + usage.ru_stime
        return Ended(code, *texts[:2], seconds, int(texts[2] or 0))


def resident(key: str = "VmRSS") -> int:
    """Bytes of memory that this process has; VmHWM: had, at most."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def calling(module, *argv) -> Callable[[], None]:
    """A program with these options, to be run in a Child."""

    def action():
        sys.argv = [f"{module.__name__.rpartition('.')[2]}.py", *map(str, argv)]
        programs.run(module.main, module.__file__)

    return action


def call(folder: Path, module, *argv) -> Ended:
    """Run a program in a folder, to its end."""
    return Child(calling(module, *argv), folder).wait()


# ---- the verdict -------------------------------------------------------------------------------------------


def complaints(err: str) -> list[str]:
    """The lines on stderr that are neither progress bars nor libtiff's."""
    lines = (line for line in re.split(r"[\r\n]+", err) if line.strip() and not BAR.search(line))
    return [line for line in lines if not LIBTIFF.fullmatch(line)]


def fault_of(
    ended: Ended,
    folder: Path,
    names: tuple[str, ...],
    memory: int,
    must: str = "either",
    codes: tuple[int, ...] = (0, 1),
    lines: int = 1,
) -> str:
    """What is wrong with how a program ended; "" for nothing.

    names: one of them must be in a complaint. memory: bytes that a good file takes. must: "good", "refused"
    or "either". lines: of complaint, at most.
    """
    said = complaints(ended.err)
    if ended.code is None:
        return f"ran for {PATIENCE} s and more"
    if "Traceback" in ended.err:
        return f"traceback: {said[-1] if said else ''}"
    if ended.code not in codes:
        return f"exit code {ended.code}: {said[-1:]}"
    if ended.seconds > SECONDS:
        return f"{ended.seconds:.0f} s of computing"
    if ended.memory > 2 * memory + SLACK:
        return f"{ended.memory >> 20} MB, a good file takes {memory >> 20}"
    if half := [str(file.relative_to(folder)) for file in folder.rglob(".*")]:
        return f"left behind: {half}"
    if ended.code == 0 and must == "refused":
        return "accepted"
    if ended.code != 0 and must == "good":
        return f"refused: {said[-1:]}"
    if ended.code != 0 and not 1 <= len(said) <= lines:
        return f"{len(said)} lines of complaint: {said[:3]}"
    if ended.code != 0 and not any(name in line for name in names for line in said):
        return f"names no file: {said[-1:]}"
    if any(not line.isprintable() for line in said):
        return f"prints what is not printable: {said[:3]!a}"
    return ""


# ---- good files --------------------------------------------------------------------------------------------


def tiny_model(place: Path) -> Path:
    """A checkpoint of nano's form with 0.2 million parameters, made once for all kinds."""
    folder = place.parent / "model"
    if not folder.exists():
        save_tiny_model(folder, NANO / "tokenizer.model")
    return folder


def random_numbers(seed: int, kind: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, *kind.encode()])


def quiet() -> None:
    """What every process of the trial starts from: one thread, no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", module=r"PIL\.")
    torch.set_num_threads(1)

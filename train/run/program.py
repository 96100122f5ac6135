"""The frame of every program: a parser, errors in one line, the exit code."""

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model.io.names import shown
from model.seam import TOWERS
from train.run.processes import exit_program, lost_processes

SIGPIPE = 13  # Windows has none, and no name for it


class Layout(argparse.RawDescriptionHelpFormatter):
    """The description as it stands; after each option its default, unless its help names one."""

    def add_argument(self, action: argparse.Action) -> None:
        words = (action.help or "").removesuffix(" (default: %(default)s)")  # Python's own, below 3.13
        default = action.default
        if isinstance(default, bool):
            default = ("off", "on")[default] if isinstance(action, argparse.BooleanOptionalAction) else None
        elif isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        if action.help != argparse.SUPPRESS and default not in (None, "", argparse.SUPPRESS):
            if "(default" not in words:
                words = f"{words} (default: {str(default).replace('%', '%%')})".lstrip()
            action.help = words
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """Options cannot be abbreviated. Complaints show names in printable characters, as a shell's * can expand
    to any name."""

    def __init__(self, **options):
        super().__init__(**dict(formatter_class=Layout, allow_abbrev=False) | options)

    def error(self, message: str) -> None:
        super().error(shown(message))


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring as it stands, and then the options."""
    return Parser(description=doc)


def add_seam_arguments(add: Callable) -> None:
    """The options of model/seam.py. add: a parser's or a group's add_argument."""
    function = dict(metavar="MODULE:FUNCTION")
    add("--attention", **function, help="attend with it (model/attention.py says what it is given)")
    add("--attention-in", choices=TOWERS, default=TOWERS[0], help="the tower that --attention is for")
    add("--mask", **function, help="who reads whom, by it instead of the prefix-LM mask")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _at_least(1, int(text))


def not_negative(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _at_least(0, int(text))


def minutes(text: str) -> float:
    """An argparse type: a time in minutes, at most a year."""
    value = float(text)
    if not 0 < value <= 525_600:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most a year")
    return value


def _at_least(minimum: int, value: int) -> int:
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is too small: must be at least {minimum}")
    return value


def complain(error: BaseException | str, file: str) -> None:
    """Print an error in one line on stderr, after the name of the program. file: its __file__."""
    line, *more = str(error).splitlines() or [type(error).__name__]  # some of Python's errors have no text
    if more and "in DataLoader worker process" in line:  # the worker's traceback, which ends in its error
        line = more[-1].partition(": ")[2]
    with contextlib.suppress(BrokenPipeError):  # nobody reads complaints: no reason to stop working
        print(f"{Path(file).name}: {shown(line)}", file=sys.stderr)


class Stopped(KeyboardInterrupt):
    """The end that SIGTERM or SIGHUP asks for. What handles Ctrl-C handles it, too."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stop_by_exception() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Stopped, so that files in writing are removed and finished work is kept.

    Python runs a handler between two of its instructions, never while C++ waits for another process. So the
    processes of torchrun, which ends them by SIGTERM, keep the system's default: they die at once.
    """

    def stop(number, _frame):
        raise Stopped(number)

    numbers = [] if "RANK" in os.environ else [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    # What is ignored stays ignored: nohup sets SIGHUP so.
    before = {n: signal.signal(n, stop) for n in set(numbers) if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[], int | None], file: str) -> None:
    """Call `main` and exit with its code (None is 0). file: the program's __file__, named in complaints.

    What a user can cause (a bad file or flag, a full disk, too little memory) is one line on stderr and exit
    code 1. A signal is 128 and its number, as in a shell: 130 for Ctrl-C, 143 for SIGTERM, 141 if nobody
    reads the output any more.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about a picture is a complaint
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal's encoding lacks ends no program.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stop_by_exception():
            status = main() or 0
            print(end="", flush=True)  # what is still in the buffer may find nobody who reads it
    except BrokenPipeError:
        complain("stopped: nobody reads the output any more", file)
        status = 128 + SIGPIPE
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        complain(error, file)
        status = 1
    except RuntimeError as error:  # of too little memory on a CPU, or of another process that was lost
        # Workers of the data loader are killed for want of memory, too.
        memory = re.search(r"\ADataLoader worker.*|can't allocate memory.*", str(error))
        if not (words := memory[0] if memory else lost_processes(error)):
            raise
        complain(words, file)
        status = 1
    except KeyboardInterrupt as stop:
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    give_up_output()
    exit_program(status)


def give_up_output() -> None:
    """Throw away what cannot be printed: at its exit, Python would try again, and complain in its own way."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

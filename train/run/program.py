"""The frame of every program: a parser, errors in one line, the exit code."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from train.run.processes import exit_program, lost_processes


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring as it stands; options cannot be abbreviated."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=layout, allow_abbrev=False)


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
    print(f"{Path(file).name}: {line}", file=sys.stderr)


def run(main: Callable[[], int | None], file: str) -> None:
    """Call `main` and exit with its code (None is 0). file: the program's __file__, named in complaints.

    What a user can cause (a bad file or flag, a full disk, too little memory) is one line on stderr and exit
    code 1; Ctrl-C is 130, as in a shell.
    """
    try:
        status = main() or 0
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        complain(error, file)
        status = 1
    except RuntimeError as error:  # of another process, of torchrun's or of the data loader's, that was lost
        worker = str(error).startswith("DataLoader worker")  # killed: most often for want of memory
        if not (words := str(error) if worker else lost_processes(error)):
            raise
        complain(words, file)
        status = 1
    except KeyboardInterrupt:
        status = 130
    exit_program(status)

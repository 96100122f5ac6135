"""Progress bar, metrics.jsonl and signals of a run."""

import argparse
import contextlib
import json
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model.io.writing import each_line, explain, named, write_lines
from train.run.processes import peak_memory

STOPPING = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIGINT]  # Windows: no SIGHUP


def stop_on_signals() -> dict[str, int]:
    """{"now": 0}, which SIGTERM, SIGHUP and SIGINT set to their number: the loop looks at it once a step. A
    second SIGINT ends the program at once. A signal that is ignored stays so, such as SIGHUP under nohup."""
    stopping = {"now": 0}

    def handler(number, _frame):
        stopping["now"] = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    return stopping


def logged_lines(file: Path, last_step: int = sys.maxsize) -> list[str]:
    """The lines of a metrics.jsonl up to a step; none if there is no such file. A last line that was not
    written to its end is dropped."""
    kept = []
    for number, _, line in each_line(file) if file.exists() else ():
        fault = f"{file}:{number}: not a line of a run's log; correct it or take it out"
        with explain(fault, ValueError, KeyError, TypeError, RecursionError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= last_step:
                kept.append(line.decode())
    return kept


class Log(contextlib.AbstractContextManager):
    """The progress bar, OUT/metrics.jsonl, and TensorBoard where it is installed. In a `with` statement, the
    bar ends with it: what is printed afterwards, a complaint for example, has a line of its own."""

    def __init__(self, args: argparse.Namespace, first_step: int, device: torch.device):
        self.path = args.out / "metrics.jsonl"
        write_lines(logged_lines(self.path, first_step), self.path)  # a resumed run trains later steps again
        self.bar = tqdm(total=args.steps, initial=first_step, unit="step", mininterval=2)
        self.step, self.time, self.batch, self.device = first_step, time.monotonic(), args.batch_size, device
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out)

    def line(self, step: int, loss_sum: float, lr: float) -> None:
        """Log the means since the last line. loss_sum: over those steps."""
        now, count = time.monotonic(), step - self.step
        rate = count * self.batch / (now - self.time)
        figures = dict(step=step, loss=round(loss_sum / count, 4), lr=lr, samples_per_s=round(rate, 1))
        figures["memory_gb"] = round(peak_memory(self.device) / 1e9, 2)
        self.step, self.time = step, now
        self.bar.set_postfix(
            loss=figures["loss"], lr=f"{lr:.1e}", samples_s=round(rate), GB=figures["memory_gb"]
        )
        self.write(figures)

    def write(self, figures: dict) -> None:
        """Append a line to metrics.jsonl, and to TensorBoard's curves."""
        self.check()
        with named(self.path), self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, figures["step"])

    def check(self) -> None:
        """Complain if the file has gone, most likely with all of OUT."""
        if not self.path.exists():
            raise ValueError(f"{self.path} was removed during the run; --resume goes on without its lines")

    def __exit__(self, *error) -> None:
        self.bar.close()
        if self.board:
            self.board.close()  # it keeps the newest lines for up to two minutes

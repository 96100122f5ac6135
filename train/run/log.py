"""Progress bar, metrics.jsonl and signals of a run."""

import argparse
import contextlib
import json
import signal
import time

import torch
from tqdm import tqdm

from train.run.processes import peak_memory


def stop_on_signals() -> dict[str, bool]:
    """A flag, "now", that SIGTERM and SIGINT set: the loop looks at it once a step. A second SIGINT ends the
    program at once."""
    stopping = {"now": False}

    def handler(number, _frame):
        stopping["now"] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return stopping


class Log:
    """The progress bar, OUT/metrics.jsonl, and TensorBoard where it is installed."""

    def __init__(self, args: argparse.Namespace, first_step: int, device: torch.device):
        path = args.out / "metrics.jsonl"
        # Lines of steps that a resumed run trains again are dropped, and so is a half-written last line.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step)
        path.write_text("".join(kept))
        self.file = path.open("a")
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
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, figures["step"])

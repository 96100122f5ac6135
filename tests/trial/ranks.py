"""One of two processes of a run dies or is stopped: the other one says so, and ends."""

import signal
import time
from pathlib import Path

import numpy as np

from trial import runs
from trial.frame import Kind, complaints

TIMEOUT = 0.05  # minutes of silence, after which a process is given up
SECONDS = 40  # until the other one must have ended, on a busy machine


class Ranks(Kind):
    name, short, long = "rank death and stop", 2, 40

    def __init__(self, place: Path):
        super().__init__(place)
        runs.make_data(place)

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        stopped, victim = number % 2 == 1, int(rng.integers(2))
        way = signal.SIGSTOP if stopped else signal.SIGKILL
        more = ("--timeout", TIMEOUT, "--steps", 100_000, "--save-every", 100_000)
        argv = runs.arguments(
            self.place, folder / "run", ("all weights", "LoRA")[number // 2 % 2], *map(str, more)
        )
        run = runs.start(argv, 2, folder)
        log = folder / "run" / "metrics.jsonl"
        while not log.exists() or not log.read_text():  # both have met
            time.sleep(0.02)
        time.sleep(rng.random())
        run.children[victim].kill(way)
        begun, other = time.monotonic(), run.children[1 - victim].wait(SECONDS)
        took = time.monotonic() - begun
        run.children[victim].kill()
        run.children[victim].wait()
        run.close()
        what = f"process {victim} {way.name}, the other ends after {took:.1f} s"
        said = [line for line in complaints(other.err) if line.startswith("fit.py: ")]
        if other.code is None:
            return what, f"the other goes on for more than {SECONDS} s"
        if other.code != 1 or "Traceback" in other.err:
            return what, f"exit code {other.code}: {complaints(other.err)[-2:]}"
        if len(said) != 1:
            return what, f"{len(said)} lines of complaint: {said[:3]}"
        if stopped and f"no sign of life from process {victim} of 2" not in said[0]:
            return what, f"does not name the process: {said}"
        return what, runs.fault_in_checkpoints(folder / "run")

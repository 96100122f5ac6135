"""Runs of training that are killed with -9, and go on: to the very weights of a run that never stopped."""

import time
from pathlib import Path

import numpy as np
import torch
from helpers import same

from trial import runs
from trial.frame import Kind

CLOSE = 5e-2  # of weights after a changed number of processes: sums in another order, and AdamW magnifies it


class Kills(Kind):
    """At a random moment, one process or two, which may go on as two or one."""

    name, short, long = "kill -9, any moment", 1, 100

    def __init__(self, place: Path):
        super().__init__(place)
        runs.make_data(place)
        self.straight = {}  # (variant, processes): its weights and how long it takes

    def weights_of(self, variant: str, world: int) -> tuple[dict, float]:
        """Of a run that is not killed."""
        if (variant, world) not in self.straight:
            out, begun = self.place / f"{variant}-{world}", time.monotonic()
            if fault := runs.run_to_end(runs.arguments(self.place, out, variant), world, self.place):
                raise RuntimeError(f"the run that nobody kills fails: {fault}")
            self.straight[variant, world] = runs.weights(out), time.monotonic() - begun
        return self.straight[variant, world]

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        variant = list(runs.VARIANTS)[number % len(runs.VARIANTS)]
        first, then = [(1, 1), (2, 2), (1, 2), (2, 1)][rng.choice(4, p=[0.4, 0.4, 0.1, 0.1])]
        wanted, takes = self.weights_of(variant, first)
        moment = rng.random() * takes
        what = f"{variant}, {first} then {then} processes, killed after {moment:.2f} s"
        run = runs.start(runs.arguments(self.place, folder / "run", variant), first, folder)
        time.sleep(moment)
        run.kill()
        run.wait()
        return what, self.fault_after(folder, variant, then, wanted, exact=first == then)

    def fault_after(self, folder: Path, variant: str, world: int, wanted: dict, exact: bool) -> str:
        """Let the run go on to its end, and compare."""
        out = folder / "run"
        if fault := runs.fault_in_checkpoints(out):
            return fault
        argv = runs.arguments(self.place, out, variant, "--resume")
        if fault := runs.run_to_end(argv, world, folder):
            return f"does not go on: {fault}"
        if partial := list(out.glob(".step*")):
            return f"left behind: {partial}"
        found = runs.weights(out)
        if exact:
            return "" if same(found, wanted) else "other weights than without the kill"
        near = found.keys() == wanted.keys() and all(
            torch.allclose(found[name].float(), wanted[name].float(), atol=CLOSE)
            for name in wanted
            if name.startswith("final/") and "k_proj.bias" not in name  # its gradient is rounding noise
        )
        return "" if near else "weights that are not near those without the kill"


# What is done to files as a run starts, saves and deletes an older checkpoint, and writes its result: the
# numbers of these events among all in its folder (runs.kill_at_event).
EVENTS = [*range(13), *range(57, 88), *range(138, 148)]


class Phases(Kills):
    """Before each file that a run opens, renames or removes, in turn."""

    name, short, long = "kill -9, each phase of a save", 1, 2 * len(EVENTS)

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        world = 1 + number % 2
        event = EVENTS[number // 2 % len(EVENTS)] if self.full else int(rng.choice(EVENTS))
        wanted, _ = self.weights_of("all weights", world)
        out = folder / "run"

        def prepare(rank):
            if rank == 0:
                runs.kill_at_event(event, out)

        run = runs.start(runs.arguments(self.place, out, "all weights"), world, folder, prepare)
        first = run.children[0].wait()
        for child in run.children[1:]:
            child.kill()
            child.wait()
        run.close()
        if first.code != -9:
            return f"file event {event}", f"was not killed: {first.code} {first.err[-300:]}"
        fault = self.fault_after(folder, "all weights", world, wanted, exact=True)
        return f"file event {event}, {world} processes", fault

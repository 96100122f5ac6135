"""Disks that fill up, at any size, under a training run and under detect.py."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
from helpers import same
from PIL import Image

from infer import detect
from trial import runs
from trial.frame import Kind, Skipped, call, complaints, fault_of, tiny_model
from trial.pictures import smooth

BIG = 64 << 20  # bytes: room for all
PICTURES = 8


class FullDisks(Kind):
    """A file system of its own, in memory, of a few pages to all that is needed."""

    name, short, long = "full disk", 2, 20

    def __init__(self, place: Path):
        super().__init__(place)
        self.disk = place / "disk"
        self.disk.mkdir()
        mount(self.disk, BIG)
        try:
            self.prepare(place)
        except BaseException:
            self.close()
            raise

    def prepare(self, place: Path) -> None:
        """Good runs: what they need."""
        runs.make_data(place)
        (place / "in").mkdir()
        for i in range(PICTURES):
            smooth(np.random.default_rng(i), "RGB", 300, 200).save(place / "in" / f"{i}.png")
        self.argv = runs.arguments(place, self.disk / "run", "all weights")
        if fault := runs.run_to_end(self.argv, 1, place):
            raise RuntimeError(f"with room for all: {fault}")
        self.wanted = runs.weights(self.disk / "run")
        self.needed = {"fit": used(self.disk)}
        empty(self.disk)
        ended = self.detect()
        self.needed["detect"], self.memory = used(self.disk), ended.memory
        empty(self.disk)

    def close(self) -> None:
        subprocess.run(["umount", str(self.disk)], check=True)

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        program = ("fit", "detect")[number % 2]
        size = int(rng.uniform(0.02, 0.98) * self.needed[program]) // 4096 * 4096
        resize(self.disk, max(4096, size))
        try:
            fault = self.train() if program == "fit" else self.fault_in_detecting()
        finally:
            resize(self.disk, BIG)
            empty(self.disk)
        return f"{program} on {size >> 10} kB", fault

    def train(self) -> str:
        (ended,) = runs.start(self.argv, 1, self.place).wait()
        out = self.disk / "run"
        if ended.code == 0:
            return "enough room: a case that tries nothing"
        said = complaints(ended.err)
        if ended.code != 1 or "Traceback" in ended.err:
            return f"exit code {ended.code}: {said[-1:]}"
        if not said or str(out) not in said[-1] or "No space left" not in said[-1]:
            return f"names no file: {said[-1:]}"
        if fault := runs.fault_in_checkpoints(out):
            return fault
        if half := [str(file) for file in out.rglob(".*")]:
            return f"left behind: {half}"
        resize(self.disk, BIG)
        if fault := runs.run_to_end([*self.argv, "--resume"], 1, self.place):
            return f"does not go on: {fault}"
        return "" if same(runs.weights(out), self.wanted) else "other weights than with enough room"

    def detect(self):
        argv = ("--image", self.place / "in", "--json", "out.json", "--out", "drawn", "--groups", 1)
        return call(self.disk, detect, "--model", tiny_model(self.place), "--batch-size", 1, *argv)

    def fault_in_detecting(self) -> str:
        """What is drawn is whole; if the JSON file is there, it is about just that."""
        ended = self.detect()
        if fault := fault_of(
            ended, self.disk, (".png", "out.json", "drawn"), self.memory, "refused", lines=3
        ):
            return fault
        drawn = list((self.disk / "drawn").glob("*"))
        for file in drawn:
            with Image.open(file) as image:
                image.load()
        listed = self.disk / "out.json"
        if listed.exists() and len(json.loads(listed.read_text())) != len(drawn):
            return f"{len(drawn)} pictures drawn, not as many in the JSON file"
        return ""


def mount(folder: Path, size: int) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no file system of a given size can be mounted ({done.stderr.strip()})")


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

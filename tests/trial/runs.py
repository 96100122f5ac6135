"""Training runs of one process or two, forked instead of started anew: what kills, disks and ranks share."""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from helpers import write_listed_set
from safetensors.torch import load_file

from train import fit
from train.run.checkpoint import newest
from trial.frame import Child, calling, tiny_model

STEPS = 9  # the last checkpoint is of a step that is no multiple of --save-every, too
OPTIONS = (
    f"--device cpu --workers 0 --batch-size 4 --lr 1e-3 --warmup 2 --log-every 1 --no-amp --steps {STEPS}"
)
PATIENCE = (
    1800  # seconds, after which a run is taken to hang: two processes wait for each other at every step
)
VARIANTS = {
    "all weights": "--save-every 2",
    "LoRA": "--save-every 2 --lora --dtype float32 --lora-rank 2 --lora-dropout 0.1",
    "Muon": "--save-every 2 --muon-lr 2e-3 --weight-decay 0.01",
    "validation": "--save-every 4 --val {data} --val-every 3 --val-count 4",
}


def warm_up() -> None:
    """Import now what an optimizer would import in each process, for seconds."""
    import torch._dynamo  # noqa: F401


def make_data(place: Path) -> Path:
    warm_up()
    return write_listed_set(place / "set")


def arguments(place: Path, out: Path, variant: str, *more) -> list[str]:
    data = place / "set" / "instances.json"
    options = f"{OPTIONS} {VARIANTS[variant]}".format(data=data).split()
    return ["--model", str(tiny_model(place)), "--out", str(out), "--data", str(data), *options, *more]


def start(argv: list[str], world: int, folder: Path, prepare=lambda rank: None) -> "Run":
    """Start a run. prepare(rank) is called in each process before it begins."""
    return Run(argv, world, folder, prepare)


class Run:
    """The processes of a run, as torchrun would start them: their store is in a process of its own."""

    def __init__(self, argv: list[str], world: int, folder: Path, prepare):
        self.children, self.store = [], None
        port = free_port() if world > 1 else 0
        if world > 1:
            self.store = Child(lambda: keep_store(port), folder)
        for rank in range(world):

            def action(rank=rank):
                if world > 1:
                    ours = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
                    ours |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE=True)
                    os.environ.update({name: str(value) for name, value in ours.items()})
                prepare(rank)
                calling(fit, *argv)()

            self.children.append(Child(action, folder))

    def kill(self) -> None:
        """All at once, by SIGKILL."""
        for child in self.children:
            child.kill()

    def wait(self) -> list:
        """How each process ended. One that dies takes the others with it, as torchrun sees to."""
        ended = [child.wait(PATIENCE) for child in self.children]
        self.close()
        return ended

    def close(self) -> None:
        if self.store:
            self.store.kill()
            self.store.wait()
            self.store = None


def keep_store(port: int) -> None:
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1)
    )
    while store:
        time.sleep(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_to_end(argv: list[str], world: int, folder: Path) -> str:
    """Run; what went wrong, or ""."""
    for rank, ended in enumerate(start(argv, world, folder).wait()):
        if ended.code != 0 or "Traceback" in ended.err:
            return f"process {rank} ends with {ended.code}: {ended.err.strip()[-300:]}"
    return ""


def weights(out: Path) -> dict:
    """What the last step left: weights or adapter, optimizer, and the result."""
    files = [*(out / f"step-{STEPS:07d}").glob("*.safetensors"), *(out / "final").glob("*.safetensors")]
    # Copies, as what is read is mapped from the files, which would then take room until the end.
    return {f"{f.parent.name}/{f.name}/{k}": v.clone() for f in files for k, v in load_file(f).items()}


def fault_in_checkpoints(out: Path) -> str:
    """Each checkpoint that has its name must be whole."""
    there = sorted(out.glob("step-*"))
    if there and newest(out) != there[-1]:
        return f"{there[-1].name} is damaged"
    return ""


def kill_at_event(number: int, out: Path) -> None:
    """Kill this process when it is about to do something with a file under `out` for the number-th time."""
    left = [number]

    def hook(event, args):
        if event in EVENTS and any(str(arg).startswith(str(out)) for arg in args[:2]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

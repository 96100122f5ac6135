"""The processes of torchrun: how they meet, their devices, what they exchange, and their peak memory."""

import hashlib
import os
import re
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model.io.writing import explain

POLL = 0.05  # seconds


def join_processes(
    backend: str, timeout: timedelta = timedelta(minutes=10), patience: timedelta | None = None
) -> None:
    """Meet the other processes that torchrun started.

    timeout: this process ends when another gives no sign of life for so long: it is stopped, or its machine
    is lost. patience: for how long this one waits for another that is alive (default: the timeout; of NCCL,
    twice that).
    """
    global _watch
    if "RANK" not in os.environ:
        raise ValueError("--shard needs torchrun: torchrun --nproc_per_node=N train/fit.py ...")
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_name_of_this_start(store, rank, world), store)
    # A process that waits in a collective of gloo gets an error after its patience, and can still save its
    # work. One that waits in a collective of NCCL hangs until NCCL kills it: the watch ends it before that,
    # and says why.
    patience = patience or (timeout if backend == "gloo" else 2 * timeout)
    _watch = Watch(store.clone(), rank, world, timeout.total_seconds(), ends=patience > timeout)
    _watch.start()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


class Watch(threading.Thread):
    """Gives signs of life to the other processes, and notes when each of them last gave one.

    store: a connection of its own, as the one on which the program waits is blocked meanwhile. limit: seconds
    of silence; ends: whether this process ends after them.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float, ends: bool):
        super().__init__(daemon=True)
        self.store, self.rank, self.world, self.limit, self.ends = store, rank, world, limit, ends
        self.heard = {other: (0, time.monotonic()) for other in range(world) if other != rank}

    def run(self) -> None:
        while True:
            try:
                self.look()
            except RuntimeError:  # the store has gone, and with it whoever started these processes
                return
            if self.ends and (words := self.missing(self.limit)):
                print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(min(10, self.limit / 20))

    def look(self) -> None:
        """Give a sign of life, and look for those of the others."""
        self.store.add(f"alive/{self.rank}", 1)
        for other, (count, _) in self.heard.items():
            if (now := self.store.add(f"alive/{other}", 0)) != count:
                self.heard[other] = now, time.monotonic()

    def missing(self, seconds: float) -> str:
        """A sentence on the processes that have been silent for so long; empty if there are none."""
        silent = [i for i, (_, when) in self.heard.items() if time.monotonic() - when > seconds]
        if not silent:
            return ""
        who = f"process{'es' if len(silent) > 1 else ''} {', '.join(map(str, silent))} of {self.world}"
        return f"no sign of life from {who} for {self.limit / 60:g} minutes (--timeout): stopped, or lost"


_watch: Watch | None = None  # of this process, once it has joined the others


def lost_processes(error: RuntimeError) -> str:
    """What an error of a collective means in words; empty for an error that is about something else."""
    if _watch is None or not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.I)):
        return ""
    words = " ".join(str(error).split())
    return _watch.missing(_watch.limit / 2) or f"lost the connection to another process ({words:.200})"


def _name_of_this_start(store: dist.Store, rank: int, world: int) -> str:
    """A name that all processes of this start know, and none of an earlier one did.

    After a restart, torchrun's store still holds what the dead processes wrote there, including their
    addresses, and a process that reads those waits forever. The number of restarts cannot serve as a name, as
    nodes may count differently. So every process writes a word of its own, process 0 collects the words, and
    all look at the collection until each has found its own word there: then no word is of the dead.
    """
    word, agreed = uuid.uuid4().hex, set()
    store.set(f"word/{rank}", word)
    while True:
        if rank == 0:
            store.set("words", " ".join(store.get(f"word/{other}").decode() for other in range(world)))
        words = store.get("words").decode()
        if word in words:
            name = hashlib.sha256(words.encode()).hexdigest()
            if store.add(f"agreed/{name}", int(name not in agreed)) == world:
                return name
            agreed.add(name)
        time.sleep(POLL)


def own_device(name: str, world: int) -> torch.device:
    """The device of this process; of several processes on a machine, each takes the GPU of its local rank."""
    with explain(f"--device {name} cannot be used here", RuntimeError, AssertionError):
        device = torch.device(name)
        if device.type != "cuda":  # use_gpu looks at those
            torch.empty(0, device=device)
    if device.type == "cuda" and (world > 1 or device.index is None):  # set_device wants an index
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def use_gpu(device: torch.device) -> None:
    """Make a GPU the current one: for streams, NCCL, and all else that is not told a device."""
    there = torch.cuda.device_count()
    if device.index >= there:
        raise ValueError(f"--device {device}: this machine has {there} GPUs")
    torch.cuda.set_device(device)


def exit_program(status: int | str) -> None:
    """End the program like sys.exit. One of several processes ends without the interpreter's clean-up, in
    which PyTorch's threads sometimes abort ("terminate called without an active exception")."""
    if dist.is_initialized():
        dist.destroy_process_group()
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)


def is_first() -> bool:
    """Whether this process is the first, which writes the files; known before it joins the others."""
    return int(os.environ.get("RANK", 0)) == 0


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value) -> list:
    """The value of every process, by rank; waits for all of them."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def peak_memory(device: torch.device | str) -> int:
    """Most bytes that this process has held so far: of the GPU, or resident, mapped files included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM")


def resident_memory(what: str = "VmRSS") -> int:
    """Bytes of this process that are in memory; VmHWM: the most so far, which is all that macOS tells."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent held when it started this process
        return 1024 * int(status.read_text().split(f"{what}:")[1].split()[0])
    import resource  # here, as Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes

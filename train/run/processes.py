"""The processes of torchrun: how they meet, their devices, what they exchange, and their peak memory."""

import hashlib
import os
import resource
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from model.io.writing import explain

POLL = 0.05  # seconds


def join_processes(backend: str, timeout: timedelta | None = None) -> None:
    """Meet the other processes that torchrun started."""
    if "RANK" not in os.environ:
        raise ValueError("--shard needs torchrun: torchrun --nproc_per_node=N train/fit.py ...")
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_name_of_this_start(store, rank, world), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


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
    """Make a GPU the current one: for new streams, NCCL, and whatever else asks for no device of its own."""
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
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent held when it started this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes

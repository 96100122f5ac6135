"""Opening every picture of a data set once, before anything is trained on it."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from train.run.processes import all_gather, rank_and_world


class _Faults(Dataset):
    """What is wrong with a picture of `data`, asked for by its item; "" for nothing."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, item: int) -> str:
        try:
            self.data.picture(item)
        except (ValueError, OSError) as error:
            return str(error)
        return ""


def broken_pictures(data: Dataset, items: Sequence[int], workers: int, title: str = "") -> dict[int, str]:
    """{item: what is wrong with its picture}, in the order of the items; the same in all processes, which
    share the work. workers: data-loading processes of each; title: of the bar."""
    rank, world = rank_and_world()
    pictures = sorted({data.same_picture(item) for item in items})  # each once, however often it is used
    share = pictures[rank::world]
    # A generator of its own: the loader draws a number, and training's must stay the same.
    loader = DataLoader(
        _Faults(data), batch_size=None, sampler=share, num_workers=workers, generator=torch.Generator()
    )
    bar = tqdm(loader, title, len(share), unit="picture", leave=False, disable=rank > 0)
    mine = {picture: fault for picture, fault in zip(share, bar, strict=True) if fault}
    faults = {picture: fault for part in all_gather(mine) for picture, fault in part.items()}
    found = ((item, faults.get(data.same_picture(item))) for item in items)
    return {item: fault for item, fault in found if fault}


def pictures_to_skip(
    data: Dataset, items: Sequence[int], file: Path, workers: int, skip: bool, known: dict | None = None
) -> dict[str, str]:
    """{item: what is wrong with its picture}, as JSON would hold it. Without `skip`, a broken picture ends
    the program.

    file: of the data, for messages. known: what was left out when this run began. It stays so, even if the
    picture can be used by now, and nothing joins it: how many pictures there are decides which come next.
    """
    found = broken_pictures(data, items, workers, f"opening the pictures of {file.name}")
    found = {str(item): fault for item, fault in found.items()}
    new = list(dict.fromkeys(fault for item, fault in found.items() if item not in (known or {})))
    if not new:
        return known or {}
    shown = name_broken(new, skip)
    if known is not None:
        raise ValueError(f"{shown}; this run began with all of its pictures and cannot go on with fewer")
    if not skip:
        raise ValueError(f"{shown}; --skip-broken trains without what is broken")
    if len(found) == len(items):
        raise none_left(file, shown)
    return found


def name_broken(faults: list[str], skip: bool) -> str:
    """Print what is wrong with each picture, in the first process. Returns the first and the number of the
    others, for a complaint; without `skip`, a single one is in that complaint alone."""
    if rank_and_world()[0] == 0 and (skip or len(faults) > 1):
        print("\n".join(faults), file=sys.stderr)
    more = len(faults) - 1
    return faults[0] + (f", and {more} more picture{'s' if more > 1 else ''}" if more else "")


def none_left(file: Path, shown: str) -> ValueError:
    """The complaint about a file all of whose pictures are broken. shown: what name_broken returned."""
    return ValueError(f"{file}: none of its pictures can be used, {shown}")

"""What the folder forms share (yolo.py, voc.py, labelme.py): pictures and their sizes, COCO's lists from what
is beside them, and the way back to such a folder."""

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from model.io.image import READERS, SUFFIXES, upright_size
from model.io.names import shown
from model.io.writing import read_json, replace_folder, write_json

IDS = "ids.json"  # beside a converted set: {"categories": {name: id}, "images": {file name: id}}


class Entry(NamedTuple):
    """A picture and its objects."""

    name: str  # relative to the folder of the pictures
    size: tuple[int, int]  # width, height
    objects: list[dict[str, Any]]  # "label" and "box" (x0, y0, x1, y1), and what else an annotation has


def list_files(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """All pictures, or files with other suffixes, in a folder and in those below it, sorted. Hidden ones are
    left out: Jupyter and macOS keep copies of files by such names."""

    def hidden(file: Path) -> bool:
        return any(part[0] == "." or part == "__MACOSX" for part in file.relative_to(folder).parts)

    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and not hidden(file))


def sizes_of(files: list[Path], strict: bool) -> list[tuple[int, int]]:
    """Width and height of upright pictures, by their headers. One without a header that can be read ends the
    program if `strict`; else it is 1 x 1, for whoever opens it to say what is wrong."""

    def size(file: Path) -> tuple[int, int]:
        try:
            return upright_size(file)
        except ValueError:
            if strict:
                raise
            return 1, 1

    with ThreadPoolExecutor(READERS) as pool:
        sizes = pool.map(size, files)
        return list(tqdm(sizes, "sizes", len(files), unit="picture", leave=False, disable=None))


def of_files(
    found: dict[str, tuple[tuple[int, int] | None, list[dict]]], images: Path, root: Path, strict: bool
) -> dict:
    """as_coco of {name of a picture: (its size, or None, its objects)}, with the labels that occur, sorted,
    as classes."""
    names = sorted(found)
    unknown = [name for name in names if found[name][0] is None]
    sizes = dict(zip(unknown, sizes_of([images / name for name in unknown], strict)))
    entries = [Entry(name, found[name][0] or sizes[name], found[name][1]) for name in names]
    return as_coco(entries, {}, root)


def as_coco(entries: list[Entry], classes: dict[str, int], root: Path) -> dict:
    """A COCO instances file, as JSON would hold it. classes: {name: id}, unless IDS in `root` says other
    ids; what it does not name gets the next ones."""
    kept = read_json(root / IDS) if (root / IDS).is_file() else {}
    kept = {key: _checked(kept.get(key, {}), f"{root / IDS}: {key}") for key in ("categories", "images")}
    category_ids = kept["categories"] or dict(classes)
    for name in (*classes, *sorted({o["label"] for entry in entries for o in entry.objects})):
        category_ids.setdefault(name, max(category_ids.values(), default=0) + 1)
    image_ids, there = kept["images"], {entry.name: entry for entry in entries}
    for name in there:
        image_ids.setdefault(name, max(image_ids.values(), default=0) + 1)
    images, annotations = [], []
    for name, i in image_ids.items():
        if name not in there:
            continue
        width, height = there[name].size
        images.append(dict(id=i, file_name=name, width=width, height=height))
        for found in there[name].objects:
            x0, y0, x1, y1 = found["box"]
            bbox = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            ids = dict(id=len(annotations) + 1, image_id=i, category_id=category_ids[found["label"]])
            other = {key: value for key, value in found.items() if key not in ("label", "box")}
            annotations.append(ids | dict(bbox=bbox, area=max(0, bbox[2] * bbox[3]), iscrowd=0) | other)
    categories = [dict(id=i, name=name) for name, i in category_ids.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def _checked(ids: Any, where: str) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise ValueError(f"{where} must be names and whole numbers")
    return ids


def objects_of(data: dict, crowds: bool = True) -> dict[int, list[dict]]:
    """{image id: its objects}, each an annotation with its "label" and its "box", clipped to the picture, in
    hundredths of a pixel. Those without an area there are left out; crowds: False, if they are, too."""
    names = {record["id"]: record["name"] for record in data["categories"]}
    sizes = {record["id"]: (record["width"], record["height"]) for record in data["images"]}
    found = defaultdict(list)
    for record in data["annotations"]:
        (x, y, w, h), (width, height) = record["bbox"], sizes[record["image_id"]]
        sides = zip((x, y, x + w, y + h), (width, height) * 2)
        box = x0, y0, x1, y1 = [round(min(max(at, 0), side), 2) for at, side in sides]
        if x1 > x0 and y1 > y0 and (crowds or not record.get("iscrowd")):
            found[record["image_id"]].append(record | dict(label=names[record["category_id"]], box=box))
    return found


def beside(data: dict, folder: Path, suffix: str) -> Iterator[tuple[dict, Path]]:
    """Each image and the file for its objects, named like it, in a folder. Two of one name are refused."""
    taken = {}
    for record in data["images"]:
        file = (folder / record["file_name"]).with_suffix(suffix)
        if (other := taken.setdefault(file, record)) is not record:
            both = f"{other['file_name']} and {record['file_name']}"
            raise ValueError(f"{both} would both have {file.name}: rename one")
        file.parent.mkdir(parents=True, exist_ok=True)
        yield record, file


def link_pictures(names: Iterable[tuple[Path, str]], folder: Path) -> None:
    """Put pictures into a folder, each (file, its name there): as hard links, which take no room, or copies
    where the file system has none."""
    for file, name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = os.path.realpath(file)
        if not os.path.isfile(source):
            raise ValueError(f"{shown(file)}: no such file")
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def write_ids(data: dict, folder: Path) -> None:
    """What these forms have no place for."""
    categories = {record["name"]: record["id"] for record in data["categories"]}
    images = {record["file_name"]: record["id"] for record in data["images"]}
    write_json(dict(categories=categories, images=images), folder / IDS)


def check_new(out: Path, replace: bool) -> None:
    """Refuse a folder that is there, unless it is empty, or may be replaced and was written by new_folder."""
    own, empty = (out / IDS).is_file(), out.is_dir() and not any(out.iterdir())
    if os.path.lexists(out) and not (empty or (replace and own)):
        why = f" and has no {IDS}, so it is not replaced" if replace else ""
        raise ValueError(f"{shown(out)} exists{why}: choose another folder")


@contextlib.contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to write to, renamed when everything is written."""
    check_new(out, replace)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:50]}.", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it for its owner alone
        yield temporary
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now

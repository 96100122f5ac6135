"""The forms that data sets come in, told by what is there.

    COCO        a file of JSON                        its pictures in images/ beside it, or beside it
                annotations/instances_train2017.json  beside train2017/ or images/
    JSONL       a file of JSON lines                  the same
    YOLO        data.yaml, or images/ and labels/     yolo.py
    Pascal VOC  Annotations/*.xml, or beside pictures voc.py
    LabelMe     *.json beside pictures                labelme.py
    a folder    with one of these; or with train/, valid/ and test/ of one of these, or files named so, as
                Roboflow exports them

In memory all but JSONL become COCO's lists of images, annotations and categories.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model.decoding.boxes import locs_to_boxes, parse_answer
from model.io.image import image_folder, upright_size
from model.io.names import shown
from model.io.writing import open_regular
from train.data import labelme, voc, yolo
from train.data.folders import list_files
from train.data.jsonl import is_jsonl, read_lines, right_answers
from train.data.records import check_records, read_records

PART_NAMES = dict(train=("train", "training"), val=("val", "valid", "validation"), test=("test", "testing"))
KNOWN = (
    "known are a COCO or JSONL file, COCO (annotations/instances_*.json beside the pictures), YOLO "
    "(data.yaml, or images/ and labels/), Pascal VOC (Annotations/*.xml or beside the pictures), LabelMe "
    "(*.json beside the pictures), a folder with one of these, or with train/, valid/ and test/ of one"
)
NO_DATA = "ids.json", "notes.json"  # what convert.py writes beside a set, and Label Studio beside YOLO labels
HEAD_BYTES = 1 << 14  # that tell LabelMe's JSON from COCO's


@dataclass(frozen=True)
class Found:
    """A data set: its form, what is read, the folder of its pictures, and its part, if it has several."""

    form: str
    path: Path
    images: Path
    part: str | None
    read: Callable[[bool], dict] | None = None  # COCO's lists, of another form; strict: sizes_of

    @property
    def name(self) -> str:
        """A short one, for titles."""
        place = self.path.parent if self.path.stem in ("data", "_annotations.coco") else self.path
        return place.stem if place.is_file() else place.absolute().name

    def __str__(self) -> str:
        part = f", part {self.part}" if self.part else ""
        return f"{shown(self.path)}: {self.form}{part}, pictures in {shown(self.images)}"


def find_data(path: Path, images: Path | None, parts: Sequence[str]) -> Found:
    """What --data names. images: --images; parts: those to take of a set that has several, best first."""
    found = _in_folder(path, images, parts) if path.is_dir() else _file(path, images, parts)
    if found is None:
        raise ValueError(f"{shown(path)}: no data set in this folder; {KNOWN}")
    return found


def records_of(found: Found, strict: bool = True, outlines: bool = False) -> tuple[dict, dict, dict]:
    """What read_records returns of a COCO file, of a set of any form. strict: False if a picture whose size
    cannot be read is found out later."""
    if found.form == "COCO":
        return read_records(found.path, found.images, outlines=outlines)
    data = found.read(strict) if found.read else lists_of_lines(found.path, found.images)[0]
    return check_records(data, found.path)


def lists_of(found: Found, strict: bool = True) -> dict:
    """The same as a COCO file would hold it."""
    categories, images, annotations = (list(of.values()) for of in records_of(found, strict, outlines=True))
    for record in annotations:
        if record["area"] is None:
            record["area"] = record["bbox"][2] * record["bbox"][3]
    return dict(images=images, annotations=annotations, categories=categories)


# ---- what is there -----------------------------------------------------------------------------------------


def _file(file: Path, images: Path | None, parts: Sequence[str], part: str | None = None) -> Found:
    if file.suffix.lower() in (".yaml", ".yml"):
        return _yolo_of_yaml(file, images, parts)
    if file.suffix.lower() == ".xml":
        raise ValueError(f"{shown(file)}: a single file of Pascal VOC; give its folder")
    form = "JSONL" if is_jsonl(file) else "COCO"
    if form == "COCO" and _is_labelme(file):
        raise ValueError(f"{shown(file)}: a single file of LabelMe; give its folder")
    return Found(form, file, image_folder(file, images), part)


def _in_folder(folder: Path, images: Path | None, parts: Sequence[str], part: str | None = None):
    inside = sorted(file for file in folder.iterdir() if file.name[0] != ".")
    yamls = [file for file in inside if file.suffix.lower() in (".yaml", ".yml") and _has_names(file)]
    if yamls:
        named = [file for file in yamls if file.stem == "data"] or yamls
        return _yolo_of_yaml(_only(named, folder), images, parts)
    json_files = [file for file in inside if file.suffix.lower() in (".json", ".jsonl") and file.is_file()]
    json_files = [file for file in json_files if file.name not in NO_DATA]
    if json_files and _is_labelme(json_files[0]):
        return _labelme(folder, images, part)
    if json_files:
        part, file = _file_of_part(json_files, parts, folder, part)
        return _file(file, images, parts, part)
    if json_files := sorted(folder.glob("annotations/instances_*.json")):
        return _coco(folder, json_files, images, parts, part)
    folders = {key: sub for sub in inside if sub.is_dir() and (key := _part_of(sub.name, whole=True))}
    if folders:
        part, sub = _pick(folders, parts, folder)
        return _in_folder(sub, images, parts, part)
    return (
        _voc(folder, images, parts, part)
        or _yolo(folder, images, parts, part)
        or _labelme(folder, images, part)  # in folders below
    )


def _coco(
    folder: Path, files: list[Path], images: Path | None, parts: Sequence[str], part: str | None
) -> Found:
    """COCO's own folder, or CVAT's: a file for each part in annotations/."""
    part, file = _file_of_part(files, parts, folder / "annotations", part)
    if (own := _part_of(file.name)) and own != part:  # the only file, which may be of another part
        part, file = _pick({own: file}, parts, folder / "annotations")
    name = file.stem.removeprefix("instances_")
    images = images or _sub(folder, f"images/{name}", name, "images")
    if images is None:
        raise ValueError(
            f"{shown(file)}: neither {shown(name)}/ nor images/ in {shown(folder)}; give --images"
        )
    return _file(file, images, parts, part)


def _labelme(folder: Path, images: Path | None, part: str | None) -> Found | None:
    if not any(map(_is_labelme, list_files(folder, {".json"}))):
        return None
    read = partial(labelme.read_labelme, folder, images or folder, folder)
    return Found("LabelMe", folder, images or folder, part, read)


def _has_names(file: Path) -> bool:
    with open_regular(file) as handle:
        return re.search(rb"^names\s*:", handle.read(yolo.MAX_BYTES), re.MULTILINE) is not None


def _is_labelme(file: Path) -> bool:
    with open_regular(file) as handle:
        head = handle.read(HEAD_BYTES)
    return re.search(rb'"(shapes|imagePath|imageData)"\s*:', head) is not None


def _part_of(name: str, whole: bool = False) -> str | None:
    """The part that a name speaks of; whole: that it is, but for CVAT's obj_train_data."""
    name = name.lower()
    words = [name.removeprefix("obj_").removesuffix("_data")] if whole else re.split("[^a-z]+", name)
    return next((part for part, names in PART_NAMES.items() if not set(names).isdisjoint(words)), None)


def _pick(there: dict, parts: Sequence[str], where: Path) -> tuple:
    for part in parts:
        if part in there:
            return part, there[part]
    wanted = " or ".join(parts)
    raise ValueError(f"{shown(where)} has the parts {', '.join(there)}, and no {wanted}: name what to take")


def _file_of_part(
    files: list[Path], parts: Sequence[str], folder: Path, part: str | None
) -> tuple[str | None, Path]:
    """Of several files, each of one part, that of the best part; or the only file, which is of this part."""
    by_part = {key: file for file in files if (key := _part_of(file.name))}
    if len(files) > 1 and len(by_part) == len(files):
        return _pick(by_part, parts, folder)
    return part, _only(files, folder)


def _only(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files[:4])
        raise ValueError(f"{shown(folder)} has {len(files)} files that could be meant ({names}): name one")
    return files[0]


def _sub(folder: Path, *names: str) -> Path | None:
    """A folder in another one, by any of these names."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _yolo_of_yaml(file: Path, images: Path | None, parts: Sequence[str]) -> Found:
    data = yolo.read_yaml(file)
    part, _ = _pick(yolo.parts_of(data, file), parts, file)
    return _yolo_of(file, images, part, yolo.places_of(data, file, part), yolo.names_of(data, file))


def _yolo(folder: Path, images: Path | None, parts: Sequence[str], part: str | None) -> Found | None:
    pictures = _sub(folder, "images") or folder
    there = {key: sub for sub in pictures.iterdir() if sub.is_dir() and (key := _part_of(sub.name, True))}
    if there:
        part, pictures = _pick(there, parts, pictures)
    if not any(yolo.label_file(picture).is_file() for picture in list_files(pictures)):
        return None
    names, file = yolo.names_beside(folder)
    return _yolo_of(folder, images, part, [pictures], names, file.parent)


def _yolo_of(
    path: Path,
    images: Path | None,
    part: str | None,
    places: list[Path],
    names: dict,
    root: Path | None = None,
) -> Found:
    if images is not None:
        raise ValueError("--images: a YOLO set says itself where its pictures are; leave it out")
    pictures, folder = yolo.pictures_in(places)
    read = partial(yolo.read_yolo, names, pictures, folder, root or path.parent)
    return Found("YOLO", path, folder, part, read)


def _voc(folder: Path, images: Path | None, parts: Sequence[str], part: str | None) -> Found | None:
    annotations = _sub(folder, "Annotations", "annotations") or folder
    if not list_files(annotations, {".xml"}):
        return None
    root = folder if annotations != folder else folder.parent
    if list_files(annotations):
        pictures = images or annotations
    else:
        pictures = images or _sub(root, "JPEGImages", "images", "Images")
    if pictures is None:
        raise ValueError(f"{shown(folder)}: Pascal VOC without JPEGImages/: give the pictures with --images")
    if not pictures.is_dir():
        raise ValueError(f"{shown(pictures)}: no such folder (the images of {shown(folder)})")
    lists = {key: root / "ImageSets" / "Main" / f"{key}.txt" for key in PART_NAMES}
    lists, names = {key: file for key, file in lists.items() if file.is_file()}, None
    if len(lists) > 1 or not lists.keys().isdisjoint(parts):
        part, file = _pick(lists, parts, root)
        names = [line.split()[0] for line in yolo.read_text(file).splitlines() if line.strip()]
    read = partial(voc.read_voc, annotations, pictures, root, names)
    return Found("Pascal VOC", folder, pictures, part, read)


# ---- JSON lines --------------------------------------------------------------------------------------------


def lists_of_lines(file: Path, images: Path) -> tuple[dict, dict[str, int]]:
    """COCO's lists of lines with boxes, and how many boxes are "unlabelled" or "degenerate" and locations
    "loose", which are left out."""
    pictures, objects, lines = {}, [], 0
    counts = dict(unlabelled=0, degenerate=0, loose=0)
    for _, record in read_lines(file, images):
        name, answer = record["image"], right_answers(record)[0]
        if name not in pictures:
            width, height = upright_size(images / name)
            pictures[name] = dict(id=len(pictures) + 1, file_name=name, width=width, height=height)
        image, found = pictures[name], parse_answer(answer)
        lines += 1
        counts["loose"] += answer.count("<loc") - 4 * len(found)
        for box in found:
            x0, y0, x1, y1 = locs_to_boxes(box.locs, image["width"], image["height"]).tolist()
            if not box.label or x1 <= x0 or y1 <= y0:
                counts["unlabelled" if not box.label else "degenerate"] += 1
                continue
            objects.append((box.label, image["id"], [x0, y0, x1 - x0, y1 - y0]))
    if not objects:
        raise ValueError(
            f"{file}: 0 of {lines} lines have a box with a label (four <loc....> and a name); there are "
            f"{counts['unlabelled']} boxes without a label, {counts['degenerate']} degenerate ones and "
            f"{counts['loose']} locations outside of boxes"
        )
    ids = {label: i for i, label in enumerate(sorted({label for label, *_ in objects}), 1)}
    annotations = [
        dict(id=i, image_id=image, category_id=ids[label], bbox=box, area=box[2] * box[3], iscrowd=0)
        for i, (label, image, box) in enumerate(objects, 1)
    ]
    categories = [dict(id=i, name=label) for label, i in ids.items()]
    return dict(images=list(pictures.values()), annotations=annotations, categories=categories), counts

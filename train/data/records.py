"""COCO instances files: one reader for everything that takes them."""

import json
from pathlib import Path

from model.io.writing import explain, open_regular

OF_ROBOFLOW = "_annotations.coco.json"  # as its exports call the file
MAX_SIDE = 2**31 - 1  # pixels: what image formats can say at most


def read_records(
    file: Path, images: Path | None = None, boxes: bool = True, outlines: bool = False, sizes: bool = True
) -> tuple[dict[int, dict], dict[int, dict], dict[int, dict]]:
    """Categories, images and annotations of a COCO file by id, in the file's order.

    Each category has a name of its own; each image has a file_name inside the image folder, and an int width
    and height; each annotation has an image and a category of the file, `iscrowd` 0 or 1, and an `area` that
    is a number or None. Other fields are passed on unchecked.
    images: their folder, if it is to be checked. boxes: each annotation must have a bbox. outlines: keep the
    segmentations, which are most of a file. sizes: each image must have a width and a height.
    """
    if images is not None and not images.is_dir():
        raise ValueError(f"{images}: no such folder (the images of {file}); give theirs with --images")
    not_json = f"{file} is not a COCO annotation file: not JSON"
    with open_regular(file) as handle, explain(not_json, ValueError, RecursionError, MemoryError):
        if handle.peek(1)[:1] not in b"{[ \t\r\n\xef":  # what is none is not read, however long it is
            raise ValueError("it does not begin with {")
        data = json.loads(handle.read(), object_hook=None if outlines else _without_outlines)
    return check_records(data, file, boxes, sizes)


def check_records(
    data: dict, file: Path, boxes: bool = True, sizes: bool = True
) -> tuple[dict[int, dict], dict[int, dict], dict[int, dict]]:
    """The same of what such a file holds. file: for messages."""
    categories, pictures, annotations = (
        _by_id(data, key, file) for key in ("categories", "images", "annotations")
    )
    if not pictures:
        raise ValueError(f"{file} has no images")
    if file.name == OF_ROBOFLOW:
        _leave_out_umbrellas(categories, annotations)
    _check_categories(categories, file)
    for i, record in pictures.items():
        where = f"{file}: image {i}"
        _check_file_name(record, where)
        given = [side for side in ("width", "height") if sizes or side in record]
        record |= {side: _side(record, side, where) for side in given}
    for i, record in annotations.items():
        where = f"{file}: annotation {i}"
        for key, known in (("image_id", pictures), ("category_id", categories)):
            if type(record.get(key)) is not int or record[key] not in known:
                raise ValueError(
                    f"{where} has the {key} {record.get(key)!r:.60}, which the file does not define"
                )
        if boxes:
            _check_bbox(record, where)
        area, crowd = record.setdefault("area", None), record.get("iscrowd")
        if area is not None and not (_is_number(area) and area >= 0):
            raise ValueError(f"{where} has the area {area!r:.60}: it must be a number of at least 0")
        if crowd not in (None, 0, 1):
            raise ValueError(f"{where} has the iscrowd {crowd!r:.60}: it must be 0 or 1")
        record["iscrowd"] = int(crowd or 0)
    return categories, pictures, annotations


def _without_outlines(record: dict) -> dict:
    """Drop an annotation's outline as soon as it is read, to save memory."""
    record.pop("segmentation", None)
    return record


def _by_id(data: dict, key: str, file: Path) -> dict[int, dict]:
    """The records of one of the file's lists by id, in the list's order."""
    if not isinstance(data, dict) or not isinstance(data.get(key), list):
        raise ValueError(f"{file} is not a COCO annotation file: no {key!r} list")
    records = {}
    for record in data[key]:
        i = record.get("id") if isinstance(record, dict) else None
        if type(i) is not int or abs(i) >= 2**63:
            raise ValueError(f"{file}: an entry of {key!r} has no whole number as id: {record!r:.80}")
        if i in records:
            raise ValueError(f"{file}: two entries of {key!r} have the id {i}")
        records[i] = record
    return records


def _leave_out_umbrellas(categories: dict[int, dict], annotations: dict[int, dict]) -> None:
    """Roboflow puts a category over those of a project, without objects: it is no class."""
    above = {record.get("supercategory") for record in categories.values()}
    used = {record.get("category_id") for record in annotations.values()}
    for i, record in list(categories.items()):
        if i not in used and record.get("supercategory") == "none" and record.get("name") in above:
            del categories[i]


def _check_categories(categories: dict[int, dict], file: Path) -> None:
    ids = {}
    for i, record in categories.items():
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: category {i} has no name")
        if not _is_text(name):
            raise ValueError(f"{file}: category {i} has a name that is no text: {name!r:.60}")
        if (other := ids.setdefault(name, i)) != i:
            raise ValueError(f"{file}: the categories {other} and {i} have the same name, {name!r:.60}")


def _check_file_name(record: dict, where: str) -> None:
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no file_name")
    if not _is_text(name):
        raise ValueError(f"{where}: {name!r:.60} cannot be the name of a file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: file_name {name!r:.200} leaves the image folder")


def _is_text(value: str) -> bool:
    """Whether a string can be written in UTF-8 and has no control characters: no line end, no NUL."""
    return value.encode(errors="replace").decode() == value and not any(x < " " for x in value)


def _is_number(value) -> bool:
    """Whether a value is a number to compute with: Python's JSON has NaN, and whole numbers of any length."""
    return type(value) in (int, float) and abs(value) <= 2**53


def _side(record: dict, side: str, where: str) -> int:
    value = record.get(side)
    if not _is_number(value) or not 0 < value <= MAX_SIDE or value % 1 != 0:
        raise ValueError(f"{where} has the {side} {value!r:.60}: it must be a whole number of pixels")
    return int(value)


def _check_bbox(record: dict, where: str) -> None:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"{where} has the bbox {box!r:.60}: it must be [x, y, width, height]")

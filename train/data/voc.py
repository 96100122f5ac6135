"""Pascal VOC: an XML file for each picture, in Annotations/ with the pictures in JPEGImages/ (or images/), or
beside its picture. ImageSets/Main/train.txt, if it is there, lists the names of a part.

VOC counts pixels from 1 and means by xmax the last one. LabelImg, CVAT and others write the same form with
corners in pixels from 0: they call the database "Unknown" (Label Studio: "MyDatabase"), and theirs is the
first coordinate of 0. A picture without a file has no objects; what is "difficult" does not count in VOC's
measure and is a crowd in COCO's.
"""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from model.io.writing import located, open_regular
from train.data.folders import beside, list_files, objects_of, of_files

SIDES = ("xmin", "ymin", "xmax", "ymax")
FROM_ZERO = "unknown", "mydatabase"
DATABASE = "counted from 1"  # what is written, as this form asks for some name
MAX_BYTES = 1 << 24


def read_voc(annotations: Path, images: Path, root: Path, part: list[str] | None, strict: bool) -> dict:
    """COCO's lists. annotations, images: the folders; root: of ids.json; part: the names that are wanted,
    without a suffix."""
    there = {file.relative_to(images).as_posix(): file for file in list_files(images)}
    stems = {Path(name).with_suffix("").as_posix(): name for name in there}
    found, from_zero = {}, False
    for file in list_files(annotations, {".xml"}):
        stem = file.relative_to(annotations).with_suffix("")
        if part is not None and stem.as_posix() not in part:
            continue
        with located(str(file)):
            element = _parse(file)
            given = (stem.parent / _text(element, "filename", stem.name)).as_posix()
            name = given if given in there else stems.get(stem.as_posix(), given)
            if name in found:
                raise ValueError(f"a second file for {name}")
            objects = [_object(each, number) for number, each in enumerate(element.findall("object"), 1)]
            found[name] = _size(element), objects
            source = _text(element, "source/database").casefold()
            from_zero |= source in FROM_ZERO or any(min(each["box"][:2]) < 1 for each in objects)
    for name in there if part is None else [stems.get(stem, f"{stem}.jpg") for stem in part]:
        found.setdefault(name, (None, []))
    for _, objects in found.values():
        for each in objects:
            each["box"] = [x - (at < 2 and not from_zero) for at, x in enumerate(each["box"])]
    return of_files(found, images, root, strict)


def _parse(file: Path) -> ET.Element:
    with open_regular(file) as handle:
        text = handle.read(MAX_BYTES)
    if b"<!ENTITY" in text:  # a few of them can become gigabytes
        raise ValueError("XML with entities of its own is not read")
    try:
        element = ET.fromstring(text)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not XML ({error})") from None  # with line and column
    if element.tag != "annotation":
        raise ValueError(f"not Pascal VOC: <{element.tag:.40}> instead of <annotation>")
    return element


def _text(element: ET.Element, path: str, default: str = "") -> str:
    return (element.findtext(path) or "").strip() or default


def _size(element: ET.Element) -> tuple[int, int] | None:
    """Width and height; None if they are not given, or 0, as some tools write."""
    with located("<size>"):
        sides = [_number(_text(element, f"size/{side}", "0"), side) for side in ("width", "height")]
    return tuple(map(int, sides)) if min(sides) >= 1 else None


def _object(element: ET.Element, number: int) -> dict:
    with located(f"object {number}"):
        label = _text(element, "name")
        if not label:
            raise ValueError("no <name>")
        if element.find("bndbox") is None:
            raise ValueError(f"{label!r:.60} has no <bndbox>")
        box = [_number(_text(element, f"bndbox/{side}"), side) for side in SIDES]
        return dict(label=label, box=box, iscrowd=int(_text(element, "difficult") == "1"))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 2**31:
        raise ValueError(f"{what} is {text!r:.40}, not a number of pixels")
    return int(value) if value == int(value) else round(value, 2)


def write_voc(data: dict, folder: Path) -> None:
    """Annotations/, as VOC counts."""
    objects = objects_of(data)
    for record, file in beside(data, folder / "Annotations", ".xml"):
        root = ET.Element("annotation")
        _add(root, folder="JPEGImages", filename=Path(record["file_name"]).name)
        _add(ET.SubElement(root, "source"), database=DATABASE)
        _add(ET.SubElement(root, "size"), width=record["width"], height=record["height"], depth=3)
        _add(root, segmented=0)
        for found in objects[record["id"]]:
            element = ET.SubElement(root, "object")
            _add(element, name=found["label"], pose="Unspecified", truncated=0)
            _add(element, difficult=int(found.get("iscrowd") or 0))
            sides = (round(x + (at < 2), 2) for at, x in enumerate(found["box"]))
            _add(
                ET.SubElement(element, "bndbox"),
                **{name: f"{x:.2f}".removesuffix(".00") for name, x in zip(SIDES, sides)},
            )
        ET.indent(root, "\t")
        ET.ElementTree(root).write(file, encoding="utf-8")


def _add(element: ET.Element, **texts) -> None:
    for name, text in texts.items():
        ET.SubElement(element, name).text = str(text)

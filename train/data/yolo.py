"""YOLO: a text file for each picture, with a line for each object, "class x y width height" (the middle and
the sides, as shares of the picture) or "class x y x y x y ..." (a polygon).

    data.yaml                path, train, val, test: folders of pictures, or lists of them; names of classes
    images/[train/]a.jpg     labels/[train/]a.txt

Without a data.yaml, the names are the lines of classes.txt or obj.names, and a label file may lie beside its
picture. A picture without a label file has no objects. Sizes are those of the upright pictures.
"""

import math
import os
from pathlib import Path

import yaml

from model.io.names import shown
from model.io.writing import explain, located, open_regular
from train.data.folders import Entry, as_coco, beside, list_files, objects_of, sizes_of

NAME_FILES = ("classes.txt", "obj.names", "data.names")
PARTS = dict(train=("train",), val=("val", "valid"), test=("test",))  # keys of a data.yaml
SLACK = 0.01  # by which shares of a picture may lie outside, as tools round them
MAX_BYTES = 1 << 26  # of a list or a label file


def read_text(file: Path) -> str:
    with open_regular(file) as handle, explain(f"{file}: not text in UTF-8", ValueError):
        return handle.read(MAX_BYTES).decode("utf-8-sig")


# ---- what there is -----------------------------------------------------------------------------------------


def read_yaml(file: Path) -> dict:
    with explain(f"{file}: not YAML", yaml.YAMLError, RecursionError):
        data = yaml.load(read_text(file), yaml.BaseLoader)  # text as it stands: "no" may be a class's name
    if not isinstance(data, dict) or "names" not in data:
        raise ValueError(f"{file}: not a data.yaml of YOLO's: no names")
    if "kpt_shape" in data:  # in two dimensions, a line looks like that of a polygon
        raise ValueError(f"{file}: labels of poses (kpt_shape); what is read are those of boxes and polygons")
    return data


def names_of(data: dict, file: Path) -> dict[int, str]:
    """Names of the classes by number, from a list or a mapping."""
    names = data["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else ())
    with explain(
        f"{file}: names must be a list, or numbers with names", ValueError, TypeError, OverflowError
    ):
        found = {int(number): str(name).strip() for number, name in pairs}
    return _distinct(found, file)


def names_beside(folder: Path) -> tuple[dict[int, str], Path]:
    """The same of the nearest file of names, in a folder or in up to three above it; and that file."""
    for place in (folder, *folder.absolute().parents[:3]):
        for name in NAME_FILES:
            if (place / name).is_file():
                lines = read_text(place / name).rstrip().splitlines()
                return _distinct(dict(enumerate(line.strip() for line in lines)), place / name), place / name
        if (place / "data.yaml").is_file():
            return names_of(read_yaml(place / "data.yaml"), place / "data.yaml"), place / "data.yaml"
    files = ", ".join(NAME_FILES)
    raise ValueError(f"{folder}: YOLO labels without names of their classes: neither {files} nor data.yaml")


def _distinct(names: dict[int, str], file: Path) -> dict[int, str]:
    numbers = {}
    for number, name in names.items():
        if not name:
            raise ValueError(f"{file}: class {number} has no name")
        if (other := numbers.setdefault(name, number)) != number:
            raise ValueError(f"{file}: the classes {other} and {number} have the same name, {name!r:.60}")
    if not names:
        raise ValueError(f"{file}: no names of classes")
    return names


def parts_of(data: dict, file: Path) -> dict[str, list[str]]:
    """The folders and lists of pictures that a data.yaml names, by part. Not all need be there: Roboflow's
    names test/ where a set has none."""
    there = {part: next((data[key] for key in keys if data.get(key)), None) for part, keys in PARTS.items()}
    parts = {part: named if isinstance(named, list) else [named] for part, named in there.items() if named}
    if not parts:
        raise ValueError(f"{file}: none of train, val and test says where the pictures are")
    return parts


def places_of(data: dict, file: Path, part: str) -> list[Path]:
    """Where those of a part are."""
    base = file.parent / str(data.get("path") or "")
    base = base if base.is_dir() else file.parent  # ultralytics also knows a place of its own
    return [_place(base, str(entry), f"{file}: {part}") for entry in parts_of(data, file)[part]]


def _place(base: Path, entry: str, where: str) -> Path:
    # Roboflow writes ../train/images beside the folder train.
    for place in (base / entry, base / entry.removeprefix("../")):
        if place.exists():
            return Path(os.path.normpath(place))
    raise ValueError(f"{where} is {entry!r:.200}: no such folder or file in {base}")


def pictures_in(places: list[Path]) -> tuple[list[Path], Path]:
    """The pictures of folders and lists, and the folder that holds them all."""
    pictures = []
    for place in places:
        if place.is_dir():
            pictures += list_files(place)
            continue
        for number, line in enumerate(read_text(place).splitlines(), 1):
            if line.strip():
                file = place.parent / line.strip()  # an absolute one stays as it is
                if not file.is_file():  # CVAT writes data/ before all
                    file = place.parent / line.strip().removeprefix("data/")
                if not file.is_file():
                    raise ValueError(f"{place}:{number}: {shown(file)}: no such picture")
                pictures.append(Path(os.path.normpath(file)))
    if not pictures:
        raise ValueError(f"{places[0]}: no pictures")
    if len(places) == 1 and places[0].is_dir():
        return pictures, places[0]
    return pictures, Path(os.path.commonpath([file.parent.absolute() for file in pictures]))


def label_file(picture: Path) -> Path:
    """Where ultralytics looks, in labels/ for the last images/; without one, beside the picture."""
    parts = picture.parts
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] == "images":
            folder = Path(*parts[:at], "labels")
            return (folder.joinpath(*parts[at + 1 :]) if folder.is_dir() else picture).with_suffix(".txt")
    return picture.with_suffix(".txt")


# ---- reading and writing -----------------------------------------------------------------------------------


def read_yolo(names: dict[int, str], pictures: list[Path], folder: Path, root: Path, strict: bool) -> dict:
    """COCO's lists. folder: that the names of the pictures are relative to; root: of ids.json."""
    labels = [label_file(picture) for picture in pictures]
    if not any(file.is_file() for file in labels):
        raise ValueError(f"{folder}: no picture has a label file; the first would be {labels[0]}")
    entries = []
    for picture, file, size in zip(pictures, labels, sizes_of(pictures, strict), strict=True):
        lines = read_text(file).splitlines() if file.is_file() else []
        objects = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                with located(f"{file}:{number}"):
                    objects.append(_read_line(line.split(), names, *size))
        name = Path(os.path.relpath(picture, folder)).as_posix()
        entries.append(Entry(name, size, objects))
    return as_coco(entries, {name: number for number, name in names.items()}, root)


def _read_line(words: list[str], names: dict[int, str], width: int, height: int) -> dict:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"not numbers: {' '.join(words):.60}") from None
    if not (len(numbers) in (5, 6) or (len(numbers) >= 7 and len(numbers) % 2)):
        raise ValueError(
            f"{len(numbers)} numbers, not a class and a box, or a class and three points or more"
        )
    label, points = numbers[0], numbers[1:]
    if label not in names:
        raise ValueError(f"class {words[0]:.20}, but the names are those of {min(names)} to {max(names)}")
    points = points[:4] if len(numbers) == 6 else points  # predictions end in their score
    if not all(math.isfinite(x) and -SLACK <= x <= 1 + SLACK for x in points):
        raise ValueError(f"{' '.join(words[1:]):.60}: places must be shares of the picture, 0 to 1")
    found = dict(label=names[int(label)])
    if len(points) == 4:
        x, y, w, h = points
        corners = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    else:
        xs, ys = [x * width for x in points[::2]], [y * height for y in points[1::2]]
        corners = min(xs), min(ys), max(xs), max(ys)
        found["segmentation"] = [[round(at, 2) for point in zip(xs, ys) for at in point]]
    # Six digits of a share are a few thousandths of a pixel: whole pixels become whole again.
    return found | dict(box=[round(at, 2) for at in corners])


def write_yolo(data: dict, folder: Path) -> None:
    """data.yaml and labels/, without crowds, which the form has no word for."""
    objects = objects_of(data, crowds=False)
    order = sorted(data["categories"], key=lambda record: record["id"])
    numbers = {record["id"]: number for number, record in enumerate(order)}
    names = {number: record["name"] for number, record in enumerate(order)}
    for record, beside_picture in beside(data, folder / "images", ".txt"):
        above, _, below = beside_picture.as_posix().rpartition("/images/")  # the last one, as in label_file
        file = Path(above, "labels", below)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines, (width, height) = [], (record["width"], record["height"])
        for found in objects[record["id"]]:
            x0, y0, x1, y1 = found["box"]
            shares = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
            lines.append(" ".join([str(numbers[found["category_id"]]), *(f"{x:.8g}" for x in shares)]) + "\n")
        file.write_text("".join(lines), encoding="utf-8")
    head = "# ultralytics asks for both; --val should be other pictures.\ntrain: images\nval: images\n"
    text = yaml.safe_dump(dict(names=names), allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(head + text, encoding="utf-8")

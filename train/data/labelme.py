"""LabelMe: a JSON file beside each picture, with shapes in pixels. Rectangles, polygons (which keep their
outline), circles and masks have a box; points and lines have none and are refused."""

import json
import math
from pathlib import Path

from model.io.writing import explain, located, open_regular, write_json
from train.data.folders import beside, list_files, objects_of, of_files

POINTS = {"rectangle": 2, "polygon": 3, "circle": 2, "mask": 2}  # at least, of the shapes with an area


def read_labelme(folder: Path, images: Path, root: Path, strict: bool) -> dict:
    """COCO's lists. folder: of the JSON files; images: of the pictures; root: of ids.json."""
    there = {file.relative_to(images).as_posix() for file in list_files(images)}
    stems = {Path(name).with_suffix("").as_posix(): name for name in there}
    found = {}
    for file in list_files(folder, {".json"}):
        data = _parse(file)
        if data is None:
            continue
        with located(str(file)):
            place = file.relative_to(folder).parent
            # The path is the labeller's own, of any system: only the name counts.
            name = (place / str(data.get("imagePath", "")).replace("\\", "/").rpartition("/")[2]).as_posix()
            name = name if name in there else stems.get((place / file.stem).as_posix(), name)
            size = data.get("imageWidth"), data.get("imageHeight")
            size = size if all(type(side) is int and side > 0 for side in size) else None
            if name in found:
                raise ValueError(f"a second file for {name}")
            if not isinstance(data["shapes"], list):
                raise ValueError("shapes must be a list")
            found[name] = size, [_object(shape, at) for at, shape in enumerate(data["shapes"], 1)]
    return of_files(dict.fromkeys(there, (None, [])) | found, images, root, strict)


def _parse(file: Path) -> dict | None:
    """None for JSON that is none of LabelMe's."""
    with open_regular(file) as handle, explain(f"{file}: not JSON", ValueError, RecursionError):
        data = json.loads(handle.read())
    return data if isinstance(data, dict) and "shapes" in data else None


def _object(shape: dict, number: int) -> dict:
    where = f"shape {number} must have a label, a shape_type and points"
    with explain(where, KeyError, TypeError, ValueError, AttributeError):
        label, kind = str(shape["label"]).strip(), shape.get("shape_type") or "polygon"
        points = [(float(x), float(y)) for x, y in shape["points"]]
        if not label or not all(map(math.isfinite, sum(points, ()))):
            raise ValueError("an empty label, or points that are no numbers")
    if len(points) < POINTS.get(kind, math.inf):
        raise ValueError(
            f"shape {number}, {label!r:.60}, is a {kind:.40} of {len(points)} points: it has no box"
        )
    if kind == "circle":
        (x, y), edge = points[0], points[1]
        r = math.dist((x, y), edge)
        points = [(x - r, y - r), (x + r, y + r)]
    points = [(round(x, 2), round(y, 2)) for x, y in points]
    xs, ys = zip(*points)
    outline = {"segmentation": [list(sum(points, ()))]} if kind == "polygon" else {}
    return dict(label=label, box=[min(xs), min(ys), max(xs), max(ys)]) | outline


def write_labelme(data: dict, folder: Path) -> None:
    """JSON files for the pictures of a folder, without crowds, which the form has no word for."""
    objects = objects_of(data, crowds=False)
    for record, file in beside(data, folder, ".json"):
        shapes = []
        for found in objects[record["id"]]:
            x0, y0, x1, y1 = found["box"]
            shape = dict(label=found["label"], points=[[x0, y0], [x1, y1]], shape_type="rectangle")
            shapes.append(shape | dict(group_id=None, flags={}))
        sides = dict(imageHeight=record["height"], imageWidth=record["width"])
        name = dict(imagePath=Path(record["file_name"]).name, imageData=None)
        write_json(dict(version="5.0.1", flags={}, shapes=shapes) | name | sides, file)

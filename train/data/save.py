"""COCO's lists -> a folder with the pictures and their objects, in any of the forms that --data takes."""

from collections.abc import Callable
from pathlib import Path

from model.io.writing import write_json
from train.data.folders import link_pictures, new_folder, objects_of, write_ids
from train.data.labelme import write_labelme
from train.data.voc import write_voc
from train.data.yolo import write_yolo


def write_coco_file(data: dict, folder: Path) -> None:
    """instances.json, with all that there is."""
    write_json(data, folder / "instances.json")


# What writes it, and the folder of its pictures.
FORMS: dict[str, tuple[Callable[[dict, Path], None], str]] = dict(
    coco=(write_coco_file, "images"),
    yolo=(write_yolo, "images"),
    voc=(write_voc, "JPEGImages"),
    labelme=(write_labelme, "."),
)


def save_set(form: str, data: dict, files: dict[str, Path], out: Path, replace: bool) -> tuple[str, str]:
    """Write a folder of a form; returns what it holds, and what was left out, if anything.

    files: the picture for each file name of the data, which is linked or copied. replace: a folder that this
    function wrote before.
    """
    write, pictures = FORMS[form]
    with new_folder(out, replace) as folder:
        link_pictures(((file, name) for name, file in files.items()), folder / pictures)
        write(data, folder)
        write_ids(data, folder)
    boxes, without = (sum(map(len, objects_of(data, crowds).values())) for crowds in (True, False))
    crowds = boxes - without if form in ("yolo", "labelme") else 0
    flat = len(data["annotations"]) - boxes if form != "coco" else 0
    counts = f"{len(data['images'])} pictures, {len(data['categories'])} classes"
    counts += f", {boxes - crowds if form != 'coco' else len(data['annotations'])} boxes"
    left = [f"{crowds} crowds, for which {form} has no word"] * bool(crowds)
    left += [f"{flat} boxes without an area inside their picture"] * bool(flat)
    return counts, " and ".join(left)

"""Data sets from one form into another; masks -> JSON lines; boxes -> Label Studio.

    python train/convert.py to-coco --data FOLDER --out instances.json
    python train/convert.py to-yolo --data instances.json --images photos/ --out yolo    # to-voc, to-labelme
    python train/convert.py to-jsonl --data instances.json --out train.jsonl --absent 2
    python train/convert.py masks-to-jsonl --data instances.json --images photos/ --out train.jsonl
    python train/convert.py label-studio --data found.json --out tasks.json

--data is a set of any form that fit.py takes (train/data/forms.py). A folder that is written holds the
pictures, as links or copies, and ids.json, from which the way back has the ids of categories and images.

Lines are for open-set detection: a line asks for classes, {"image": "a.jpg", "prefix": "detect cat ; dog",
"suffix": "<loc...> cat"}, and its answer is empty if the image shows none of them. Boxes come back from them
with an error of at most half a location, 1/2048 of the image's side (three halves at its right and lower
edge, which the last location stands for).

Masks come from outlines or from pictures (train/data/masks.py); their lines ask for one class, {"image":
"a.jpg", "prefix": "segment cat", "suffix": "<loc...><seg...> cat"}. --sheet shows what 16 codes keep of them.

For Label Studio, boxes are in percent of the picture: predictions of what detect.py writes with --json, or
annotations of a set. Its pictures are given by URL, to which --url is the beginning.
"""

import argparse
import json
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.decoding.boxes import box_prompt, check_label, format_answer
from model.decoding.masks import MaskCodec
from model.io.hub import CODEC, NANO
from model.io.names import shown
from model.io.writing import atomic_write, open_regular, write_json, write_lines
from train.data.coco import CocoIndex
from train.data.forms import PART_NAMES, Found, find_data, lists_of, lists_of_lines, records_of
from train.data.label_studio import annotated_objects, predicted_objects, studio_box
from train.data.masks import Sheet, read_outlines, segment_lines
from train.data.save import save_set
from train.run.program import complain, not_negative, parser, positive, run


def lines_of(
    rng: np.random.Generator, index: CocoIndex, item: int, absent: int, most: int | None
) -> Iterator[dict]:
    """The lines of an image. They ask for its classes and `absent` others in random order, for at most `most`
    in a line (None: for all in one)."""
    boxes, labels = index.objects(item)
    names = [index.classes[label] for label in labels]
    others = [name for name in dict.fromkeys(index.classes) if name not in names]
    asked = [*dict.fromkeys(names), *(others[i] for i in rng.permutation(len(others))[:absent])]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    most = most or len(asked) or 1
    for first in range(0, len(asked), most):
        chunk = asked[first : first + most]
        rows = [row for row, name in enumerate(names) if name in chunk]
        suffix = format_answer(boxes[rows], [names[row] for row in rows], *index.sizes[item].tolist())
        yield dict(image=index.name(item), prefix=box_prompt(chunk), suffix=suffix)


def find(args: argparse.Namespace) -> Found:
    """The set that --data names; a note says which, if it had to be looked for or is of a form of folders."""
    found = find_data(args.data, args.images, [args.part or "train"])
    if found.path != args.data or found.read:
        note(str(found))
    return found


def note(text: str) -> None:
    complain(text, __file__)


def index_of(args: argparse.Namespace) -> CocoIndex:
    found = find(args)
    if found.read is None:  # without a look at its images
        return CocoIndex.read(found.path, max_classes=None)
    return CocoIndex.of(records_of(found), found.path, max_classes=None)


def coco_to_jsonl(args: argparse.Namespace) -> str:
    index = index_of(args)
    for name in index.classes:
        check_label(name)
    counts = Counter()

    def lines():
        for item in range(len(index)):
            rng = np.random.default_rng([args.seed, item])
            records = list(lines_of(rng, index, item, args.absent, args.classes_per_line))
            not_shown = len(index.classes) - len(set(index.objects(item)[1].tolist()))
            counts.update(lines=len(records), without=int(not records))
            counts.update(short=int(not_shown < args.absent), added=min(not_shown, args.absent))
            yield from (json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    write_lines(lines(), args.out)
    if counts["short"]:
        note(
            f"--absent {args.absent} adds {counts['added']} classes and not {args.absent * len(index)}: "
            f"{counts['short']} of {len(index)} images lack fewer of the set's {len(index.classes)} classes; "
            "a class that is to be asked for without being there must be among its categories"
        )
    if counts["without"]:
        note(
            f"{counts['without']} of {len(index)} images have no line, as they show no class: "
            "--absent N asks for N that are not there"
        )
    return (
        f"{counts['lines']} lines of {len(index)} images; {counts['without']} images without a line, "
        f"skipped {index.skipped_crowd} crowd and {index.skipped_degenerate} degenerate boxes"
    )


def to_coco(args: argparse.Namespace) -> str:
    found = find(args)
    told = ""
    if found.form == "JSONL":
        data, skipped = lists_of_lines(found.path, found.images)
        words = dict(unlabelled="boxes without a label", degenerate="degenerate ones")
        told = ", ".join(f"{skipped[key]} {what}" for key, what in words.items())
        told = f"; skipped {told} and {skipped['loose']} locations outside of boxes"
    else:
        data = lists_of(found)
    write_json(data, args.out)
    images, boxes, categories = (len(data[key]) for key in ("images", "annotations", "categories"))
    return f"{boxes} boxes of {categories} categories in {images} images{told}"


def to_folder(args: argparse.Namespace) -> str:
    found = find(args)
    data = lists_of(found)
    files = {record["file_name"]: found.images / record["file_name"] for record in data["images"]}
    told, left_out = save_set(args.form, data, files, args.out, args.force)
    if left_out:
        note(f"{left_out} left out")
    return told


def masks_to_jsonl(args: argparse.Namespace) -> str:
    if args.sheet and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        raise ValueError(f"--sheet {args.sheet}: must be a .png file in a folder that exists")
    if args.sheet and args.sheet.exists() and not args.force:
        raise ValueError(f"--sheet {args.sheet} exists: choose another, or overwrite it with --force")
    codec, sheet, counts = MaskCodec.load(args.codec), Sheet(), Counter()
    found = find(args)
    records = records_of(found) if found.read else None
    outlines, images = read_outlines(found.path, found.images, records), found.images

    def lines():
        parts = segment_lines(outlines, images, codec, args.most, args.skip_bad, counts)
        for record, image, objects in tqdm(parts, unit="line", leave=False, disable=None):
            for each in objects:
                sheet.add(image, *each)
            counts["lines"] += 1
            yield json.dumps(record, ensure_ascii=False) + "\n"

    write_lines(lines(), args.out)
    if args.sheet and sheet.pairs:
        with atomic_write(args.sheet) as temporary:
            sheet.draw().save(temporary, "PNG")
    left, of = counts["crowded"], counts["crowded"] + counts["bad"] + counts["objects"]
    if left:
        why = f"their classes have more than {args.most} in an image"
        note(f"{left} of {of} objects left out, as {why}: --most {counts['most']} keeps all")
    mean = sum(sheet.ious) / max(1, len(sheet.ious))
    return (
        f"{counts['objects']} objects in {counts['lines']} lines; mean IoU of masks and reconstructions "
        f"{mean:.3f}; left out: {counts['crowded']} of classes with more than {args.most} in an image, "
        f"{counts['bad']} bad ones"
    )


def label_studio(args: argparse.Namespace) -> str:
    predicted = False
    if not args.data.is_dir():
        with open_regular(args.data) as file:
            predicted = file.read(100).lstrip().startswith(b"[")
    kind = "predictions" if predicted else "annotations"
    tasks, boxes = [], 0
    images = predicted_objects(args.data) if predicted else annotated_objects(index_of(args))
    for name, size, objects in images:
        result = [studio_box(number, size, *each) for number, each in enumerate(objects)]
        image = args.url + urllib.parse.quote(name, errors="surrogatepass")
        tasks.append({"data": {"image": image}, kind: [{"result": result}]})
        boxes += len(result)
    write_json(tasks, args.out)
    return f"{len(tasks)} tasks with {boxes} boxes as {kind}"


def arguments(argv=None) -> argparse.Namespace:
    options = parser(__doc__)
    commands = options.add_subparsers(required=True)

    def command(name: str, convert, help: str, *aliases: str, out: str = "the file to write", **defaults):
        added = commands.add_parser(name, help=help, aliases=aliases)
        added.set_defaults(convert=convert, **defaults)
        add = added.add_argument
        add("--data", type=Path, required=True, help="the set to read, of any form: a file or a folder")
        add("--images", type=Path, help="the folder of the images (default: as fit.py)")
        add("--part", choices=PART_NAMES, help="of a set in parts (default: train)")
        add("--out", type=Path, required=True, help=out)
        add("--force", action="store_true", help="overwrite --out (and --sheet)")
        return add

    command("to-coco", to_coco, "a COCO instances file", "jsonl-to-coco")
    for form, title in (("yolo", "YOLO"), ("voc", "Pascal VOC"), ("labelme", "LabelMe")):
        out = "the folder to write; the pictures are linked there, or copied"
        command(f"to-{form}", to_folder, f"a folder of {title}", out=out, form=form)
    add = command("to-jsonl", coco_to_jsonl, "open-set lines", "coco-to-jsonl")
    add("--absent", type=not_negative, default=0, help="absent classes to ask for in each image")
    add("--classes-per-line", type=positive, metavar="K", help="at most; default: all in one line")
    add("--seed", type=not_negative, default=0, help="of the absent classes and the order")
    add = command("masks-to-jsonl", masks_to_jsonl, "segmentation lines from outlines or mask pictures")
    add("--codec", type=Path, default=NANO / CODEC, help="vae-oid.npz, or nano's own")
    most = "objects of a class and image; classes with more are left out"
    add("--most", type=positive, default=8, help=most)
    add("--skip-bad", action="store_true", help="leave bad masks out instead of stopping")
    add("--sheet", type=Path, metavar="PNG", help="a picture of masks before and after")
    add = command("label-studio", label_studio, "a file for Label Studio, from a set or detect.py's JSON")
    add("--url", default="", help="put before each file name, such as /data/local-files/?d=photos/")
    return options.parse_args(argv)


def main(argv=None) -> None:
    args = arguments(argv)
    if not args.out.parent.is_dir():
        raise ValueError(f"{args.out.parent}: no such folder (for --out)")
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out} exists: choose another --out, or overwrite it with --force")
    print(f"{shown(args.out)}: {args.convert(args)}")


if __name__ == "__main__":
    run(main, __file__)

"""COCO instances <-> JSON lines for open-set detection; masks -> JSON lines; boxes -> Label Studio.

    python train/convert.py coco-to-jsonl --data instances.json --out train.jsonl --absent 2
    python train/convert.py jsonl-to-coco --data train.jsonl --images photos/ --out instances.json
    python train/convert.py masks-to-jsonl --data instances.json --images photos/ --out train.jsonl
    python train/convert.py label-studio --data found.json --out tasks.json

A line asks for classes, {"image": "a.jpg", "prefix": "detect cat ; dog", "suffix": "<loc...> cat"}, and its
answer is empty if the image shows none of them. The way back reads the sizes of the images. Boxes come back
with an error of at most half a location, 1/2048 of the image's side (three halves at its right and lower
edge, which the last location stands for).

Masks come from a COCO file or from pictures (train/data/masks.py); their lines ask for one class, {"image":
"a.jpg", "prefix": "segment cat", "suffix": "<loc...><seg...> cat"}. --sheet shows what 16 codes keep of them.

For Label Studio, boxes are in percent of the picture: predictions of what detect.py writes with --json, or
annotations of a COCO file. Its pictures are given by URL, to which --url is the beginning.
"""

import argparse
import json
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.decoding.boxes import box_prompt, check_label, format_answer, locs_to_boxes, parse_answer
from model.decoding.masks import MaskCodec
from model.io.hub import CODEC, NANO
from model.io.image import load_image
from model.io.names import shown
from model.io.writing import atomic_write, explain, write_json, write_lines
from train.data.coco import CocoIndex
from train.data.jsonl import read_lines, right_answers
from train.data.masks import Sheet, read_outlines, segment_lines
from train.run.program import not_negative, parser, positive, run


def lines_of(
    rng: np.random.Generator, index: CocoIndex, item: int, absent: int, most: int | None
) -> Iterator[dict]:
    """The lines of an image: its classes and `absent` others in random order, at most `most` in a line."""
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


def coco_to_jsonl(args: argparse.Namespace) -> str:
    index = CocoIndex.read(args.data, max_classes=None)
    for name in index.classes:
        check_label(name)
    counts = Counter()

    def lines():
        for item in range(len(index)):
            rng = np.random.default_rng([args.seed, item])
            records = list(lines_of(rng, index, item, args.absent, args.classes_per_line))
            counts.update(lines=len(records), without=not records)
            yield from (json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    write_lines(lines(), args.out)
    return (
        f"{counts['lines']} lines of {len(index)} images; {counts['without']} images without a line, "
        f"skipped {index.skipped_crowd} crowd and {index.skipped_degenerate} degenerate boxes"
    )


def jsonl_to_coco(args: argparse.Namespace) -> str:
    images, objects, counts = {}, [], Counter()
    for _, record in tqdm(read_lines(args.data, args.images), unit="line", leave=False, disable=None):
        name, answer = record["image"], right_answers(record)[0]
        if name not in images:
            width, height = load_image(args.images / name).size
            images[name] = dict(id=len(images) + 1, file_name=name, width=width, height=height)
        image, found = images[name], parse_answer(answer)
        counts["loose"] += answer.count("<loc") - 4 * len(found)
        for box in found:
            x0, y0, x1, y1 = locs_to_boxes(box.locs, image["width"], image["height"]).tolist()
            if not box.label or x1 <= x0 or y1 <= y0:
                counts["unlabelled" if not box.label else "degenerate"] += 1
                continue
            objects.append((box.label, image["id"], [x0, y0, x1 - x0, y1 - y0]))
    ids = {label: i for i, label in enumerate(sorted({label for label, *_ in objects}), 1)}
    annotations = [
        dict(id=i, image_id=image, category_id=ids[label], bbox=box, area=box[2] * box[3], iscrowd=0)
        for i, (label, image, box) in enumerate(objects, 1)
    ]
    categories = [dict(id=i, name=label) for label, i in ids.items()]
    data = dict(images=list(images.values()), annotations=annotations, categories=categories)
    write_json(data, args.out)
    return (
        f"{len(objects)} boxes of {len(ids)} categories in {len(images)} images; skipped "
        f"{counts['unlabelled']} boxes without a label, {counts['degenerate']} degenerate ones "
        f"and {counts['loose']} locations outside of boxes"
    )


def masks_to_jsonl(args: argparse.Namespace) -> str:
    if args.sheet and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        raise ValueError(f"--sheet {args.sheet}: must be a .png file in a folder that exists")
    codec, sheet, counts = MaskCodec.load(args.codec), Sheet(), Counter()
    outlines = read_outlines(args.data)

    def lines():
        parts = segment_lines(outlines, args.images, codec, args.most, args.skip_bad, counts)
        for record, image, objects in tqdm(parts, unit="line", leave=False, disable=None):
            for each in objects:
                sheet.add(image, *each)
            counts["lines"] += 1
            yield json.dumps(record, ensure_ascii=False) + "\n"

    write_lines(lines(), args.out)
    if args.sheet and sheet.pairs:
        with atomic_write(args.sheet) as temporary:
            sheet.draw().save(temporary, "PNG")
    mean = sum(sheet.ious) / max(1, len(sheet.ious))
    return (
        f"{counts['objects']} objects in {counts['lines']} lines; mean IoU of masks and reconstructions "
        f"{mean:.3f}; left out: {counts['crowded']} of classes with more than {args.most} in an image, "
        f"{counts['bad']} bad ones"
    )


# ---- Label Studio ------------------------------------------------------------------------------------------


def label_studio(args: argparse.Namespace) -> str:
    with open(args.data, "rb") as file:
        predicted = file.read(100).lstrip().startswith(b"[")
    kind = "predictions" if predicted else "annotations"
    tasks, boxes = [], 0
    for name, size, objects in (predicted_objects if predicted else annotated_objects)(args.data):
        result = [studio_box(number, size, *each) for number, each in enumerate(objects)]
        image = args.url + urllib.parse.quote(name, errors="surrogatepass")
        tasks.append({"data": {"image": image}, kind: [{"result": result}]})
        boxes += len(result)
    write_json(tasks, args.out)
    return f"{len(tasks)} tasks with {boxes} boxes as {kind}"


def annotated_objects(file: Path) -> Iterator[tuple[str, tuple, list[tuple]]]:
    """Name and size of each image of a COCO file, and its objects: box, label and score (None)."""
    index = CocoIndex.read(file, max_classes=None)
    for item in range(len(index)):
        boxes, labels = index.objects(item)
        names = [index.classes[label] for label in labels]
        rows = [(box, name, None) for box, name in zip(boxes.tolist(), names)]
        yield index.name(item), tuple(index.sizes[item].tolist()), rows


def predicted_objects(file: Path) -> Iterator[tuple[str, tuple, list[tuple]]]:
    """The same of what detect.py writes."""
    with explain(f"{file} is not what detect.py writes with --json", ValueError, RecursionError, *WRONG_FORM):
        for image in json.loads(file.read_bytes()):
            width, height = (int(image[side]) for side in ("width", "height"))
            if min(width, height) < 1:
                raise ValueError(f"a picture of {width} x {height} pixels")
            found = image["detections"]
            rows = [([float(x) for x in d["box"]], str(d["label"]), float(d["score"])) for d in found]
            yield str(image["image"]), (width, height), rows


WRONG_FORM = KeyError, TypeError, AttributeError  # what values of another form end in


def studio_box(number: int, size: tuple[int, int], box: list[float], label: str, score: float | None) -> dict:
    """A box in pixels of a picture of that width and height -> a region of Label Studio, in percent."""
    (width, height), (x0, y0, x1, y1) = size, box
    sides = dict(x=x0 / width, y=y0 / height, width=(x1 - x0) / width, height=(y1 - y0) / height)
    value = {side: 100 * share for side, share in sides.items()} | dict(rotation=0, rectanglelabels=[label])
    region = dict(id=str(number), type="rectanglelabels", from_name="label", to_name="image", value=value)
    region |= dict(original_width=width, original_height=height, image_rotation=0)
    return region if score is None else region | dict(score=score)


def arguments(argv=None) -> argparse.Namespace:
    options = parser(__doc__)
    commands = options.add_subparsers(required=True)

    def command(name: str, convert, help: str):
        added = commands.add_parser(name, help=help)
        added.set_defaults(convert=convert)
        added.add_argument("--data", type=Path, required=True, help="the file to read")
        added.add_argument("--out", type=Path, required=True, help="the file to write")
        added.add_argument("--force", action="store_true", help="overwrite --out")
        return added.add_argument

    add = command("coco-to-jsonl", coco_to_jsonl, "open-set lines from a COCO instances file")
    add("--absent", type=not_negative, default=0, help="absent classes to ask for in each image")
    add("--classes-per-line", type=positive, metavar="K", help="at most; default: all in one line")
    add("--seed", type=not_negative, default=0, help="of the absent classes and the order")
    add = command("jsonl-to-coco", jsonl_to_coco, "a COCO instances file from open-set lines")
    add("--images", type=Path, required=True, help="the folder of the images")
    add = command("masks-to-jsonl", masks_to_jsonl, "segmentation lines from outlines or mask pictures")
    add("--images", type=Path, required=True, help="the folder of the images")
    add("--codec", type=Path, default=NANO / CODEC, help="vae-oid.npz, or nano's own")
    add("--most", type=positive, default=8, help="objects of a class and image, at most")
    add("--skip-bad", action="store_true", help="leave bad masks out instead of stopping")
    add("--sheet", type=Path, metavar="PNG", help="a picture of masks before and after")
    add = command(
        "label-studio", label_studio, "a file for Label Studio to import, from COCO or detect.py's JSON"
    )
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

"""Find objects in pictures.

    python infer/detect.py --image photo.jpg    # the shipped nano model
    python infer/detect.py --image a.jpg folder/ --json out.json --out drawn/ --model FOLDER_OR_HUB_ID
    python infer/detect.py --image photo.jpg --classes "cat ; traffic light"    # open-set: what you name
    python infer/detect.py --image folder/ --save yolo --json - --quiet    # a data set, and boxes for a pipe

Prints a table, writes each picture with its boxes to --out, and with --json all boxes in pixels of the
original picture; with --save, OUT/yolo (and so on) is a data set of the pictures and these boxes. If --out
has files, the next free of drawn2, drawn3, ... is made instead; --overwrite writes into it. The exit code is
0 only if every picture was processed. What is done when the program is stopped stays, and is in --json.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from textwrap import indent

from PIL import Image
from tqdm import tqdm

from infer.lib.draw import draw_boxes
from infer.lib.options import (
    add_detection_arguments,
    check_folder,
    check_output,
    load_detector,
    make_folder,
    tables,
    write_output,
)
from infer.lib.record import as_lists, make_record
from infer.lib.watch import Watch
from model.decoding.detections import Detections
from model.decoding.photographs import photograph_warning
from model.io.image import SUFFIXES, read_ahead
from model.io.names import as_text, shown
from model.io.writing import atomic_write
from train.data.folders import check_new
from train.data.save import FORMS, save_set
from train.run.program import complain, parser, run


def add_file_arguments(options: argparse.ArgumentParser) -> None:
    """The options of what is read and written."""
    add = options.add_argument
    several = dict(nargs="+", action="extend")
    add("--image", **several, required=True, metavar="FILE_OR_DIR", help="pictures or folders")
    add("--json", type=Path, metavar="FILE",
        help="write all boxes there, in place of what it holds; -: print them")  # fmt: skip
    add("--save", **several, choices=FORMS, default=[], help="write data sets too, OUT/yolo and so on")
    add("--quiet", action="store_true", help="print no table and no progress, complaints only")
    add("--tokens", action="store_true", help="put the raw generated ids into the JSON file")
    add("--out", type=Path, default=Path("detections"), metavar="DIR", help="folder of the drawn pictures")
    add("--overwrite", action="store_true", help="write into --out though it has files, and replace those")
    add("--score-threshold", type=float, default=0.6, help="drop boxes with a lower score")


def find_images(names: list[str]) -> tuple[list[Path], list[str]]:
    """The files, those of a folder sorted by name; and a complaint for each name that brings none."""
    files, complaints = [], []
    for name in names:
        path = Path(name)
        if not name:  # to Path it is the working folder
            complaints.append("--image '': is no name")
        elif not os.path.isdir(name):  # False too for what is no name: load_image has the words
            files.append(path)
        else:
            try:
                inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            except OSError as error:
                complaints.append(f"{shown(path)}: {error.strerror}")
                continue
            files += inside
            if not inside:
                complaints.append(f"{shown(path)}: no images in this folder ({' '.join(sorted(SUFFIXES))})")
    return files, complaints


class Drawings:
    """The folder that pictures are written to. A picture never replaces one that this run reads (sources:
    their real paths) or has written and, unless `overwrite`, no other file either."""

    def __init__(self, folder: Path, sources: set[str], overwrite: bool):
        self.folder, self.overwrite = make_folder(folder, overwrite), overwrite
        self.taken = sources

    def save(self, picture: Image.Image, name: str) -> Path:
        """Write FOLDER/<name>.png, with a number after the name if it is taken."""
        target, number = self.folder / fitting(name, ".png"), 2
        while os.path.realpath(target) in self.taken or (not self.overwrite and os.path.lexists(target)):
            target, number = self.folder / fitting(name, f"-{number}.png"), number + 1
        with atomic_write(target) as temporary:
            picture.save(temporary, "PNG")
        self.taken.add(os.path.realpath(target))
        return target


def fitting(name: str, ending: str) -> str:
    """A file name of both. The name is cut so that it has at most 255 bytes, as file systems allow."""
    while len(os.fsencode(name + ending)) > 255:
        name = name[:-1]
    return name + ending


def save_masks(found: Detections, record: dict, drawings: Drawings, name: str) -> None:
    """Write each mask as a picture beside the drawn one, of this name, and put it into the record."""
    for number, (mask, d) in enumerate(zip(found.masks or (), record["detections"])):
        label = re.sub(r"\W+", "-", d["label"])
        d["mask"] = as_text(drawings.save(Image.fromarray(mask), f"{name}.{number}-{label}"))


def detect_files(args: argparse.Namespace, masks: bool = False) -> int:
    """Detect, or with masks segment, in all of --image; returns the exit code."""
    program = sys.argv[0]  # detect.py or segment.py
    files, complaints = find_images(args.image)
    for message in complaints:
        complain(message, program)
    check_folder(args.out, args.overwrite)
    if args.overwrite:
        for form in args.save:
            check_new(args.out / form, replace=True)
    sources = {os.path.realpath(file) for file in files if os.path.isfile(file)}
    check_output(args.json, read=sources)
    detector = load_detector(args, masks)
    drawings, records, photographs, finished = Drawings(args.out, sources, args.overwrite), [], [], False
    named = {}  # in the data sets of --save: {name: file}
    watch = Watch(args.classes is None)
    # None shows the bar on a terminal only.
    bar = tqdm(total=len(files), unit="image", disable=args.quiet or len(files) < 2 or None)
    try:
        with bar, tables(args.json, args.quiet):
            for batch in read_ahead(files, args.batch_size or detector.fitting_batch()):
                images = []
                for file, reading in batch:
                    try:
                        images.append((file, reading.result()))
                    except ValueError as error:  # costs this picture and the exit code, not the run
                        complaints.append(str(error))
                        complain(error, program)
                found_all = detector([image for _, image in images]) if images else []
                for (file, image), found in zip(images, found_all, strict=True):
                    record, drawn = save_found(file, image, found, drawings, args.tokens)
                    records.append(record)
                    photographs += [file] if found.photograph else []
                    suffix = file.suffix if file.suffix.lower() in SUFFIXES else ".png"  # readers want one
                    named[as_text(drawn.stem + suffix)] = file
                    watch.add(image, found)
                    bar.clear()
                    print(f"{shown(file)}  {image.width} x {image.height}  ->  {shown(drawn)}")
                    print(indent(str(found), "  "))
                bar.update(len(batch))
        finished = True
        if photographs:
            complain(photograph_warning(photographs, len(records)), program)
    finally:  # a signal, a full disk, nobody who reads what is printed: what is done has cost time, and stays
        if records and not finished:
            complain(f"ended early: {len(records)} of {len(files)} pictures are done", program)
        if args.json and (finished or records):
            write_output(records, args.json, args.quiet)
        if args.save and records:
            save_sets(args, as_lists(records, list(named), detector.classes), named, drawings.folder)
    if warning := watch.warning():
        complain(warning, program)
    return 1 if complaints else 0


def save_sets(args: argparse.Namespace, data: dict, named: dict[str, Path], folder: Path) -> None:
    """Write the data sets that --save asks for, and say so. named: {name in the data: its picture}."""
    told = [save_set(form, data, named, folder / form, args.overwrite)[0] for form in args.save]
    with tables(args.json, args.quiet):
        for form, what in zip(args.save, told, strict=True):
            print(f"{shown(folder / form)}: {what}")


def save_found(
    file: Path, image: Image.Image, found: Detections, drawings: Drawings, tokens: bool
) -> tuple[dict, Path]:
    """Draw what was found on an image and write it; returns its entry in the JSON file and the drawn file."""
    record = make_record(file, image, found, tokens)
    captions = [f"{shown(d['label'])} {d['score']:.2f}" for d in record["detections"]]
    picture = draw_boxes(image, found.boxes, captions, found.class_ids, found.masks)
    drawn = drawings.save(picture, file.stem)
    save_masks(found, record, drawings, drawn.stem)
    return record, drawn


def main() -> int:
    options = parser(__doc__)
    add_file_arguments(options)
    add_detection_arguments(options)
    return detect_files(options.parse_args())


if __name__ == "__main__":
    run(main, __file__)

"""Find objects in pictures.

    python infer/detect.py --image photo.jpg    # the shipped nano model
    python infer/detect.py --image a.jpg folder/ --json out.json --out drawn/ --model FOLDER_OR_HUB_ID
    python infer/detect.py --image photo.jpg --classes "cat ; traffic light"    # open-set: what you name

Prints a table, writes each picture with its boxes to --out, and with --json all boxes in pixels of the
original picture. The exit code is 0 only if every picture was processed.
"""

import argparse
import re
import sys
from pathlib import Path
from textwrap import indent

from PIL import Image
from tqdm import tqdm

from infer.lib.draw import draw_boxes
from infer.lib.options import add_detection_arguments, check_output, load_detector
from model.decoding.detections import Detections
from model.decoding.masks import to_rle
from model.io.image import SUFFIXES, read_ahead
from model.io.writing import atomic_write, write_json
from train.run.program import complain, parser, run


def add_file_arguments(options: argparse.ArgumentParser) -> None:
    """The options of what is read and written."""
    add = options.add_argument
    add("--image", nargs="+", required=True, type=Path, metavar="FILE_OR_DIR", help="pictures or folders")
    add("--json", type=Path, metavar="FILE", help="write all boxes there")
    add("--tokens", action="store_true", help="put the raw generated ids into the JSON file")
    add("--out", type=Path, default=Path("detections"), metavar="DIR", help="folder of the drawn pictures")
    add("--score-threshold", type=float, default=0.6, help="drop boxes with a lower score")


def find_images(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """The image files, those of a folder sorted by name; and a complaint for each folder without any."""
    files, complaints = [], []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            files += inside
            if not inside:
                complaints.append(f"{path}: no images in this folder ({' '.join(sorted(SUFFIXES))})")
        else:
            files.append(path)
    return files, complaints


def save_picture(picture: Image.Image, out: Path, name: str, taken: set[Path]) -> Path:
    """Write OUT/<name>.png, with a number after the name if a picture of this run, in or out, has it."""
    target, number = out / f"{name}.png", 2
    while target.resolve() in taken:
        target, number = out / f"{name}-{number}.png", number + 1
    taken.add(target.resolve())
    with atomic_write(target) as temporary:
        picture.save(temporary, "PNG")
    return target


def save_masks(found: Detections, record: dict, drawn: Path, taken: set[Path]) -> None:
    """Write each mask as a picture beside the drawn one, and put it into the record."""
    for number, (mask, d) in enumerate(zip(found.masks or (), record["detections"])):
        label = re.sub(r"\W+", "-", d["label"])
        name = f"{drawn.stem}.{number}-{label}"
        d["mask"] = str(save_picture(Image.fromarray(mask), drawn.parent, name, taken))
        d["segmentation"] = to_rle(mask)


def make_record(file: Path, image: Image.Image, found: Detections, tokens: bool) -> dict:
    """One image's entry in the JSON file."""
    detections = [
        dict(label=label, class_id=c, score=round(score, 4), box=[round(x, 2) for x in box])
        for (label, score, box), c in zip(found, found.class_ids.tolist(), strict=True)
    ]
    record = dict(image=str(file), width=image.width, height=image.height, detections=detections)
    return record | (dict(tokens=found.tokens.flatten().tolist()) if tokens else {})


def detect_files(args: argparse.Namespace, masks: bool = False) -> int:
    """Detect, or with masks segment, in all of --image; returns the exit code."""
    program = sys.argv[0]  # detect.py or segment.py
    files, complaints = find_images(args.image)
    for message in complaints:
        complain(message, program)
    check_output(args.json)
    records, taken = [], {file.resolve() for file in files}
    if args.json and args.json.resolve() in taken:
        raise ValueError(f"--json {args.json} is one of the pictures")
    detector = load_detector(args, masks)
    args.out.mkdir(parents=True, exist_ok=True)
    # None shows the bar on a terminal only.
    with tqdm(total=len(files), unit="image", disable=len(files) < 2 or None) as bar:
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
                record = make_record(file, image, found, args.tokens)
                captions = [f"{d['label']} {d['score']:.2f}" for d in record["detections"]]
                picture = draw_boxes(image, found.boxes, captions, found.class_ids, found.masks)
                drawn = save_picture(picture, args.out, file.stem, taken)
                save_masks(found, record, drawn, taken)
                bar.clear()
                print(f"{file}  {image.width} x {image.height}  ->  {drawn}")
                print(indent(str(found), "  "))
                records.append(record)
            bar.update(len(batch))
    if args.json:
        write_json(records, args.json)
    return 1 if complaints else 0


def main() -> int:
    options = parser(__doc__)
    add_file_arguments(options)
    add_detection_arguments(options)
    return detect_files(options.parse_args())


if __name__ == "__main__":
    run(main, __file__)

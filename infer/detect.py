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

import torch
from PIL import Image

from infer.lib.draw import draw_boxes
from infer.lib.options import add_detection_arguments, check_json, load_detector
from model.decoding.detector import Detections, Detector
from model.decoding.masks import to_rle
from model.io.image import SUFFIXES, read_ahead
from model.io.writing import atomic_write, write_json


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_file_arguments(parser)
    add_detection_arguments(parser)
    return parser.parse_args(argv)


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read and written."""
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE_OR_DIR",
        help="pictures, or folders of them",
    )
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
    """Write OUT/<name>.png, with a number behind the name if a picture of this run, in or out, has it."""
    target, number = out / f"{name}.png", 2
    while target.resolve() in taken:
        target, number = out / f"{name}-{number}.png", number + 1
    taken.add(target.resolve())
    with atomic_write(target) as temporary:
        picture.save(temporary, "PNG")
    return target


def entry(file: Path, image: Image.Image, found: Detections, detector: Detector, tokens: bool) -> dict:
    """One image of the JSON file."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    detections = [
        dict(label=detector.classes[c], class_id=c, score=round(score, 4), box=[round(x, 2) for x in box])
        for c, score, box in rows
    ]
    record = dict(image=str(file), width=image.width, height=image.height, detections=detections)
    return record | (dict(tokens=found.tokens.flatten().tolist()) if tokens else {})


def print_table(record: dict, drawn: Path) -> None:
    print(f"{record['image']}  {record['width']} x {record['height']}  ->  {drawn}")
    for d in record["detections"]:
        x0, y0, x1, y1 = d["box"]
        print(f"  {d['label']:<16}{d['score']:6.2f}   {x0:7.1f} {y0:7.1f} {x1:7.1f} {y1:7.1f}")
    if not record["detections"]:
        print("  nothing found")


def run(args: argparse.Namespace, load=load_detector, program: str = "detect.py") -> int:
    """load(args, score threshold) gives the detector. Returns the exit code."""
    files, complaints = find_images(args.image)
    for message in complaints:
        print(f"{program}: {message}", file=sys.stderr)
    check_json(args.json)
    records, taken = [], {file.resolve() for file in files}
    if args.json and args.json.resolve() in taken:
        raise ValueError(f"--json {args.json} is one of the pictures")
    detector = load(args, args.score_threshold)
    args.out.mkdir(parents=True, exist_ok=True)
    bar = None
    if len(files) > 1:
        from tqdm import tqdm

        bar = tqdm(total=len(files), unit="image", disable=None)
    for batch in read_ahead(files, args.batch_size or detector.fitting_batch()):
        images = []
        for file, reading in batch:
            try:
                images.append((file, reading.result()))
            except ValueError as error:
                complaints.append(str(error))
                print(f"{program}: {error}", file=sys.stderr)
        found_all = detector([image for _, image in images]) if images else []
        for (file, image), found in zip(images, found_all, strict=True):
            record = entry(file, image, found, detector, args.tokens)
            records.append(record)
            captions = [f"{d['label']} {d['score']:.2f}" for d in record["detections"]]
            picture = draw_boxes(image, found.boxes, captions, found.labels, found.masks)
            drawn = save_picture(picture, args.out, file.stem, taken)
            for number, (mask, d) in enumerate(zip(found.masks or (), record["detections"])):
                name = re.sub(r"\W+", "-", d["label"])
                name = f"{drawn.stem}.{number}-{name}"
                d["mask"] = str(save_picture(Image.fromarray(mask), args.out, name, taken))
                d["segmentation"] = to_rle(mask)
            if bar:
                bar.clear()
            print_table(record, drawn)
        if bar:
            bar.update(len(batch))
    if bar:
        bar.close()
    if args.json:
        write_json(records, args.json)
    return 1 if complaints else 0


def main(arguments=arguments, load=load_detector, program: str = "detect.py") -> None:
    try:
        sys.exit(run(arguments(), load, program))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{program}: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

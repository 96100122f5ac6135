"""Predictions of a data set and their figures, in a folder from which a stopped run can continue:

    settings.json           what the predictions were made from
    predictions-RANK.jsonl  {"image_id", "results"}, a line as soon as an image is done
    results.json            all of them, in the form that COCO's server accepts
    figures.json            the figures that are printed, and the table of the calibration error

Without --data, it holds such a folder for each practice set, with the drawn scenes in scenes/.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from model import PaliGemma
from model.decoding.detector import ClosedSetDetector
from model.decoding.masks import MaskCodec
from model.decoding.open_set import OpenSetDetector
from model.io.hub import resolve, weight_files
from model.io.image import check_size, image_folder, read_ahead
from model.io.names import shown
from model.io.writing import each_line, explain, named, read_json, write_json, write_lines
from train.collapse import collapse_of_set
from train.measures import (
    FIGURES,
    calibration_error,
    category_ids,
    read_coco,
    run_cocoeval,
    to_results,
    without_images,
)
from train.practice.write import HELD_OUT_SETS, write_coco
from train.run.pictures import name_broken, none_left
from train.run.processes import all_gather, rank_and_world
from train.run.program import complain, positive

SCENES_FOLDER = "scenes"  # folder of the drawn scenes


# ---- the sets ----------------------------------------------------------------------------------------------


def add_set_arguments(options: argparse.ArgumentParser, data: str, sets: tuple[str, ...]) -> None:
    """The options of what is evaluated. data: what kind of file --data is."""
    add = options.add_argument
    add("--data", type=Path, help=f"{data}; without it, held-out practice scenes are drawn")
    add("--images", type=Path, help="the folder of its images (default: images/ beside the file, or its own)")
    add("--sets", nargs="+", choices=sets, default=list(sets), help="held-out practice sets")
    add("--count", type=positive, default=1000, help="scenes of each practice set")
    add("--json", type=Path, metavar="FILE", help="write the figures there; -: to standard output")
    skip = "measure without pictures that cannot be used (default: no figures)"
    add("--skip-broken", action=argparse.BooleanOptionalAction, default=False, help=skip)


def evaluation_sets(
    args: argparse.Namespace, folder: Path, model: PaliGemma, codec: MaskCodec | None = None
) -> Iterator[tuple[str, Path, Path, Path]]:
    """Name, annotations, folder of images and folder of results: of --data, or of each practice set.

    A practice set is drawn when its turn comes, by the first process, unless it is there. With a codec, the
    annotations are answers in words and masks, else boxes.
    """
    if args.data:
        yield args.data.stem, args.data, image_folder(args.data, args.images), folder
        return
    for split in args.sets:
        out, size = folder / split, model.config.vision.image_size
        scenes = out / SCENES_FOLDER
        if rank_and_world()[0] == 0 and not scenes.exists():
            write_coco(scenes, args.count, split, size, codec=codec)
        all_gather(None)  # the other processes wait for the scenes
        name = "answers.jsonl" if codec else "instances.json"
        yield HELD_OUT_SETS[split], scenes / name, scenes / "images", out


# ---- predictions -------------------------------------------------------------------------------------------


def evaluate(
    detector: ClosedSetDetector | OpenSetDetector,
    data: Path,
    images: Path,
    batch_size: int | None = None,
    title: str = "",
    out: Path | None = None,
    skip_broken: bool = False,
) -> dict:
    """All figures of a set, in the first process; in the other processes of torchrun, {}.

    batch_size: None for what memory holds. title: of the progress bar. out: where to keep the predictions.
    skip_broken: leave out pictures that cannot be used, and the objects in them; the figures then have
    "skipped", {image id: what is wrong with it}.
    """
    coco = read_coco(data, images)
    ids = category_ids(coco, detector.classes, data)
    rank, world = rank_and_world()
    keep_on = skip_broken or out is not None
    shares = all_gather(predict(detector, coco, images, ids, batch_size, title, out, rank, world, keep_on))
    if rank > 0:
        return {}
    if skipped := {str(i): fault for _, faults in shares for i, fault in faults.items()}:
        check_broken(list(skipped.values()), len(coco.imgs), data, skip_broken)
        coco = without_images(coco, set(map(int, skipped)))
    results = sorted((result for share, _ in shares for result in share), key=lambda r: r["image_id"])
    # Boxes of a class that the set does not have count only where classes are ignored.
    of_set = [result for result in results if result["category_id"] != -1]
    evaluation = run_cocoeval(coco, of_set)
    any_class = run_cocoeval(coco, results, use_classes=False)
    if warning := collapse_of_set(coco, results):
        complain(warning, sys.argv[0])
    error, table = calibration_error(evaluation)
    figures = {name: round(float(value), 4) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    figures["AP any class"] = round(float(any_class.stats[0]), 4)
    figures |= {"calibration error": round(error, 4), "images": len(coco.imgs), "calibration": table}
    figures |= {"skipped": skipped} if skipped else {}
    if out:
        write_lines([json.dumps(of_set)], out / "results.json")
        write_json(figures, out / "figures.json")
    return figures


def predict(
    detector: ClosedSetDetector | OpenSetDetector,
    coco: COCO,
    images: Path,
    ids: list[int],
    batch_size: int | None = None,
    title: str = "",
    out: Path | None = None,
    rank: int = 0,
    world: int = 1,
    keep_on: bool = False,
) -> tuple[list[dict], dict[int, str]]:
    """Results in COCO's format for every image of the set, and {image id: what is wrong with it} of those
    that cannot be used; of several processes, for this one's share.

    ids: the set's category id of each class. With out, the results of an image are written there as they
    come, and an image whose results are there, whichever process wrote them, is not decoded again.
    keep_on: go on after an image that cannot be used; else it is the last.
    """
    known = read_predictions(out) if out else {}
    share = sorted(coco.dataset["images"], key=lambda record: record["id"])[rank::world]
    todo = [record for record in share if record["id"] not in known]
    log = open_log(out / f"predictions-{rank}.jsonl") if out else contextlib.nullcontext()
    bar = tqdm(total=len(todo), desc=shown(title), unit="image", leave=False, disable=rank > 0)
    broken = []
    size = batch_size or detector.fitting_batch()

    def file_of(record: dict) -> Path:
        return images / record["file_name"]

    with log as lines, bar:
        for of_batch, pictures in usable_pictures(todo, file_of, check_record, size, broken, keep_on):
            for found, record in zip(detector(pictures), of_batch, strict=True):
                results = known[record["id"]] = to_results(found, record["id"], ids)
                if lines:
                    line = json.dumps(dict(image_id=record["id"], results=results))
                    with named(Path(lines.name)):
                        print(line, file=lines, flush=True)
            bar.update(len(pictures))
    faults = {record["id"]: fault for record, fault in broken}
    return [result for record in share for result in known.get(record["id"], [])], faults


def check_record(record: dict, picture: Image.Image, file: Path) -> None:
    """Refuse a picture of another size than its record in the file says. COCO's own evaluation needs none."""
    if "width" in record and "height" in record:
        check_size(picture.size, file, record["width"], record["height"])


def usable_pictures(
    items: Sequence,
    file_of: Callable[[Any], Path],
    check: Callable[[Any, Image.Image, Path], None],
    size: int,
    broken: list[tuple[Any, str]],
    keep_on: bool,
) -> Iterator[tuple[list, list[Image.Image]]]:
    """Batches of up to `size` items and their pictures. Items whose picture cannot be read, or is refused by
    check(item, picture, file), are added to `broken`, each with what is wrong.

    keep_on: go on after such a picture; else the batch before it is the last.
    """
    rest = iter(items)
    for batch in read_ahead(map(file_of, items), size):
        usable = []
        for (file, reading), item in zip(batch, islice(rest, len(batch)), strict=True):
            try:
                check(item, picture := reading.result(), file)
                usable.append((item, picture))
            except ValueError as error:
                broken.append((item, str(error)))
        if broken and not keep_on:
            return
        if usable:
            yield [item for item, _ in usable], [picture for _, picture in usable]


def check_broken(faults: list[str], count: int, data: Path, skip: bool) -> None:
    """Print which pictures of a set cannot be used. ValueError without `skip`, or if no others are left.
    faults: what is wrong with each; count: of all pictures of the set."""
    found = name_broken(faults, skip)
    if not skip:
        why = "which would be those of other pictures; --skip-broken measures without what is broken"
        raise ValueError(f"{found}: no figures of {data}, {why}")
    if len(faults) == count:
        raise none_left(data, found)


def left_out(skipped: int, used: int) -> str:
    """A remark beside figures: how many pictures they leave out. "" for none."""
    return f"; {skipped} of {used + skipped} pictures left out as broken" if skipped else ""


def read_predictions(out: Path) -> dict[int, list[dict]]:
    """{image id: its results} of all predictions-*.jsonl in a folder, except for a half-written last line."""
    known = {}
    for file in sorted(out.glob("predictions-*.jsonl")):
        for number, _, line in each_line(file):
            if not line.endswith(b"\n"):
                break
            fault = f"{file}, line {number}, is not a prediction: remove the file"
            with explain(fault, ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                known[row["image_id"]] = row["results"]
    return known


def open_log(file: Path) -> TextIO:
    """A file to append lines to; a last line without its end is cut off."""
    log = file.open("a", encoding="utf-8")
    log.truncate(file.read_bytes().rfind(b"\n") + 1)
    return log


# ---- what they were made from ------------------------------------------------------------------------------


def check_settings(out: Path, settings: dict) -> None:
    """Write out/settings.json. A folder with predictions or scenes that were made with other settings is
    refused: this run would take them for its own."""
    file, settings = out / "settings.json", json.loads(json.dumps(settings, default=str))
    old = read_json(file) if file.exists() else {}
    changed = sorted(key for key in old | settings if old.get(key) != settings.get(key))
    begun = *out.glob("predictions-*.jsonl"), *out.glob(SCENES_FOLDER)
    if changed and any(path.stat().st_size for path in begun):
        raise ValueError(
            f"{out} holds predictions of other settings ({', '.join(changed)}): "
            "choose another --out, or remove the folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, file)


def file_stamps(source: str | None) -> dict | None:
    """Size and time of the checkpoint's files, which change when it is overwritten or calibrated."""
    if source is None:
        return None
    folder = resolve(source)
    files = [file for file in (*sorted(folder.glob("*.json")), *weight_files(folder)) if file.exists()]
    return {os.path.realpath(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}

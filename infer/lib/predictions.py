"""Predictions of a data set, kept in a folder so that a run that was stopped goes on from where it was:

    settings.json           what the predictions were made from
    predictions-RANK.jsonl  {"image_id", "results"}, a line as soon as an image is done
    results.json            all of them, as COCO's server takes them
    figures.json            what is printed, and the table behind the calibration error

Without --data, each practice set has such a folder in it, with the drawn scenes in scenes/.
"""

import contextlib
import json
from itertools import islice
from pathlib import Path
from typing import TextIO

from pycocotools.coco import COCO
from tqdm import tqdm

from model.decoding.detector import Detector
from model.io.hub import resolve
from model.io.image import check_size, read_ahead
from model.io.writing import read_json, write_json


def recorded(out: Path) -> dict[int, list[dict]]:
    """{image id: its results} of every predictions-*.jsonl in a folder, but for a half-written last line."""
    known = {}
    for file in sorted(out.glob("predictions-*.jsonl")):
        *lines, _ = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                known[row["image_id"]] = row["results"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}, is no prediction: remove the file") from error
    return known


def open_log(file: Path) -> TextIO:
    """A file to append lines to; a last line without its end is cut off."""
    log = file.open("a", encoding="utf-8")
    log.truncate(file.read_bytes().rfind(b"\n") + 1)
    return log


def predict(
    detector: Detector,
    coco: COCO,
    images: Path,
    ids: list[int],
    batch_size: int | None,
    title: str,
    out: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[dict]:
    """Results in COCO's format for every image of the set; of several processes, for this one's share.

    With out, a folder: the results of an image are written there as they come, and an image whose results
    are there, whichever process wrote them, is not decoded again. Raises ValueError for an image that is
    unreadable or not of the size that the set gives it.
    """
    known = recorded(out) if out else {}
    share = sorted(coco.dataset["images"], key=lambda record: record["id"])[rank::world]
    todo = [record for record in share if record["id"] not in known]
    log = open_log(out / f"predictions-{rank}.jsonl") if out else contextlib.nullcontext()
    bar = tqdm(total=len(todo), desc=title, unit="image", leave=False, disable=rank > 0)
    with log as lines, bar:
        records, size = iter(todo), batch_size or detector.fitting_batch()
        for batch in read_ahead((images / record["file_name"] for record in todo), size):
            of_batch, pictures = list(islice(records, len(batch))), [reading.result() for _, reading in batch]
            for (file, _), picture, record in zip(batch, pictures, of_batch, strict=True):
                if "width" in record and "height" in record:  # COCO's own evaluation needs neither
                    check_size(picture, file, record["width"], record["height"])
            for found, record in zip(detector(pictures), of_batch, strict=True):
                rows = zip(*(column.tolist() for column in (found.boxes, found.scores, found.labels)))
                results = known[record["id"]] = []
                for (x0, y0, x1, y1), score, label in rows:
                    box = [x0, y0, x1 - x0, y1 - y0]
                    results.append(dict(image_id=record["id"], category_id=ids[label], bbox=box, score=score))
                if lines:
                    print(json.dumps(dict(image_id=record["id"], results=results)), file=lines, flush=True)
            bar.update(len(batch))
    return [result for record in share for result in known[record["id"]]]


def file_stamps(source: str | None) -> dict | None:
    """What tells a checkpoint from one that was later written to the same folder."""
    if source is None:
        return None
    files = [file.resolve() for file in sorted(resolve(source).glob("*.safetensors"))]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def remember(out: Path, settings: dict) -> None:
    """Write out/settings.json; ValueError if the folder holds predictions that were made with others."""
    file, settings = out / "settings.json", json.loads(json.dumps(settings, default=str))
    old = read_json(file) if file.exists() else {}
    changed = sorted(key for key in old | settings if old.get(key) != settings.get(key))
    begun = [path for path in (*out.glob("predictions-*.jsonl"), *out.glob("scenes")) if path.stat().st_size]
    if changed and begun:
        raise ValueError(
            f"{out} holds predictions of other settings ({', '.join(changed)}): "
            "choose another --out, or remove the folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, file)

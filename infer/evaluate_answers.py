"""How good a model's answers in words and masks are.

    python infer/evaluate_answers.py    # nano on held-out practice scenes
    python infer/evaluate_answers.py --model SRC --data answers.jsonl --images DIR

--data has a line for each prompt: {"image", "prefix", "suffix"}, suffix the right answer or a list of them.
What is measured depends on the prefix:

    answer ...                        exact match
    caption ..., describe ..., cap    exact match, and CIDEr-D (arXiv 1411.5726; 10 is perfect)
    anything, if the line has a "mask" in COCO's run-length encoding: mean IoU with it

The mask of an answer is that of its first object; an answer without one scores 0, as RefCOCO is measured.
Lines with a "kind" are also told by kind. Upper and lower case, and spaces around an answer, do not count.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infer.lib.options import (
    add_codec_arguments,
    add_model_arguments,
    add_sampling_arguments,
    check_counts,
    check_json,
    load_codec,
    load_model,
    sampling_options,
)
from model.decoding.boxes import BINS, locs_to_boxes, parse_answer
from model.decoding.detector import Asker
from model.decoding.masks import MaskCodec, from_rle, paste_mask
from model.io.image import load_image
from model.io.writing import write_json, write_lines
from train.data.jsonl import read_lines, right_answers

HELD_OUT = {"same": "same drawings", "vendor": "unseen vendor"}
TASKS = {"answer": "question", "caption": "caption", "describe": "caption", "cap": "caption"}
IMAGES = 8  # whose prompts are put together
GRAMS, SIGMA = 4, 6.0  # of CIDEr-D: the longest n-grams, the tolerance of length


def n_grams(text: str) -> list[Counter]:
    """Of 1 word, of 2 ... GRAMS words, with their counts."""
    words = re.findall(r"\w+", text.casefold())
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, GRAMS + 1)]


def cider_d(said: list[str], right: list[list[str]]) -> float:
    """Mean CIDEr-D of captions, each against its right ones: how many n-grams they share, rare ones counting
    for more. An n-gram's rarity is that among the right captions of all images. 0 to 10."""
    references = [[n_grams(text) for text in texts] for texts in right]
    seen = Counter(
        gram for texts in references for gram in {g for grams in texts for of_n in grams for g in of_n}
    )

    def weighted(grams: list[Counter]) -> list[dict]:
        return [
            {g: count * (math.log(len(right)) - math.log(max(1, seen[g]))) for g, count in of_n.items()}
            for of_n in grams
        ]

    def alike(a: dict, b: dict) -> float:
        norms = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        return sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b) / norms if norms else 0.0

    scores = []
    for text, texts in zip(said, references, strict=True):
        mine = n_grams(text)
        for reference in texts:
            gap = sum(mine[0].values()) - sum(reference[0].values())
            of_n = [alike(a, b) for a, b in zip(weighted(mine), weighted(reference), strict=True)]
            scores.append(10 * sum(of_n) / GRAMS * math.exp(-(gap**2) / (2 * SIGMA**2)) / len(texts))
    return sum(scores) / len(said)


def overlap(said: str, mask: np.ndarray, codec: MaskCodec, bins: int = BINS) -> float:
    """Intersection over union of an answer's first mask with the right one, bool [H, W]; 0 if it has none.
    bins: see locs_to_boxes."""
    found = parse_answer(said)
    if not found or not found[0].seg:
        return 0.0
    height, width = mask.shape
    guess = codec.decode(torch.tensor(found[0].seg)[None])[0].numpy()
    guess = paste_mask(guess, locs_to_boxes(found[0].locs, width, height, bins), width, height)
    return float((guess & mask).sum() / max(1, (guess | mask).sum()))


def ask_all(ask: Asker, records: list[dict], images: Path, title: str) -> list[str]:
    """The answer to each line."""
    said, by_image = [], [list(lines) for _, lines in groupby(records, key=lambda r: r["image"])]
    bar = tqdm(total=len(records), desc=title, unit="answer", leave=False)
    for start in range(0, len(by_image), IMAGES):
        of_call = by_image[start : start + IMAGES]
        pictures = [load_image(images / lines[0]["image"]) for lines in of_call]
        for picture, lines in zip(pictures, of_call):
            for height, width in {tuple(line["mask"]["size"]) for line in lines if "mask" in line}:
                if (width, height) != picture.size:
                    fault = f"has a mask of {width} x {height} pixels, but {picture.width} x {picture.height}"
                    raise ValueError(f"{images / lines[0]['image']} {fault}")
        asked = [(i, line["prefix"]) for i, lines in enumerate(of_call) for line in lines]
        said += [ask.tokenizer.decode(tokens).strip() for tokens, _ in ask(pictures, asked)]
        bar.update(len(asked))
    bar.close()
    return said


def task_of(record: dict) -> str | None:
    """What is measured of a line, None if nothing can be."""
    return "mask" if "mask" in record else TASKS.get(record["prefix"].split(" ")[0])


def judge(records: list[dict], said: list[str], codec: MaskCodec | None, bins: int = BINS) -> dict:
    """{task: {"exact", "CIDEr-D" or "mean IoU", "lines", and "exact" of each kind}}."""
    by_task = defaultdict(list)
    for record, text in zip(records, said, strict=True):
        by_task[task_of(record)].append((record, text))
    figures = {}
    for task, pairs in by_task.items():
        figures[task] = dict(lines=len(pairs))
        if task == "mask":
            overlaps = [overlap(text, from_rle(record["mask"]), codec, bins) for record, text in pairs]
            figures[task]["mean IoU"] = round(sum(overlaps) / len(overlaps), 4)
            continue
        right = [[text.strip() for text in right_answers(record)] for record, _ in pairs]
        exact = [
            text.casefold() in [answer.casefold() for answer in ok] for (_, text), ok in zip(pairs, right)
        ]
        figures[task]["exact"] = round(sum(exact) / len(exact), 4)
        if task == "caption":
            figures[task]["CIDEr-D"] = round(cider_d([text for _, text in pairs], right), 3)
        kinds = defaultdict(list)
        for (record, _), hit in zip(pairs, exact):
            kinds[record.get("kind", "others")].append(hit)
        if len(kinds) > 1:
            figures[task]["kinds"] = {
                kind: dict(exact=round(sum(hits) / len(hits), 4), lines=len(hits))
                for kind, hits in kinds.items()
            }
    return figures


def checked_lines(data: Path, images: Path) -> list[dict]:
    """The lines of a file. Raises ValueError for one of which nothing can be measured."""
    records = []
    for _, record in read_lines(data, images):
        try:
            if task_of(record) is None:
                raise ValueError(f"begins with none of {', '.join(TASKS)}, and has no mask")
            if "mask" in record:
                from_rle(record["mask"])
            if not isinstance(record.get("kind", ""), str):
                raise ValueError(f"'kind' must be text, not {record['kind']!r:.60}")
        except ValueError as error:
            raise ValueError(f"{data}: {record['image']}, {record['prefix']!r}: {error}") from error
        records.append(record)
    if not records:
        raise ValueError(f"{data} has no lines")
    return records


def report(name: str, figures: dict) -> None:
    print(name)
    for task, row in figures.items():
        shown = "".join(f"{key} {row[key]:<8.3f}" for key in ("exact", "CIDEr-D", "mean IoU") if key in row)
        print(f"  {task:<20}{shown}({row['lines']} lines)")
        for kind, of_kind in row.get("kinds", {}).items():
            print(f"    {kind:<18}exact {of_kind['exact']:<8.3f}({of_kind['lines']} lines)")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, help="JSONL; without it, held-out practice scenes are drawn")
    add("--images", type=Path, help="folder of its pictures (default: images/ beside the file)")
    add("--sets", nargs="+", choices=HELD_OUT, default=list(HELD_OUT), help="held-out practice sets")
    add("--count", type=int, default=1000, help="scenes of each practice set")
    add("--max-tokens", type=int, default=100, help="longest answer")
    add("--bins", type=int, choices=(1023, 1024), default=BINS, help="1023: locations of RefCOCO checkpoints")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--answers", type=Path, metavar="FILE", help="write the lines there, with what the model said")
    add_codec_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from train.practice.write import write_coco

    check_counts(args, "count", "max_tokens")
    check_json(args.json)
    check_json(args.answers)
    how = sampling_options(args)
    model, tokenizer = load_model(args)
    ask = Asker(model, tokenizer, args.max_tokens, how, args.seed)
    figures, answered, codec = {}, [], None
    for split in [None] if args.data else args.sets:
        name = HELD_OUT[split] if split else args.data.stem
        with tempfile.TemporaryDirectory() as temporary:
            data = args.data or Path(temporary) / "scenes" / "answers.jsonl"
            images = (args.data and args.images) or data.parent / "images"
            if split:
                codec = codec or load_codec(args)
                write_coco(data.parent, args.count, split, model.config.vision.image_size, codec=codec)
            records = checked_lines(data, images)
            if any("mask" in record for record in records):
                codec = codec or load_codec(args)
            said = ask_all(ask, records, images, name)
            figures[name] = judge(records, said, codec, args.bins)
        report(name, figures[name])
        answered += [record | dict(answer=text) for record, text in zip(records, said, strict=True)]
    if args.json:
        write_json(figures, args.json)
    if args.answers:
        write_lines((json.dumps(record) + "\n" for record in answered), args.answers)


def main() -> None:
    try:
        run(arguments())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"evaluate_answers.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""How good a model's answers in words and masks are.

    python infer/evaluate_answers.py    # nano on held-out practice scenes
    python infer/evaluate_answers.py --model SRC --data answers.jsonl --images DIR

--data has a line for each prompt: {"image", "prefix", "suffix"}, suffix the right answer or a list of them.
What is measured depends on the prefix:

    anything                          exact match, in which neither case nor the number of spaces counts
    caption ..., describe ..., cap    CIDEr-D besides (arXiv 1411.5726; 10 is perfect)
    anything, if the line has a "mask" in COCO's run-length encoding: mean IoU with it instead

Lines that begin with answer, caption, describe or cap, and all others, have rows of their own. The mask of
an answer is that of its first object; an answer without one scores 0, as RefCOCO is measured. Lines with a
"kind" are also reported by kind. --sheet draws some pictures with their answers.

Pictures that cannot be read, or have another size than their masks, are named, and there are no figures; with
--skip-broken the figures are without their lines, and say how many pictures are left out.
"""

import json
import tempfile
from itertools import groupby
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from infer.lib.answers import answer_sheet
from infer.lib.options import (
    add_codec_arguments,
    add_model_arguments,
    add_sampling_arguments,
    check_output,
    load_codec,
    load_model,
    note_closed_set_only,
    sampling_options,
    tables,
    write_output,
)
from infer.lib.predictions import add_set_arguments, check_broken, evaluation_sets, left_out, usable_pictures
from model.decoding.generate import Prompter
from model.decoding.masks import rle_size
from model.io.names import shown
from model.io.tokenizer import LOCS
from model.io.writing import atomic_write, located, write_lines
from train.data.jsonl import read_lines
from train.measures import judge_answers
from train.run.program import parser, positive, run

SETS = ("same", "vendor")
IMAGES = 8  # whose prompts are put together


def read_prompts(data: Path, images: Path) -> list[dict]:
    """The lines of a file. One whose mask or kind cannot be used is refused."""
    records = []
    for _, record in read_lines(data, images):
        with located(f"{data}: {record['image']}, {record['prefix']!r}"):
            if "mask" in record:
                rle_size(record["mask"])  # compared with the picture before the mask is made
            if not isinstance(record.get("kind", ""), str):
                raise ValueError(f"'kind' must be text, not {record['kind']!r:.60}")
        records.append(record)
    if not records:
        raise ValueError(f"{data} has no lines")
    return records


def ask_all(
    prompter: Prompter, records: list[dict], images: Path, title: str, keep_on: bool
) -> tuple[list[dict], dict[str, str]]:
    """The lines, each with the model's "answer", except those of images that cannot be used; and {image: what
    is wrong with it}. keep_on: go on after such an image; else it is the last."""
    answered, broken = [], []
    by_image = [list(lines) for _, lines in groupby(records, key=lambda record: record["image"])]
    with tqdm(total=len(records), desc=shown(title), unit="answer", leave=False) as bar:
        pictures_of = usable_pictures(
            by_image, lambda lines: images / lines[0]["image"], check_masks, IMAGES, broken, keep_on
        )
        for groups, pictures in pictures_of:
            lines = [(i, line) for i, of_image in enumerate(groups) for line in of_image]
            said = prompter(pictures, [(i, line["prefix"]) for i, line in lines])
            texts = (prompter.model.tokenizer.decode(tokens).strip() for tokens, _ in said)
            answered += [line | dict(answer=text) for (_, line), text in zip(lines, texts, strict=True)]
            bar.update(len(lines))
    return answered, {lines[0]["image"]: fault for lines, fault in broken}


def check_masks(lines: list[dict], picture: Image.Image, file: Path) -> None:
    """Refuse masks of another size than their picture."""
    for height, width in (line["mask"]["size"] for line in lines if "mask" in line):
        if (width, height) != picture.size:
            fault = f"has a mask of {width} x {height} pixels, but {picture.width} x {picture.height}"
            raise ValueError(f"{file} {fault}")


def print_figures(name: str, figures: dict, note: str = "") -> None:
    print(shown(name) + note)
    for task, row in figures.items():
        values = "".join(f"{key} {row[key]:<8.3f}" for key in ("exact", "CIDEr-D", "mean IoU") if key in row)
        print(f"  {task:<20}{values}({row['lines']} lines)")
        for kind, of_kind in row.get("kinds", {}).items():
            print(f"    {kind:<18}exact {of_kind['exact']:<8.3f}({of_kind['lines']} lines)")


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add_set_arguments(options, "JSONL", SETS)
    add("--max-tokens", type=positive, default=100, help="most tokens of an answer")
    add("--bins", type=int, choices=(1023, 1024), default=LOCS, help="1023: locations of RefCOCO checkpoints")
    add("--answers", type=Path, metavar="FILE", help="write the lines there, with what the model said")
    add("--sheet", type=Path, metavar="FILE", help="draw the first answers there, a PNG file")
    add("--sheet-count", type=positive, default=8, help="answers on it")
    add_codec_arguments(options)
    add_model_arguments(options)
    add_sampling_arguments(options)
    args = options.parse_args()
    if args.images and not args.data:
        raise ValueError("--images belongs to --data, which is missing")
    for option in ("json", "answers", "sheet"):
        check_output(getattr(args, option), f"--{option}", [args.data])
    sampling = sampling_options(args)
    codec = None if args.data else load_codec(args)
    model = load_model(args)
    note_closed_set_only(model)
    prompter = Prompter(model, args.max_tokens, sampling, args.seed)
    figures, answered = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for name, data, images, _ in evaluation_sets(args, Path(temporary), model, codec):
            records = read_prompts(data, images)
            if codec is None and any("mask" in record for record in records):
                codec = load_codec(args)
            with located(str(data)):  # a prompt may be too long for the model
                of_set, broken = ask_all(prompter, records, images, name, args.skip_broken)
            count = len({record["image"] for record in records})
            if broken:
                check_broken(list(broken.values()), count, data, args.skip_broken)
            figures[name] = judge_answers(of_set, [line["answer"] for line in of_set], codec, args.bins)
            with tables(args.json):
                print_figures(name, figures[name], left_out(len(broken), count - len(broken)))
            figures[name] |= dict(skipped=broken) if broken else {}
            if args.sheet and not answered:
                sheet = answer_sheet(of_set[: args.sheet_count], images, codec, args.bins)
                with atomic_write(args.sheet) as unfinished:
                    sheet.save(unfinished, "PNG")
            answered += of_set
    if args.json:
        write_output(figures, args.json)
    if args.answers:
        write_lines((json.dumps(record) + "\n" for record in answered), args.answers)


if __name__ == "__main__":
    run(main, __file__)

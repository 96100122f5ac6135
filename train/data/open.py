"""Opening --data, in any form (train/data/forms.py): boxes for the closed-set language, or lines of text."""

import math
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from model import PaliGemma
from model.config import BRANCHES, MAX_GROUPS
from model.decoding.closed_set import ClosedSet
from model.io.tokenizer import Tokenizer
from model.io.writing import located
from train.data.coco import CocoDetections, CocoIndex
from train.data.forms import find_data, records_of
from train.data.jsonl import JsonlPairs
from train.data.targets import NANO_NOISE, Noise


def read_coco_index(file: Path, images: Path | None, part: str = "train") -> CocoIndex | None:
    """The index of a set of boxes; None for JSON lines. part: that is taken of a set with several."""
    found = find_data(file, images, [part])
    return None if found.form == "JSONL" else CocoIndex.of(records_of(found, strict=False), found.path)


def branches_for(index: CocoIndex) -> int:
    """How many branches find all objects of a full picture: half as many again as it has, as several branches
    find the same one, in sixteens. Full: of 100 pictures, 99 have no more objects."""
    full = np.quantile(index.offsets.diff().numpy(), 0.99)
    return min(max(BRANCHES, 16 * math.ceil(1.5 * full / 16)), MAX_GROUPS)


def classes_for(index: CocoIndex | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a model that is trained on this data: those it knows if they include all of the file's,
    else the file's. They decide what the class tokens mean, so this comes before the model is loaded."""
    return known if index is None or set(index.classes) <= set(known) else index.classes


def open_data(
    file: Path,
    images: Path | None,
    model: PaliGemma,
    tokenizer: Tokenizer,
    seed: int = 0,
    augment: bool = False,
    allow_outside: bool = False,
    noise: Noise = NANO_NOISE,
    index: CocoIndex | None = None,
    branches: int | None = None,
    flip_vertical: bool = False,
    part: str = "train",
) -> Dataset:
    """The data set of a file, checked against the model. index: of its boxes, if they are read already;
    branches, flip_vertical: see CocoDetections. part: that is taken of a set with several."""
    index = read_coco_index(file, images, part) if index is None else index
    found, size = find_data(file, images, [part]), model.config.vision.image_size
    file, images = found.path, found.images
    if index is None:
        if changed := noise.changed():
            what = f"{', '.join(changed)}: only closed-set detection has noise"
            raise ValueError(f"{what}, and {file} holds lines of text, not COCO instances")
        if branches is not None:
            raise ValueError(f"--answers parallel: {file} holds lines of text, not COCO instances")
        if flip_vertical:
            raise ValueError(f"--flip-vertical: {file} holds lines of text, whose boxes would be off")
        data = JsonlPairs(
            file, images, tokenizer, size, seed=seed, augment=augment, allow_outside=allow_outside
        )
    else:
        language = ClosedSet.of(model.config, tokenizer)
        if unknown := [name for name in index.classes if name not in language.classes]:
            known = f"not among the {len(language.classes)} that are trained ({language.classes[0]}, ...)"
            raise ValueError(f"{file} has classes that are {known}: {', '.join(unknown[:5])}")
        label_of = [language.classes.index(name) for name in index.classes]
        data = CocoDetections(
            index, images, language, label_of, size, seed, augment, noise, branches, flip_vertical
        )
    if not len(data):
        raise ValueError(f"{file} has no samples with objects, and --skip-empty leaves out the others")
    with located(str(file)):
        check_length(data.text_positions, model)
    return data


def check_length(text: int, model: PaliGemma) -> None:
    """Refuse image and text that need more positions than the checkpoint is meant for. RoPE could compute
    more, but its config promises no more, and programs that load the result may rely on that."""
    vision, have = model.config.vision, model.config.text.max_positions
    need = vision.tokens + text
    if need > have:
        parts = f"{vision.tokens} of an image of {vision.image_size} px, {text} of text"
        how = "shorten the text"
        if have > text:
            how += f", or take an --image-size of at most {math.isqrt(have - text) * vision.patch_size}"
        raise ValueError(f"{need} positions needed ({parts}), the checkpoint has {have}: {how}")

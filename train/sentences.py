"""The sentences of the practice set, in one place: nano's vocabulary is trained on what this file can say."""

import numpy as np

from model.config import COCO_CLASSES

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red orange yellow green blue purple pink brown black white grey".split()
SIZES = ["tiny", "small", "large", "huge"]
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
RELATIONS = ["left of", "right of", "above", "below", "next to", "in front of", "behind", "on top of"]
_IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis"}


def plural(name: str) -> str:
    """The plural of a class name: dog -> dogs, wine glass -> wine glasses, scissors -> scissors."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name == "scissors":
        return name
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")


def counted(name: str, count: int) -> str:
    """ "a dog", "an apple", "three dogs"."""
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"{NUMBERS[count]} {plural(name)}"


def random_sentences(rng: np.random.Generator) -> list[str]:
    """Prompts and answers of every task with random words: one sentence of each kind."""
    a, b, c = rng.choice(COCO_CLASSES, 3)
    colour, size, place = (str(rng.choice(words)) for words in (COLOURS, SIZES, PLACES))
    relation, count, other = str(rng.choice(RELATIONS)), int(rng.integers(1, 13)), int(rng.integers(1, 13))
    return [
        "detect all classes",
        f"detect {a} ; {b} ; {c}",
        f"segment {a}",
        f"{a} ; {b}",
        "caption en",
        "describe en",
        f"{counted(a, 1)} {relation} {counted(b, count)}",
        f"{counted(a, count)}, {counted(b, other)} and {counted(c, 1)}",
        f"a picture of {counted(a, count)} on a {colour} background",
        f"there are {counted(b, max(other, 2))} in the picture",
        f"a {size} {colour} {a} at the {place}",
        f"answer en how many {plural(a)} are there?",
        f"answer en where is the {a}?",
        f"answer en what is {relation} the {a}?",
        f"answer en what colour is the {a}?",
        f"answer en which is larger, the {a} or the {b}?",
        f"answer en is there {counted(a, 1)}?",
        f"question en {NUMBERS[count]}",
        "yes",
        "no",
        f"the {a} is at the {place}, {relation} the {b}",
        NUMBERS[count],
        str(count),
    ]

"""The grammar of what can be said about a practice scene. Nano's vocabulary is trained on it too.

    caption en                                         a cat left of two dogs
    answer en how many dogs are there?                 2
    answer en is there a zebra?                        no
    answer en where is the cat?                        top left
    answer en what is at the top left?                 a cat
    answer en what is left of the bus?                 a cat
    answer en which is larger, the cat or the bus?     the bus
    answer en what colour is the bus?                  red
    answer en how large is the cat?                    small
    detect cat ; zebra                                 <loc...> cat ; <loc...> cat
    segment cat                                        <loc...><seg...> cat

Every sentence follows from the facts alone. A question whose answer would be unclear is not asked, so that
an answer is either right or wrong. Positions and sizes are fractions of the picture's side, measured from its
top left.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.config import COCO_CLASSES
from model.decoding.boxes import box_prompt
from model.decoding.closed_set import PROMPT
from train.practice.backgrounds import pick

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red orange yellow green blue purple pink brown black white grey".split()
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
SIZES = {"small": (0, 0.3), "medium": (0.35, 0.45), "large": (0.5, 1)}  # ranges of the longest side
MIN_MARGIN = 0.04  # between a centre and the lines between the thirds of the picture
MIN_DISTANCE = 0.1  # between the centres of two things, one of which is left of the other or above it
MIN_AREA_RATIO = 1.5  # of the larger thing to the smaller
_IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives"}
_PAIRS = ("skis", "scissors")


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    name: str  # of its class
    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    colour: str | None  # None where no colour prevails

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def sides(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return x1 - x0, y1 - y0


def plural(name: str) -> str:
    """The plural of a class name: dog -> dogs, wine glass -> wine glasses, scissors -> pairs of scissors."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name in _PAIRS:
        return f"pairs of {name}"
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")


def phrase(name: str, count: int) -> str:
    """A class name with its number: "a dog", "an apple", "a pair of skis", "three dogs"."""
    if count == 1 and name in _PAIRS:
        return f"a pair of {name}"
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"{NUMBERS[count]} {plural(name)}"


def position_of(thing: Thing) -> str | None:
    """The ninth of the picture that a thing's centre is in, "top left"; None near the edge of a ninth."""
    if any(abs(c - line) < MIN_MARGIN for c in thing.centre for line in (1 / 3, 2 / 3)):
        return None
    x, y = (min(int(3 * c), 2) for c in thing.centre)
    return f"{ROWS[y]} {COLUMNS[x]}"


def relation(a: tuple[float, float], b: tuple[float, float]) -> str | None:
    """Where centre a is relative to centre b, "left of"; None if they are too close to tell."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    if max(abs(dx), abs(dy)) < MIN_DISTANCE:
        return None
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


# ---- captions ----------------------------------------------------------------------------------------------


def caption_of(things: Sequence[Thing]) -> str:
    """The classes from left to right, each with its number; for one or two of them also where they are."""
    classes = defaultdict(list)
    for thing in things:
        classes[thing.name].append(thing.centre)
    groups = [(tuple(np.mean(centres, 0)), phrase(name, len(centres))) for name, centres in classes.items()]
    groups.sort()
    phrases = [text for _, text in groups]
    if len(things) == 1 and (where := position_of(things[0])):
        return f"{phrases[0]} at the {where}"
    if len(groups) == 2:
        (a, first), (b, second) = groups
        how = relation(a, b)
        if how == "below":  # the higher one comes first
            first, second, how = second, first, "above"
        return f"{first} {how} {second}" if how else f"{first} and {second}"
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


# ---- questions ---------------------------------------------------------------------------------------------
# Each takes things and returns (question, answer), or None if the facts do not decide the answer.

Question = tuple[str, str] | None


def how_many(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    name = _present(rng, things) if rng.random() < 0.8 else _absent(rng, things)
    return f"how many {plural(name)} are there?", str(sum(thing.name == name for thing in things))


def how_many_objects(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    return "how many objects are there?", str(len(things))


def is_there(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    yes = rng.random() < 0.5
    name = _present(rng, things) if yes else _absent(rng, things)
    return f"is there {phrase(name, 1)}?", "yes" if yes else "no"


def where(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    sure = [thing for thing in _unique(things) if position_of(thing)]
    thing = pick(rng, sure)
    return thing and (f"where is the {thing.name}?", position_of(thing))


def what_is_at(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    positions = [position_of(thing) for thing in things]
    if None in positions:
        return None
    sure = [thing for thing in things if positions.count(position_of(thing)) == 1]
    thing = pick(rng, sure)
    return thing and (f"what is at the {position_of(thing)}?", phrase(thing.name, 1))


def what_is_beside(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    thing = pick(rng, _unique(things))
    found = defaultdict(list)
    for other in things:
        if thing and other is not thing:
            found[relation(other.centre, thing.centre)].append(other.name)
    if None in found:
        return None
    how = pick(rng, [how for how, names in sorted(found.items()) if len(names) == 1])
    return how and (f"what is {how} the {thing.name}?", phrase(found[how][0], 1))


def which_is_larger(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    unique = _unique(things)
    if len(unique) < 2:
        return None
    a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
    small, large = sorted((a, b), key=_area)
    if _area(large) < MIN_AREA_RATIO * _area(small):
        return None
    return f"which is larger, the {a.name} or the {b.name}?", f"the {large.name}"


def what_colour(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    thing = pick(rng, [thing for thing in _unique(things) if thing.colour])
    return thing and (f"what colour is the {thing.name}?", thing.colour)


def how_large(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    sure = [
        (thing, size)
        for thing in _unique(things)
        for size, (low, high) in SIZES.items()
        if low <= max(thing.sides) <= high
    ]
    chosen = pick(rng, sure)
    return chosen and (f"how large is the {chosen[0].name}?", chosen[1])


QUESTIONS: dict[str, Callable[[np.random.Generator, Sequence[Thing]], Question]] = {
    "how many": how_many,
    "how many objects": how_many_objects,
    "is there": is_there,
    "where": where,
    "what is at": what_is_at,
    "what is beside": what_is_beside,
    "which is larger": which_is_larger,
    "what colour": what_colour,
    "how large": how_large,
}


def ask(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, str, str]:
    """A random kind of question whose answer is clear: kind, question, answer."""
    for i in rng.permutation(len(QUESTIONS)):
        kind = list(QUESTIONS)[i]
        if asked := QUESTIONS[kind](rng, things):
            return kind, *asked
    raise AssertionError("the number of objects is always clear")


def _present(rng: np.random.Generator, things: Sequence[Thing]) -> str:
    return pick(rng, sorted({thing.name for thing in things}))


def _absent(rng: np.random.Generator, things: Sequence[Thing]) -> str:
    present = {thing.name for thing in things}
    return pick(rng, [name for name in COCO_CLASSES if name not in present])


def _unique(things: Sequence[Thing]) -> list[Thing]:
    """The things that are the only one of their class."""
    names = [thing.name for thing in things]
    return [thing for thing in things if names.count(thing.name) == 1]


def _area(thing: Thing) -> float:
    return thing.sides[0] * thing.sides[1]


# ---- prompts -----------------------------------------------------------------------------------------------

CAPTION = "caption en"


def answer_prompt(question: str) -> str:
    return f"answer en {question}"


# ---- the vocabulary ----------------------------------------------------------------------------------------


def random_things(rng: np.random.Generator) -> list[Thing]:
    """The facts of an imaginary scene."""
    names = rng.choice(COCO_CLASSES, int(rng.integers(1, 7)))
    repeats = rng.integers(1, 3 if len(names) > 4 else 5, len(names))
    things = []
    for name in np.repeat(names, repeats).tolist()[:12]:
        low, side = rng.random(2) * 0.6, rng.uniform(0.2, 0.4, 2)
        things.append(Thing(name, (*low.tolist(), *(low + side).tolist()), str(rng.choice(COLOURS))))
    return things


def random_sentences(rng: np.random.Generator) -> list[str]:
    """Prompts and answers of every kind about an imaginary scene."""
    things = random_things(rng)
    names = rng.choice(COCO_CLASSES, 3).tolist()
    texts = [PROMPT, box_prompt(names), " ; ".join(names), box_prompt(names[:1], masks=True)]
    texts += [CAPTION, caption_of(things), caption_of(things[:1])]
    for kind in QUESTIONS.values():
        if asked := kind(rng, things):
            texts += [answer_prompt(asked[0]), asked[1]]
    return texts

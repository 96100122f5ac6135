"""What is said about a scene: right, unambiguous, and told from the facts alone."""

import re

import numpy as np
import pytest
import torch

from model.config import COCO_CLASSES
from model.decoding.boxes import boxes_to_locs, parse_answer
from model.decoding.masks import crop, mask_iou, paste_mask
from train.practice import sentences
from train.practice.scenes import Scene, make_scene
from train.practice.sentences import (
    QUESTIONS,
    Thing,
    ask,
    caption_of,
    phrase,
    plural,
    random_sentences,
    random_things,
)
from train.practice.tasks import (
    MAX_ASKED,
    MAX_BOXES,
    MAX_MASKS,
    TASK_SHARES,
    colour_of,
    make_tasks,
    things_of,
)
from train.practice.write import answer_lines

CAT = Thing("cat", (0.05, 0.1, 0.25, 0.3), "black")  # top left, small
DOG = Thing("dog", (0.5, 0.46, 1.0, 1.0), "brown")  # bottom right, large
DOG2 = Thing("dog", (0.4, 0.05, 0.6, 0.25), None)  # top centre
BUS = Thing("bus", (0.35, 0.36, 0.75, 0.64), "red")  # middle centre, medium


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("dog", "a dog", "three dogs"),
        ("apple", "an apple", "three apples"),
        ("person", "a person", "three people"),
        ("wine glass", "a wine glass", "three wine glasses"),
        ("toothbrush", "a toothbrush", "three toothbrushes"),
        ("couch", "a couch", "three couches"),
        ("sheep", "a sheep", "three sheep"),
        ("knife", "a knife", "three knives"),
        ("scissors", "a pair of scissors", "three pairs of scissors"),
    ],
)
def test_numbers(name, one, many):
    assert (phrase(name, 1), phrase(name, 3)) == (one, many)
    assert plural(name) == many.removeprefix("three ")


@pytest.mark.parametrize(
    ("things", "said"),
    [
        ([CAT], "a cat at the top left"),
        ([Thing("cat", (0.2, 0.1, 0.46, 0.3), None)], "a cat"),  # on the line between two places
        ([DOG, DOG2], "two dogs"),
        ([DOG, CAT], "a cat left of a dog"),
        ([DOG2, DOG, CAT], "a cat left of two dogs"),
        ([BUS, DOG2], "a dog above a bus"),
        ([DOG2, BUS], "a dog above a bus"),
        ([BUS, Thing("cat", (0.36, 0.36, 0.76, 0.64), None)], "a bus and a cat"),
        ([BUS, DOG, CAT, DOG2], "a cat, a bus and two dogs"),
    ],
)
def test_captions(things, said):
    assert caption_of(things) == said


def every_answer(kind, things, count=60):
    """What a kind of question gives for things, over many draws."""
    asked = {QUESTIONS[kind](np.random.default_rng(i), things) for i in range(count)}
    return asked


@pytest.mark.parametrize(
    ("kind", "things", "asked"),
    [
        ("how many objects", [CAT, DOG, DOG2], {("how many objects are there?", "3")}),
        ("where", [CAT, DOG, DOG2], {("where is the cat?", "top left")}),
        ("where", [DOG, DOG2], {None}),
        (
            "what is at",
            [CAT, DOG],
            {("what is at the top left?", "a cat"), ("what is at the bottom right?", "a dog")},
        ),
        ("what is at", [CAT, CAT], {None}),
        (
            "what is beside",
            [CAT, DOG],
            {("what is right of the cat?", "a dog"), ("what is left of the dog?", "a cat")},
        ),
        ("what is beside", [CAT], {None}),
        ("which is larger", [CAT, CAT, DOG], {None}),
        ("what colour", [BUS, DOG2], {("what colour is the bus?", "red")}),
        ("what colour", [DOG2], {None}),
        ("how large", [CAT, DOG, DOG2], {("how large is the cat?", "small")}),
        ("how large", [BUS], {("how large is the bus?", "medium")}),
        ("how large", [DOG], {("how large is the dog?", "large")}),
        ("how large", [Thing("dog", (0, 0, 0.32, 0.2), None)], {None}),  # neither small nor medium
    ],
)
def test_questions(kind, things, asked):
    assert every_answer(kind, things) == asked


def test_questions_about_what_is_not_there():
    asked = dict(every_answer("how many", [CAT, DOG, DOG2], 200))
    assert asked["how many cats are there?"] == "1" and asked["how many dogs are there?"] == "2"
    assert {
        answer for question, answer in asked.items() if "cat" not in question and "dog" not in question
    } == {"0"}
    asked = dict(every_answer("is there", [CAT], 200))
    assert asked.pop("is there a cat?") == "yes" and asked and set(asked.values()) == {"no"}
    larger = dict(every_answer("which is larger", [CAT, DOG]))
    assert larger == dict.fromkeys(
        ("which is larger, the cat or the dog?", "which is larger, the dog or the cat?"), "the dog"
    )


def test_every_kind_is_asked(rng):
    kinds = {ask(rng, random_things(rng))[0] for _ in range(300)}
    assert kinds == set(QUESTIONS)


def test_the_module_shows_what_it_says():
    """Each prompt and answer of the docstring is one that the grammar makes, of other classes perhaps."""
    names = sorted({*COCO_CLASSES, *map(plural, COCO_CLASSES)}, key=len, reverse=True)

    def form(text):
        return re.sub("|".join(names), "X", text.split(" ; ")[0]).replace("an X", "a X")

    made = {form(text) for seed in range(300) for text in random_sentences(np.random.default_rng(seed))}
    shown = [re.split("  +", line.strip()) for line in sentences.__doc__.splitlines() if line[:1] == " "]
    assert len(shown) == 11
    for prompt, answer in shown:
        assert form(prompt) in made and ("<loc" in answer or form(answer) in made)


# Of drawn scenes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((230, 20, 30), "red"),
        ((250, 140, 0), "orange"),
        ((250, 230, 20), "yellow"),
        ((30, 160, 40), "green"),
        ((20, 60, 220), "blue"),
        ((0, 200, 230), "blue"),
        ((130, 30, 200), "purple"),
        ((250, 120, 190), "pink"),
        ((255, 160, 160), "pink"),
        ((120, 70, 30), "brown"),
        ((20, 15, 20), "black"),
        ((250, 250, 245), "white"),
        ((130, 128, 125), "grey"),
    ],
)
def test_colours(rgb, name, rng):
    pixels = np.clip(np.array(rgb) + rng.integers(-4, 5, (100, 3)), 0, 255).astype(np.uint8)
    assert colour_of(pixels) == name
    other = np.array((20, 60, 220) if name != "blue" else (230, 20, 30), np.uint8)
    assert colour_of(np.concatenate((pixels, np.tile(other, (100, 1))))) is None


def test_shares_cover_the_tasks(codec):
    assert set(TASK_SHARES) == set(make_tasks(codec)) and abs(sum(TASK_SHARES.values()) - 1) < 1e-9


def test_facts_of_a_scene():
    scene = make_scene(4)
    things = things_of(scene)
    assert [thing.name for thing in things] == [COCO_CLASSES[label] for label in scene.labels]
    assert np.allclose([thing.box for thing in things], scene.boxes / 128)


def same_boxes(said, scene, rows):
    return sorted(box.locs for box in said) == sorted(
        map(tuple, boxes_to_locs(scene.boxes[rows], 128, 128).tolist())
    )


def test_open_set_answers(codec, rng):
    """Every object of the classes asked for, once, and no other; some prompts have no answer."""
    counts = []
    for seed in range(60):
        scene = make_scene(seed)
        prompt, answer = make_tasks(codec)["detect"](rng, scene)
        asked = prompt.removeprefix("detect ").split(" ; ")
        assert 1 <= len(asked) == len(set(asked)) <= MAX_ASKED and set(asked) <= set(COCO_CLASSES)
        rows = [k for k, label in enumerate(scene.labels) if COCO_CLASSES[label] in asked]
        said = parse_answer(answer)
        assert same_boxes(said, scene, rows) and len(said) <= MAX_BOXES
        assert sorted(box.label for box in said) == sorted(COCO_CLASSES[scene.labels[k]] for k in rows)
        counts.append(len(said))
    assert min(counts) == 0 and max(counts) > 3


def test_mask_answers(codec, rng):
    """All objects of the class, from left to right, and their codes are those of their masks."""
    empty = 0
    for seed in range(120):
        scene = make_scene(seed)
        prompt, answer = make_tasks(codec)["segment"](rng, scene)
        name = prompt.removeprefix("segment ")
        rows = np.flatnonzero(scene.labels == COCO_CLASSES.index(name))
        said = parse_answer(answer)
        assert same_boxes(said, scene, rows) and len(said) <= MAX_MASKS
        assert [box.locs[1] for box in said] == sorted(box.locs[1] for box in said)
        for box, k in zip(said, sorted(rows, key=lambda k: scene.boxes[k, 0]), strict=True):
            mask = torch.from_numpy(crop(scene.owner == k, scene.boxes[k]))[None]
            assert box.label == name and codec.encode(mask)[0].tolist() == list(box.seg)
        empty += not said
    assert 0 < empty < 15


def test_held_out_lines(codec, rng):
    scene = make_scene(3, split="same")
    made = {line["kind"]: line for line in answer_lines(rng, scene, codec)}
    assert {"caption", "how many", "how many objects", "is there"} <= set(made)
    assert made["how many objects"]["suffix"] == str(len(scene.labels))
    assert list(made)[-1] == "segment" and made["segment"]["mask"]["size"] == [128, 128]


def test_codec_keeps_what_it_should(codec):
    """The shipped codec: masks of held-out scenes come back, through box and 16 codes."""
    ious = []
    for seed in range(40):
        scene: Scene = make_scene(seed, split="same")
        for k, box in enumerate(scene.boxes):
            mask = scene.owner == k
            back = codec.decode(codec.encode(torch.from_numpy(crop(mask, box))[None]))[0].numpy()
            back = paste_mask(back, box, 128, 128)
            ious.append(mask_iou(mask, back))
    assert np.mean(ious) > 0.85

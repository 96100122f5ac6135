"""Training data from files: augmentation, COCO instances, JSON lines, boxes in text, the converters."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, write_jsonl
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from model.decoding.boxes import (
    ParsedBox,
    areas,
    boxes_to_locs,
    format_answer,
    locs_to_boxes,
    parse_answer,
)
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.image import square, to_network
from model.io.tokenizer import LOCS, Tokenizer
from train import convert, fit
from train.data.augment import FILL, MIN_KEPT, augment, flip, jitter, rescale
from train.data.coco import CocoDetections, CocoIndex, read_records
from train.data.jsonl import JsonlPairs, is_jsonl, read_lines
from train.data.samples import answer_sample
from train.data.targets import closed_set_target
from train.measures import read_coco

CLASSES = ("cat", "dog", "traffic light", "bird")
LANGUAGE = ClosedSet((2, 500, 600, 108), 1000, 7, 1, CLASSES, groups=6)
WIDTH, HEIGHT, SIZE = 90, 60, 32
RED, BLUE = (255, 0, 0), (0, 0, 255)


def painted(boxes, colours, size=(WIDTH, HEIGHT)):
    """A white image with a rectangle of whole pixels for each box."""
    image = Image.new("RGB", size, "white")
    for (x0, y0, x1, y1), colour in zip(np.asarray(boxes, int).tolist(), colours, strict=True):
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    return image


def find(image, colour):
    """The box of all pixels of a colour, or None."""
    y, x = (np.asarray(image) == colour).all(-1).nonzero()
    return [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else None


# Augmentation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["flip", "rescale"])
def test_boxes_move_with_pixels(step):
    """The painted rectangles are found where the boxes are; those dropped show less than the stated share."""
    dropped = cut = outside = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        low = rng.integers(0, (35, 50), (2, 2)) + [[0, 0], [WIDTH // 2, 0]]  # side by side: neither hides one
        boxes = np.concatenate((low, low + rng.integers(2, 10, (2, 2))), axis=1).astype(np.float64)
        image, before = painted(boxes, (RED, BLUE)), boxes.copy()
        moved, new, kept = (
            (*flip(image, boxes), np.arange(2)) if step == "flip" else rescale(rng, image, boxes)
        )
        assert (boxes == before).all(), "the input is left as it was"
        assert new.shape == (len(kept), 4) and (step == "rescale" or moved.size == image.size)
        for row, colour in enumerate((RED, BLUE)):
            seen = find(moved, colour)
            share = 0 if seen is None else areas(np.array(seen)) / areas(boxes[row])
            if row in kept:
                assert seen == new[kept.tolist().index(row)].tolist() and share >= MIN_KEPT
            else:
                assert share < MIN_KEPT
            dropped, cut = dropped + (share < MIN_KEPT), cut + (MIN_KEPT <= share < 1)
        outside += find(moved, FILL) is not None
    assert (min(dropped, cut, outside) > 5) == (step == "rescale")


def test_augment():
    """Same generator, same result; colours stay near; sizes of 1 and no boxes are no error."""
    boxes = np.array([[10.0, 10, 30, 40], [50, 5, 88, 59]])
    image = painted(boxes, (RED, (30, 90, 60)))
    results = [augment(np.random.default_rng(seed // 2), image, boxes) for seed in range(40)]
    for (a, a_boxes, a_kept), (b, b_boxes, b_kept) in zip(results[::2], results[1::2], strict=True):
        assert a.tobytes() == b.tobytes() and (a_boxes == b_boxes).all() and (a_kept == b_kept).all()
    assert len({a.tobytes() for a, *_ in results}) > 10
    for seed in range(20):
        rng = np.random.default_rng(seed)
        grey = np.asarray(jitter(rng, Image.new("RGB", (4, 4), FILL)))
        assert np.ptp(grey, axis=2).max() == 0 and 90 < grey.min() <= grey.max() < 160
        red = np.asarray(jitter(rng, Image.new("RGB", (4, 4), RED)))[0, 0].astype(int)
        assert red[0] > 150 and red[1:].max() < 60
        shown, none, kept = augment(rng, Image.new("RGB", (1, 1)), np.zeros((0, 4)))
        assert min(shown.size) >= 1 and none.shape == (0, 4) and kept.shape == (0,)


# COCO -------------------------------------------------------------------------------------------------------


def instances(**changes):
    """Three images, the second without objects; ids with gaps and out of order, as COCO's are."""
    data = dict(
        images=[
            dict(id=70, file_name="a.png", width=WIDTH, height=HEIGHT),
            dict(id=5, file_name="b.png", width=40, height=40),
            dict(id=9, file_name="sub/c.png", width=50, height=80.0),
        ],
        categories=[dict(id=90, name="bird"), dict(id=2, name="traffic light"), dict(id=13, name="cat")],
        annotations=[
            dict(id=1, image_id=9, category_id=90, bbox=[5, 5, 100, 10], segmentation=[[1, 2, 3]]),  # cut
            dict(id=2, image_id=70, category_id=2, bbox=[10, 20, 30, 30], iscrowd=0),
            dict(id=3, image_id=70, category_id=13, bbox=[50.5, 0, 20.25, 59]),
            dict(id=4, image_id=9, category_id=2, bbox=[0, 0, 9, 9], iscrowd=1),
            dict(id=5, image_id=9, category_id=2, bbox=[0, 0, 9, 0]),
            dict(id=6, image_id=9, category_id=2, bbox=[60, 0, 9, 9]),  # beside the image
            dict(id=7, image_id=9, category_id=2, bbox=[1, float("nan"), 9, 9]),
            dict(id=8, image_id=9, category_id=13, bbox=[-10, -5, 20, 20]),
        ],
    )
    return data | changes


@pytest.fixture
def folder(tmp_path):
    """instances.json and its images, each of noise of its own."""
    (tmp_path / "images/sub").mkdir(parents=True)
    for seed, record in enumerate(instances()["images"]):
        noise = np.random.default_rng(seed).integers(0, 256, (int(record["height"]), record["width"], 3))
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "images" / record["file_name"])
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    return tmp_path


def test_index(folder):
    """Categories by id whatever their order; crowd and degenerate boxes counted; all in shared memory."""
    index = CocoIndex.read(folder / "instances.json", folder / "images")
    assert index.classes == ("traffic light", "cat", "bird") and index.category_ids == (2, 13, 90)
    assert (index.skipped_crowd, index.skipped_degenerate, len(index)) == (1, 3, 3)
    assert [index.name(i) for i in range(3)] == ["a.png", "b.png", "sub/c.png"]
    assert index.image_ids.tolist() == [70, 5, 9]
    assert index.sizes.tolist() == [[WIDTH, HEIGHT], [40, 40], [50, 80]]
    objects = [[array.tolist() for array in index.objects(i)] for i in range(3)]
    assert objects[0] == [[[10, 20, 40, 50], [50.5, 0, 70.75, 59]], [0, 1]]
    assert objects[1] == [[], []] and index.objects(1)[0].shape == (0, 4)
    assert objects[2] == [[[5, 5, 50, 15], [0, 0, 10, 15]], [2, 1]]
    for tensor in (index.image_ids, index.sizes, index.offsets, index.boxes, index.labels, index.names):
        assert tensor.is_shared()


def broken(key, row, **changes):
    """The file with a record changed; None takes a field away."""
    data = instances()
    changed = data[key][row] | changes
    data[key][row] = {name: value for name, value in changed.items() if value is not None}
    return data


BAD_FILES = {
    "not JSON": "{",
    "no 'categories' list": [],
    "no 'annotations' list": {"images": [], "categories": []},
    "has no images": instances(images=[]),
    "99 categories": instances(categories=[dict(id=i, name=str(i)) for i in range(99)]),
    "two entries of 'images' have the id 5": broken("images", 0, id=5),
    "two entries of 'annotations' have the id 2": broken("annotations", 0, id=2),
    "two entries of 'categories' have the id 90": broken("categories", 1, id=90),
    "no whole number as id": broken("images", 0, id=None),
    "annotation 2 has the image_id 71": broken("annotations", 1, image_id=71),
    "annotation 2 has the category_id 1,": broken("annotations", 1, category_id=1),
    "annotation 3 has the bbox [1, 2, 3]": broken("annotations", 2, bbox=[1, 2, 3]),
    "annotation 3 has the bbox None": broken("annotations", 2, bbox=None),
    "image 5 has the width None": broken("images", 1, width=None),
    "image 5 has the height 0": broken("images", 1, height=0),
    "image 5 has no file_name": broken("images", 1, file_name=None),
    "'/etc/a.png' leaves": broken("images", 1, file_name="/etc/a.png"),
    "'sub/../../a.png' leaves": broken("images", 1, file_name="sub/../../a.png"),
    "category 13 has no name": broken("categories", 2, name=None),
}


ONLY_TRAINING = ("99 categories", "image 5 has the width None")  # evaluation has no limit and needs no sizes


@pytest.mark.parametrize(
    ("read", "message"),
    [(CocoIndex.read, message) for message in BAD_FILES]
    + [(read_coco, message) for message in BAD_FILES if message not in ONLY_TRAINING],
)
def test_bad_instances(tmp_path, read, message):
    """Training and evaluation complain in the same words."""
    file = tmp_path / "bad.json"
    bad = BAD_FILES[message]
    file.write_text(bad if isinstance(bad, str) else json.dumps(bad))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(file)
    assert "bad.json" in str(error.value)


def test_records(folder):
    """What other readers take besides: segmentations and areas as they are, annotations without boxes."""
    file = folder / "instances.json"
    categories, images, annotations = read_records(file, outlines=True)
    assert (
        list(categories) == [90, 2, 13] and list(images) == [70, 5, 9] and list(annotations) == [*range(1, 9)]
    )
    assert images[9]["height"] == 80 and type(images[9]["height"]) is int
    assert annotations[1]["segmentation"] == [[1, 2, 3]] and annotations[4]["iscrowd"] == 1
    assert "segmentation" not in read_records(file)[2][1]
    file.write_text(json.dumps(broken("annotations", 3, bbox=None)))  # a crowd
    with pytest.raises(ValueError, match="annotation 4 has the bbox None"):
        read_records(file)
    assert "bbox" not in read_records(file, boxes=False)[2][4]


@pytest.mark.parametrize("what", ["--dry-run", "--steps 1 --batch-size 2 --workers 0 --no-amp --device cpu"])
def test_training_reads_the_file_once(folder, monkeypatch, what):
    """For the classes of the model, and for the samples: it may have gigabytes."""
    read, calls = CocoIndex.read, []
    monkeypatch.setattr(
        CocoIndex, "read", lambda *args, **options: calls.append(args) or read(*args, **options)
    )
    data = ["--model", "nano", "--data", str(folder / "instances.json"), "--out", str(folder / "run")]
    assert fit.train(fit.arguments([*data, *what.split()])) == 0 and len(calls) == 1


def detections(folder, **options):
    index = CocoIndex.read(folder / "instances.json", folder / "images")
    return CocoDetections(index, folder / "images", LANGUAGE, [2, 0, 3], SIZE, **options)


def test_closed_set_samples(folder):
    """Text, labels and weights line up with the target; pixels are those that detection feeds."""
    data = detections(folder, seed=3)
    prompt, sample = LANGUAGE.prompt, data[11, 0]
    boxes = np.array([[10, 20, 40, 50], [50.5, 0, 70.75, 59]])
    target = closed_set_target(
        np.random.default_rng([3, 11]), boxes, np.array([2, 0]), WIDTH, HEIGHT, LANGUAGE
    )
    assert list(sample) == ["image", "text", "labels", "weights", "prefix_len"]
    text, labels, weights = (sample[name] for name in ("text", "labels", "weights"))
    last = len(prompt) - 1
    assert sample["prefix_len"].item() == len(prompt) and sample["prefix_len"].dtype == torch.int64
    assert text.shape == labels.shape == weights.shape == (len(prompt) + GROUP * LANGUAGE.groups,)
    assert (text.dtype, labels.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert text.tolist() == [*prompt, *target.inputs[:-1]]
    assert labels[last:].tolist() == target.tokens.tolist() and labels[-1] == LANGUAGE.eos
    assert weights[last:].tolist() == target.weights.tolist()
    assert not labels[:last].any() and not weights[:last].any()
    fed = (weights[last:-1] == 1).nonzero()[:, 0] + last  # real objects: what is predicted is fed next
    assert len(fed) == 10 and (labels[fed] == text[fed + 1]).all()
    with Image.open(folder / "images/a.png") as image:
        expected = to_network(square(image, SIZE))
    assert sample["image"].dtype == torch.uint8 and sample["image"].shape == (SIZE, SIZE, 3)
    assert torch.allclose(sample["image"].movedim(-1, 0) / 127.5 - 1, expected, atol=1e-6)
    assert (data[0, 1]["labels"][last:-1].unflatten(0, (-1, GROUP))[:, 4] == LANGUAGE.noise).all()


def test_augmented_boxes(tmp_path):
    """Tokens of an augmented sample point at their object's pixels; of more objects than G, G are drawn."""
    boxes = {2: [55, 20, 80, 50], 13: [10, 15, 35, 45]}  # by category: a red and a blue object, many times
    painted(list(boxes.values()), (RED, BLUE)).save(tmp_path / "a.png")
    annotations = [
        dict(id=i, image_id=70, category_id=c, bbox=[*boxes[c][:2], 25, 30])
        for i, c in enumerate([2, 13, 13, 2, 2, 13, 13, 2, 13])
    ]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(instances(images=instances()["images"][:1], annotations=annotations)))
    data = CocoDetections(CocoIndex.read(file), tmp_path, LANGUAGE, [2, 0, 3], 180, augment=True)
    counts = []
    for draw in range(40):
        sample = data[draw, 0]
        groups = sample["labels"][len(LANGUAGE.prompt) - 1 : -1].reshape(-1, GROUP).numpy()
        real = groups[groups[:, 4] != LANGUAGE.noise]
        counts.append(len(real))
        pixels = sample["image"].numpy().astype(int)
        for *locs, label in real:
            channel = {2: 0, 0: 2}[int(label) - LANGUAGE.class0]
            y, x = ((2 * pixels[..., channel] - pixels[..., 1] - pixels[..., 2 - channel]) > 150).nonzero()
            box = locs_to_boxes(np.array(locs) - LANGUAGE.loc0, 180, 180)
            assert np.abs(box - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 2
    assert set(counts) <= {0, 4, 5, 6} and counts.count(6) > 15 and min(counts) < 6


def test_samples_depend_on_the_key_alone(folder):
    """With two workers as with none; another draw or seed is another sample."""
    data, keys = detections(folder, augment=True), [(draw, draw % 3) for draw in range(9)]
    alone = [data[key] for key in keys]
    for sample, other in zip(
        alone, DataLoader(data, batch_size=None, sampler=keys, num_workers=2), strict=True
    ):
        assert all(torch.equal(sample[name], other[name]) for name in sample)
    assert not torch.equal(data[0, 0]["text"], data[1, 0]["text"])
    assert not torch.equal(data[0, 0]["text"], detections(folder, augment=True, seed=1)[0, 0]["text"])


def test_detections_refuse(folder):
    """Class tables that do not fit, images that are missing or of another size than annotated."""
    index = CocoIndex.read(folder / "instances.json")
    for label_of in ([0, 1], [0, 1, 4], [0, -1, 2]):
        with pytest.raises(ValueError, match=r"must have 3 entries|'cat'.*-1|'bird'.*4"):
            CocoDetections(index, folder, LANGUAGE, label_of, SIZE)
    data = detections(folder)
    assert len(data) == 3 and data.name(2) == "sub/c.png"
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images/a.png")
    with pytest.raises(ValueError, match=r"a\.png has 60x90 pixels.*90x60"):
        data[0, 0]
    (folder / "images/b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png: no such file"):
        data[0, 1]
    with pytest.raises(ValueError, match="no such folder"):
        CocoIndex.read(folder / "instances.json", folder / "elsewhere")


# JSON lines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


CAT = dict(image="a.png", prefix="caption en", suffix="a cat")
LIGHT = dict(
    image="sub/c.png", prefix="detect traffic light", suffix="<loc0000><loc0001><loc0002><loc1023> bé"
)


def test_pairs(folder, tokenizer):
    """Text and labels line up; blank lines and other keys do no harm; answers are drawn from a list."""
    several = dict(image="b.png", prefix="", suffix=["cow", "a long traffic light", ""])
    file = write_jsonl(
        folder / "train.jsonl",
        "",
        CAT | dict(id=7),
        "  ",
        json.dumps(LIGHT, ensure_ascii=False) + "\r",
        several,
    )
    data = JsonlPairs(file, folder / "images", tokenizer, SIZE)
    assert len(data) == 3 and [data.name(i) for i in range(3)] == ["a.png", "sub/c.png", "b.png"]
    for item, record in enumerate((CAT, LIGHT)):
        sample = data[5, item]
        prompt, answer = tokenizer.encode_prompt(record["prefix"]), tokenizer.encode(record["suffix"])
        assert sample["text"].tolist() == prompt + answer and sample["prefix_len"] == len(prompt)
        before = [0] * (len(prompt) - 1)
        assert sample["labels"].tolist() == before + answer + [tokenizer.eos]
        assert sample["weights"].tolist() == before + [1] * (len(answer) + 1)
        assert sample["image"].shape == (SIZE, SIZE, 3) and sample["labels"].dtype == torch.int64
    seen = {tokenizer.decode(data[draw, 2]["text"].tolist()[2:]) for draw in range(30)}
    assert seen == set(several["suffix"])
    texts = [data[draw, item]["text"] for item in range(3) for draw in range(30)]
    assert data.text_tokens == max(map(len, texts))
    assert data.offsets.is_shared()


def test_pairs_depend_on_the_key_alone(folder, tokenizer):
    """With two workers as with none; augmentation changes colours and nothing else."""
    file = write_jsonl(folder / "train.jsonl", CAT, LIGHT | dict(suffix=["x", "y", "z"]))
    plain, data = (JsonlPairs(file, folder / "images", tokenizer, SIZE, augment=on) for on in (False, True))
    keys = [(draw, draw % 2) for draw in range(12)]
    for key, other in zip(keys, DataLoader(data, batch_size=None, sampler=keys, num_workers=2), strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in data[key].items())
    changed = [not torch.equal(data[draw, 0]["image"], plain[draw, 0]["image"]) for draw in range(20)]
    assert any(changed) and not all(changed)
    assert all(torch.equal(data[draw, 0]["text"], plain[draw, 0]["text"]) for draw in range(20))


BAD_LINES = {
    "not JSON (": "{'image': 1}",
    "not a JSON object: [1]": [1],
    "no 'image'": dict(prefix="", suffix=""),
    "no 'prefix'": dict(image="a.png", suffix=""),
    "no 'suffix'": dict(image="a.png", prefix=""),
    "'image' must be text, not 3": CAT | dict(image=3),
    "'prefix' must be text, not None": CAT | dict(prefix=None),
    "'suffix' must be text, or a list of texts, not {": CAT | dict(suffix={}),
    "'suffix' must be text, or a list of texts, not []": CAT | dict(suffix=[]),
    "'suffix' must be text, or a list of texts, not ['a', 1]": CAT | dict(suffix=["a", 1]),
    "'image' is empty": CAT | dict(image=""),
    "'../secret.png' lies outside": CAT | dict(image="../secret.png"),
    "'sub/../../secret.png' lies outside": CAT | dict(image="sub/../../secret.png"),
    "'link.png' lies outside": CAT | dict(image="link.png"),
    "lies outside the image folder": CAT | dict(image=str(Path.cwd() / "a.png")),
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines(folder, tokenizer, message):
    """Found before training, with file and line; outside paths only where they are allowed."""
    Image.new("RGB", (9, 9), BLUE).save(folder / "secret.png")
    (folder / "images/link.png").symlink_to(folder / "secret.png")
    file = write_jsonl(folder / "train.jsonl", CAT, "", BAD_LINES[message], CAT)
    with pytest.raises(ValueError, match=re.escape(f"{file}:3: ") + ".*" + re.escape(message)):
        JsonlPairs(file, folder / "images", tokenizer, SIZE)
    if "secret" in message or "link" in message:
        data = JsonlPairs(file, folder / "images", tokenizer, SIZE, allow_outside=True)
        assert (data[0, 1]["image"] == torch.tensor(BLUE)).all()


def test_no_lines(folder, tokenizer):
    with pytest.raises(ValueError, match="has no lines"):
        JsonlPairs(write_jsonl(folder / "train.jsonl", "", " "), folder / "images", tokenizer, SIZE)


def test_is_jsonl(folder):
    """By content: COCO files on one line or many are none, broken first lines of pairs are."""
    for text, expected in (
        (json.dumps(CAT) + "\n" + json.dumps(CAT), True),
        ("\n\n" + json.dumps(dict(id=3) | CAT), True),
        ('{"image": "a.png", prefix: "x"}\n', True),
        (json.dumps(dict(label="cat", mask="m.png", image="a.png")), True),  # a line of masks
        (json.dumps(dict(label="cat", mask="m.png")), True),
        (json.dumps(instances()), False),
        (json.dumps(instances(), indent=2), False),
        (json.dumps([CAT]), False),
        ("", False),
        ("\x00\xff", False),
    ):
        (folder / "some.txt").write_text(text, encoding="latin-1")
        assert is_jsonl(folder / "some.txt") == expected, text


# Boxes in text ----------------------------------------------------------------------------------------------

A, B = "<loc0010><loc0020><loc0030><loc0040>", "<loc0000><loc0000><loc1023><loc1023>"
SEG = "".join(f"<seg{i:03d}>" for i in range(112, 128))
IN_A, IN_B = (10, 20, 30, 40), (0, 0, 1023, 1023)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("no boxes here", []),
        (f"{A} cat", [(IN_A, "cat")]),
        (f"{A} traffic light ; {B} hot dog", [(IN_A, "traffic light"), (IN_B, "hot dog")]),
        (f"{A}cat;{A}cat;", [(IN_A, "cat"), (IN_A, "cat")]),
        (f"{A} ; {B} dog", [(IN_A, ""), (IN_B, "dog")]),
        (f"{A}{B} dog", [(IN_A, ""), (IN_B, "dog")]),
        (f"{A[:27]} cat ; {B} dog", [(IN_B, "dog")]),
        (f"{A} cat ; {B[:18]}", [(IN_A, "cat")]),
        (f"so ; {A} cat <unused3> x ; y ; {B} dog<eos>", [(IN_A, "cat"), (IN_B, "dog")]),
        (f"<loc1024>{B[:27]} cat ; {A} dog", [(IN_A, "dog")]),
        (f"{A} cat\n", [(IN_A, "cat")]),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text) == [ParsedBox(locs, (), label) for locs, label in expected]


def test_parse_masks():
    """Sixteen codes are a mask; fewer are none, and the box and its label stay."""
    assert parse_answer(f"{A}{SEG} cat ; {B}{SEG}") == [
        ParsedBox(IN_A, tuple(range(112, 128)), "cat"),
        ParsedBox(IN_B, tuple(range(112, 128)), ""),
    ]
    assert parse_answer(f"{A}{SEG[8:]} cat") == [ParsedBox(IN_A, (), "cat")]
    assert parse_answer(f"{A}{SEG[8:]}<seg128> cat") == [ParsedBox(IN_A, (), "cat")]


def test_format_answer():
    """Read back as written; a box at the edge, or beyond it, has no <loc1024>."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        boxes = rng.uniform(-5, 105, (int(rng.integers(0, 6)), 4))
        boxes[: len(boxes) // 2, 2:] = 100, 50
        labels = [CLASSES[i] for i in rng.integers(0, len(CLASSES), len(boxes))]
        text = format_answer(boxes, labels, 100, 50)
        assert "<loc1024>" not in text
        locs = boxes_to_locs(boxes, 100, 50).tolist()
        assert parse_answer(text) == [ParsedBox(tuple(q), (), c) for q, c in zip(locs, labels, strict=True)]
    assert format_answer(np.array([[4, 1, 8, 2]]), ["hot dog"], 8, 2) == (
        "<loc0512><loc0512><loc1023><loc1023> hot dog"
    )
    assert format_answer(np.array([[4, 1, 8, 2]]), [""], 8, 2).endswith(">")
    with pytest.raises(ValueError, match="'a;b'"):
        format_answer(np.zeros((1, 4)), ["a;b"], 1, 1)


# Converters -------------------------------------------------------------------------------------------------


def test_round_trip(folder, capsys):
    """COCO -> lines -> COCO: names, sizes and classes are the same, boxes are within half a location."""
    source, lines, back = folder / "instances.json", folder / "out.jsonl", folder / "back.json"
    convert.main(["coco-to-jsonl", "--data", str(source), "--out", str(lines)])
    assert (
        "2 lines of 3 images; 1 images without a line, skipped 1 crowd and 3 deg" in capsys.readouterr().out
    )
    assert is_jsonl(lines) and "<loc1024>" not in lines.read_text()
    convert.main(
        ["jsonl-to-coco", "--data", str(lines), "--images", str(folder / "images"), "--out", str(back)]
    )
    assert "4 boxes of 3 categories in 2 images; skipped 0 boxes" in capsys.readouterr().out
    before, after = CocoIndex.read(source), CocoIndex.read(back, folder / "images")
    assert after.classes == ("bird", "cat", "traffic light")
    for row, old in enumerate((0, 2)):  # the image without objects has no line
        assert after.name(row) == before.name(old) and after.sizes[row].equal(before.sizes[old])
        (boxes, labels), (old_boxes, old_labels) = after.objects(row), before.objects(old)
        assert [after.classes[i] for i in labels] == [before.classes[i] for i in old_labels]
        bins = before.sizes[old].repeat(2).numpy() / LOCS
        assert (np.abs(boxes - old_boxes) <= bins / 2 + 1e-9).all()


@pytest.mark.parametrize("most", [None, 1, 2])
def test_absent_classes(folder, most):
    """Each class of an image is asked for once, with N others, at most K a line; each answers for its own."""
    lines = folder / "out.jsonl"
    options = ["coco-to-jsonl", "--data", str(folder / "instances.json"), "--absent", "1"]
    options += ["--classes-per-line", str(most)] if most else []
    convert.main([*options, "--out", str(lines)])
    asked = {}
    for _, record in read_lines(lines, folder / "images"):
        names = record["prefix"].removeprefix("detect ").split(" ; ")
        assert len(names) <= (most or 3) and {box.label for box in parse_answer(record["suffix"])} <= set(
            names
        )
        asked.setdefault(record["image"], []).extend(names)
    assert sorted(asked["a.png"]) == sorted(asked["sub/c.png"]) == ["bird", "cat", "traffic light"]
    assert len(asked["b.png"]) == 1
    text = lines.read_text()
    convert.main([*options, "--out", str(lines), "--force"])
    assert lines.read_text() == text
    orders = set()
    for seed in range(8):
        convert.main([*options, "--out", str(lines), "--force", "--seed", str(seed)])
        orders.add(lines.read_text())
    assert len(orders) > 1


def test_lines_to_coco(folder, capsys):
    """Several lines of an image become one; what is no box with a label is counted."""
    suffix = f"{A} cat ; {B} ; <loc0005> dog ; <loc0009><loc0001><loc0009><loc0004> cat"
    file = write_jsonl(
        folder / "train.jsonl", CAT | dict(suffix=suffix), LIGHT, CAT | dict(suffix=[f"{B} dog", "x"]), CAT
    )
    out = folder / "back.json"
    convert.main(
        ["jsonl-to-coco", "--data", str(file), "--images", str(folder / "images"), "--out", str(out)]
    )
    assert (
        "3 boxes of 3 categories in 2 images; skipped 1 boxes without a label, 1 degenerate ones and 1 loc"
        in (capsys.readouterr().out)
    )
    data = json.loads(out.read_text())
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(1, "bé"), (2, "cat"), (3, "dog")]
    assert [(a["image_id"], a["category_id"]) for a in data["annotations"]] == [(1, 2), (2, 1), (1, 3)]
    assert data["annotations"][2]["bbox"] == [0, 0, WIDTH, HEIGHT]


def test_converter_errors(folder, monkeypatch, capsys):
    """One line, exit code 1, nothing written and nothing overwritten."""
    source, out = str(folder / "instances.json"), folder / "out.jsonl"
    semicolon = folder / "semicolon.json"
    semicolon.write_text(json.dumps(broken("categories", 0, name="a;b")))
    bad = write_jsonl(folder / "train.jsonl", CAT, "{")
    back = ["jsonl-to-coco", "--images", str(folder / "images"), "--out", str(out), "--data"]
    forth = ["coco-to-jsonl", "--out", str(out), "--data"]
    for command, message in (
        ([*forth, str(folder / "none.json")], "none.json"),
        ([*forth, str(bad)], "not a COCO annotation file"),
        ([*forth, str(semicolon)], "'a;b'"),
        ([*forth, source, "--absent", "-1"], "--absent"),
        ([*forth, source, "--classes-per-line", "0"], "argument --classes-per-line: "),
        ([*forth, source, "--abs", "1"], "unrecognized arguments: --abs"),
        ([*forth[:2], str(folder / "no/out.jsonl"), "--data", source], "no such folder"),
        ([*forth[:2], source, "--data", source], "exists"),
        ([*back, str(bad)], "train.jsonl:2: not JSON"),
        (
            [*back, str(write_jsonl(folder / "images" / "train.jsonl", CAT | dict(image="x.png")))],
            "x.png: no such file",
        ),
    ):
        code, printed, complaint = call(monkeypatch, capsys, convert, *command)
        assert message in complaint and not printed and not out.exists() and not list(folder.glob(".out*"))
        if "usage: " not in complaint:  # argparse's own
            assert code == 1 and complaint.startswith("convert.py: ") and complaint.count("\n") == 1
    assert json.loads(Path(source).read_text())["images"]


def test_an_image_without_objects():
    """All its answer is noise."""
    target = closed_set_target(np.random.default_rng(0), np.zeros((0, 4)), np.zeros(0, int), 9, 9, LANGUAGE)
    sample = answer_sample(np.zeros((9, 9, 3), np.uint8), LANGUAGE.prompt, target)
    assert sample["weights"].sum() == 0.5 * LANGUAGE.groups + 1

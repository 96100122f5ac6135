"""Open-set detection and segmentation: what is read off answers, how it is scored, and the two programs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import call, picture
from PIL import Image

from infer import detect, evaluate, segment
from infer.lib import options as loading
from model.config import COCO_CLASSES, PaliGemmaConfig, TextConfig, VisionConfig
from model.decoding.batches import network_images
from model.decoding.detections import KEEP_ALL, Selection
from model.decoding.generate import Prompter, collect_answers, generate
from model.decoding.masks import from_rle, paste_mask
from model.decoding.open_set import OpenSetDetector, class_names, score_objects
from model.io.hub import CODEC, NANO
from model.io.tokenizer import Tokenizer

A, B = "<loc0000><loc0128><loc0512><loc0640>", "<loc0256><loc0256><loc1023><loc1023>"
SEGS = "".join(f"<seg{code:03d}>" for code in range(16))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(NANO)


def read(tokenizer, text, asked, p=None):
    """The objects that are read off an answer: label, score, first location. p: probability of each piece."""
    tokens = tokenizer.encode(text)
    p = p or {}
    log_p = [math.log(p.get(tokenizer.decode([token]), 0.25)) for token in tokens]
    return [
        (one.class_id, round(one.score, 4), one.box.locs[1])
        for one in score_objects(tokenizer, tokens, log_p, asked)
    ]


# Answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked", "found"),
    [
        (f"{A} cat ; {B} dog", ["dog", "cat"], [(1, 0.25, 128), (0, 0.25, 256)]),
        (f"{A} traffic light", ["traffic light"], [(0, 0.25, 128)]),
        (f"{A} Cat", ["cat"], [(0, 0.25, 128)]),
        (f"{A}; {B} dog", ["cat", "dog"], [(1, 0.25, 256)]),  # a missing label, and no way to tell
        (f"{A}; {B} dog", ["dog"], [(0, 0.25, 128), (0, 0.25, 256)]),  # only one class it can be
        (f"{A} zebra ; {B} dog", ["cat", "dog"], [(1, 0.25, 256)]),  # nobody asked for a zebra
        (f"{A} cat ; {B[:27]}", ["cat"], [(0, 0.25, 128)]),  # an unfinished box
        (f"{A} cat ; {A} cat", ["cat"], [(0, 0.25, 128), (0, 0.25, 128)]),  # twice: suppression's business
        (f"{A} teddy", ["teddy bear", "bear"], []),  # an unfinished label
        (f"{A}{SEGS} cat", ["cat"], [(0, 0.25, 128)]),
        ("a cat", ["cat"], []),
        ("", ["cat"], []),
    ],
)
def test_answers(tokenizer, text, asked, found):
    assert read(tokenizer, text, asked) == found


def test_score_is_the_geometric_mean_of_the_labels_tokens(tokenizer):
    """Neither the box's tokens nor the separators count."""
    p = {" traffic": 0.9, " light": 0.4, " cat": 0.8, "cat": 0.8, "traffic": 0.9, "light": 0.4}
    found = read(tokenizer, f"{A} traffic light ; {B} cat", ["cat", "traffic light"], p)
    assert found == [(1, 0.6, 128), (0, 0.8, 256)]


def test_score_without_a_label_is_that_of_the_box(tokenizer):
    p = {f"<loc{n}>": x for n, x in (("0000", 0.5), ("0128", 0.5), ("0512", 0.5), ("0640", 0.08))}
    ((_, score, _),) = read(tokenizer, A, ["cat"], p)
    assert score == pytest.approx((0.5**3 * 0.08) ** 0.25, abs=1e-4)


# Detectors --------------------------------------------------------------------------------------------------


class Said:
    """Stands in for Prompter: canned answers by prompt; remembers what it was asked."""

    def __init__(self, tokenizer, by_prompt, p=0.9):
        self.model, self.by_prompt, self.p = SimpleNamespace(tokenizer=tokenizer), by_prompt, p
        self.asked, self.max_tokens = [], 50

    def __call__(self, images, asked):
        self.asked += asked
        tokens = [self.model.tokenizer.encode(self.by_prompt.get(prompt, "")) for _, prompt in asked]
        return [(row, [math.log(self.p)] * len(row)) for row in tokens]


def detector(tokenizer, by_prompt, classes, per_call, selection=KEEP_ALL):
    return OpenSetDetector(Said(tokenizer, by_prompt), classes, per_call, selection)


def test_classes_are_asked_for_a_few_at_a_time(tokenizer):
    """Labels are numbers among all classes; every image gets every prompt, and its own answers."""
    made = detector(
        tokenizer, {"detect cat ; dog": f"{A} dog", "detect bus": f"{B} bus"}, ["cat", "dog", "bus"], 2
    )
    wide, high = made([Image.new("RGB", (200, 100)), Image.new("RGB", (100, 200))])
    assert made.prompter.asked == [
        (i, prompt) for i in (0, 1) for prompt in ("detect cat ; dog", "detect bus")
    ]
    assert wide.class_ids.tolist() == high.class_ids.tolist() == [1, 2]
    assert wide.labels == high.labels == ["dog", "bus"]
    assert wide.boxes.tolist() == [[25, 0, 125, 50], [50, 25, 200, 100]]
    assert high.boxes[0].tolist() == [12.5, 0, 62.5, 100] and wide.scores.tolist() == pytest.approx(
        [0.9, 0.9]
    )
    assert wide.tokens.tolist() == tokenizer.encode(f"{A} dog") + tokenizer.encode(f"{B} bus")


def test_nothing_found(tokenizer):
    (found,) = detector(tokenizer, {}, ["cat", "dog"], 1)([Image.new("RGB", (20, 10))])
    assert found.boxes.shape == (0, 4) and found.class_ids.dtype == np.int64 and not len(found.scores)


def test_suppression_is_over_all_calls(tokenizer):
    """The same box twice in an answer, and once more from another call for the same object."""
    said = {"detect cat": f"{A} cat ; {A} cat", "detect dog": f"{A} dog"}
    made = detector(tokenizer, said, ["cat", "dog"], 1, Selection(nms_iou=0.5))
    (found,) = made([Image.new("RGB", (100, 100))])
    assert found.labels == ["cat", "dog"]


def test_masks(tokenizer, codec):
    """Codes become a mask inside their box, in pixels of the picture; an answer without codes is none."""
    said = {"segment cat": f"{A}{SEGS} cat ; {B} cat", "segment dog": f"{B}{SEGS[:-8]} dog"}
    made = OpenSetDetector(Said(tokenizer, said), ["cat", "dog"], codec=codec)
    (found,) = made([Image.new("RGB", (200, 100))])
    assert found.labels == ["cat"] and found.boxes.tolist() == [[25, 0, 125, 50]]
    right = paste_mask(codec.decode(torch.arange(16)[None])[0].numpy(), found.boxes[0], 200, 100)
    assert len(found.masks) == 1 and np.array_equal(found.masks[0], right) and right.any()


def test_prompter_answers_as_generate_does(model):
    """Prompts of several images in batches of their own: each answer is the one it would be alone."""
    from model import PaliGemma

    loaded, words = PaliGemma.from_pretrained(str(model), dtype=torch.float32), Tokenizer(model)
    images = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (64, 64), "red")]
    asked = [
        (0, "detect cat"),
        (1, "caption en"),
        (0, "answer en how many dogs are there?"),
        (1, "detect cat"),
    ]
    said = Prompter(loaded, 12)(images, asked)
    for (i, prompt), (tokens, log_p) in zip(asked, said, strict=True):
        image_tokens = loaded.encode(network_images(loaded, [images[i]]))
        ((alone, its_log_p),) = collect_answers(
            loaded, generate(loaded, image_tokens, [words.encode_prompt(prompt)], 12)
        )
        assert tokens == alone and log_p == pytest.approx(its_log_p, abs=1e-4)
        assert len(log_p) == len(tokens) <= 12 and loaded.config.eos not in tokens


# Names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config():
    vision = VisionConfig(image_size=32, patch_size=16, width=16, layers=1, heads=2, mlp=16)
    text = TextConfig(
        version=2, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, query_scale=1.0, vocab_size=64
    )
    return PaliGemmaConfig(vision, text, image_token=63)


def test_class_names(config):
    assert class_names(" cat ;traffic   light; Cat;", config) == ("cat", "traffic light")
    assert class_names(["cat", "traffic light", "Cat"], config) == ("cat", "traffic light")
    assert class_names(" all ", config) == COCO_CLASSES and class_names(["all"], config) == ("all",)
    assert class_names("unicorn", config) == ("unicorn",)
    for text, words in (
        (" ; ", "names no class"),
        ("a<loc0001>", "one of ; < >"),
        ([], "names no class"),
        (["a;b"], "a;b"),
    ):
        with pytest.raises(ValueError, match=words):
            class_names(text, config)
    with pytest.raises(ValueError, match="'zebras' is none of the 80 .* did you mean 'zebra'"):
        class_names("cat ; zebras", config.override(open_vocabulary=False))


# The programs -----------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, program, *argv):
    code, out, err = call(monkeypatch, capsys, program, *argv)
    return code, out, err.splitlines()


def test_detect_by_name(monkeypatch, capsys, model, here, tokenizer):
    """Writes what closed-set detection writes; class_id counts the classes asked for."""
    ask = Said(tokenizer, {"detect cat ; traffic light": f"{A} traffic light ; {B} cat ; {B} dog"})
    monkeypatch.setattr(loading, "Prompter", lambda *_: ask)
    monkeypatch.setattr("model.decoding.open_set.fitting_batch", lambda *_: 4)
    argv = "--image", picture(here / "a.png"), "--model", model, "--classes", "cat ; traffic light"
    code, out, err = run(monkeypatch, capsys, detect, *argv, "--json", "out.json", "--tokens")
    assert (code, err) == (0, [])
    (record,) = json.loads((here / "out.json").read_text())
    assert set(record) == {"image", "width", "height", "detections", "tokens"}
    found = {(d["label"], d["class_id"], d["score"]) for d in record["detections"]}
    assert found == {("cat", 0, 0.9), ("traffic light", 1, 0.9)}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--classes", "unicorn"], "unicorn"),
        (["--classes", ";"], "names no class"),
        (["--classes", "cat", "--groups", 3], "--groups"),
        (["--classes", "cat", "--early-stop", 0.5, 1], "--early-stop"),
        (["--classes", "cat", "--max-tokens", 100000], "positions"),
        (["--eos-offset", 1], "--eos-offset"),
        (["--temperature", -1], "temperature"),
    ],
)
def test_detect_mistakes(monkeypatch, capsys, model, here, options, word):
    argv = "--image", picture(here / "a.png"), "--model", model
    code, _, err = run(monkeypatch, capsys, detect, *argv, *options)
    assert code == 1 and len(err) == 1 and err[0].startswith("detect.py: ") and word in err[0]


def test_evaluate_by_name(monkeypatch, capsys, model, coco):
    """All classes, so many a call, through pycocotools."""
    monkeypatch.chdir(coco.parent)
    for i in range(3):
        picture(coco.parent / "images" / f"{i}.png", 128, 128, seed=i)
    argv = "--model", model, "--data", coco, "--json", "f.json"
    code, out, _ = run(
        monkeypatch, capsys, evaluate, *argv, "--classes", "all", "--classes-per-call", 40, "--max-tokens", 8
    )
    assert not code and "mAP 0.000" in out
    assert json.loads(Path("f.json").read_text())["instances"]["images"] == 3


def test_segment(monkeypatch, capsys, model, here, tokenizer):
    """A drawing, a picture of each mask, and run-length encodings that are the same."""
    said = {"segment cat": f"{A}{SEGS} cat", "segment hair drier": f"{B}{SEGS} hair drier"}
    ask = Said(tokenizer, said)
    monkeypatch.setattr(loading, "Prompter", lambda *_: ask)
    monkeypatch.setattr("model.decoding.open_set.fitting_batch", lambda *_: 4)
    argv = [
        "--image",
        picture(here / "a.png"),
        "--model",
        model,
        "--codec",
        NANO / CODEC,
        "--json",
        "out.json",
    ]
    argv += ["--classes", "cat ; hair drier"]
    code, out, err = run(monkeypatch, capsys, segment, *argv)
    assert (code, err) == (0, [])
    (record,) = json.loads((here / "out.json").read_text())
    names = {"a.png", "a.0-cat.png", "a.1-hair-drier.png"}
    assert {file.name for file in (here / "detections").iterdir()} == names
    for found in record["detections"]:
        mask = np.asarray(Image.open(here / found["mask"])) > 0
        assert mask.shape == (60, 90) and np.array_equal(from_rle(found["segmentation"]), mask)
        rows, columns = np.nonzero(mask)
        x0, y0, x1, y1 = found["box"]
        assert x0 - 1 <= columns.min() and columns.max() < x1 and y0 - 1 <= rows.min() and rows.max() < y1


def test_segment_needs_a_codec(monkeypatch, capsys, model, here):
    argv = "--image", picture(here / "a.png"), "--model", model, "--classes", "cat"
    for options, word in (([], "vae-oid.npz"), (["--codec", here / "a.png"], "a.png")):
        code, _, err = run(monkeypatch, capsys, segment, *argv, *options)
        assert code == 1 and len(err) == 1 and err[0].startswith("segment.py: ") and word in err[0]

"""Open-set detection and segmentation: what is read off answers, and how it is scored."""

import math

import numpy as np
import pytest
import torch
from helpers import BOX as A
from helpers import CODES as SEGS
from helpers import OTHER_BOX as B
from helpers import CannedAnswers
from PIL import Image

from model.config import COCO_CLASSES, PaliGemmaConfig, TextConfig, VisionConfig
from model.decoding.batches import network_images
from model.decoding.detections import KEEP_ALL, Selection
from model.decoding.generate import Prompter, collect_answers, generate
from model.decoding.masks import paste_mask
from model.decoding.open_set import OpenSetDetector, class_names, score_objects
from model.io.tokenizer import Tokenizer

# Answers ----------------------------------------------------------------------------------------------------


def read(tokenizer, text, asked, p=None):
    """The objects that are read off an answer: label, score, first location. p: probability of each piece."""
    tokens = tokenizer.encode(text)
    p = p or {}
    log_p = [math.log(p.get(tokenizer.decode([token]), 0.25)) for token in tokens]
    return [
        (one.class_id, round(one.score, 4), one.box.locs[1])
        for one in score_objects(tokenizer, tokens, log_p, asked)
    ]


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


def detector(tokenizer, by_prompt, classes, per_call, selection=KEEP_ALL):
    return OpenSetDetector(CannedAnswers(tokenizer, by_prompt), classes, per_call, selection)


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
    made = OpenSetDetector(CannedAnswers(tokenizer, said), ["cat", "dog"], codec=codec)
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

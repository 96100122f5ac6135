"""The Python API, on the shipped model: what the README shows, and what it refuses."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT, call
from PIL import Image, ImageOps

from infer import detect
from model import Detector
from model.config import BRANCHES, COCO_CLASSES
from model.decoding import detector as module
from model.decoding.closed_set import Answer
from model.decoding.detections import Detections, Selection
from model.decoding.masks import tight_box
from model.decoding.parallel import ParallelDecoder

EXAMPLE = ROOT / "media" / "example.png"
SEEN = ["wine glass", "kite", "person", "tennis racket", "car", "remote"]  # in it, by nano


@pytest.fixture(scope="module")
def nano():
    return Detector.from_pretrained("nano", device="cpu")


def equal(a: Detections, b: Detections) -> bool:
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "tokens"))
    return same and a.labels == b.labels and np.array_equal(a.class_ids, b.class_ids)


def alike(a: Detections, b: Detections) -> bool:
    """As decoded in batches of other sizes, which may change last digits, and a location by one bin."""
    near = np.allclose(a.boxes, b.boxes, rtol=0, atol=0.5) and np.allclose(a.scores, b.scores, atol=1e-3)
    return near and a.labels == b.labels


def test_an_image_in_every_form(nano):
    """A file by its path or name, a PIL image, a list of them: the same objects, best first."""
    found = nano(EXAMPLE)
    assert sorted(found.labels) == sorted(SEEN) and found.masks is None
    assert found.boxes.shape == (6, 4) and (np.diff(found.scores) <= 0).all() and found.scores.min() >= 0.6
    assert [nano.classes[c] for c in found.class_ids] == found.labels and nano.classes == COCO_CLASSES
    with Image.open(EXAMPLE) as image:
        width, height = image.size
        assert equal(nano(image), found) and equal(nano(str(EXAMPLE)), found)
        several = nano([image, EXAMPLE, str(EXAMPLE)])
    assert isinstance(several, list) and all(alike(one, found) for one in several) and nano([]) == []
    assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()


def test_mirrored_answer():
    """Edges of the image, which the last bin stands for, change sides; a sum has the groups of both."""
    locs = torch.tensor([[[0, 100, 500, 300], [7, 0, 1023, 1023]], [[2, 3, 4, 1022], [5, 512, 6, 1023]]])
    tokens = torch.cat((1000 + locs, torch.tensor([[[9], [8]], [[7], [6]]])), dim=-1)
    rest = [torch.rand(2, 2) for _ in range(3)]
    answer = Answer(tokens, locs, tokens[..., 4], *rest)
    mirrored = answer.mirrored(loc0=1000)
    other = [[[0, 724, 500, 924], [7, 0, 1023, 1023]], [[2, 2, 4, 1021], [5, 0, 6, 512]]]
    assert mirrored.locs.tolist() == other and torch.equal(mirrored.tokens[..., :4], 1000 + mirrored.locs)
    for name in ("labels", "scores", "noise", "live"):
        assert torch.equal(getattr(mirrored, name), getattr(answer, name))
    assert torch.equal(mirrored.tokens[..., 4], tokens[..., 4])
    back = mirrored.mirrored(loc0=1000)
    assert torch.equal(back.locs, locs) and torch.equal(back.tokens, tokens)
    both = answer + mirrored
    assert torch.equal(both.locs, torch.cat((locs, mirrored.locs), dim=1)) and both.scores.shape == (2, 4)


@pytest.mark.parametrize("decode", ["sequence", "parallel"])
def test_mirror(decode, nano):
    """Of a picture and of its mirror image the same is found; the plain reading is among the candidates."""
    detector = Detector(nano.model, Selection(0.3, 0.5), decode, mirror=True)
    with Image.open(EXAMPLE) as image:
        found, other = detector([image, ImageOps.mirror(image)])
        width = image.width
    y0, x0, y1, x1 = other.boxes.T[[1, 0, 3, 2]]
    assert np.allclose(found.boxes, np.stack((width - x1, y0, width - x0, y1), axis=1), atol=0.5)
    assert found.labels == other.labels and np.allclose(found.scores, other.scores, atol=1e-3)
    assert set(SEEN) <= set(found.labels)
    everything = Selection(0.0, 1.0)
    plain = Detector(nano.model, everything, decode)(EXAMPLE)
    both = Detector(nano.model, everything, decode, mirror=True)(EXAMPLE)
    assert len(both) == 2 * len(plain)
    assert {tuple(tokens) for tokens in plain.tokens.tolist()} < {tuple(t) for t in both.tokens.tolist()}


def test_as_text_and_in_a_loop(nano):
    found = nano(EXAMPLE)
    lines = str(found).splitlines()
    assert len(lines) == len(found) == 6
    for line, (label, score, box) in zip(lines, found, strict=True):
        assert re.fullmatch(rf"{label} +{score:.2f} " + "".join(f" +{side:.1f}" for side in box), line)
    assert [(one.label, one.score, one.box) for one in found] == [tuple(one) for one in found]
    assert repr(found).startswith("<Detections: ") and "kite 0.9" in repr(found)
    nothing = nano(Image.new("RGB", (60, 40)), classes=["zebra"])
    assert len(nothing) == 0 and list(nothing) == [] and str(nothing) == "nothing found"
    assert repr(nothing) == "<Detections: none>" and nothing.boxes.shape == (0, 4)


def test_as_the_program(nano, monkeypatch, capsys, here):
    """detect.py finds the same, with the same thresholds and dtype, with classes and without."""
    for argv, classes in (([], None), (["--classes", "kite ; person ; zebra"], ["kite", "person", "zebra"])):
        call(monkeypatch, capsys, detect, "--image", EXAMPLE, "--json", "out.json", *argv)
        ((record,), found) = json.loads((here / "out.json").read_text()), nano(EXAMPLE, classes=classes)
        theirs = [(d["label"], d["class_id"], d["score"], d["box"]) for d in record["detections"]]
        ours = zip(found.labels, found.class_ids, found.scores, found.boxes, strict=True)
        assert theirs and theirs == [
            (label, c, round(float(score), 4), box.round(2).tolist()) for label, c, score, box in ours
        ]


def test_in_parallel(nano, monkeypatch, capsys, here):
    """Five steps for all boxes: the same objects, and the program's own boxes; open-set goes on in words."""
    detector = Detector.from_pretrained("nano", device="cpu", decode="parallel", score_threshold=0.3)
    decoder = detector.closed_set.decode
    assert isinstance(decoder, ParallelDecoder) and decoder.groups == BRANCHES
    found = detector(EXAMPLE)
    assert set(found.labels) == set(SEEN) and found.tokens.shape == (BRANCHES, 5)
    assert alike(detector([EXAMPLE, EXAMPLE])[1], found)
    assert equal(detector(EXAMPLE, classes=["kite"]), nano(EXAMPLE, classes=["kite"]))
    few = Detector(nano.model, Selection(0.3, 0.5), decode="parallel", branches=8)(EXAMPLE)
    assert few.tokens.shape == (8, 5)
    for argv, ours in (([], found), (["--branches", 8], few)):
        argv = ["--score-threshold", 0.3, "--decode", "parallel", *argv]
        call(monkeypatch, capsys, detect, "--image", EXAMPLE, "--json", "out.json", "--tokens", *argv)
        (record,) = json.loads((here / "out.json").read_text())
        assert record["tokens"] == ours.tokens.flatten().tolist()
        assert [d["label"] for d in record["detections"]] == ours.labels
    for options, words in (
        (dict(decode="both"), "'both': must be one of 'sequence', 'parallel'"),
        (dict(decode="sequence", branches=8), 'branches=8 is for decode="parallel"'),
        (dict(decode="parallel", branches=0), "branches=0: must be at least 1"),
        (dict(decode="parallel", branches=10**9), "branches=1000000000: must be at least 1, at most 1,000"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Detector(nano.model, **options)
    with pytest.raises(ValueError, match="groups=1000000000"):
        module.closed_set_decoder(nano.model, "sequence", groups=10**9)


def test_classes_by_name(nano):
    """Open-set: class_ids count the names given; a text of names does, too."""
    found = nano(EXAMPLE, classes=["zebra", "person", "kite"])
    assert sorted(found.labels) == ["kite", "person"]
    assert [["zebra", "person", "kite"][c] for c in found.class_ids] == found.labels
    assert equal(nano(EXAMPLE, classes="zebra ; person ; kite"), found)
    (of_list,) = nano([EXAMPLE], classes=["zebra", "person", "kite"])
    assert equal(of_list, found)


def test_masks(nano):
    """A mask of each object, in pixels of the image and inside the box, with the codec beside the model."""
    found = nano(EXAMPLE, classes=["kite", "person"], masks=True)
    with Image.open(EXAMPLE) as image:
        shape = image.height, image.width
    assert len(found.masks) == len(found) > 0
    for mask, box in zip(found.masks, found.boxes):
        assert mask.shape == shape and mask.dtype == bool
        assert (tight_box(mask)[:2] >= np.floor(box[:2])).all()
        assert (tight_box(mask)[2:] <= np.ceil(box[2:])).all()


def test_upright_images(nano, tmp_path):
    """EXIF orientation is applied to PIL images as to files; boxes are in pixels of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    with Image.open(EXAMPLE) as image:
        turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert equal(nano(image), nano(EXAMPLE))


def test_batches(nano, monkeypatch):
    """As many images at a time as memory holds, in order."""
    monkeypatch.setattr(module, "fitting_batch", lambda *_: 2)
    images = [Image.new("RGB", (50, 50)), EXAMPLE, EXAMPLE]
    assert [len(found) for found in nano(images)] == [0, 6, 6]


def test_selection():
    """Options reach the selection; nothing below the threshold."""
    detector = Detector.from_pretrained("nano", device="cpu", score_threshold=0.0, nms_iou=0.3, min_size=5)
    assert detector.selection == Selection(0.0, 0.3, 5)
    assert len(detector(EXAMPLE)) < len(Detector(detector.model, Selection(0.0, 1.0))(EXAMPLE)) == BRANCHES
    assert detector.model.projector.weight.dtype == torch.float32


def test_refused(nano, model):
    """In words, whatever a user can get wrong."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    for images, options, words in (
        ("none.png", {}, "none.png: no such file"),
        ([EXAMPLE, "none.png"], {}, "none.png"),
        (pixels, {}, "a file or a PIL image, not of type ndarray"),
        (None, {}, "a file or a PIL image, not of type NoneType"),
        (EXAMPLE, dict(classes=[]), "names no class"),
        (EXAMPLE, dict(classes=[0, 2]), "[0, 2]: classes are given by their names"),
        (EXAMPLE, dict(classes=["<loc0001>"]), "one of ; < >"),
        (EXAMPLE, dict(masks=True), "masks=True needs the names"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            nano(images, **options)
    for name, value in dict(score_threshold=math.nan, nms_iou=-1, min_size=-5).items():
        with pytest.raises(ValueError, match=f"{name} = {value}"):
            Selection(**{name: value})
    with pytest.raises(ValueError, match="zebras.* did you mean 'zebra'"):
        nano(EXAMPLE, classes=["zebras"])
    with pytest.raises(ValueError, match="has no mask codec"):
        Detector.from_pretrained(model, device="cpu")(EXAMPLE, classes=["cat"], masks=True)
    with pytest.raises(ValueError, match="no folder 'nowhere"):
        Detector.from_pretrained("nowhere/")
    with pytest.raises(ValueError, match="no folder ''"):
        Detector.from_pretrained("")


def test_imports_nothing_heavy():
    """Neither to start nor to detect: what tests, training and some programs need is imported there."""
    code = f"""
import sys
from model import Detector
Detector.from_pretrained("nano", device="cpu")({str(EXAMPLE)!r})
heavy = "transformers peft pycocotools matplotlib triton huggingface_hub torchvision scipy pandas".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")

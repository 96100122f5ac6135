"""COCO files: the index, the samples, and all that can be wrong with them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training import HEIGHT, WIDTH, broken, instances

from model.decoding.closed_set import GROUP, ClosedSet
from model.io.image import square, to_network
from train import fit
from train.data import forms
from train.data.coco import CocoDetections, CocoIndex
from train.data.records import read_records
from train.data.samples import answer_sample
from train.data.targets import closed_set_target
from train.measures import read_coco

LANGUAGE = ClosedSet((2, 500, 600, 108), 1000, 7, 1, ("cat", "dog", "traffic light", "bird"), groups=6)


SIZE = 32


# The index --------------------------------------------------------------------------------------------------


def test_index(folder):
    """Categories by id whatever their order; crowd and degenerate boxes counted; all in shared memory."""
    index = CocoIndex.read(folder / "instances.json", folder / "images")
    assert index.classes == ("traffic light", "cat", "bird")
    assert (index.skipped_crowd, index.skipped_degenerate, len(index)) == (1, 3, 3)
    assert [index.name(i) for i in range(3)] == ["a.png", "b.png", "sub/c.png"]
    assert index.sizes.tolist() == [[WIDTH, HEIGHT], [40, 40], [50, 80]]
    objects = [[array.tolist() for array in index.objects(i)] for i in range(3)]
    assert objects[0] == [[[10, 20, 40, 50], [50.5, 0, 70.75, 59]], [0, 1]]
    assert objects[1] == [[], []] and index.objects(1)[0].shape == (0, 4)
    assert objects[2] == [[[5, 5, 50, 15], [0, 0, 10, 15]], [2, 1]]
    for tensor in (index.sizes, index.offsets, index.boxes, index.labels, index.names):
        assert tensor.is_shared()


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
    "not JSON (maximum recursion": "[" * 100_000,
    "the categories 90 and 2 have the same name, 'bird'": broken("categories", 1, name="bird"),
    "category 13 has a name that is no text: 'a\\nb'": broken("categories", 2, name="a\nb"),
    "an entry of 'images' has no whole number as id: {'id': '5'": broken("images", 1, id="5"),
    "annotation 2 has the image_id '70'": broken("annotations", 1, image_id="70"),
    "annotation 2 has the category_id 2.0": broken("annotations", 1, category_id=2.0),
    "image 5 has the width 1000000": broken("images", 1, width=10**30),
    "image 5 has the height 1e+308": broken("images", 1, height=1e308),
    "image 5: 'a\\x00.png' cannot be": broken("images", 1, file_name="a\0.png"),
    "image 5: '\\ud800' cannot be": broken("images", 1, file_name="\ud800"),
    "annotation 3 has the bbox [1, nan, 3, 4]": broken("annotations", 2, bbox=[1, float("nan"), 3, 4]),
    "annotation 3 has the bbox [1, 1000000": broken("annotations", 2, bbox=[1, 10**400, 3, 4]),
    "annotation 3 has the bbox ['1', 2, 3, 4]": broken("annotations", 2, bbox=["1", 2, 3, 4]),
    "annotation 3 has the area '9'": broken("annotations", 2, area="9"),
    "annotation 3 has the area -1": broken("annotations", 2, area=-1),
    "annotation 3 has the iscrowd '0'": broken("annotations", 2, iscrowd="0"),
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


def test_what_may_be_missing(tmp_path):
    """Areas and crowds are filled in alike, whether they are missing or null."""
    data = instances()
    missing = {key: x for key, x in data["annotations"][1].items() if key not in ("area", "iscrowd")}
    data["annotations"] = [missing, missing | dict(id=1, area=None, iscrowd=None)]
    (tmp_path / "some.json").write_text(json.dumps(data))
    for annotation in read_coco(tmp_path / "some.json").dataset["annotations"]:
        assert annotation["area"] == 900 and annotation["iscrowd"] == 0


def test_evaluation_needs_the_folder_too(folder):
    with pytest.raises(ValueError, match="elsewhere: no such folder"):
        read_coco(folder / "instances.json", folder / "elsewhere")


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
    calls = []
    monkeypatch.setattr(
        forms, "read_records", lambda *args, **options: calls.append(args) or read_records(*args, **options)
    )
    data = ["--model", "nano", "--data", str(folder / "instances.json"), "--out", str(folder / "run")]
    assert fit.train(fit.arguments([*data, *what.split()])) == 0 and len(calls) == 1


# Samples ----------------------------------------------------------------------------------------------------


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


def test_large_pictures_are_reduced_to_augment(folder, monkeypatch):
    """Boxes and noise follow, and the file's size is still compared; as they are without augmentation."""
    data = instances()
    for image in data["images"]:
        file, side = folder / "images" / image["file_name"], 8 * SIZE
        image["width"], image["height"] = 12 * SIZE, side
        Image.open(file).resize((12 * SIZE, side)).save(file)
    (folder / "instances.json").write_text(json.dumps(data))
    given = []

    def unchanged(rng, image, boxes, flip_vertical):
        given.append((image.size, boxes))
        return image, boxes, np.arange(len(boxes))

    monkeypatch.setattr("train.data.coco.augment", unchanged)
    plain, reduced = detections(folder), detections(folder, augment=True)
    sample, other = plain[0, 0], reduced[0, 0]
    (size, boxes), whole = given[0], plain.objects(0)[0]
    assert size == (6 * SIZE, 4 * SIZE) and np.allclose(boxes, whole / 2)
    assert (sample["image"].int() - other["image"].int()).abs().max() < 40
    data["images"][0]["height"] += 1
    (folder / "instances.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has 384x256 pixels .upright., its annotations are for 384x257"):
        detections(folder, augment=True)[0, 0]


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


def test_an_image_without_objects():
    """All its answer is noise."""
    target = closed_set_target(np.random.default_rng(0), np.zeros((0, 4)), np.zeros(0, int), 9, 9, LANGUAGE)
    sample = answer_sample(np.zeros((9, 9, 3), np.uint8), LANGUAGE.prompt, target)
    assert sample["weights"].sum() == 0.5 * LANGUAGE.groups + 1

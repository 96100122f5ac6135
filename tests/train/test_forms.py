"""Data sets in other forms: what is read, what is written, and what is said about what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import call, complaint, picture, write_jsonl
from PIL import Image
from training import PLAIN, run

from infer import evaluate
from train import convert
from train.data.folders import new_folder
from train.data.forms import find_data, lists_of
from train.data.open import read_coco_index

SIZES = {"a.jpg": (64, 48), "b.png": (40, 60), "sub/c.jpg": (100, 50)}
OBJECTS = [
    (7, 90, [0, 0, 64, 48]),
    (7, 3, [10, 5.25, 20.5, 30]),
    (5, 3, [50, 20, 49, 30]),
]  # image, class, box
CLASSES = {3: "traffic light", 17: "ünknown: yes", 90: "cat"}


@pytest.fixture
def photos(tmp_path) -> Path:
    """instances.json and images/: three pictures, the second without objects; ids are out of order."""
    images = []
    for i, (name, size) in zip((7, 2, 5), SIZES.items()):
        images.append(dict(id=i, file_name=name, width=size[0], height=size[1]))
        picture(tmp_path / "images" / name, *size, seed=i)
    annotations = [
        dict(id=k, image_id=i, category_id=c, bbox=box, area=box[2] * box[3], iscrowd=0)
        for k, (i, c, box) in enumerate(OBJECTS, 1)
    ]
    categories = [dict(id=i, name=name) for i, name in CLASSES.items()]
    data = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path


@pytest.fixture
def converted(monkeypatch, capsys):
    """convert.py, which must succeed: what it prints and what it says on stderr."""

    def converted(command, data, out, *options):
        code, printed, said = call(
            monkeypatch, capsys, convert, command, "--data", data, "--out", out, *options
        )
        assert code == 0, said
        return printed, said

    return converted


def read(path, images=None, part="train") -> dict:
    return lists_of(find_data(path, images, [part]))


def boxes(data: dict) -> list:
    """File name, class and box of every object."""
    images = {record["id"]: record["file_name"] for record in data["images"]}
    names = {record["id"]: record["name"] for record in data["categories"]}
    return [(images[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in data["annotations"]]


def label(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def photo(file: Path, size=(100, 50)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file)
    return file


# There and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["yolo", "voc", "labelme"])
def test_there_and_back(photos, converted, form):
    """The same file: ids of categories and images, their order, a class without objects, an empty picture."""
    source, out, back = photos / "instances.json", photos / form, photos / "back.json"
    assert "3 pictures, 3 classes, 3 boxes" in converted(f"to-{form}", source, out)[0]
    converted("to-coco", out, back)
    assert json.loads(back.read_text()) == json.loads(source.read_text())
    converted(f"to-{form}", source, out, "--force")  # what it wrote may be replaced
    (out / "ids.json").unlink()  # as if it were another program's
    assert sorted(boxes(read(out))) == sorted(boxes(json.loads(source.read_text())))
    (photos / form / "mine.txt").touch()
    with pytest.raises(ValueError, match="no ids.json, so it is not replaced"):
        convert.main([f"to-{form}", "--data", str(source), "--out", str(out), "--force"])
    assert (photos / form / "mine.txt").exists() and not list(photos.glob(".*"))


def test_a_set_is_replaced_or_stays(tmp_path, monkeypatch):
    """Ctrl-C while the old one is removed, which takes time, leaves the new one."""

    def remove(folder, **_):
        if (folder / "ids.json").exists():
            raise KeyboardInterrupt

    label(tmp_path / "set" / "ids.json", "{}")
    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "set", replace=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "set" / "new").exists()


def test_what_cannot_be_kept(photos, converted):
    """Crowds, where a form has no word for them, and boxes without an area are left out, which is said."""
    data = json.loads((photos / "instances.json").read_text())
    data["annotations"][0]["iscrowd"] = 1
    data["annotations"][1]["bbox"] = [70, 5, 10, 10]
    (photos / "instances.json").write_text(json.dumps(data))
    for form in ("yolo", "labelme"):
        _, said = converted(f"to-{form}", photos / "instances.json", photos / form)
        assert f"1 crowds, for which {form} has no word and 1 boxes without an area" in said
        assert len(read(photos / form)["annotations"]) == 1
    converted("to-voc", photos / "instances.json", photos / "voc")
    assert [a["iscrowd"] for a in read(photos / "voc")["annotations"]] == [1, 0]


@pytest.mark.parametrize("form", ["yolo", "voc", "labelme"])
def test_there_and_back_from_a_folder_of_that_name(photos, converted, form):
    """Label Studio's names all begin with images/."""
    data = json.loads((photos / "instances.json").read_text())
    for record in data["images"]:
        record["file_name"] = f"images/{record['file_name']}"
    (photos / "instances.json").write_text(json.dumps(data))
    converted(f"to-{form}", photos / "instances.json", photos / form)
    assert boxes(read(photos / form)) == boxes(data)


@pytest.mark.parametrize("form", ["yolo", "voc", "labelme"])
def test_two_images_of_one_file(photos, form):
    """Merged COCO files have them: one file of labels cannot be of both."""
    data = json.loads((photos / "instances.json").read_text())
    data["images"][1] |= dict(file_name="a.jpg", width=64, height=48)
    (photos / "instances.json").write_text(json.dumps(data))
    argv = [f"to-{form}", "--data", str(photos / "instances.json"), "--out", str(photos / form)]
    assert "a.jpg and a.jpg would both have" in complaint(convert.main, argv)
    assert not (photos / form).exists()


def test_to_lines_from_any_form(photos, converted):
    converted("to-yolo", photos / "instances.json", photos / "yolo")
    converted("to-jsonl", photos / "yolo", photos / "of_yolo.jsonl")
    converted("to-jsonl", photos / "instances.json", photos / "of_coco.jsonl")
    assert (photos / "of_yolo.jsonl").read_text() == (photos / "of_coco.jsonl").read_text()


# YOLO -------------------------------------------------------------------------------------------------------


def test_yolo_of_ultralytics(tmp_path):
    """data.yaml with a path and a mapping; a polygon, a score; a turned picture; one without a label file."""
    photo(tmp_path / "set/images/train/a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 100)).save(tmp_path / "set/images/train/b.jpg", exif=exif)
    photo(tmp_path / "set/images/val/c.png")
    label(tmp_path / "set/labels/train/a.txt", "1 0.5 0.5 0.2 0.4 0.93\n\n0 0.1 0.2 0.3 0.2 0.2 0.6\n")
    label(tmp_path / "set/labels/train/b.txt", "0 0.5 0.5 0.1 0.2")
    text = "path: ../set\ntrain: images/train\nval: [images/val]\nnames:\n  0: cat\n  1: traffic light\n"
    file = label(tmp_path / "here/my.yaml", text)
    data = read(file)
    assert data["categories"] == [dict(id=0, name="cat"), dict(id=1, name="traffic light")]
    assert boxes(data) == [
        ("a.jpg", "traffic light", [40, 15, 20, 20]),
        ("a.jpg", "cat", [10, 10, 20, 20]),
        ("b.jpg", "cat", [45, 20, 10, 10]),
    ]
    assert data["annotations"][1]["segmentation"] == [[10, 10, 30, 10, 20, 30]]
    assert data["images"][1] == dict(id=2, file_name="b.jpg", width=100, height=50)
    assert find_data(file, None, ["val"]).images == tmp_path / "set/images/val"
    assert "no picture has a label file" in complaint(read, file, part="val")
    assert "and no test" in complaint(read, file, part="test")
    assert "--images" in complaint(find_data, file, tmp_path, ["train"])


@pytest.mark.parametrize("names", ["classes.txt", "obj.names"])
def test_yolo_by_a_name_file(tmp_path, names):
    """Without a data.yaml: labels/ beside images/ with parts, or beside each picture, as LabelImg writes."""
    label(tmp_path / names, "cat\ndog\n")
    photo(tmp_path / "images/train/a.jpg")
    photo(tmp_path / "images/val/b.jpg")
    for name in ("train/a", "val/b"):
        label(tmp_path / f"labels/{name}.txt", "1 0.5 0.5 0.2 0.4\n")
    for part, name in (("train", "a.jpg"), ("val", "b.jpg")):
        assert boxes(read(tmp_path, part=part)) == [(name, "dog", [40, 15, 20, 20])]
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(tmp_path / "images/train/a.jpg", flat)
    shutil.copy(tmp_path / "labels/train/a.txt", flat)
    assert boxes(read(flat)) == [("a.jpg", "dog", [40, 15, 20, 20])]


def test_yolo_of_roboflow(tmp_path):
    """Its data.yaml says ../train/images and means train/images; a list of pictures works, too."""
    for part in ("train", "valid"):
        photo(tmp_path / part / "images/a.v1.jpg")
        label(tmp_path / part / "labels/a.v1.txt", "0 0.5 0.5 0.2 0.4")
    text = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"
    file = label(tmp_path / "data.yaml", text)
    for part in ("train", "val"):
        found = find_data(tmp_path, None, [part])
        assert (found.form, found.part) == ("YOLO", part) and len(lists_of(found)["annotations"]) == 1
    assert find_data(tmp_path / "valid", None, ["train"]).images == tmp_path / "valid/images"
    label(tmp_path / "list.txt", "./train/images/a.v1.jpg\n./valid/images/a.v1.jpg\n")
    file.write_text("train: list.txt\nnames: ['cat']\n")
    names = [record["file_name"] for record in read(tmp_path)["images"]]
    assert names == ["train/images/a.v1.jpg", "valid/images/a.v1.jpg"]
    label(tmp_path / "list.txt", "./train/images/a.v1.jpg\nnone.jpg\n")
    assert "list.txt:2: " in complaint(read, tmp_path)


def test_yolo_of_label_studio(tmp_path):
    """Its notes.json is no COCO file; and its COCO files name pictures from their own folder on."""
    photo(tmp_path / "images/a.jpg")
    label(tmp_path / "labels/a.txt", "0 0.5 0.5 0.2 0.4")
    label(tmp_path / "classes.txt", "cat\n")
    label(tmp_path / "notes.json", json.dumps(dict(categories=[dict(id=0, name="cat")], info={})))
    assert boxes(read(tmp_path)) == [("a.jpg", "cat", [40, 15, 20, 20])]
    image = dict(id=0, file_name="images/a.jpg", width=100, height=50)
    file = label(tmp_path / "of/result.json", json.dumps(dict(images=[image], annotations=[], categories=[])))
    photo(tmp_path / "of/images/a.jpg")
    assert find_data(file.parent, None, ["train"]).images == file.parent
    photo(tmp_path / "of/images/images/a.jpg")
    assert find_data(file.parent, None, ["train"]).images == file.parent / "images"


def test_yolo_of_cvat(tmp_path):
    """Folders of parts, of which one is taken; and a list whose lines begin with data/."""
    for part in ("train", "valid"):
        photo(tmp_path / f"obj_{part}_data/{part}.jpg")
        label(tmp_path / f"obj_{part}_data/{part}.txt", "0 0.5 0.5 0.2 0.4")
    label(tmp_path / "obj.names", "cat\n")
    label(tmp_path / "train.txt", "data/obj_train_data/train.jpg\n")
    assert boxes(read(tmp_path)) == [("train.jpg", "cat", [40, 15, 20, 20])]
    assert boxes(read(tmp_path, part="val")) == [("valid.jpg", "cat", [40, 15, 20, 20])]
    assert boxes(read(label(tmp_path / "data.yaml", "train: train.txt\nnames: [cat]")))[0][0] == "train.jpg"


def test_yolo_names_as_they_stand_and_parts_that_are_not_there(tmp_path):
    """YAML would make False of a class called no, and 7 of 007; Roboflow names a test/ that it has not."""
    photo(tmp_path / "train/images/a.jpg")
    label(tmp_path / "train/labels/a.txt", "1 0.5 0.5 0.2 0.4")
    text = "path:\ntrain: ../train/images\nval: ~\ntest: ../test/images\nnames: [yes, no, 007]"
    file = label(tmp_path / "data.yaml", text)
    assert [record["name"] for record in read(file)["categories"]] == ["yes", "no", "007"]
    assert "test is '../test/images': no such folder" in complaint(read, file, part="test")
    file.write_text(f"{text}\nkpt_shape: [2, 2]\n")  # a box and two points would be taken for a polygon
    assert "kpt_shape" in complaint(read, file)


def test_hidden_copies_are_no_data(tmp_path):
    """Of Jupyter and of macOS; but files with suffixes in capitals are data."""
    copies = (".ipynb_checkpoints/a-checkpoint", "__MACOSX/._a", "._a")
    for form, suffix, text in (
        ("voc", "XML", voc(voc_object(1, 11, 100, 50))),
        ("labelme", "JSON", labelme(shape("rectangle", [0, 10], [100, 50]))),
    ):
        photo(tmp_path / form / "a.JPG")
        label(tmp_path / form / f"a.{suffix}", text)
        for copy in copies:
            label(tmp_path / form / f"{copy}.jpg", "\0")
            label(tmp_path / form / f"{copy}.{suffix.lower()}", "\0")
        data = read(tmp_path / form)
        assert boxes(data) == [("a.JPG", "cat", [0, 10, 100, 40])] and len(data["images"]) == 1


YOLO_FAULTS = {
    "0 0.5 0.5 0.1": "a.txt:2: 4 numbers",
    "0 0.5 0.5 0.1 x": "a.txt:2: not numbers: 0 0.5",
    "0 0.5 0.5 nan 0.1": "a.txt:2: 0.5 0.5 nan",
    "0 120 80 30 30": "a.txt:2: 120 80 30 30: places must be shares",
    "5 0.5 0.5 0.1 0.1": "a.txt:2: class 5, but the names are those of 0 to 1",
    "0.5 0.5 0.5 0.1 0.1": "a.txt:2: class 0.5",
    "0 0.5 0.5 0.1 0.1 0.1 0.1 0.1": "a.txt:2: 8 numbers",
}


@pytest.mark.parametrize("line", YOLO_FAULTS)
def test_yolo_faults(tmp_path, line):
    label(tmp_path / "classes.txt", "cat\ndog\n")
    photo(tmp_path / "images/a.jpg")
    label(tmp_path / "labels/a.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    assert YOLO_FAULTS[line] in complaint(read, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "not YAML"),
        ("names: [a]", "none of train, val and test"),
        ("names: [a]\ntrain: elsewhere", "train is 'elsewhere': no such folder"),
        ("names: [a, a]\ntrain: images", "the classes 0 and 1 have the same name"),
        ("names: []\ntrain: images", "no names of classes"),
        ("names: {x: a}\ntrain: images", "names must be a list"),
    ],
)
def test_yaml_faults(tmp_path, text, message):
    photo(tmp_path / "images/a.jpg")
    said = complaint(read, label(tmp_path / "data.yaml", text))
    assert message in said and "data.yaml" in said and "\n" not in said


# Pascal VOC -------------------------------------------------------------------------------------------------


def voc(objects: str, head="<filename>a.jpg</filename>", size=(100, 50)) -> str:
    sides = "<width>{}</width><height>{}</height>".format(*size)
    return f"<annotation>{head}<size>{sides}</size>{objects}</annotation>"


def voc_object(*box, name="cat", more="") -> str:
    sides = "".join(f"<{s}>{x}</{s}>" for s, x in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


LABELIMG = "<filename>a.jpg</filename><source><database>Unknown</database></source>"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (voc(voc_object(1, 11, 100, 50)), [0, 10, 100, 40]),  # VOC's own: from 1, to the last pixel
        (voc(voc_object(1, 11, 100, 50), LABELIMG), [1, 11, 99, 39]),
        (voc(voc_object(1, 11, 100, 50), LABELIMG.replace("Unknown", "MyDatabase")), [1, 11, 99, 39]),
        (voc(voc_object(0, 11, 100, 50)), [0, 11, 100, 39]),  # there is no pixel 0 in VOC's
        (voc(voc_object(1, 11, 30.5, 50), "<filename>x.png</filename>", (0, 0)), [0, 10, 30.5, 40]),
    ],
)
def test_voc_pixels(tmp_path, text, box):
    """Beside the pictures, too; a file name that is no picture's gives way to the name of the XML file."""
    for folder in (tmp_path / "voc", tmp_path / "flat"):
        photo(folder / ("JPEGImages/a.jpg" if folder.name == "voc" else "a.jpg"))
        photo(folder / ("JPEGImages/b.jpg" if folder.name == "voc" else "b.jpg"))  # has no file
        label(folder / ("Annotations/a.xml" if folder.name == "voc" else "a.xml"), text)
        data = read(folder)
        assert boxes(data) == [("a.jpg", "cat", box)]
        assert [(i["file_name"], i["width"], i["height"]) for i in data["images"]] == [
            ("a.jpg", 100, 50),
            ("b.jpg", 100, 50),
        ]


def test_voc_difficult_and_parts(tmp_path):
    """What is difficult is a crowd; the box of a person's head is none of the object's; lists name parts."""
    head = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    difficult = voc_object(1, 1, 9, 9, more="<difficult>1</difficult>" + head)
    for name in ("a", "b"):
        photo(tmp_path / f"JPEGImages/{name}.jpg")
        text = voc(voc_object(11, 11, 20, 20, name="dog") + difficult, f"<filename>{name}.jpg</filename>")
        label(tmp_path / f"Annotations/{name}.xml", text)
    assert [(a["bbox"], a["iscrowd"]) for a in read(tmp_path)["annotations"][:2]] == [
        ([10, 10, 10, 10], 0),
        ([0, 0, 9, 9], 1),
    ]
    for part, name in (("train", "a"), ("val", "b")):
        label(tmp_path / f"ImageSets/Main/{part}.txt", f"{name}\n")
    for part, name in (("train", "a"), ("val", "b")):
        assert [i["file_name"] for i in read(tmp_path, part=part)["images"]] == [f"{name}.jpg"]


VOC_FAULTS = {
    "<annotation>": "not XML",
    "<annotations></annotations>": "not Pascal VOC: <annotations>",
    '<!DOCTYPE a [<!ENTITY b "c">]><annotation></annotation>': "entities",
    voc("<object></object>"): "object 1: no <name>",
    voc(voc_object(1, 1, 5, 5) + "<object><name>dog</name></object>"): "object 2: 'dog' has no <bndbox>",
    voc(voc_object(1, "x", 5, 5)): "object 1: ymin is 'x'",
    voc(voc_object(1, 1, 5)): "object 1: ymax is ''",
    voc("", size=("many", 3)): "<size>: width is 'many'",
}


@pytest.mark.parametrize("text", VOC_FAULTS)
def test_voc_faults(tmp_path, text):
    photo(tmp_path / "JPEGImages/a.jpg")
    label(tmp_path / "Annotations/a.xml", text)
    said = complaint(read, tmp_path)
    assert VOC_FAULTS[text] in said and "a.xml" in said and "\n" not in said


# LabelMe ----------------------------------------------------------------------------------------------------


def labelme(*shapes) -> str:
    return json.dumps(dict(version="5", shapes=shapes, imagePath="..\\x\\a.jpg", imageData=None))


def shape(kind, *points, label="cat") -> dict:
    return dict(label=label, shape_type=kind, points=points)


def test_labelme(tmp_path):
    """Every shape with an area; a path of another system; a picture without a file."""
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    shapes = (
        shape("rectangle", [30, 40], [10, 20]),
        shape("polygon", [1, 2], [5, 2], [3, 9.5], label="dog"),
        shape("circle", [20, 20], [23, 24]),
    )
    label(tmp_path / "a.json", labelme(*shapes))
    data = read(tmp_path)
    found = [("cat", [10, 20, 20, 20]), ("dog", [1, 2, 4, 7.5]), ("cat", [15, 15, 10, 10])]
    assert boxes(data) == [("a.jpg", *each) for each in found] and len(data["images"]) == 2
    assert data["annotations"][1]["segmentation"] == [[1, 2, 5, 2, 3, 9.5]]
    for wrong, message in (
        (shape("point", [1, 2]), "shape 1, 'cat', is a point of 1 points: it has no box"),
        (shape("rectangle", [1, 2]), "is a rectangle of 1 points"),
        (shape("rectangle", [1, "x"], [2, 3]), "shape 1 must have"),
        ({}, "shape 1 must have"),
    ):
        label(tmp_path / "a.json", labelme(wrong))
        assert message in complaint(read, tmp_path) and "a.json" in complaint(read, tmp_path)
    label(tmp_path / "a.json", labelme(*shapes))
    label(tmp_path / "b.json", labelme(shapes[1]))  # a copy for another picture, which still names the first
    assert "b.json: a second file for a.jpg" in complaint(read, tmp_path)


# Folders ----------------------------------------------------------------------------------------------------


def test_coco_of_roboflow(photos):
    """train/ and valid/ with the pictures beside the file; its class for all classes has no objects."""
    data = json.loads((photos / "instances.json").read_text())
    data["categories"] = [dict(id=0, name="things", supercategory="none")] + [
        record | dict(supercategory="things") for record in data["categories"]
    ]
    for part in ("train", "valid"):
        shutil.copytree(photos / "images", photos / "export" / part)
        label(photos / "export" / part / "_annotations.coco.json", json.dumps(data))
    found = find_data(photos / "export", None, ["train"])
    assert str(found).endswith("_annotations.coco.json: COCO, part train, pictures in " + str(found.images))
    for part, name in (("train", "train"), ("val", "valid")):
        index = read_coco_index(photos / "export", None, part)
        assert find_data(photos / "export", None, [part]).images.name == name
        assert index.classes == tuple(CLASSES.values()) and len(index) == 3


@pytest.mark.parametrize("pictures", ["{}", "images/{}", "images"])
def test_coco_as_it_is_published(photos, pictures):
    """annotations/ with other files in it, beside a folder of pictures for each part, or one for all."""
    folder = photos / "coco"
    for name in ("train2017", "val2017"):
        file = label(folder / f"annotations/instances_{name}.json", (photos / "instances.json").read_text())
        label(file.with_name(f"captions_{name}.json"), "{}")
        shutil.copytree(photos / "images", folder / pictures.format(name), dirs_exist_ok=True)
    for part, name in (("train", "train2017"), ("val", "val2017")):
        found = find_data(folder, None, [part])
        assert (found.form, found.part, found.path.stem) == ("COCO", part, f"instances_{name}")
        assert found.images == folder / pictures.format(name)
        assert len(read_coco_index(folder, None, part)) == 3
    assert find_data(folder, photos / "images", ["val"]).images == photos / "images"
    (folder / "annotations/instances_train2017.json").unlink()
    assert find_data(folder, None, ["test", "val"]).part == "val"
    assert "has the parts val, and no train" in complaint(read, folder)


def test_coco_of_cvat(photos):
    """A single file, of no part."""
    file = label(photos / "cvat/annotations/instances_default.json", (photos / "instances.json").read_text())
    assert "neither default/ nor images/" in complaint(read, photos / "cvat")
    shutil.copytree(photos / "images", photos / "cvat/images")
    found = find_data(photos / "cvat", None, ["train"])
    assert (found.path, found.part, found.images) == (file, None, photos / "cvat/images")
    shutil.copy(file, file.with_name("instances_more.json"))
    assert "2 files that could be meant" in complaint(read, photos / "cvat")


def test_lines_of_roboflow(photos):
    """Files of lines named by part, with the pictures beside them."""
    for part in ("train", "valid"):
        line = dict(image="a.jpg", prefix="detect cat", suffix="<loc0000><loc0000><loc1023><loc1023> cat")
        write_jsonl(photos / f"images/_annotations.{part}.jsonl", line)
    found = find_data(photos / "images", None, ["val"])
    assert (found.form, found.path.name) == ("JSONL", "_annotations.valid.jsonl")
    assert found.images == photos / "images" and boxes(lists_of(found))[0][1] == "cat"
    assert read_coco_index(photos / "images", None) is None


def test_unknown_folders(photos):
    """What forms are known is said, and what would have to be named."""
    assert "no data set in this folder; known are a COCO" in complaint(read, photos / "images")
    assert "no such file" in complaint(read, photos / "none")
    for name in ("one.json", "two.json"):
        shutil.copy(photos / "instances.json", photos / name)
    assert "3 files that could be meant (instances.json, one.json" in complaint(read, photos)
    photo(photos / "plain/a.jpg")
    label(photos / "plain/a.txt", "0 0.5 0.5 0.1 0.1")
    (photos / "instances.json").unlink()
    assert "without names of their classes" in complaint(read, photos / "plain")
    assert "give its folder" in complaint(read, label(photos / "a.xml", "<a/>"))


# Programs ---------------------------------------------------------------------------------------------------


def test_fit_and_evaluate(photos, converted, tiny, model, monkeypatch, capsys):
    """A folder of another form is trained on, with the weights that the COCO file gives; and evaluated, with
    the same figures; a second time from what is kept."""
    data = json.loads((photos / "instances.json").read_text())
    data["categories"][1]["name"] = "dog"  # nano knows all three
    (photos / "instances.json").write_text(json.dumps(data))
    converted("to-voc", photos / "instances.json", photos / "voc")
    losses, figures = [], []
    for name in ("voc", "instances.json"):
        out = photos / f"run-{name}"
        run(tiny, out, f"{PLAIN} --data {photos / name} --steps 1 --val {photos / name} --val-every 1")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line.get("loss"), line.get("val_loss")) for line in lines])
        printed = capsys.readouterr().out
        assert re.search("voc: Pascal VOC, pictures in .*JPEGImages" if name == "voc" else ": COCO", printed)
        options = "--model", model, "--data", photos / name, "--out", photos / f"eval-{name}"
        for _ in range(2):
            code, printed, said = call(monkeypatch, capsys, evaluate, *options, "--device", "cpu")
            assert code == 0 and ("Pascal VOC" in said) == (name == "voc")
        figures.append(printed.splitlines()[1:])
        code, only, said = call(monkeypatch, capsys, evaluate, *options, "--device", "cpu", "--json", "-")
        assert list(json.loads(only)) == [name.removesuffix(".json")] and printed in said
        assert printed.splitlines()[0].endswith(f"({name.removesuffix('.json')})")
    assert losses[0] == losses[1] and figures[0] == figures[1]


def test_nothing_to_convert(photos, monkeypatch, capsys, converted):
    """Lines without boxes are an error, with their number; --absent that adds none is said."""
    file = write_jsonl(photos / "text.jsonl", *[dict(image="a.jpg", prefix="caption en", suffix="a cat")] * 2)
    options = "jsonl-to-coco", "--data", file, "--out", photos / "none.json"
    code, printed, said = call(monkeypatch, capsys, convert, *options)
    assert code == 1 and not printed and "0 of 2 lines have a box" in said and said.count("\n") == 1
    assert not (photos / "none.json").exists()
    data = json.loads((photos / "instances.json").read_text())
    data["categories"] = data["categories"][:1]
    data["annotations"] = [
        a | dict(category_id=3, image_id=i) for a, i in zip(data["annotations"], (7, 2, 5))
    ]
    (photos / "one.json").write_text(json.dumps(data))
    _, said = converted("to-jsonl", photos / "one.json", photos / "one.jsonl", "--absent", 2)
    assert "--absent 2 adds 0 classes and not 6: 3 of 3 images lack fewer" in said
    _, said = converted("to-jsonl", photos / "instances.json", photos / "all.jsonl")
    assert "1 of 3 images have no line" in said and "--absent N" in said

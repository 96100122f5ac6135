"""detect.py: what it prints and writes, and how it takes bad input; drawing.

The model is tiny and random: its boxes mean nothing, but where they may be and how they are written does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call, picture
from PIL import Image

from infer import detect
from infer.lib import options
from infer.lib.draw import class_colour, draw_boxes
from model import PaliGemma
from model.config import BRANCHES, COCO_CLASSES
from model.decoding.boxes import areas, locs_to_boxes
from model.decoding.detector import Detector
from model.io.tokenizer import Tokenizer
from train.data.forms import find_data, lists_of
from train.data.save import FORMS


@pytest.fixture
def run_detect(monkeypatch, capsys, model, here):
    """detect.py with the untrained model and all its boxes: exit code, stdout, lines of stderr."""

    def run(*argv):
        given = [] if "--model" in argv else ["--model", model]
        given += [] if "--score-threshold" in argv else ["--score-threshold", 0]
        code, out, err = call(monkeypatch, capsys, detect, *given, *argv)
        return code, out, err.splitlines()

    return run


# ---- detect.py ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_twice(run_detect, here, batch):
    file = picture(here / "a.jpg")
    code, out, _ = run_detect("--image", file, file, "--json", "out.json", "--batch-size", batch)
    one, other = json.loads((here / "out.json").read_text())
    assert code == 0 and one == other and "a-2.png" in out


def test_options_given_twice(run_detect, here):
    """--image a --image b: both."""
    files = [picture(here / name) for name in ("a.png", "b.png")]
    argv = "--image", files[0], "--image", files[1], "--save", "coco", "--save", "voc"
    assert run_detect(*argv, "--json", "out.json")[0] == 0
    assert [entry["image"] for entry in json.loads((here / "out.json").read_text())] == [*map(str, files)]
    assert {folder.name for folder in (here / "detections").iterdir() if folder.is_dir()} == {"coco", "voc"}


def test_json_over_a_picture(run_detect, here):
    """It would be lost."""
    file = picture(here / "a.png")
    code, _, err = run_detect("--image", file, "--json", file)
    assert (
        code == 1
        and len(err) == 1
        and "one of the files that are read" in err[0]
        and Image.open(file).size == (90, 60)
    )


def test_one_picture(run_detect, here):
    """A table, and the picture with its boxes under detections/; no JSON unless asked for; nothing else."""
    code, out, err = run_detect("--image", picture(here / "a.jpg"))
    assert (code, err) == (0, [])
    first, *rows = out.splitlines()
    assert "a.jpg" in first and "90 x 60" in first and "detections/a.png" in first
    assert rows and all(re.fullmatch(r"  [a-z ]{16} +[01]\.\d\d  ( +-?\d+\.\d){4}", row) for row in rows)
    assert {row[2:18].strip() for row in rows} <= set(COCO_CLASSES)
    with Image.open(here / "detections" / "a.png") as drawn:
        assert drawn.mode == "RGB" and drawn.width * 60 == pytest.approx(drawn.height * 90, rel=0.01)
    assert sorted(path.name for path in here.iterdir()) == ["a.jpg", "detections"]
    assert [path.name for path in (here / "detections").iterdir()] == ["a.png"]


def test_json(run_detect, here, model):
    """The fixed form, boxes inside the original picture, best first, as many as the tokens say."""
    sizes = {"wide.jpg": (300, 40), "tall.png": (31, 200), "one.png": (1, 1)}
    files = [picture(here / name, *size, seed=i) for i, (name, size) in enumerate(sizes.items())]
    code, _, err = run_detect("--image", *files, "--json", "out.json", "--tokens", "--nms-iou", 1)
    assert (code, err) == (0, [])
    records = json.loads((here / "out.json").read_text())
    tokenizer = Tokenizer(model)
    assert [record["image"] for record in records] == [str(file) for file in files]
    for record, (width, height) in zip(records, sizes.values(), strict=True):
        assert list(record) == ["image", "width", "height", "detections", "tokens"]
        assert (record["width"], record["height"]) == (width, height)
        for found in record["detections"]:
            assert list(found) == ["label", "class_id", "score", "box"]
            assert found["label"] == COCO_CLASSES[found["class_id"]] and 0 <= found["score"] <= 1
            x0, y0, x1, y1 = found["box"]
            assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
            assert all(isinstance(side, float) for side in found["box"])
        scores = [found["score"] for found in record["detections"]]
        assert scores == sorted(scores, reverse=True)

        groups = np.array(record["tokens"]).reshape(-1, 5)
        assert record["tokens"] == groups.flatten().tolist() and len(groups) == 12
        locs = groups[:, :4] - tokenizer.loc0
        assert (locs >= 0).all() and (locs < 1024).all()
        assert (groups[:, 4] >= tokenizer.unused0).all() and (groups[:, 4] <= tokenizer.unused0 + 80).all()
        boxes = locs_to_boxes(locs, width, height)
        boxes = boxes[areas(boxes) > 0].round(2)
        assert sorted(boxes.tolist()) == sorted(found["box"] for found in record["detections"])


def test_json_without_tokens(run_detect, here):
    """No tokens unless asked for; a picture without boxes has an entry too."""
    code, out, _ = run_detect("--image", picture(here / "a.png"), "--json", "o.json", "--score-threshold", 1)
    assert code == 0 and "nothing found" in out
    assert json.loads((here / "o.json").read_text()) == [
        {"image": str(here / "a.png"), "width": 90, "height": 60, "detections": []}
    ]


def test_data_sets(run_detect, here):
    """--save: in each form the pictures and their boxes, under names of their own; again with --overwrite."""
    files = [picture(here / name, seed=i) for i, name in enumerate(("1/a.png", "2/a.png"))]
    usual = "--image", *files, "--json", "out.json", "--overwrite", "--score-threshold", 0.1
    for _ in range(2):
        code, out, err = run_detect(*usual, "--save", *FORMS)
        assert code == 0 and not err and out.count("2 pictures, 80 classes") == len(FORMS)
    records = json.loads((here / "out.json").read_text())
    for form in FORMS:
        data = lists_of(find_data(here / "detections" / form, None, ["train"]))
        names = {record["id"]: record["name"] for record in data["categories"]}
        assert [record["file_name"] for record in data["images"]] == ["a.png", "a-2.png"]
        assert sorted(names) == [*range(1, 81)] and names[1] == "person"
        for number, record in enumerate(records, 1):
            boxes = [a for a in data["annotations"] if a["image_id"] == number]
            assert record["detections"]
            for a, d in zip(boxes, record["detections"], strict=True):
                (x, y, w, h), label = a["bbox"], names[a["category_id"]]
                assert label == d["label"] and np.allclose([x, y, x + w, y + h], d["box"], atol=0.011)
                assert ("score" in a) == (form == "coco") and a.get("score") in (None, d["score"])
    images = here / "detections" / "voc" / "JPEGImages"
    assert [(images / name).read_bytes() for name in ("a.png", "a-2.png")] == [f.read_bytes() for f in files]
    shutil.rmtree(here / "detections" / "yolo")
    (here / "detections" / "yolo").mkdir()
    (here / "detections" / "yolo" / "notes.txt").touch()  # somebody's own
    code, _, err = run_detect(*usual, "--save", "yolo")
    assert code == 1 and "yolo exists and has no ids.json" in err[0]


def test_data_sets_of_pictures_without_a_known_suffix(run_detect, here):
    """Each is in the set, whatever it is called."""
    files = [picture(here / "a.png", seed=i).rename(here / name) for i, name in enumerate(("a.json", "b"))]
    assert run_detect("--image", *files, "--save", "labelme", "yolo")[0] == 0
    for form in ("labelme", "yolo"):
        data = lists_of(find_data(here / "detections" / form, None, ["train"]))
        assert [record["file_name"] for record in data["images"]] == ["a.png", "b.png"]


def test_json_on_stdout(run_detect, here):
    """--json -: only JSON there, and the table on stderr; --quiet: no table."""
    file = picture(here / "a.png")
    _, table, _ = run_detect("--image", file, "--json", "out.json", "--overwrite")
    code, out, err = run_detect("--image", file, "--json", "-", "--overwrite")
    assert code == 0 and json.loads(out) == json.loads((here / "out.json").read_text())
    assert err == table.splitlines() and len(err) > 1 and not (here / "-").exists()
    code, out, err = run_detect("--image", file, "--json", "-", "--overwrite", "--quiet", "--save", "yolo")
    assert code == 0 and json.loads(out) and not err
    code, out, err = run_detect("--image", file, here / "b.png", "--json", "out.json", "--quiet")
    assert code == 1 and not out and len(err) == 1 and "b.png" in err[0]


def test_folder_with_a_broken_picture(run_detect, here):
    """One line about the broken one, the others done, exit code 1; what is no picture is passed over."""
    for name in ("b.png", "c.JPG", "sub/d.png"):
        picture(here / "in" / name)
    (here / "in" / "a.jpg").write_text("no picture")
    (here / "in" / "notes.txt").write_text("no picture either")
    code, out, err = run_detect("--image", "in", "--json", "out.json", "--out", "drawn/deep")
    assert code == 1 and len(err) == 1 and "in/a.jpg" in err[0]
    assert [Path(r["image"]).name for r in json.loads((here / "out.json").read_text())] == ["b.png", "c.JPG"]
    assert sorted(path.name for path in (here / "drawn/deep").iterdir()) == ["b.png", "c.png"]
    assert "b.png" in out and "c.JPG" in out and "a.jpg" not in out


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_change_nothing(batch_size, run_detect, here):
    """Pictures decoded together get the boxes that each gets alone, in the order they were named."""
    files = [picture(here / f"{i}.png", 40 + 20 * i, seed=i) for i in (3, 1, 2)]
    files.insert(1, here / "none.png")
    code, _, err = run_detect("--image", *files, "--json", "out.json", "--batch-size", batch_size)
    assert code == 1 and len(err) == 1 and "none.png: no such file" in err[0]
    records = json.loads((here / "out.json").read_text())
    assert [Path(record["image"]).name for record in records] == ["3.png", "1.png", "2.png"]
    for record in records:
        run_detect("--image", record["image"], "--json", "one.json")
        (alone,) = json.loads((here / "one.json").read_text())
        assert [d["label"] for d in alone["detections"]] == [d["label"] for d in record["detections"]]
        ours, theirs = ([d["box"] for d in r["detections"]] for r in (record, alone))
        assert np.allclose(ours, theirs, atol=0.02)


def test_same_names_do_not_overwrite_each_other(run_detect, here):
    """a.png of two folders, a.jpg, and one whose own name is the number's."""
    files = [
        picture(here / name, seed=i) for i, name in enumerate(("1/a.png", "2/a.png", "1/a.jpg", "3/a-2.png"))
    ]
    code, out, _ = run_detect("--image", *files, "--json", "out.json")
    drawn = re.findall(r"-> +(\S+)", out)
    assert code == 0 and len(set(drawn)) == 4 and all((here / file).is_file() for file in drawn)
    assert len({(here / file).read_bytes() for file in drawn}) == 4


def test_pictures_are_not_overwritten(run_detect, here):
    """--out may be the folder that the pictures come from."""
    file = picture(here / "a.png")
    before = file.read_bytes()
    run_detect("--image", file, "--out", here, "--overwrite")
    assert file.read_bytes() == before


def test_options(run_detect, here):
    """Every option does what it says."""
    file, usual = picture(here / "a.png"), ["--nms-iou", 1, "--noise-feedback"]

    def boxes(*options):
        code, _, err = run_detect("--image", file, "--json", "out.json", "--tokens", *usual, *options)
        assert (code, err) == (0, [])
        (record,) = json.loads((here / "out.json").read_text())
        return record["detections"], record["tokens"]

    def shortest(found):
        x0, y0, x1, y1 = found["box"]
        return min(x1 - x0, y1 - y0)

    everything, tokens = boxes()
    assert len(tokens) == 60 and len(everything) > 3, "the test needs a few boxes"
    assert boxes("--seed", 3) == (everything, tokens), "greedy decoding has no chance in it"
    few, beginning = boxes("--groups", 3)
    assert beginning == tokens[:15] and len(few) <= 3
    second = everything[1]["score"] - 1e-4
    assert boxes("--score-threshold", second)[0] == everything[:2]
    size = sorted(map(shortest, everything))[2] - 0.01
    assert boxes("--min-size", size)[0] == [found for found in everything if shortest(found) >= size]
    assert {round(found["score"], 2) for found in boxes("--final-cap", 0.01)[0]} <= {0.01}  # 81 ids alike
    assert boxes("--attn-cap", 0.01)[1] != tokens
    assert boxes("--no-noise-feedback")[1] != tokens
    assert boxes("--image-size", 64) == (everything, tokens) != boxes("--image-size", 96)
    assert boxes("--device", "cpu", "--dtype", "float32")[1] == tokens
    assert len(boxes("--dtype", "bfloat16")[1]) == 60
    assert boxes("--early-stop", 0.0, 1)[1] == tokens[:5]
    rounded, its_tokens = boxes("--int8")
    assert len(its_tokens) == 60 and rounded != everything
    assert boxes("--batch-size", 3) == (everything, tokens)
    drawn = [boxes("--temperature", 1, "--top-p", 0.8, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and tokens not in drawn


def test_in_parallel(run_detect, here):
    """Five steps for all boxes, however many; a seed changes nothing."""
    file = picture(here / "a.png")

    def tokens(*options):
        code, _, err = run_detect("--image", file, "--json", "out.json", "--tokens", *options)
        assert (code, err) == (0, [])
        return json.loads((here / "out.json").read_text())[0]["tokens"]

    in_parallel = tokens("--decode", "parallel")
    assert len(in_parallel) == 5 * BRANCHES and len(tokens("--decode", "parallel", "--branches", 7)) == 5 * 7
    assert tokens("--decode", "parallel", "--seed", 3) == in_parallel
    mirrored = tokens("--decode", "parallel", "--mirror")
    assert mirrored[: len(in_parallel)] == in_parallel and len(mirrored) == 2 * len(in_parallel)
    assert tokens("--decode", "sequence") == tokens() != in_parallel


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--decode parallel --groups 3", "--groups is for --decode sequence"),
        ("--decode parallel --noise-feedback", "--noise-feedback is for --decode sequence"),
        ("--decode parallel --early-stop 0.5 2", "--early-stop is for --decode sequence"),
        ("--decode parallel --temperature 1", "--temperature is for --decode sequence"),
        ("--decode sequence --branches 4", "--branches is for --decode parallel"),
        ("--decode parallel --classes cat", "parallel is for closed-set detection, without --classes"),
        ("--branches 4 --classes cat", "--branches is for closed-set detection, without --classes"),
        ("--mirror --classes cat", "--mirror is for closed-set detection, without --classes"),
    ],
)
def test_options_of_the_other_form(options, words, run_detect, here, monkeypatch):
    """Refused in words before the model is loaded."""
    monkeypatch.setattr("infer.lib.options.load_model", None)
    code, _, err = run_detect("--image", picture(here / "a.png"), *options.split())
    assert code == 1 and len(err) == 1 and err[0].endswith(words)


@pytest.mark.parametrize(
    ("answers", "refused", "other"),
    [("sequence", "--branches 4", "parallel"), ("parallel", "--groups 4", "sequence")],
)
def test_the_form_that_a_checkpoint_was_taught(answers, refused, other, run_detect, here, monkeypatch):
    """Is how it is decoded, unless --decode says otherwise."""
    model = PaliGemma.from_pretrained("nano", answers=answers)
    monkeypatch.setattr(options, "load_model", lambda args: model)
    built, real = [], options.closed_set_decoder

    def watched(model, form, *args, **more):
        built.append(form)
        return real(model, form, *args, **more)

    monkeypatch.setattr(options, "closed_set_decoder", watched)
    image = picture(here / "a.png")
    assert run_detect("--image", image)[0] == 0 and run_detect("--image", image, "--decode", other)[0] == 0
    assert built == [answers, other]
    code, _, err = run_detect("--image", image, *refused.split())
    assert code == 1 and err[0].endswith(f"{refused.split()[0]} is for --decode {other}")
    assert type(Detector(model).closed_set.decode) is type(real(model, answers))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image", "none.jpg"], ["none.jpg", "no such file"]),
        (["--image", "empty"], ["empty", "no images"]),
        (["--image", "a.png", "--model", "no/such/folder"], ["no/such/folder", "folder"]),
        (["--image", "a.png", "--model", "empty"], ["config.json", "missing"]),
        (["--image", "a.png", "--device", "nonsense"], ["--device nonsense", "cpu"]),
        (["--image", "a.png", "--device", "cuda:99"], ["--device cuda:99", "cpu"]),
        (["--image", "a.png", "--attn-cap", "-1"], ["attn_cap", "-1"]),
        (["--image", "a.png", "--image-size", "100"], ["image_size = 100", "96 and 112"]),
        (["--image", "a.png", "--score-threshold", "2"], ["score_threshold = 2"]),
        (["--image", "a.png", "--score-threshold", "nan"], ["score_threshold = nan"]),
        (["--image", "a.png", "--nms-iou", "1.01"], ["nms_iou = 1.01"]),
        (["--image", "a.png", "--nms-iou", "-1"], ["nms_iou = -1"]),
        (["--image", "a.png", "--min-size", "inf"], ["min_size = inf"]),
        (["--image", "a.png", "--min-size", "-5"], ["min_size = -5"]),
        (["--image", "a.png", "--json", "no/out.json"], ["--json", "no"]),
        (["--image", "a.png", "--json", "empty"], ["empty"]),
        (["--image", "a.png", "--out", "a.png"], ["a.png"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if value[0].startswith("--") else "",
)
def test_bad_input(argv, words, run_detect, here):
    """One line that says what is wrong, exit code 1, no traceback, nothing half written."""
    picture(here / "a.png")
    (here / "empty").mkdir()
    code, _, err = run_detect(*argv)
    assert code == 1 and len(err) == 1 and err[0].startswith("detect.py: ")
    assert all(word in err[0] for word in words), err[0]
    assert {path.name for path in here.iterdir()} <= {"a.png", "empty", "detections"}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--image"],
        ["--image", "a.png", "--dtype", "float16"],
        ["--image", "a", "--score", "1"],
        ["--image", "a.png", "--groups", "0"],
        ["--image", "a.png", "--groups", "-3"],
        ["--image", "a.png", "--batch-size", "0"],
        ["--image", "a.png", "--decode", "parallel", "--branches", "0"],
        ["--image", "a.png", "--decode", "both"],
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_bad_usage(argv, run_detect):
    """argparse's own: a usage line and exit code 2."""
    code, _, err = run_detect(*argv)
    assert code == 2 and err[0].startswith("usage:")


def test_no_traceback_in_a_process_of_its_own(model, tmp_path):
    """From another working folder with nothing but PYTHONPATH: a good picture, one broken, one missing."""
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    command = [sys.executable, ROOT / "infer" / "detect.py", "--image", "good.png", "bad.png", "none.png"]
    command += ["--model", model, "--score-threshold", "0", "--json", "out.json"]
    environment = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "image/s]" not in line]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [re.findall(r"(\w+)\.png", line)[0] for line in complaints] == ["bad", "none"]
    assert [record["image"] for record in json.loads((tmp_path / "out.json").read_text())] == ["good.png"]
    assert (tmp_path / "detections" / "good.png").is_file()


# ---- drawing -----------------------------------------------------------------------------------------------


def test_drawing():
    """Boxes where they belong, in their class's colour; small pictures enlarged; the source unharmed."""
    image = Image.new("RGB", (64, 32), "black")
    drawn = draw_boxes(image, [[16, 8, 48, 24]], ["cat 0.90"], [15])
    scale = drawn.width / 64
    assert drawn.height / 32 == scale > 4 and image.getcolors() == [(64 * 32, (0, 0, 0))]
    for x, y in ((16, 16), (47.9, 16), (32, 23.9)):
        assert drawn.getpixel((round(x * scale), round(y * scale))) == class_colour(15)
    assert drawn.getpixel((round(32 * scale), round(16 * scale))) == (0, 0, 0)
    assert draw_boxes(Image.new("RGB", (900, 700)), [], [], []).size == (900, 700)


@pytest.mark.parametrize("box", [[0, 0, 64, 32], [60, 28, 64, 32], [0, 30, 3, 32], [63, 0, 64, 1]], ids=str)
@pytest.mark.parametrize("size", [(64, 32), (2, 400), (3000, 20)], ids=str)
def test_drawing_at_the_edges(box, size):
    """A caption stays in the picture as far as it fits, wherever the box is."""
    scale = np.array([*size, *size]) / (64, 32, 64, 32)
    drawn = draw_boxes(Image.new("RGB", size, "black"), [box * scale], ["potted plant 0.50"], [3])
    counts = {colour: count for count, colour in drawn.getcolors(1 << 24)}
    assert counts.get(class_colour(3), 0) > 0


def test_colours_differ():
    assert len({class_colour(i) for i in range(80)}) == 80

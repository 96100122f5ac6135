"""evaluate.py: its figures, and runs that are stopped, resumed or shared between processes.

A detector that answers from a list stands in for the model, except where several processes need a real one.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LISTED_IMAGES, ROOT, FromAList, call, edit_json, python, torchrun
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from infer import evaluate, report
from infer.lib import predictions
from model.decoding.detections import Detections
from train import measures
from train.practice.write import write_coco

FIGURES = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"]
FIGURES += ["AR1", "AR10", "AR100", "AR small", "AR medium", "AR large"]


@pytest.fixture
def run_evaluate(monkeypatch, capsys, model, here):
    """evaluate.py with the untrained model."""

    def run(*argv):
        given = [] if "--model" in argv else ["--model", model]
        return call(monkeypatch, capsys, evaluate, *given, *argv)

    return run


def files_of(folder: Path) -> dict:
    """What must not depend on how a run went."""
    return {name: (folder / name).read_bytes() for name in ("results.json", "figures.json")}


# ---- figures -----------------------------------------------------------------------------------------------


def test_figures_are_pycocotools_own(evaluate_data, data, tmp_path, capsys):
    """All twelve, and results.json is a file that pycocotools takes."""
    assert evaluate_data("--out", tmp_path / "out")[0] == 0
    truth = COCO(str(data))
    theirs = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "results.json")), "bbox")
    theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert list(figures)[:12] == FIGURES and list(measures.FIGURES) == FIGURES
    assert [figures[name] for name in FIGURES] == pytest.approx(theirs.stats.tolist(), abs=6e-5)
    assert 0.2 < figures["AP"] < 0.9 and {"AP any class", "calibration error"} <= figures.keys()


def test_practice_sets(run_evaluate, here):
    """Without a set of one's own: the three held-out ones, mAP first."""
    code, out, _ = run_evaluate("--count", 8, "--groups", 4, "--json", "figures.json")
    assert code == 0
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert re.fullmatch(r"mAP \d\.\d{3} \(same drawings\)", lines[0]) and out.startswith(lines[0])
    assert [re.findall(r"\((.*)\)", line) for line in lines] == [
        ["same drawings"], ["unseen vendor"], ["crowded scenes"]
    ]  # fmt: skip
    figures = json.loads((here / "figures.json").read_text())
    assert list(figures) == ["same drawings", "unseen vendor", "crowded scenes"]
    wanted = {"AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AP any class", "calibration error"}
    assert all(wanted <= of_set.keys() and of_set["images"] == 8 for of_set in figures.values())
    assert [path.name for path in here.iterdir()] == ["figures.json"]


def test_practice_set_of_another_size(run_evaluate, here):
    """The scenes are drawn as large as the model reads them, and not taken for those of the usual size."""
    options = ("--sets", "same", "--count", 2, "--groups", 2, "--out", "out")
    assert run_evaluate(*options, "--image-size", 96)[0] == 0
    records = json.loads((here / "out" / "same" / "scenes" / "instances.json").read_text())["images"]
    assert {(record["width"], record["height"]) for record in records} == {(96, 96)}
    code, _, err = run_evaluate(*options)
    assert code == 1 and "image_size" in err


def test_in_parallel(run_evaluate, monkeypatch, capsys, here):
    """The boxes that count are those of the branches, of which there are four; report.py draws them."""
    write_coco(here / "set", 3)
    options = "--data set/instances.json --decode parallel --branches 4 --nms-iou 1 --out eval"
    code, out, _ = run_evaluate(*options.split())
    assert code == 0 and re.match(r"mAP 0\.\d{3} \(instances\)\n", out)
    settings = json.loads((here / "eval" / "settings.json").read_text())
    assert settings["decode"] == "parallel" and settings["branches"] == 4
    images = [result["image_id"] for result in json.loads((here / "eval" / "results.json").read_text())]
    assert images and max(images.count(image) for image in images) <= 4
    code, _, err = call(monkeypatch, capsys, report, "--eval", "eval", "--out", "page", "--images", 1)
    assert code == 0, err
    assert (here / "page" / "index.html").exists()


def test_a_set_of_ones_own(run_evaluate, here):
    """Written by train/practice/write.py; the images lie beside the file, or elsewhere."""
    write_coco(here / "set", 5, "vendor")
    code, out, _ = run_evaluate("--data", "set/instances.json", "--groups", 3, "--batch-size", 2)
    assert code == 0 and re.match(r"mAP 0\.\d{3} \(instances\)\n", out)
    (here / "set" / "images").rename(here / "pictures")
    code, moved, _ = run_evaluate("--data", "set/instances.json", "--images", "pictures", "--groups", 3)
    assert code == 0 and moved == out


def test_predictions_are_in_pixels_of_the_picture(coco):
    """What the detector finds is written as COCO wants it: x, y, width, height, the set's own class ids."""
    answers = [
        [[10, 10, 30, 30, 1], [50, 50, 110, 90, 2]],
        [[0, 0, 120, 110, 1]],
        [[5, 6, 35, 46, 3]],
    ]

    class Finds:
        """Finds in the next picture what the set says."""

        classes = ("mouse", "cat", "dog", "bird")

        def __call__(self, images):
            assert all(image.size == (128, 128) for image in images)
            rows = [np.array(answers.pop(0), float) for _ in images]
            ids = [r[:, 4].astype(int) for r in rows]
            return [
                Detections(r[:, :4], np.full(len(r), 0.8), c, [self.classes[i] for i in c], tokens=None)
                for r, c in zip(rows, ids)
            ]

    figures = predictions.evaluate(Finds(), coco, coco.parent / "images", 2, "test")
    assert figures["AP"] == figures["AP50"] == figures["AP any class"] == 1
    assert figures["images"] == 3 and figures["calibration error"] == pytest.approx(0.2)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), ["instances.json"]),
        (lambda file: file.write_text("[]"), ["instances.json", "COCO"]),
        (
            lambda file: edit_json(file, lambda d: d["categories"][0].update(name="ufo")),
            ["instances.json", "ufo"],
        ),
        (lambda file: (file.parent / "images" / "1.png").unlink(), ["1.png", "no such file"]),
        (
            lambda file: (file.parent / "images" / "1.png").write_text("?"),
            ["1.png", "not a readable image", "no figures"],
        ),
    ],
    ids=["missing", "list", "unknown class", "lost image", "broken image"],
)
def test_bad_sets(spoil, words, coco, run_evaluate):
    spoil(coco)
    code, out, err = run_evaluate("--data", coco, "--groups", 1)
    complaint = err.splitlines()[-1]
    assert code == 1 and out == "" and "Traceback" not in err
    assert complaint.startswith("evaluate.py: ") and all(word in complaint for word in words), err


def test_bad_arguments(run_evaluate):
    for option, value, expected in (
        ("--count", 0, 2),
        ("--batch-size", 0, 2),
        ("--device", "nonsense", 1),
        ("--model", "no/such/folder", 1),
        ("--images", "pictures", 1),  # of no --data
        ("--part", "test", 1),
    ):
        code, out, err = run_evaluate(option, value)
        assert code == expected and out == "" and str(value) in err.splitlines()[-1]


def test_a_set_without_objects(capsys):
    """COCO's -1 is no figure."""
    evaluate.print_figures("x", dict(AP=-1.0, AP50=-1.0, AR1=0.5, images=2, calibration=[]))
    assert capsys.readouterr().out == "mAP - (x)\n   AP50 -   AR1 0.500\n   \n   \n"


def test_the_data_is_not_replaced(run_evaluate, coco):
    before = coco.read_text()
    code, _, err = run_evaluate("--data", coco, "--json", coco)
    assert code == 1 and "is one of the files that are read" in err and coco.read_text() == before


def test_figures_are_not_lost(run_evaluate, here):
    """A file that cannot be written is told before the work, not after it."""
    for target in ("no/figures.json", ".", "/proc/figures.json"):
        code, out, err = run_evaluate("--count", 1, "--groups", 1, "--sets", "same", "--json", target)
        assert code == 1 and out == "" and len(err.splitlines()) == 1


# ---- going on ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """results.json and figures.json of a run that never stopped."""
    out = tmp_path_factory.mktemp("straight")
    predictions.evaluate(FromAList(data), data, data.parent / "images", 3, "instances", out)
    return files_of(out)


def test_stopped_and_resumed(evaluate_data, data, tmp_path, straight):
    """Images that were done are not decoded again, and the end is the same; a third run decodes nothing."""
    out = tmp_path / "out"
    assert evaluate_data("--out", out, "--batch-size", 2, detector=FromAList(data, limit=5))[0] == 130
    log = out / "predictions-0.jsonl"
    assert [json.loads(line)["image_id"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    assert not (out / "figures.json").exists()
    rest = FromAList(data)
    code, first, _ = evaluate_data("--out", out, "--batch-size", 3, detector=rest)
    assert code == 0 and rest.seen == LISTED_IMAGES - 4 and files_of(out) == straight
    nothing = FromAList(data)
    code, second, _ = evaluate_data("--out", out, detector=nothing)
    assert (code, nothing.seen, second) == (0, 0, first) and files_of(out) == straight
    assert len(log.read_text().splitlines()) == LISTED_IMAGES


def test_half_a_line_is_dropped(evaluate_data, data, tmp_path, straight):
    """The image of a line without its end is decoded again; that of another process's too."""
    out = tmp_path / "out"
    evaluate_data("--out", out)
    log = out / "predictions-0.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:-5])
    (out / "predictions-7.jsonl").write_text(lines[5] + lines[6].rstrip("\n"))
    detector = FromAList(data)
    code, _, _ = evaluate_data("--out", out, detector=detector)
    assert code == 0 and detector.seen == LISTED_IMAGES - 4 and files_of(out) == straight
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_broken_line_is_reported(evaluate_data, tmp_path):
    out = tmp_path / "out"
    evaluate_data("--out", out)
    log = out / "predictions-0.jsonl"
    log.write_text("?\n" + log.read_text())
    code, printed, err = evaluate_data("--out", out)
    assert code == 1 and "predictions-0.jsonl, line 1" in err and printed == ""


def test_other_settings_are_refused(evaluate_data, data, tmp_path):
    """In words, and nothing is touched; how fast it goes is no setting."""
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    usual = ["--out", out, "--model", model]
    evaluate_data(*usual)
    before = files_of(out)
    for more, word in (
        (["--min-size", 3], "min_size"),
        (["--groups", 4], "groups"),
        (["--noise-feedback"], "noise_feedback"),
        (["--decode", "parallel"], "decode"),
        (["--images", tmp_path], "images"),
    ):
        code, printed, err = evaluate_data(*usual, *more)
        assert code == 1 and err.startswith("evaluate.py: ") and printed == ""
        assert f"({word})" in err and "--out" in err
    assert evaluate_data(*usual, "--batch-size", 1, "--device", "cpu")[0] == 0
    (model / "model.safetensors").write_bytes(b"12")  # trained further
    assert "(model files)" in evaluate_data(*usual)[2]
    assert files_of(out) == before


def test_settings_without_predictions_are_replaced(tmp_path):
    predictions.check_settings(tmp_path / "out", dict(a=1))
    (tmp_path / "out" / "predictions-0.jsonl").touch()
    predictions.check_settings(tmp_path / "out", dict(a=2))
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"a": 2}


# ---- shared out --------------------------------------------------------------------------------------------


def test_broken_pictures(evaluate_data, data, tmp_path, straight):
    """All are named, and there are no figures; what was found in the others is kept until they are mended."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(data.parent / "images", images)
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:900])
    (images / "5.png").unlink()
    options = ["--images", images, "--out", out, "--batch-size", 1, "--json", tmp_path / "figures.json"]
    code, printed, err = evaluate_data(*options)
    assert (
        code == 1 and printed == "" and "2.png: not a readable image" in err and "5.png: no such file" in err
    )
    assert err.splitlines()[-1].startswith("evaluate.py: ") and "1 more picture" in err.splitlines()[-1]
    assert not (out / "figures.json").exists() and not (tmp_path / "figures.json").exists()
    for name in ("2.png", "5.png"):
        shutil.copy(data.parent / "images" / name, images)
    rest = FromAList(data)
    code, _, _ = evaluate_data(*options, detector=rest)
    assert code == 0 and rest.seen == 2 and files_of(out) == straight


def test_a_loop_of_links(evaluate_data, tmp_path):
    """As the data, its folder of images, or beside the weights: none is followed."""
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for argv in (("--data", loop), ("--images", loop)):
        code, _, err = evaluate_data(*argv)
        assert code == 1 and "loop.json" in err and len(err.splitlines()) == 1
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert predictions.file_stamps(str(tmp_path)) == {}


@pytest.mark.parametrize("content", [b"[]\n", b"caf\xe9\n", b"[" * 100_000 + b"\n", None], ids=range(4))
def test_predictions_that_are_none(content, evaluate_data, tmp_path):
    """None: a FIFO, which would be waited for."""
    evaluate_data("--out", tmp_path / "out")
    file = tmp_path / "out" / "predictions-0.jsonl"
    file.unlink()
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    code, _, err = evaluate_data("--out", tmp_path / "out")
    assert code == 1 and str(file) in err and "Traceback" not in err


def test_skip_broken(evaluate_data, monkeypatch, capsys, data, tmp_path):
    """As if they were not in the file: named, counted beside the figures, and no object of theirs is missed.
    A run without the option is continued; report.py leaves the same pictures out."""
    shutil.copytree(data.parent, tmp_path / "set")
    broken, images, out = tmp_path / "set" / "instances.json", tmp_path / "set" / "images", tmp_path / "out"
    without = tmp_path / "set" / "without.json"
    content = json.loads(broken.read_text())
    for name in ("images", "annotations"):
        key = "id" if name == "images" else "image_id"
        content[name] = [record for record in content[name] if record[key] not in (2, 5)]
    without.write_text(json.dumps(content))
    wanted = predictions.evaluate(FromAList(data), without, images, 3, "without")
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:900])
    (images / "5.png").unlink()

    options = ["--data", broken, "--out", out, "--json", tmp_path / "figures.json"]
    code, printed, err = evaluate_data(*options)
    assert code == 1 and printed == "" and "--skip-broken" in err
    rest = FromAList(data)
    code, printed, err = evaluate_data(*options, "--skip-broken", detector=rest)
    assert code == 0 and rest.seen == 0
    assert "2.png: not a readable image" in err and "5.png: no such file" in err
    assert f"(instances; 2 of {LISTED_IMAGES} pictures left out as broken)" in printed.splitlines()[0]
    figures = json.loads((out / "figures.json").read_text())
    skipped = figures.pop("skipped")
    assert list(skipped) == ["2", "5"] and "not a readable image" in skipped["2"] and figures == wanted
    assert list(json.loads((tmp_path / "figures.json").read_text())["instances"]["skipped"]) == ["2", "5"]
    code, _, err = call(monkeypatch, capsys, report, "--eval", out, "--out", tmp_path / "page")
    assert code == 0, err
    assert "(2 pictures left out as broken)" in (tmp_path / "page" / "index.html").read_text()
    for file in images.iterdir():
        file.write_text("no picture")
    code, printed, err = evaluate_data("--data", broken, "--skip-broken")  # and without --out
    assert code == 1 and printed == "" and "none of its pictures can be used" in err.splitlines()[-1]


@pytest.mark.parametrize("world", [2, 3])
def test_shares(data, tmp_path, world, straight):
    """Every process takes its part, and any number of processes goes on with what others left."""
    coco, images = measures.read_coco(data), data.parent / "images"
    ids = measures.category_ids(coco, FromAList.classes, data)
    detectors = [FromAList(data) for _ in range(world)]
    shares = [
        predictions.predict(detector, coco, images, ids, 2, "share", tmp_path, rank, world)
        for rank, detector in enumerate(detectors)
    ]
    assert [detector.seen for detector in detectors] == [
        len(range(rank, LISTED_IMAGES, world)) for rank in range(world)
    ]
    taken = [{result["image_id"] for result in share} for share, _ in shares]
    assert all(found <= set(range(rank, LISTED_IMAGES, world)) for rank, found in enumerate(taken))
    (tmp_path / "predictions-1.jsonl").unlink()
    alone = FromAList(data)
    predictions.evaluate(alone, data, images, 4, "instances", tmp_path)
    assert alone.seen == detectors[1].seen and files_of(tmp_path) == straight


@pytest.mark.parametrize(("asked", "gpus", "device"), [
    ("auto", True, "cuda:3"), ("cuda", True, "cuda:3"), ("cuda:1", True, "cuda:1"), ("cpu", True, "cpu"),
    ("auto", False, "auto"),
])  # fmt: skip
def test_every_process_has_its_gpu(asked, gpus, device, monkeypatch):
    started = []
    monkeypatch.setattr(evaluate, "join_processes", lambda *args, **_: started.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    args = argparse.Namespace(device=asked)
    evaluate.join_torchrun(args)
    assert args.device == asked and not started  # alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    evaluate.join_torchrun(args)
    assert args.device == device and started == [("gloo",)]


@pytest.mark.parametrize("decode", ["sequence", "parallel"])
def test_two_processes(decode, model, tmp_path):
    """torchrun with two, on a practice set: the figures of one, printed once; the scenes drawn once."""
    program = [ROOT / "infer" / "evaluate.py", "--model", model, "--count", "5", "--device", "cpu"]
    program += ["--sets", "same", "--batch-size", "1", "--decode", decode]
    printed = [
        python(*launcher, *program, "--out", tmp_path / out)
        for launcher, out in (((), "one"), (torchrun(2), "two"))
    ]
    assert printed[0] == printed[1] and re.match(r"mAP \d\.\d{3} \(same drawings\)\n", printed[1])
    one, two = (tmp_path / name / "same" for name in ("one", "two"))
    assert files_of(one) == files_of(two) and len(json.loads((one / "results.json").read_text())) > 5
    lines = [len((two / f"predictions-{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert lines == [3, 2] and len(list((two / "scenes" / "images").iterdir())) == 5


# Pictures of another size than their annotations ------------------------------------------------------------


class FindsNothing:
    """Stands in for a detector."""

    classes = ("cat",)

    def fitting_batch(self):
        return 2

    def __call__(self, images):
        none = np.zeros(0, int)
        return [Detections(np.zeros((0, 4)), none, none, [], tokens=none) for _ in images]


def coco_set(folder: Path, sizes: list[tuple[int, int]], **said: int) -> Path:
    """A file that says every picture has 40 x 30 pixels, or what `said` says, and pictures of these sizes."""
    (folder / "images").mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 0, 0)).save(folder / "images" / f"{i}.png")
    record = said or dict(width=40, height=30)
    data = dict(
        images=[record | dict(id=i, file_name=f"{i}.png") for i in range(len(sizes))],
        annotations=[dict(id=1, image_id=0, category_id=1, bbox=[2, 2, 9, 9], area=81, iscrowd=0)],
        categories=[dict(id=1, name="cat")],
    )
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"


def mean_ap(data: Path) -> float:
    return predictions.evaluate(FindsNothing(), data, data.parent / "images", None, "test")["AP"]


@pytest.mark.parametrize("other", [(80, 60), (30, 40), (40, 31)])
def test_pictures_of_another_size(other, tmp_path):
    """evaluate.py names the file and both sizes; boxes measured on other pixels would all be wrong."""
    data = coco_set(tmp_path, [(40, 30), (40, 30), (40, 30), other])
    fault = rf"3\.png has {other[0]}x{other[1]} pixels \(upright\), its annotations are for 40x30"
    with pytest.raises(ValueError, match=fault):
        mean_ap(data)


def test_pictures_of_the_right_size(tmp_path):
    """Also where the file gives no sizes: COCO's own evaluation does not need them."""
    assert mean_ap(coco_set(tmp_path / "with", [(40, 30)] * 3)) == 0
    assert mean_ap(coco_set(tmp_path / "without", [(40, 30), (80, 60)], license=1)) == 0

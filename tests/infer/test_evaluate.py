"""Figures, interrupted and shared evaluations, and the report of them.

A detector that answers from a list stands in for the model, except where several processes need a real one.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, python, torchrun
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from infer import evaluate, report
from model.decoding.detector import Detections

NAMES = ["cat", "dog", "bird"]
COUNT = 8  # images; number 3 and 7 have no objects
FIGURES = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"]
FIGURES += ["AR1", "AR10", "AR100", "AR small", "AR medium", "AR large"]


def write_set(folder: Path) -> Path:
    """A COCO set of noise images, 100 x 80, some of them with objects of three classes."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in (i for i in range(COUNT) if i % 4 != 3):
        for _ in range(rng.integers(1, 5)):
            w, h = rng.integers(10, 60, 2).tolist()
            x, y = int(rng.integers(0, 100 - w)), int(rng.integers(0, 80 - h))
            ids = dict(id=len(annotations) + 1, image_id=image, category_id=int(rng.integers(1, 4)))
            annotations.append(ids | dict(bbox=[x, y, w, h], area=w * h, iscrowd=0))
    images = [dict(id=i, file_name=f"{i}.png", width=100, height=80) for i in range(COUNT)]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(NAMES)]
    (folder / "images").mkdir(parents=True)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    data = dict(images=images, annotations=annotations, categories=categories)
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set")


class FromAList:
    """Finds the objects of a set, moved a little, and some that are not there, whatever the batch.

    Counts what it is asked for, and fails after `limit` images.
    """

    classes = ("mouse", *NAMES)

    def __init__(self, data: Path, limit: int | None = None):
        coco, rng = json.loads(data.read_text()), np.random.default_rng(1)
        self.answers = {}  # by the first pixels of the image
        for record in coco["images"]:
            with Image.open(data.parent / "images" / record["file_name"]) as image:
                key = image.tobytes()[:60]
            truth = [a for a in coco["annotations"] if a["image_id"] == record["id"]]
            rows = [[*a["bbox"], a["category_id"]] for a in truth] + [[5, 5, 20, 30, rng.integers(0, 4)]]
            rows = np.array(rows, float)
            rows[:, 2:4] += rows[:, :2] + rng.integers(-3, 4, (len(rows), 2))
            scores = np.sort(rng.random(len(rows)))[::-1]
            self.answers[key] = Detections(rows[:, :4], scores, rows[:, 4].astype(int), None)
        self.seen, self.limit = 0, limit

    def fitting_batch(self):
        return 4

    def __call__(self, images):
        self.seen += len(images)
        if self.limit is not None and self.seen > self.limit:
            raise KeyboardInterrupt
        return [self.answers[image.tobytes()[:60]] for image in images]


@pytest.fixture
def run_evaluate(monkeypatch, capsys, data):
    """evaluate.py in this process with a detector that answers from a list."""

    def run(*argv, detector=None):
        detector = detector or FromAList(data)
        monkeypatch.setattr(evaluate, "load_detector", lambda args, threshold: detector)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", *map(str, (data, *argv))])
        code = 0
        try:
            evaluate.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


def files_of(folder: Path) -> dict:
    """What must not depend on how a run went."""
    return {name: (folder / name).read_bytes() for name in ("results.json", "figures.json")}


# Figures ----------------------------------------------------------------------------------------------------


def tiny_set(folder: Path, images: int) -> Path:
    """Two cats in image 1, of 20 x 20; the other images are empty."""
    boxes = [[0, 0, 20, 20], [50, 50, 20, 20]]
    annotations = [
        dict(id=i + 1, image_id=1, category_id=1, bbox=box, area=400, iscrowd=0)
        for i, box in enumerate(boxes)
    ]
    records = [dict(id=i + 1, file_name=f"{i}.png", width=99, height=99) for i in range(images)]
    data = dict(images=records, annotations=annotations, categories=[dict(id=1, name="cat")])
    (folder / "tiny.json").write_text(json.dumps(data))
    return folder / "tiny.json"


def test_figures_by_hand(tmp_path):
    """One object found exactly (0.9), a wrong box (0.8), one found with IoU 0.6 (0.7).

    At IoU 0.5 to 0.6: precision 1 up to recall 0.5 (51 of 101 points), then 2/3 (50 points). Above: 1 up to
    recall 0.5, then nothing.
    """
    coco = evaluate.read_coco(tiny_set(tmp_path, 1))
    boxes = [([0, 0, 20, 20], 0.9), ([0, 70, 20, 20], 0.8), ([50, 50, 20, 12], 0.7)]
    results = [dict(image_id=1, category_id=1, bbox=box, score=score) for box, score in boxes]
    found = dict(zip(evaluate.FIGURES, evaluate.run_cocoeval(coco, results).stats, strict=True))
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert found["AP50"] == pytest.approx(low) and found["AP75"] == pytest.approx(high)
    assert found["AP"] == pytest.approx((3 * low + 7 * high) / 10)  # 0.50, 0.55, 0.60; seven above
    assert found["AP small"] == pytest.approx(found["AP"]) and found["AP large"] == -1
    assert found["AR1"] == pytest.approx(0.5)
    assert found["AR100"] == found["AR10"] == found["AR small"] == pytest.approx((3 + 7 * 0.5) / 10)


def test_figures_are_pycocotools_own(run_evaluate, data, tmp_path, capsys):
    """All twelve, and results.json is a file that pycocotools takes."""
    assert run_evaluate("--out", tmp_path / "out")[0] == 0
    truth = COCO(str(data))
    theirs = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "results.json")), "bbox")
    theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert list(figures)[:12] == FIGURES and list(evaluate.FIGURES) == FIGURES
    assert [figures[name] for name in FIGURES] == pytest.approx(theirs.stats.tolist(), abs=6e-5)
    assert 0.2 < figures["AP"] < 0.9 and {"AP any class", "calibration error"} <= figures.keys()


def test_images_without_objects_count(tmp_path):
    """A box in an empty image is wrong; one that is surer than the right ones costs precision."""
    coco = evaluate.read_coco(tiny_set(tmp_path, 2))
    results = [
        dict(image_id=1, category_id=1, bbox=a["bbox"], score=0.5) for a in coco.dataset["annotations"]
    ]
    perfect = evaluate.run_cocoeval(coco, results)
    false = dict(image_id=2, category_id=1, bbox=[1, 1, 9, 9], score=0.9)
    evaluation = evaluate.run_cocoeval(coco, [*results, false])
    assert perfect.stats[0] == pytest.approx(1) and evaluation.stats[0] == pytest.approx(2 / 3)
    scores, right, images = evaluate.judged(evaluation)
    assert sorted(zip(images.tolist(), scores.tolist(), right.tolist())) == [
        (1, 0.5, True), (1, 0.5, True), (2, 0.9, False)
    ]  # fmt: skip


def test_crowds_are_neither_right_nor_wrong(tmp_path):
    file = tiny_set(tmp_path, 1)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    coco = evaluate.read_coco(file)
    boxes = [[0, 0, 10, 10], [50, 50, 20, 20]]
    results = [dict(image_id=1, category_id=1, bbox=box, score=0.5) for box in boxes]
    scores, right, _ = evaluate.judged(evaluate.run_cocoeval(coco, results))
    assert (scores.tolist(), right.tolist()) == ([0.5], [True])


# Going on ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """results.json and figures.json of a run that never stopped."""
    out = tmp_path_factory.mktemp("straight")
    evaluate.evaluate(FromAList(data), data, data.parent / "images", 3, "instances", out)
    return files_of(out)


def test_stopped_and_resumed(run_evaluate, data, tmp_path, straight):
    """Images that were done are not decoded again, and the end is the same; a third run decodes nothing."""
    out = tmp_path / "out"
    assert run_evaluate("--out", out, "--batch-size", 2, detector=FromAList(data, limit=5))[0] == 130
    log = out / "predictions-0.jsonl"
    assert [json.loads(line)["image_id"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    assert not (out / "figures.json").exists()
    rest = FromAList(data)
    code, first = run_evaluate("--out", out, "--batch-size", 3, detector=rest)
    assert code == 0 and rest.seen == COUNT - 4 and files_of(out) == straight
    nothing = FromAList(data)
    code, second = run_evaluate("--out", out, detector=nothing)
    assert (code, nothing.seen, second) == (0, 0, first) and files_of(out) == straight
    assert len(log.read_text().splitlines()) == COUNT


def test_half_a_line_is_dropped(run_evaluate, data, tmp_path, straight):
    """The image of a line without its end is decoded again; that of another process's too."""
    out = tmp_path / "out"
    run_evaluate("--out", out)
    log = out / "predictions-0.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:-5])
    (out / "predictions-7.jsonl").write_text(lines[5] + lines[6].rstrip("\n"))
    detector = FromAList(data)
    code, _ = run_evaluate("--out", out, detector=detector)
    assert code == 0 and detector.seen == COUNT - 4 and files_of(out) == straight
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_broken_line_is_told(run_evaluate, tmp_path):
    out = tmp_path / "out"
    run_evaluate("--out", out)
    log = out / "predictions-0.jsonl"
    log.write_text("?\n" + log.read_text())
    code, printed = run_evaluate("--out", out)
    assert "predictions-0.jsonl, line 1" in code and printed == ""


def test_other_settings_are_refused(run_evaluate, data, tmp_path):
    """In words, and nothing is touched; how fast it goes is no setting."""
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    usual = ["--out", out, "--model", model]
    run_evaluate(*usual)
    before = files_of(out)
    for more, word in (
        (["--min-size", 3], "min_size"),
        (["--groups", 4], "groups"),
        (["--noise-feedback"], "noise_feedback"),
        (["--images", tmp_path], "images"),
    ):
        code, printed = run_evaluate(*usual, *more)
        assert code.startswith("evaluate.py: ") and f"({word})" in code and "--out" in code and printed == ""
    assert run_evaluate(*usual, "--batch-size", 1, "--device", "cpu")[0] == 0
    (model / "model.safetensors").write_bytes(b"12")  # trained further
    assert "(model files)" in run_evaluate(*usual)[0]
    assert files_of(out) == before


def test_settings_without_predictions_are_replaced(tmp_path):
    evaluate.remember(tmp_path / "out", dict(a=1))
    (tmp_path / "out" / "predictions-0.jsonl").touch()
    evaluate.remember(tmp_path / "out", dict(a=2))
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"a": 2}


# Shared out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_shares(data, tmp_path, world, straight):
    """Every process takes its part, and any number of processes goes on with what others left."""
    coco, images = evaluate.read_coco(data), data.parent / "images"
    ids = evaluate.category_ids(coco, FromAList.classes, data)
    detectors = [FromAList(data) for _ in range(world)]
    shares = [
        evaluate.predict(detector, coco, images, ids, 2, "share", tmp_path, rank, world)
        for rank, detector in enumerate(detectors)
    ]
    assert [detector.seen for detector in detectors] == [
        len(range(rank, COUNT, world)) for rank in range(world)
    ]
    taken = [{result["image_id"] for result in share} for share in shares]
    assert all(found <= set(range(rank, COUNT, world)) for rank, found in enumerate(taken))
    (tmp_path / "predictions-1.jsonl").unlink()
    alone = FromAList(data)
    evaluate.evaluate(alone, data, images, 4, "instances", tmp_path)
    assert alone.seen == detectors[1].seen and files_of(tmp_path) == straight


@pytest.mark.parametrize(("asked", "gpus", "device"), [
    ("auto", True, "cuda:3"), ("cuda", True, "cuda:3"), ("cuda:1", True, "cuda:1"), ("cpu", True, "cpu"),
    ("auto", False, "auto"),
])  # fmt: skip
def test_every_process_has_its_gpu(asked, gpus, device, monkeypatch):
    started = []
    monkeypatch.setattr(evaluate, "join", lambda *args, **_: started.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    args = evaluate.arguments(["--device", asked])
    evaluate.join_processes(args)
    assert args.device == asked and not started  # alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    evaluate.join_processes(args)
    assert args.device == device and started == [("gloo",)]


def test_two_processes(model, tmp_path):
    """torchrun with two, on a practice set: the figures of one, printed once; the scenes drawn once."""
    program = [ROOT / "infer" / "evaluate.py", "--model", model, "--count", "5", "--device", "cpu"]
    program += ["--sets", "same", "--batch-size", "1"]
    printed = [
        python(*launcher, *program, "--out", tmp_path / out)
        for launcher, out in (((), "one"), (torchrun(2), "two"))
    ]
    assert printed[0] == printed[1] and re.match(r"mAP \d\.\d{3} \(same drawings\)\n", printed[1])
    one, two = (tmp_path / name / "same" for name in ("one", "two"))
    assert files_of(one) == files_of(two) and len(json.loads((one / "results.json").read_text())) > 5
    lines = [len((two / f"predictions-{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert lines == [3, 2] and len(list((two / "scenes" / "images").iterdir())) == 5


# Report -----------------------------------------------------------------------------------------------------

PLOTS = "precision_recall score_distribution boxes_per_image box_sizes calibration ap_per_class".split()
PICTURES = {f"{name}.png" for name in PLOTS} | {"best.jpg", "worst.jpg"}


@pytest.fixture
def run_report(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
        try:
            report.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def check_report(folder: Path, pictures: set[str]) -> str:
    """Every picture is there, readable, and on the page; the page asks for nothing else."""
    page = (folder / "index.html").read_text()
    assert {file.name for file in folder.iterdir()} == pictures | {"index.html"}
    assert set(re.findall(r'src="([^"]*)"', page)) == pictures and "http" not in page
    assert page.count("<figcaption>") == len(pictures)
    for name in pictures:
        with Image.open(folder / name) as image:
            assert image.convert("L").getextrema()[0] < 128 < image.width  # not empty
    return page


def test_report(run_evaluate, run_report, tmp_path):
    pytest.importorskip("matplotlib")
    run_evaluate("--out", tmp_path / "eval")
    lines = [dict(step=i, loss=5 / i, lr=1e-3, samples_per_s=9) for i in range(1, 90)]
    lines += [dict(step=50, val_loss=1.0), dict(step=89, val_mAP=0.25, val_loss=0.5)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"st')
    assert run_report("--eval", tmp_path / "eval", "--run", tmp_path / "run", "--out", tmp_path / "page") == 0
    page = check_report(tmp_path / "page", PICTURES | {"learning_curve.png", "validation_curve.png"})
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert all(
        f"<th>{name}</th><td>{figures[name]:.3f}</td>" in page for name in FIGURES if figures[name] >= 0
    )
    assert "validation loss 0.500, validation mAP 0.250" in page


def test_report_of_practice_sets(data, run_report, tmp_path):
    """One after the other, each with its own pictures; a folder that was moved; a run with losses only."""
    pytest.importorskip("matplotlib")
    for split in ("same", "crowded"):
        out = tmp_path / "first" / split
        shutil.copytree(data.parent, out / "scenes")
        places = dict(data="scenes/instances.json", images="scenes/images")
        (out / "settings.json").write_text(json.dumps(dict(name=split) | places))
        evaluate.evaluate(
            FromAList(data), out / "scenes" / "instances.json", out / "scenes" / "images", 4, split, out
        )
    (tmp_path / "first").rename(tmp_path / "eval")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    code = run_report(
        "--eval", tmp_path / "eval", "--run", tmp_path / "run", "--out", tmp_path / "page", "--images", 1
    )
    assert code == 0
    names = {f"{split}_{name}" for split in ("same", "crowded") for name in PICTURES}
    page = check_report(tmp_path / "page", names | {"learning_curve.png"})
    assert page.index("<h2>same") < page.index("<h2>crowded")


def test_best_and_worst(data, tmp_path):
    """F1 by hand: all of an image's objects and nothing else is 1; half of them and one wrong is 0.5."""
    truth = json.loads(data.read_text())["annotations"]
    of_image = {i: [a for a in truth if a["image_id"] == i] for i in range(COUNT)}
    keep = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keep} | dict(score=0.9) for a in of_image[0] + of_image[1][1:]]
    results.append(dict(image_id=1, category_id=1, bbox=[90, 70, 5, 5], score=0.9))
    results.append(dict(image_id=3, category_id=1, bbox=[90, 70, 5, 5], score=0.9))
    results += [dict(image_id=2, category_id=1, bbox=[0, 0, 3, 3], score=0.01)] * 20
    settings = dict(name="x", data=str(data), images=str(data.parent / "images"))
    for name, value in (("settings", settings), ("figures", {}), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    e = report.Evaluated(tmp_path)
    n = len(of_image[1])
    assert e.threshold == 0.9 and e.found.tolist()[:4] == [len(of_image[0]), n, 0, 1]
    assert e.f1[:4].tolist() == pytest.approx([1, 2 * (n - 1) / (2 * n), 0, 0]) and e.f1[7] == 1


def test_report_in_words(run_report, tmp_path, monkeypatch):
    """What is missing, in one line."""
    monkeypatch.chdir(tmp_path)
    assert "report.py: --eval ." in run_report("--eval", ".", "--out", "page")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in run_report("--eval", ".", "--out", "page")
    assert not (tmp_path / "page").exists()


def test_nothing_found(run_evaluate, run_report, data, tmp_path):
    """A detector that finds nothing has a report too."""
    pytest.importorskip("matplotlib")
    silent = FromAList(data)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), None)
    silent.answers = dict.fromkeys(silent.answers, none)
    assert run_evaluate("--out", tmp_path / "eval", detector=silent)[0] == 0
    assert run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page", "--images", 1) == 0
    check_report(tmp_path / "page", PICTURES)

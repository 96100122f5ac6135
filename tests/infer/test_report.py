"""report.py: its pictures, and the page that shows them."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import LISTED_IMAGES, FromAList, call, edit_json
from PIL import Image

from infer import ablate, heads, report, tradeoffs
from infer.lib import predictions
from infer.lib.draw import place
from infer.lib.plots import NEEDED, Evaluated, ap_per_class, new_figure
from model.decoding.detections import Detections
from train.measures import FIGURES

PLOTS = "precision_recall score_distribution boxes_per_image box_sizes calibration ap_per_class".split()
PICTURES = {f"{name}.png" for name in PLOTS} | {"best.jpg", "worst.jpg"}


@pytest.fixture
def run_report(monkeypatch, capsys):
    def run(*argv):
        code, _, err = call(monkeypatch, capsys, report, *argv)
        return code, err

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


def test_report(evaluate_data, run_report, tmp_path):
    evaluate_data("--out", tmp_path / "eval")
    lines = [dict(step=i, loss=5 / i, lr=1e-3, samples_per_s=9) for i in range(1, 90)]
    lines += [dict(step=50, val_loss=1.0), dict(step=89, val_mAP=0.25, val_loss=0.5)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"st')
    assert (
        run_report("--eval", tmp_path / "eval", "--run", tmp_path / "run", "--out", tmp_path / "page")[0] == 0
    )
    page = check_report(tmp_path / "page", PICTURES | {"learning_curve.png", "validation_curve.png"})
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert all(
        f"<th>{name}</th><td>{figures[name]:.3f}</td>" in page for name in FIGURES if figures[name] >= 0
    )
    assert "validation loss 0.500, validation mAP 0.250" in page


def test_report_of_practice_sets(data, run_report, tmp_path):
    """One after the other, each with its own pictures; a folder that was moved; a run with losses only."""
    for split in ("same", "crowded"):
        out = tmp_path / "first" / split
        shutil.copytree(data.parent, out / "scenes")
        places = dict(data="scenes/instances.json", images="scenes/images")
        (out / "settings.json").write_text(json.dumps(dict(name=split) | places))
        predictions.evaluate(
            FromAList(data), out / "scenes" / "instances.json", out / "scenes" / "images", 4, split, out
        )
    (tmp_path / "first").rename(tmp_path / "eval")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    code, _ = run_report(
        "--eval", tmp_path / "eval", "--run", tmp_path / "run", "--out", tmp_path / "page", "--images", 1
    )
    assert code == 0
    names = {f"{split}_{name}" for split in ("same", "crowded") for name in PICTURES}
    page = check_report(tmp_path / "page", names | {"learning_curve.png"})
    assert page.index("<h2>same") < page.index("<h2>crowded")


def test_best_and_worst(data, tmp_path):
    """F1 by hand: all of an image's objects and nothing else is 1; half of them and one wrong is 0.5."""
    truth = json.loads(data.read_text())["annotations"]
    of_image = {i: [a for a in truth if a["image_id"] == i] for i in range(LISTED_IMAGES)}
    keep = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keep} | dict(score=0.9) for a in of_image[0] + of_image[1][1:]]
    results.append(dict(image_id=1, category_id=1, bbox=[90, 70, 5, 5], score=0.9))
    results.append(dict(image_id=3, category_id=1, bbox=[90, 70, 5, 5], score=0.9))
    results += [dict(image_id=2, category_id=1, bbox=[0, 0, 3, 3], score=0.01)] * 20
    settings = dict(name="x", data=str(data), images=str(data.parent / "images"))
    for name, value in (("settings", settings), ("figures", dict.fromkeys(NEEDED, 0)), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    e = Evaluated(tmp_path)
    n = len(of_image[1])
    assert e.threshold == 0.9 and e.found.tolist()[:4] == [len(of_image[0]), n, 0, 1]
    assert e.f1[:4].tolist() == pytest.approx([1, 2 * (n - 1) / (2 * n), 0, 0]) and e.f1[7] == 1


def test_report_in_words(run_report, tmp_path, monkeypatch):
    """What is missing, in one line."""
    monkeypatch.chdir(tmp_path)
    code, err = run_report("--eval", ".", "--out", "page")
    assert code == 1 and err.startswith("report.py: --eval .")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, err = run_report("--eval", ".", "--out", "page")
    assert code == 1 and "pip install matplotlib" in err
    assert not (tmp_path / "page").exists()


def test_hostile_names(evaluate_data, run_report, data, tmp_path):
    """Names of sets and classes are text on the page: no tags, no formulas, no halves of characters."""
    coco = json.loads(data.read_text())
    hostile = "<script>alert(1)</script> $\\frac$ \x1b[31m\n\ud800"
    coco["categories"][0]["name"] = hostile.split(" \x1b")[0]  # files with escapes in a name are refused
    shutil.copytree(data.parent, tmp_path / "set")
    (tmp_path / "set" / "instances.json").write_text(json.dumps(coco))
    assert evaluate_data("--out", tmp_path / "eval")[0] == 0
    settings, figures = (tmp_path / "eval" / f"{name}.json" for name in ("settings", "figures"))
    edit_json(
        settings, lambda content: content.update(name=hostile, data=str(tmp_path / "set/instances.json"))
    )
    assert run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page") == (0, "")
    page = check_report(tmp_path / "page", PICTURES)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; $\\frac$ \\x1b[31m\\n\\ud800") == 2
    assert "<script" not in page
    edit_json(figures, lambda content: content.update(images="<script>"))
    code, err = run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page")
    assert code == 1 and "figures.json: images is '<script>', not a number" in err
    edit_json(figures, lambda content: content.update(images=1) or content.pop("AP50"))
    code, err = run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page")
    assert code == 1 and "figures.json is not evaluate.py's: it has no 'AP50'" in err
    edit_json(settings, lambda content: content.pop("name"))
    assert (
        "settings.json is not evaluate.py's ('name')"
        in run_report("--eval", tmp_path / "eval", "--out", "x")[1]
    )


def test_a_log_of_something_else(evaluate_data, run_report, tmp_path):
    evaluate_data("--out", tmp_path / "eval")
    for line in ("5", '{"loss": 1}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "report_set", lambda *args: [])
            code, err = run_report("--eval", tmp_path / "eval", "--run", tmp_path, "--out", tmp_path / "page")
        assert code == 1 and f"--run {tmp_path}: its metrics.jsonl" in err and len(err.splitlines()) == 1


def test_no_half_plot(tmp_path):
    """The old one stays until the new one is whole."""
    file = tmp_path / "a.png"
    file.write_text("old")

    def save(target, **options):
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="a.png cannot be written"), new_figure(file, 2, 2) as figure:
        figure.savefig = save
    assert file.read_text() == "old" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("program", [ablate, heads, tradeoffs])
@pytest.mark.parametrize(
    ("out", "words"), [("plot", "no format"), ("a.txt", "no format"), ("none/a.png", "its folder does not")]
)
def test_a_plot_that_could_not_be_written(program, out, words, here, monkeypatch, capsys):
    """Complained about before the hours of work."""
    command = ["early-stop"] if program is tradeoffs else ["--model", "nowhere"]
    code, _, err = call(monkeypatch, capsys, program, *command, "--out", out)
    assert code == 1 and f"--out {out}: {words}" in err


def test_nothing_found(evaluate_data, run_report, data, tmp_path):
    """A detector that finds nothing has a report too."""
    silent = FromAList(data)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), [], None)
    silent.answers = dict.fromkeys(silent.answers, none)
    assert evaluate_data("--out", tmp_path / "eval", detector=silent)[0] == 0
    assert run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page", "--images", 1)[0] == 0
    check_report(tmp_path / "page", PICTURES)


@pytest.mark.parametrize(
    "content",
    [
        "[",
        '{"a": 1}',
        "[1]",
        '[{"image_id": 0}]',
        '[{"image_id": 0, "category_id": 1, "bbox": [[5], 5, 5, 5], "score": 1}]',
        '[{"image_id": 99, "category_id": 1, "bbox": [5, 5, 5, 5], "score": 1}]',
        "\udcff",
        None,
    ],
)
def test_results_that_are_none(content, evaluate_data, run_report, tmp_path):
    """None: a device, which can be read without an end."""
    evaluate_data("--out", tmp_path / "eval")
    file = tmp_path / "eval" / "results.json"
    file.unlink()
    if content is None:
        file.symlink_to("/dev/zero")
    else:
        file.write_text(content, errors="surrogateescape")
    code, err = run_report("--eval", tmp_path / "eval", "--out", tmp_path / "page")
    assert code == 1 and str(file) in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("count, tallest", [(3, 260), (80, 900)])
def test_ap_per_class_is_compact(count, tallest, tmp_path):
    ids = list(range(1, count + 1))
    result = SimpleNamespace(
        precision=np.random.default_rng(0).random((10, 101, count)),
        truth=[dict(category_id=i) for i in ids],
        names={i: f"class {i}" for i in ids},
        classes=ids,
    )
    with new_figure(tmp_path / "a.png", 7.5, 4.8) as figure:
        ap_per_class(figure.subplots(), result)
        names = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
    assert len(set(names)) == len(names) == count
    assert Image.open(tmp_path / "a.png").height < tallest


def test_captions_make_room_for_each_other():
    """Three equal boxes, and a fourth caption where there is no room left above or below the box."""
    taken = []
    for _ in range(3):
        x, y = place([40, 60, 200, 120], (80, 15), (300, 200), taken)
        assert all(x + 80 <= a or a + 80 <= x or y + 15 <= b or b + 15 <= y for a, b, *_ in taken)
        taken.append((x, y, x + 80, y + 15))
    assert taken[0][:2] == (40, 45) and place([0, 0, 90, 40], (80, 15), (90, 40), []) == (0, 0)
    assert place([0, 0, 5, 5], (80, 15), (30, 10), []) == (0, 0)

"""infer/calibrate.py: fitted scores are right as often as they say, and are written where they are read."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import call

from infer import calibrate
from model import PaliGemma
from model.decoding.parallel import calibrated
from model.io.hub import NANO
from train import convert
from train.measures import fit_calibration
from train.practice.write import write_coco


def test_fit():
    """From scores of which a known share is right: those shares, and the order of the scores."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 50_000)
    truth = calibrated(torch.from_numpy(scores), (1.5, 4.0, -0.5)).numpy()
    found = fit_calibration(scores, rng.random(len(scores)) < truth)
    assert np.abs(calibrated(torch.from_numpy(scores), found).numpy() - truth).max() < 0.02
    assert min(found[:2]) >= 0
    assert calibrated(torch.tensor([0.2, 0.7]), None).tolist() == pytest.approx([0.2, 0.7])
    edges = calibrated(torch.tensor([0.0, 1.0, torch.nan]), found)  # NaN is still seen where it is looked for
    assert 0 <= edges[0] < edges[1] <= 1 and edges[2].isnan()


def test_program(here, monkeypatch, capsys):
    """It changes config.json alone; the new numbers are read, and do not depend on those before."""
    shutil.copytree(NANO, here / "mine")
    printed = []
    for before in (None, [1.0, 1.0, 5.0]):
        raw = json.loads((here / "mine/config.json").read_text())
        raw["detection"]["calibration"] = before
        (here / "mine/config.json").write_text(json.dumps(raw))
        printed.append(call(monkeypatch, capsys, calibrate, "--model", "mine", "--count", 12)[1])
        after = json.loads((here / "mine/config.json").read_text())
        found = after["detection"].pop("calibration")
        raw["detection"].pop("calibration")
        assert after == raw
        assert PaliGemma.from_pretrained("mine").config.calibration == tuple(found)
    assert printed[0] == printed[1]
    assert re.search(r"calibration error \d.\d+ -> \d.\d+   mAP \d.\d+ -> \d.\d+", printed[0])


def test_other_forms_of_data(here, monkeypatch, capsys):
    """The same scenes as COCO and as YOLO: the same numbers; what is wrong is said of the folder."""
    write_coco(here / "scenes", 12)
    convert.main(["to-yolo", "--data", str(here / "scenes/instances.json"), "--out", str(here / "yolo")])
    capsys.readouterr()
    printed = []
    for data in ("scenes/instances.json", "yolo"):
        shutil.copytree(NANO, here / "mine", dirs_exist_ok=True)
        printed.append(call(monkeypatch, capsys, calibrate, "--model", "mine", "--data", data)[1])
    assert printed[0] == printed[1] and "calibration error" in printed[0]
    names = (here / "yolo/data.yaml").read_text().replace("person", "somebody")
    (here / "yolo/data.yaml").write_text(names)
    code, _, err = call(monkeypatch, capsys, calibrate, "--model", "mine", "--data", "yolo")
    assert code == 1 and err.startswith("calibrate.py: yolo has categories")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "owner/name"], "owner/name/config.json is no file here"),
        (["--classes", "cat"], "only boxes in parallel are calibrated"),
        (["--decode", "sequence", "--count", 1], "answers in sequence"),
    ],
)
def test_refused(options, words, here, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, calibrate, *options)
    assert code != 0 and words in err

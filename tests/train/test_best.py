"""Validation in the course of a run: when, which weights are kept, and what the last line says."""

import json
from pathlib import Path

import pytest
from helpers import same
from safetensors.torch import load_file
from training import PLAIN, Killed, metrics, parsed, run, weights

from model import PaliGemma
from train.run.best import verdict
from train.validate import Validation


@pytest.fixture
def scored(monkeypatch):
    """Let validations find these mAPs one after the other; None ends the program as a lost machine does."""

    def scored(*scores, warning=""):
        left = iter(scores)

        def figures(self):
            if (score := next(left)) is None:
                raise Killed
            return dict(val_loss=1.0, val_mAP=score), warning

        monkeypatch.setattr(Validation, "run", figures)

    return scored


def test_the_best_weights_are_kept(tiny, scenes, tmp_path, scored, capsys):
    """Those of step 2, which no checkpoint holds any more at the end; the last line has the command."""
    scored(0.1, 0.2, 0.5, 0.3, 0.4)
    out = tmp_path / "run"
    run(tiny, out, f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --steps 4 --lr 1e-2 --keep 3")
    lines = capsys.readouterr().out.splitlines()
    assert [line["step"] for line in metrics(out) if "val_mAP" in line] == [0, 1, 2, 3, 4]
    assert "step 2: val_loss 1.0000, val_mAP 0.5000 (the best so far)" in lines
    assert same(weights(out / "best"), {k: v.bfloat16() for k, v in weights(out / "step-0000002").items()})
    assert (
        f"{out / 'best'} (step 2: val_mAP 0.500, val_loss 1.000) is better than {out / 'final'}" in lines[-1]
    )
    assert lines[-1].endswith(f"python infer/detect.py --model {out / 'best'} --image PICTURE")


def test_killed_while_validating(tiny, scenes, tmp_path, scored):
    """It goes on with the validation that was not finished, and knows what was best before."""
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --val {scenes} --val-every 2 --steps 4 --lora"
    scored(0.1, 0.2, 0.3)
    run(tiny, tmp_path / "straight", options)
    scored(0.1, None)
    with pytest.raises(Killed):
        run(tiny, out, options)
    scored(0.2, 0.3)
    run(tiny, out, options, "--resume")
    assert [line["val_mAP"] for line in metrics(out) if "val_mAP" in line] == [0.1, 0.2, 0.3]
    for name in ("best", "final"):
        one, two = (
            load_file(tmp_path / run / name / "adapter_model.safetensors") for run in ("straight", "run")
        )
        assert same(one, two)
    assert PaliGemma.from_pretrained(str(tiny), adapter=str(out / "best")).config.closed_set_only
    scored()  # a run that is over validates nothing again
    run(tiny, out, options, "--resume")


def test_a_warning_is_said_once_and_at_the_end(tiny, scenes, tmp_path, scored, capsys):
    """Not of the model as it came."""
    scored(0.1, 0.1, 0.1, 0.1, warning="all alike")
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --steps 3")
    assert capsys.readouterr().err.count("warning: all alike") == 2


@pytest.mark.parametrize(
    ("best", "options", "words"),
    [
        (None, "", "x/final: python infer/detect.py --model x/final --image PICTURE"),
        (8, "", "x/final is the best of all validations (val_mAP 0.300, val_loss 2.000), as x/best: python"),
        (0, "", "x/best (before the first step: val_mAP 0.500, val_loss 2.000) is better than x/final"),
        (4, "--lora", "detect.py --model x --adapter x/best --image PICTURE"),
    ],
)
def test_the_last_line(best, options, words):
    args = parsed(options)
    args.out = Path("x")
    last = dict(step=8, score=[0.3, -2.0])
    trainer = dict(step=8, best=dict(step=best, score=[0.5, -2.0]), validated=last)
    if best in (None, 8):
        trainer = dict(step=8) if best is None else dict(step=8, best=last, validated=last)
    said = verdict(args, json.loads(json.dumps(trainer)), closed_set=True)
    assert words in said and "\n" not in said
    assert "infer/generate.py" in verdict(args, trainer, closed_set=False)

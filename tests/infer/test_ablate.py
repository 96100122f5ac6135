"""infer/ablate.py: each change changes something, and nothing else stays behind."""

from argparse import Namespace

import pytest
import torch
from helpers import call, tiny_config
from PIL import Image

from infer import ablate
from model import PaliGemma
from model.io.hub import resolve
from model.io.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """nano's form, tiny, with random weights that do not vanish in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    model = PaliGemma(tiny_config(Tokenizer(resolve("nano"))).override(sliding_window=24))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.15)
    model.folder = resolve("nano")
    model.save_pretrained(folder)
    return folder


def test_every_change_is_in_use(checkpoint, capsys, tmp_path):
    """Each change of the model has a loss of its own, and those of decoding leave it to the last digit as it
    was; so none stays behind for the next one, either."""
    plot = tmp_path / "plot.png"
    options = dict(model=checkpoint, set="same", count=2, only=None, out=plot, device="cpu")
    measured = ablate.ablate(Namespace(**options))
    changes = ablate.changes_of(PaliGemma.from_pretrained(checkpoint))
    assert list(measured) == [change.name for change in changes]
    usual = measured["as it is"]["loss"]
    of_model = [measured[change.name]["loss"] for change in changes[1:] if not change.decoding]
    assert len({usual, *of_model}) == 1 + len(of_model) >= 16
    assert all(measured[change.name]["loss"] == usual for change in changes if change.decoding)
    table = capsys.readouterr().out
    assert all(name in table for name in measured)
    assert table.count(" = ") == sum(bool(change.decoding) for change in changes)  # finds nothing in any form
    assert Image.open(plot).size[0] > 500


def test_unknown_change(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, ablate, "--only", "no RoPE", "gravity off")
    assert code == 1 and 'gravity off is none of "causal prefix"' in err and len(err.splitlines()) == 1

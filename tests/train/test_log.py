"""The log of a run."""

import json
import signal
import sys
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
from tqdm import tqdm
from training import PLAIN, run

from train.run.log import STOPPING, Log, stop_on_signals


def test_an_ignored_signal_stays_ignored():
    """nohup starts a program with SIGHUP ignored, and closing the terminal must not stop it."""
    before = [signal.getsignal(number) for number in STOPPING]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopping = stop_on_signals()
        signal.raise_signal(signal.SIGHUP)
        assert stopping == {"now": 0}
        signal.raise_signal(signal.SIGTERM)
        assert stopping == {"now": signal.SIGTERM}
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    """Lines of later steps, and a last line that was not written to its end."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(dict(step=step, loss=1.0)) + "\n" for step in (1, 2, 3))
    file.write_text(lines + '{"step": 2, "lo')
    log = Log(Namespace(out=tmp_path, steps=4, batch_size=1), 2, torch.device("cpu"))
    log.line(3, 0.5, lr=1e-3)
    log.bar.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_tensorboard_ends_with_the_run(tmp_path, monkeypatch):
    """Its writer keeps the newest lines to itself for a while."""
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=lambda _: board))
    with Log(Namespace(out=tmp_path, steps=4, batch_size=1), 0, torch.device("cpu")) as log:
        log.line(3, 0.5, lr=1e-3)
    assert [call[0] for call in board.method_calls][-2:] == ["add_scalar", "close"]


def test_the_bar_ends_with_the_run(tiny, scenes, tmp_path, capsys, monkeypatch):
    """Whatever ends it: a complaint has a line of its own, and no bar is left to the next run."""

    def fail(log, *_, **__):
        raise ValueError("no more")

    monkeypatch.setattr(Log, "line", fail)
    with pytest.raises(ValueError, match="no more"):
        run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --steps 2")
    assert not any("step" in bar.unit for bar in tqdm._instances)
    assert capsys.readouterr().err.endswith("\n")

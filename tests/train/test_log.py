"""The log of a run."""

import json
from argparse import Namespace

import torch

from train.run.log import Log


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    """Lines of later steps, and a last line that was not written to its end."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(dict(step=step, loss=1.0)) + "\n" for step in (1, 2, 3))
    file.write_text(lines + '{"step": 2, "lo')
    log = Log(Namespace(out=tmp_path, steps=4, batch_size=1), 2, torch.device("cpu"))
    log.line(3, 0.5, lr=1e-3)
    log.bar.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]

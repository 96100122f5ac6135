"""The other benchmark programs with tiny settings: they run, and both sides compute the same thing."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ENVIRONMENT, call, load
from PIL import Image
from reference import save, tiny_paligemma

from infer import benchmark_step, tradeoffs
from infer.lib import measuring
from model.config import VARIANTS
from train.run.processes import peak_memory

# ---- benchmark_step.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tiny_paligemma(0), tmp_path_factory.mktemp("tiny"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # transformers'
def test_sides_compute_the_same_loss(tiny):
    """The step of transformers + peft is the same step, with and without recomputing activations."""
    args = argparse.Namespace(device="cpu", batch_size=2, steps=1)
    rows = [benchmark_step.measure(side, tiny, args) for side in benchmark_step.SIDES]
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 4, rel=0.01)
    assert len({row["trainable"] for row in rows}) == 1 and rows[0]["trainable"] > 1000


def test_benchmark_step(run_program, here, tiny):
    options = "--no-peer --steps 1 --device cpu --peak-tflops 1 --json f.json".split()
    out = run_program(benchmark_step, *options, "--folder", tiny)
    rows = json.loads((here / "f.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["ours", "ours, recompute"]
    table = [line.split("  ")[0] for line in out.splitlines()[-3:]]
    assert table == ["", "ours", "ours, recompute"] and re.search("s a step .* MFU", out)


def test_every_side_fails(monkeypatch, capfd, here):
    """A line for each, and the reason; no traceback."""
    (here / "config.json").write_text("{}")
    argv = "--no-peer", "--device", "cpu", "--folder", here
    code, out, err = call(monkeypatch, capfd, benchmark_step, *argv)
    assert code == 1 and "Traceback" not in err
    assert "config.json" in err and "benchmark_step.py: " in err


# ---- tradeoffs.py ------------------------------------------------------------------------------------------


def test_early_stop(run_program, here):
    """Stopping early decodes fewer boxes; the table has a row for each rule, and a plot is drawn."""
    out = run_program(tradeoffs, *"early-stop --count 3 --repeats 1 --noise 0 --out plot.png".split())
    header, never, one, two = (line.split() for line in out.splitlines())
    assert header[-2:] == ["boxes", "images/s"] and never[:2] == ["-", "-"] and never[3] == "12.0"
    assert one[:2] == ["0.0", "1"] and one[3] == "1.0" and two[3] == "2.0"
    assert Image.open(here / "plot.png").size == (780, 520)


def test_growth(run_program, here):
    """Both forms, in each panel; mAP is of the boxes that were decoded, so it rises with their number."""
    few = "--count 3 --groups 1 12 --batch-size 1 2 --sides 32 64"
    out = run_program(tradeoffs, *f"growth --repeats 1 {few} --out plot.png".split())
    lines = [line for line in out.splitlines() if " against " in line]
    names = [re.sub(r"(\d+) [\d.e+]+", r"\1", line) for line in lines]
    panels = ["mAP against boxes, {}: 1, 12", "milliseconds against boxes, {}: 1, 12"]
    panels += ["milliseconds against images a batch, {}: 1, 2"]
    panels += ["milliseconds against image tokens, {}: 4, 16"]
    assert names == [panel.format(form) for panel in panels for form in ("in sequence", "in parallel")]
    for line in lines[:2]:
        one, twelve = (float(word.split()[1]) for word in line.split(": ")[1].split(", "))
        assert 0 < one < twelve < 1
    assert Image.open(here / "plot.png").size == (1170, 780)


def test_head(run_program):
    """Each way for coordinates and for classes."""
    few = "--widths nano --repeats 3 --batch-size 1 2"
    lines = run_program(tradeoffs, *f"head --device cpu {few}".split()).splitlines()
    assert lines[1].split() == ["full", "slice"] and len(lines) == 6
    assert re.fullmatch(r"nano, batch 2, 81 classes +\d+ +\d+", lines[-1])


def test_layouts(run_program):
    """A row for every layout, with the errors of 16 and of 8 bits."""
    lines = run_program(tradeoffs, *"layouts --model nano --rows 1 5 --repeats 1".split()).splitlines()
    errors = {(cells := re.split(r"\s{2,}", line))[0]: float(cells[1]) for line in lines[1:]}
    assert {"bfloat16, plain", "float32, plain", "Int8Linear"} <= set(errors)
    assert errors.pop("float32, plain") < 5e-5
    for name, error in errors.items():
        assert 0.003 < error < 0.02 if name in ("Int8Linear", "PlanesLinear") else 0 < error < 0.003


def test_the_heads_ways_choose_alike(monkeypatch):
    """The likeliest allowed id, but for noise, which only the head leaves out."""
    decoder = tradeoffs.TiedHead(8, 257_216, torch.float32, "cpu")
    ways = tradeoffs.three_ways(decoder, torch.randn(3, 8), slot=0)
    assert torch.equal(ways["full"]().indices, ways["slice"]().best)


def test_options_belong_to_their_table(monkeypatch, capsys):
    """Where an option would have no effect it is refused."""
    for argv in (["head", "--count", 3], ["growth", "--out", "a.png", "--device", "cpu"], []):
        code, _, err = call(monkeypatch, capsys, tradeoffs, *argv)
        assert code == 2 and "usage:" in err


# ---- what they share ---------------------------------------------------------------------------------------


def test_random_checkpoint(here, monkeypatch, tiny):
    """Built once: the second time it is found; a temporary one is removed."""
    config = load(tiny).config
    monkeypatch.setitem(VARIANTS, "tiny", config)
    with measuring.random_checkpoint("tiny", here / "kept") as folder:
        stamp = (folder / "model.safetensors").stat().st_mtime_ns
        assert load(folder).config.text == config.text
    with measuring.random_checkpoint("tiny", here / "kept") as folder:
        assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with measuring.random_checkpoint("tiny", None) as folder:
        assert (folder / "config.json").exists()
    assert not folder.exists()


def test_peak_memory():
    """That of this process alone: what its parent held when it started does not count."""
    held = bytearray(300 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])  # every page is there
    code = "from train.run.processes import peak_memory; print(peak_memory('cpu'))"
    child = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    assert int(child.stdout) < peak_memory("cpu")
    assert peak_memory("cpu") > len(held)


def test_print_table(capsys):
    measuring.print_table([{"side": "ours", "s": "1.50"}, {"side": "theirs, too", "GB": "10"}])
    assert capsys.readouterr().out == "side            s  GB\nours         1.50\ntheirs, too        10\n"

"""The benchmark programs with tiny settings: that they run, and that both sides compute the same thing."""

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

from infer import benchmark, benchmark_step, tradeoffs
from infer.lib import measuring
from model.config import VARIANTS
from train.run.processes import peak_memory


@pytest.fixture
def run(monkeypatch, capsys, here):
    """A program's standard output; it must end well."""

    def run(program, *argv) -> str:
        code, out, err = call(monkeypatch, capsys, program, *argv)
        assert code == 0, err
        return out

    return run


# ---- benchmark.py ------------------------------------------------------------------------------------------


def test_benchmark(run, here):
    """Nano beside transformers: the tokens of all sides are equal, and every figure is there. Boxes in
    parallel are timed as a whole, against the same answers."""
    options = "--groups 1 --rounds 2 --batch-size 1 2 --no-memory --peer --device cpu --json f.json".split()
    out = run(benchmark, *options, "--branches", 7)
    rows = json.loads((here / "f.json").read_text())["rows"]
    sides = "ours", "ours, parallel", "transformers"
    assert [(row["batch"], row["side"]) for row in rows] == [(n, side) for n in (1, 2) for side in sides]
    for row in rows:
        in_sequence = row["side"] != "ours, parallel"
        assert row["tokens_equal"] is (True if in_sequence else None)
        assert (row["token"] is None) != in_sequence
        assert row["prefill"] > 0 and row["images_s"] * row["answer"] == pytest.approx(row["batch"])
        if in_sequence:
            assert row["answer"] == pytest.approx(row["prefill"] + 60 * row["token"])
        (ours,) = (other for other in rows if (other["batch"], other["side"]) == (row["batch"], "ours"))
        assert row["of_ours"] == pytest.approx(row["answer"] / ours["answer"])
    assert "prefill s" in out and "of ours" in out and "other tokens" not in out


def test_sides_in_parallel(model):
    """--branches of them in one call, through the model of the other sides, which memory holds once."""
    args = argparse.Namespace(device="cpu", dtype="float32", branches=7)
    ours, side = benchmark.Ours(model, args), benchmark.Parallel(model, args)
    assert side.model is ours.model
    assert side.decode(benchmark.random_images(model, 2, "cpu"), groups=1).shape == (2, 5 * 7)


def test_peak_memory_is_of_a_process_of_its_own(run, here):
    run(benchmark, *"--groups 1 --rounds 1 --no-peer --no-parallel --device cpu --json f.json".split())
    (row,) = json.loads((here / "f.json").read_text())["rows"]
    assert 5e7 < row["peak"] < 5e9


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


def test_benchmark_step(run, here, tiny):
    options = "--no-peer --steps 1 --device cpu --peak-tflops 1 --json f.json".split()
    out = run(benchmark_step, *options, "--folder", tiny)
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


def test_early_stop(run, here):
    """Stopping early decodes fewer boxes; the table has a row for each rule, and a plot is drawn."""
    out = run(tradeoffs, *"early-stop --count 3 --repeats 1 --noise 0 --out plot.png".split())
    header, never, one, two = (line.split() for line in out.splitlines())
    assert header[-2:] == ["boxes", "images/s"] and never[:2] == ["-", "-"] and never[3] == "12.0"
    assert one[:2] == ["0.0", "1"] and one[3] == "1.0" and two[3] == "2.0"
    assert Image.open(here / "plot.png").size == (780, 520)


def test_growth(run, here):
    """Both forms, in each panel; mAP is of the boxes that were decoded, so it rises with their number."""
    few = "--count 3 --groups 1 12 --batch-size 1 2 --sides 32 64"
    out = run(tradeoffs, *f"growth --repeats 1 {few} --out plot.png".split())
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


def test_head(run):
    """Each way for coordinates and for classes."""
    few = "--widths nano --repeats 3 --batch-size 1 2"
    lines = run(tradeoffs, *f"head --device cpu {few}".split()).splitlines()
    assert lines[1].split() == ["full", "slice"] and len(lines) == 6
    assert re.fullmatch(r"nano, batch 2, 81 classes +\d+ +\d+", lines[-1])


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

"""The benchmark programs with tiny settings: that they run, and that both sides compute the same thing."""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, call, complaint, load
from PIL import Image
from reference import save, tiny_paligemma

from infer import benchmark, benchmark_step, tradeoffs
from infer.lib import measuring, peers, turns
from model.config import VARIANTS
from model.io.hub import NANO
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

LAYER = 160 * (2 * 160 + 2 * 80 + 3 * 640)  # nano's matrices of a decoder layer
BYTES_OF_NANO = {
    "ours": 4 * 4 * LAYER,
    "ours, int8": 4 * LAYER,
    "transformers": 4 * (4 * LAYER + 160 * 2560),
}
VISION = 8 * 192 * (4 * 192 + 2 * 768) + 192 * 3 * 16 * 16
FLOPS_OF_NANO = 2 * (64 * VISION + (64 + 5) * (3 * LAYER + 2 * 160 * 80))  # of the last, keys and values


@pytest.fixture
def in_this_process(monkeypatch):
    """Turns start no processes, which would import torch and transformers anew."""

    def run_child(program, *options, limit):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [program, *map(str, options)])
            benchmark.main()
        return [json.loads(line) for line in out.getvalue().splitlines()]

    monkeypatch.setattr(benchmark, "run_child", run_child)


QUICK = "--groups 1 --rounds 1 --seconds 0 --device cpu --json f.json".split()


def test_benchmark(run, here, in_this_process):
    """Nano beside transformers: the tokens of all sides are equal, and every figure is there. Boxes in
    parallel are timed as a whole, against the same answers."""
    options = "--batch-size 1 2 --threads 1 --peers transformers --branches 7".split()
    out = run(benchmark, *QUICK, *options)
    figures = json.loads((here / "f.json").read_text())
    (machine,) = figures["machine"].values()
    sides = "ours", "ours, parallel", "ours, int8", "ours, int8, parallel", "transformers"
    rows = figures["rows"]
    assert [(row["batch"], row["side"]) for row in rows] == [(n, side) for n in (1, 2) for side in sides]
    for row in rows:
        in_sequence, int8 = "parallel" not in row["side"], "int8" in row["side"]
        assert row["tokens_equal"] is (True if in_sequence and not int8 else None)
        assert row["prefill"] > 0 and row["images_s"] * row["answer"] == pytest.approx(row["batch"])
        (ours,) = (other for other in rows if (other["batch"], other["side"]) == (row["batch"], "ours"))
        assert row["of_ours"] == pytest.approx(row["answer"] / ours["answer"])
        rate = row["of_gemm"] * machine["int8" if int8 else "float32"]  # operations a second
        assert rate * row["prefill"] == pytest.approx(row["batch"] * FLOPS_OF_NANO, rel=0.01)
        assert (row["token"] is None) != in_sequence and (row["of_reading"] is None) != in_sequence
        if in_sequence:
            assert row["answer"] == pytest.approx(row["prefill"] + 59 * row["token"])
            read = row["of_reading"] * machine["read"] * row["token"]  # bytes
            assert read == pytest.approx(BYTES_OF_NANO[row["side"]], rel=0.01)
    assert "of GEMM" in out and "of ours" in out and "other tokens" not in out


def test_other_tokens_show(model):
    """In float32, where both sides of a comparison are exact."""
    turns = [
        dict(side=side, batch=1, threads=1, tokens=tokens, prefill=1.0, whole=2.0, peak=None)
        for side, tokens in (("ours", [1, 2]), ("ours, int8", [1, 3]), ("transformers", [1, 3]))
    ]
    args = argparse.Namespace(groups=1, dtype="float32", device="cpu")
    rows = benchmark.summary(turns, {1: dict(read=1.0, float32=1.0, int8=1.0)}, model, args)
    assert [row["tokens_equal"] for row in rows] == [True, None, False]
    assert "other tokens than ours" in benchmark.as_text(rows[-1]).values()


def test_sides_in_parallel(model):
    """--branches of them in one call, through the model of the groups, which memory holds once."""
    args = argparse.Namespace(device="cpu", dtype="float32", branches=7)
    side, images = turns.Ours(model, args), turns.random_images(model, 2, "cpu")
    assert side.decode_parallel(images).shape == (2, 5 * 7)
    assert side.decode(images, groups=1).shape == (2, 5)


@pytest.mark.parametrize(("took", "passes"), [(1.0, 1 + 3), (99.0, 1)])
def test_a_long_first_pass_counts(took, passes, model, monkeypatch):
    """A short one is a warm-up, for which a slow side has no time."""
    done = []
    side = SimpleNamespace(set_threads=lambda threads: None, batches=True, prefilled=0.0)
    side.decode = lambda images, groups: done.append(groups) or torch.zeros(1, 5)
    monkeypatch.setitem(turns.SIDES, "ours", lambda folder, args: side)
    monkeypatch.setattr(turns, "now", lambda device: took * len(done))
    options = dict(batch_size=[1], groups=1, parallel=False, threads=[1], seconds=2.5)
    (row,) = turns.turn("ours", model, argparse.Namespace(device="cpu", **options))
    assert len(done) == passes and row["whole"] == took


def test_peak_memory_is_of_a_process_of_its_own(run, here):
    run(benchmark, *QUICK, *"--peers --no-parallel --no-int8".split())
    (row,) = json.loads((here / "f.json").read_text())["rows"]
    assert 5e7 < row["peak"] < 5e9


def test_a_child_that_is_killed(here):
    """What it has printed by then is kept, but for half a line."""
    lines = """import time; print('{"a": 1}'); print('words'); print('{"b": 2', flush=True); time.sleep(99)"""
    (here / "slow.py").write_text(lines)
    assert measuring.run_child(here / "slow.py", limit=0.5) == [dict(a=1)]


def test_turns_that_do_not_fit(monkeypatch, model):
    """All sides have a turn before one has a second; a turn that took longer than is left is left out."""
    clock, order = [0.0], []

    def run_child(program, *options, limit):
        order.append((options[-1], limit))
        clock[0] += dict(ours=10, transformers=40)[options[-1]]
        return []

    monkeypatch.setattr(benchmark, "run_child", run_child)
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: clock[0])
    args = argparse.Namespace(scratch=model, device="cpu", dtype="float32", rounds=3)
    benchmark.take_turns(["ours", "transformers"], 75, model, args)
    assert order == [("ours", 75), ("transformers", 65), ("ours", 25), ("ours", 15)]


def test_what_is_not_measured_is_said(run, here, monkeypatch):
    """And what is, is kept."""
    row = dict(side="ours", batch=1, threads=1, tokens=[], prefill=1.0, whole=5.0, peak=10**9)
    answers = [[row], ChildProcessError("ours, int8: exit code -9")]

    def run_child(*options, limit):
        if isinstance(answer := answers.pop(0), list):
            return answer
        raise answer

    monkeypatch.setattr(benchmark, "run_child", run_child)
    out = run(benchmark, *QUICK, "--peers", "--threads", 2, 1)
    missing = ["ours, threads 2", "ours, int8, threads 2", "ours, int8, threads 1"]
    assert out.splitlines()[-3:] == [f"not measured: {name}" for name in missing] and not answers
    (row,) = json.loads((here / "f.json").read_text())["rows"]
    assert (row["token"], row["answer"]) == (1, 1 + 59)  # four of five tokens are read


def test_peers_that_are_not_installed(monkeypatch, capsys, here):
    """One line that says how to install them; without --peers, those that are there."""
    monkeypatch.setattr(peers, "installed", lambda package: package in ("transformers", "gguf"))
    assert peers.choose_peers(None, "cpu") == ["transformers"]
    code, _, err = call(monkeypatch, capsys, benchmark, "--peers", "llama.cpp", "--device", "cpu")
    assert code == 1 and err.count("\n") == 1
    assert "llama-cpp-python not installed; python -m pip install llama-cpp-python" in err
    monkeypatch.setattr(peers, "installed", lambda package: True)
    assert peers.choose_peers(None, "cuda:1") == ["transformers"]
    assert "on a CPU only" in complaint(peers.choose_peers, ["llama.cpp"], "cuda:1")


# ---- llama.cpp ---------------------------------------------------------------------------------------------


def test_llama_cpp_reads_a_prefix_and_tokens(monkeypatch):
    """In one call, and one by one, all but the last of the groups; every pass begins anew."""
    calls = []

    class Llama:
        ctx = "ctx"

        def __init__(self, file, **options):
            calls.append(options["n_ctx"])

        def reset(self):
            calls.append("reset")

        def eval(self, tokens):
            calls.append(len(tokens))

    fake = SimpleNamespace(Llama=Llama, llama_set_n_threads=lambda *x: calls.append(x))
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    side = peers.LlamaCpp("x.gguf", VARIANTS["paligemma2-3b-224"], prompt=5, groups=1)
    side.set_threads(2)
    side.decode(None, groups=1)
    assert calls == [266, ("ctx", 2, 2), "reset", 261, 1, 1, 1, 1] and side.prefilled > 0


def test_q8_0_is_gguf_s(tiny):
    """The same scales and, but for halves, the same numbers as gguf's own."""
    quants = pytest.importorskip("gguf.quants")
    weight = torch.randn(8, 64)
    ours = peers.as_stored(weight, "int8").numpy().view("uint8").reshape(8, -1)
    theirs = quants.quantize(weight.numpy(), quants.GGMLQuantizationType.Q8_0)
    assert (ours != theirs).mean() < 0.01


@pytest.mark.parametrize(("kind", "limit"), [("float32", 0.01), ("bfloat16", 0.1), ("int8", 0.3)])
def test_llama_cpp_computes_the_same(here, kind, limit):
    """Its logits of a text are those of our decoder, so the file says what the checkpoint does."""
    llama_cpp, _ = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    peers.write_gguf(NANO, here / "f.gguf", kind)
    # verbose: it is silent by moving pytest's own files out of the way, and then finds no model.
    llama = llama_cpp.Llama(str(here / "f.gguf"), n_ctx=64, logits_all=True, verbose=True)
    ours, tokens = load(NANO), torch.arange(20, 40)
    llama.eval(tokens.tolist())
    mask = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    with torch.inference_mode():
        x = ours.decoder.embed_tokens(tokens[None])
        logits = ours.decoder.logits(ours.decoder(x, torch.arange(20)[None], (mask, mask)))[0]
    error = torch.from_numpy(llama.scores[:20]) - logits
    assert error.norm() < limit * logits.norm()


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

"""benchmark.py with tiny settings: its sides compute the same, its figures are there, its time is kept."""

import argparse
import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import call, complaint, load

from infer import benchmark
from infer.lib import measuring, peers, turns
from model.config import VARIANTS
from model.io.hub import NANO

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


def test_benchmark(run_program, here, in_this_process):
    """Nano beside transformers: the tokens of all sides are equal, and every figure is there. Boxes in
    parallel are timed as a whole, against the same answers."""
    options = "--batch-size 1 2 --threads 1 --peers transformers --branches 7".split()
    out = run_program(benchmark, *QUICK, *options)
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
    assert "other tokens than ours" in benchmark.table_row(rows[-1]).values()


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


def test_peak_memory_is_of_a_process_of_its_own(run_program, here):
    run_program(benchmark, *QUICK, *"--peers --no-parallel --no-int8".split())
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
    args = argparse.Namespace(scratch=model, device="cpu", dtype="float32", rounds=3, threads=[1])
    benchmark.take_turns(["ours", "transformers"], 75, model, args)
    assert order == [("ours", 75), ("transformers", 65), ("ours", 25), ("ours", 15)]


def test_what_is_not_measured_is_said(run_program, here, monkeypatch):
    """And what is, is kept."""
    row = dict(side="ours", batch=1, threads=1, tokens=[], prefill=1.0, whole=5.0, peak=10**9)
    answers = [[row], ChildProcessError("ours, int8: exit code -9")]

    def run_child(*options, limit):
        if isinstance(answer := answers.pop(0), list):
            return answer
        raise answer

    monkeypatch.setattr(benchmark, "run_child", run_child)
    out = run_program(benchmark, *QUICK, "--peers", "--threads", 2, 1)
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


def test_q8_0_is_gguf_s():
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

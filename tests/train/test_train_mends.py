"""Faults of the training loop that were found by review: each test failed before its fault was mended."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import (
    FIT,
    PLAIN,
    language_of,
    launch,
    metrics,
    run,
    run_until_killed,
    same,
    torchrun,
    weights,
    weights_apart,
)
from torch.distributed import HashStore
from torch.overrides import TorchFunctionMode

from model import PaliGemma
from model.decoding.closed_set import GroupDecoder
from model.io.tokenizer import Tokenizer
from train import fit as train
from train import loss as objective_module
from train import validate
from train.data.coco import CocoDetections
from train.data.open import open_data
from train.data.samples import collate
from train.loss import Objective, allowed_loss, vocabulary_loss
from train.run.optimizers import lr_factor
from train.validate import Validation

# A GPU that is none -----------------------------------------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """Whatever is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def place(value):
            asked = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if asked and func is not torch.device else value

        return func(*map(place, args), **{name: place(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as Python can see; the numbers of those that were made the current one. Of
    torch.cuda.set_device only the call into C is replaced, so its own checks run."""
    current = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with OnTheCpu():
        yield current


@pytest.mark.parametrize(
    ("device", "environment", "current"),
    [("cuda", {}, 0), ("cuda:1", {}, 1), ("cuda", dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"), 0)],
    ids=["the GPU", "one by its number", "torchrun, one process"],
)
def test_training_on_a_gpu(device, environment, current, gpus, tiny, scenes, tmp_path, monkeypatch):
    """With validation, a checkpoint and going on from it: what the CPU does without autocast."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = f"{PLAIN} --data {scenes} --val {scenes} --val-every 2 --val-count 4 --save-every 2"
    run(tiny, tmp_path / "run", f"{options} --steps 4 --device {device} --amp")
    for name in ("step-0000004", "final"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    run(tiny, tmp_path / "run", f"{options} --steps 4 --device {device} --amp", "--resume")
    assert gpus == [current, current]
    assert same(weights(tmp_path / "run" / "step-0000004"), weights(tmp_path / "step-0000004"))
    run(tiny, tmp_path / "cpu", f"{options} --steps 4")
    one, two = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("run", "cpu")
    )
    assert one == pytest.approx(two, abs=1e-3)


def test_device_of_each_process(monkeypatch):
    """Of several on a machine, each has a GPU of its own."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.own_device("cuda", world=8) == torch.device("cuda:1")
    assert train.own_device("cpu", world=8) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:2", "gpu"])
def test_no_such_device(device, gpus, tmp_path):
    with pytest.raises(ValueError, match=f"--device {device}"):
        run("nano", tmp_path / "run", f"--device {device}")
    assert not gpus and not (tmp_path / "run").exists()


@pytest.fixture
def group():
    """This process as the only one of torchrun."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(folder, options="") -> Objective:
    argv = f"--model {folder} --out x --device cpu --shard {options}".split()
    model = PaliGemma.from_pretrained(str(folder), dtype=torch.float32)
    return train.distribute(Objective(model, None).train(), train.arguments(argv))


def test_sharded_on_the_cpu_of_a_machine_with_gpus(group, tiny, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    assert {p.device_mesh.device_type for p in sharded(tiny).parameters()} == {"cpu"}


def test_helper_head_on_an_adapters_base(tiny, tmp_path):
    """Its weights are float32, the image tokens of an adapter's base bfloat16."""
    run(tiny, tmp_path / "run", "--lora --steps 2 --patch-weight 1")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


# Validation in several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["", "--shard"], ids=["DDP", "FSDP"])
def test_validation_in_two_processes(option, tiny, scenes, tmp_path):
    """Before a checkpoint is written and steps follow. Five pictures: the processes' shares differ."""
    options = f"--data {scenes} --val {scenes} --val-every 2 --val-count 5 --save-every 2 --steps 4"
    run(tiny, tmp_path / "one", f"{PLAIN} {options}")
    printed = launch(tiny, tmp_path / "two", f"{options} {option}", torchrun(2))
    one, two = ([x for x in metrics(tmp_path / name) if "val_loss" in x] for name in ("one", "two"))
    assert [x["step"] for x in two] == [2, 4]
    assert [x["val_loss"] for x in one] == pytest.approx([x["val_loss"] for x in two], abs=2e-4)
    if option:  # said at the start: a decoder's steps of its own do not go together with split weights
        assert "val_mAP" in printed and not any("val_mAP" in x for x in two)
    else:
        assert "val_mAP" not in printed
        assert [x["val_mAP"] for x in one] == pytest.approx([x["val_mAP"] for x in two], abs=1e-3)
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4


def test_the_first_process_decides_what_is_best(tiny, scenes, tmp_path):
    """One digit in which figures differ would let only some processes save, and the others wait forever."""
    program = tmp_path / "differing.py"
    program.write_text(
        "import os, runpy\n"
        "from pathlib import Path\n"
        "from train import validate\n"
        "from train.run import checkpoint\n"
        "rank, figures, save = int(os.environ['RANK']), iter(range(9)), checkpoint.save_checkpoint\n"
        "def differing(self):\n"
        "    return dict(val_loss=5 + next(figures) * (-1) ** rank)\n"
        "def recorded(run, trainer, *rest):\n"
        "    print(trainer['step'], file=open(run.out / f'saves-{rank}', 'a'))\n"
        "    save(run, trainer, *rest)\n"
        "validate.Validation.run, checkpoint.save_checkpoint = differing, recorded\n"
        f"runpy.run_path({str(FIT)!r}, run_name='__main__')\n"
    )
    options = f"--data {scenes} --val {scenes} --val-every 1 --save-every 4 --steps 4"
    launch(tiny, tmp_path / "run", options, torchrun(2), program)
    saves = [(tmp_path / "run" / f"saves-{rank}").read_text().split() for rank in (0, 1)]
    assert saves == [["1", "4"], ["1", "4"]]  # the first process saw the loss rise
    assert [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [5, 6, 7, 8]


# Rounding ---------------------------------------------------------------------------------------------------


def test_sharded_with_amp_rounds_no_totals_and_no_angles(group, tiny, scenes, monkeypatch):
    """Weights are cast to bfloat16; the weights of the loss, their total and RoPE's angles are not."""
    objective = sharded(tiny, "--amp")
    attention, attend, loss_of = objective.model.decoder.layers[1].attn, [], []
    forward, real = attention.forward, objective_module.vocabulary_loss

    def watched_attention(x, rope, *rest):
        attend.append((x, *rope))
        return forward(x, rope, *rest)

    def watched_loss(decoder, hidden, labels, weights):
        loss_of.append((weights, real(decoder, hidden, labels, weights)))
        return loss_of[-1][1]

    monkeypatch.setattr(attention, "forward", watched_attention)
    monkeypatch.setattr(objective_module, "vocabulary_loss", watched_loss)
    data = open_data(scenes, None, objective.model, Tokenizer(tiny), seed=0, augment=False)
    batch = collate([data[i, i] for i in range(4)], objective.model.config.pad)
    loss, logged = objective(batch | {"total": torch.tensor(240.5)})
    ((x, cos, sin),), ((weights_, loss_sum),) = attend, loss_of
    assert x.dtype == torch.bfloat16
    assert {t.dtype for t in (cos, sin, weights_, loss_sum, loss)} == {torch.float32}
    assert logged.item() == pytest.approx(loss_sum.item() / 240.5, abs=1e-5)


def test_loss_sums_are_float32(tiny):
    """Whatever the weights of the positions are: 300 times 1 is 300, in bfloat16 it would stop at 256."""
    decoder = PaliGemma.from_pretrained(str(tiny), dtype=torch.bfloat16).decoder
    language = language_of(tiny)
    hidden = torch.randn(1, 300, decoder.config.width, dtype=torch.bfloat16)
    labels, ones = torch.full((1, 300), language.loc0), torch.ones(1, 300, dtype=torch.bfloat16)
    for loss in (vocabulary_loss, partial(allowed_loss, language=language)):
        rounded, exact = (loss(decoder, hidden, labels, w) for w in (ones, ones.float()))
        assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=1e-5)


# Options that would make a run useless ----------------------------------------------------------------------


def parsed(options: str):
    return train.arguments(f"--model x --out x --device cpu {options}".split())


def test_the_rate_never_rises_after_warm_up():
    """--min-lr follows a small --lr; one that is larger than it is refused."""
    assert parsed("--lr 3e-7").min_lr == 3e-7 and parsed("--lr 1e-3").min_lr == 1e-6
    args = parsed("--lr 3e-7 --steps 200")
    assert [lr_factor(step, args) for step in range(100, 200)] == pytest.approx([1] * 100)
    for options in ("--lr 3e-7 --min-lr 1e-6", "--min-lr -1", "--lr 0", "--lr nan"):
        with pytest.raises(ValueError, match="--lr|--min-lr"):
            parsed(options)


def test_all_weights_in_bfloat16_are_refused():
    """Most steps would be smaller than what bfloat16 can add to a weight."""
    with pytest.raises(ValueError, match="--dtype float32"):
        parsed("--dtype bfloat16")
    assert parsed("--dtype bfloat16 --lora").dtype == "bfloat16" and parsed("").dtype == "float32"


# Recomputation ----------------------------------------------------------------------------------------------


def test_recomputation_is_for_gradients_only(tiny, scenes, monkeypatch):
    """It reads the state of the random generators in every block, which a CUDA graph of validation's decoder
    cannot capture."""
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    objective = Objective(model, None)
    train.distribute(objective, parsed("--recompute"))
    reads, real = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or real())
    GroupDecoder(model, language_of(tiny), groups=2)(torch.zeros(1, 3, 64, 64))
    assert not reads
    data = open_data(scenes, None, model, Tokenizer(tiny), seed=0, augment=False)
    objective(collate([data[0, 0]], model.config.pad) | {"total": torch.ones(())})
    assert len(reads) == len(model.vision.layers) + len(model.decoder.layers)


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--lr 2e-3", "--lr"), ("--min-lr 1e-4", "--min-lr"), ("--muon-lr 1e-2", "--muon-lr"),
        ("--steps 9", "--steps"), ("--warmup 3", "--warmup"), ("--weight-decay 0.1", "--weight-decay"),
        ("--clip 2", "--clip"), ("--loss vocabulary", "--loss"), ("--augment", "--augment"),
        ("--amp", "--amp"), ("--freeze-vision", "--freeze-vision"), ("--lora", "--dtype"),
        ("--patch-steps 1 --patch-weight 1", "--patch-steps"), ("--seed 1", "--seed"),
    ],
    ids=lambda value: value.split()[0],
)  # fmt: skip
def test_other_options_are_refused(option, name, begun):
    """Whatever changes the weights that a run ends with."""
    model, scenes, out = begun
    with pytest.raises(ValueError, match=f"{name} "):
        run(model, out, f"{PLAIN} --data {scenes} --steps 2 {option} --resume")


@pytest.fixture(scope="module")
def begun(tiny, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    run(tiny, out, f"{PLAIN} --data {scenes} --steps 2")
    return tiny, scenes, out


def test_the_machine_and_the_watching_may_change(tiny, scenes, tmp_path, monkeypatch):
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --steps 4 --save-every 2"
    run_until_killed(monkeypatch, 4, tiny, out, options)
    more = f"--accumulate 2 --recompute --val {scenes} --val-every 1 --val-count 2 --keep 1 --log-every 2"
    run(tiny, out, f"{options} {more}", "--resume")
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 4]


def test_a_run_from_before_an_option_goes_on(tiny, scenes, tmp_path):
    """Its run.json does not have the option: that is as good as its default, and as nothing else."""
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --steps 2"
    run(tiny, out, options)
    before = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({name: x for name, x in before.items() if name != "rslora"}))
    with pytest.raises(ValueError, match="--rslora False"):
        run(tiny, out, f"{options} --rslora", "--resume")
    run(tiny, out, options, "--resume")


def test_the_best_is_of_one_measure(tiny, scenes, tmp_path, monkeypatch):
    """A score on other pictures says nothing about which checkpoint is better."""
    out, options = tmp_path / "run", f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --save-every 1"
    scores = iter((0.9, 0.8, 0.3, 0.4, 0.2))
    monkeypatch.setattr(Validation, "run", lambda self: dict(val_loss=1.0, val_mAP=next(scores)))
    run_until_killed(monkeypatch, 3, tiny, out, f"{options} --steps 5")
    run(tiny, out, f"{options} --steps 5 --val-count 2", "--resume")
    best = json.loads((out / "step-0000005" / "trainer.json").read_text())["best"]
    assert best == dict(step=4, score=0.4)


# Validation data --------------------------------------------------------------------------------------------


def test_validation_data_of_another_kind(tiny, scenes, pairs, tmp_path):
    """A loss over the ids of closed-set detection says nothing about lines of text, and the other way."""
    for options, held in (
        (f"--data {scenes} --val {pairs}", "lines of text"),
        (f"--data {pairs} --val {scenes}", "COCO instances"),
        (f"--val {pairs}", "lines of text"),
    ):
        with pytest.raises(ValueError, match=f"--val .* holds {held}"):
            run(tiny, tmp_path / "run", f"{PLAIN} {options} --val-every 1 --steps 1")
    assert not (tmp_path / "run").exists()


def test_validation_pictures_are_the_same_for_loss_and_map(tiny, scenes, tmp_path, monkeypatch):
    """The first in the file, whatever their ids."""
    data = json.loads(scenes.read_text())
    data["images"].reverse()
    file = tmp_path / "reversed.json"
    file.write_text(json.dumps(data))
    read, real = dict(loss=[], mAP=[]), CocoDetections.__getitem__
    monkeypatch.setattr(
        CocoDetections,
        "__getitem__",
        lambda self, key: read["loss"].append(self.name(key[1])) or real(self, key),
    )

    def truth_of(data, items):
        read["mAP"] += map(data.name, items)
        return real_truth(data, items)

    real_truth = validate.truth_of
    monkeypatch.setattr(validate, "truth_of", truth_of)
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    args = parsed(
        f"--data x --val {file} --val-images {scenes.parent / 'images'} --val-every 1 --val-count 3"
    )
    Validation(args, model, Objective(model, None), Tokenizer(tiny), torch.device("cpu")).run()
    first = [record["file_name"] for record in data["images"][:3]]
    assert read == dict(loss=first, mAP=first)

"""Optimizers: who moves which parameter, at which rate, and how far."""

import pytest
import torch
from helpers import language_of
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import PLAIN, parsed, run, weights, weights_apart

from model import PaliGemma
from train import fit as train
from train.data.samples import collate
from train.practice.dataset import PracticeScenes
from train.run import optimizers as schedule
from train.run.optimizers import lr_factor


@pytest.mark.parametrize("muon", [0, 1e-3], ids=["AdamW", "Muon and AdamW"])
def test_optimizers(muon, tiny):
    """Each parameter belongs to one optimizer and moves; the matrices of the layers are Muon's."""
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    language = language_of(tiny)
    names = [[200 + i] for i in range(80)]
    objective = train.Objective(model, language, patch_weight=1.0, names=names).train()
    args = train.arguments(
        ["--model", "x", "--out", "x", "--device", "cpu", "--lr", "1e-3", "--muon-lr", str(muon)]
    )
    optimizers = train.make_optimizers(objective, args)
    assert [type(o).__name__ for o in optimizers] == (["Muon", "AdamW"] if muon else ["AdamW"])
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(objective.parameters()))
    if muon:
        names = {p: name for name, p in objective.named_parameters()}
        of_muon = {names[p] for p in optimizers[0].param_groups[0]["params"]}
        assert {
            "model.decoder.layers.1.mlp.up_proj.weight",
            "model.vision.layers.0.attn.q_proj.weight",
        } <= of_muon
        assert not any("embed" in name or "norm" in name or name.endswith("bias") for name in of_muon)

    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    batch = collate([PracticeScenes(language, 64, 16)[i, i] for i in range(4)])
    loss, logged = objective(batch | {"total": batch["weights"].sum()})
    assert loss > logged > 0
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    still = {name for name, p in objective.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if not name.endswith("k_proj.bias")}  # a constant in the softmax


def test_decay_spares_vectors_and_embeddings(tiny):
    objective = train.Objective(
        PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), language_of(tiny), 0.0
    )
    args = train.arguments(["--model", "x", "--out", "x", "--device", "cpu", "--weight-decay", "0.1"])
    (optimizer,) = train.make_optimizers(objective, args)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in objective.named_parameters():
        assert decay[p] == (0.1 if p.ndim == 2 and "embed" not in name else 0), name


def test_optimizer_options(tiny):
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    objective = train.Objective(model, None)
    for options, beta2, decay in (("", 0.98, 0), ("--beta2 0.999 --weight-decay 0.01", 0.999, 0.01)):
        args = train.arguments(f"--model x --out x --device cpu {options}".split())
        (optimizer,) = train.make_optimizers(objective, args)
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, beta2)}
        assert max(group["weight_decay"] for group in optimizer.param_groups) == decay


# Rates ------------------------------------------------------------------------------------------------------


def test_learning_rate():
    """Up in a line, down in half a cosine, from lr to min-lr."""
    argv = "--model x --out x --steps 110 --warmup 10 --lr 2e-3 --min-lr 2e-4".split()
    args = train.arguments(argv)
    factors = [schedule.lr_factor(step, args) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1) and factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1) and factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule.lr_factor(0, train.arguments([*argv, "--warmup", "0"])) == pytest.approx(1)


def test_the_rate_never_rises_after_warm_up():
    """--min-lr follows a small --lr; one that is larger than it is refused."""
    assert parsed("--lr 3e-7").min_lr == 3e-7 and parsed("--lr 1e-3").min_lr == 1e-6
    args = parsed("--lr 3e-7 --steps 200")
    assert [lr_factor(step, args) for step in range(100, 200)] == pytest.approx([1] * 100)
    for options in ("--lr 3e-7 --min-lr 1e-6", "--min-lr -1", "--lr 0", "--lr nan"):
        with pytest.raises(ValueError, match="--lr|--min-lr"):
            parsed(options)


@pytest.fixture
def optimizer_steps():
    """(kind, learning rate, norm of all its gradients) of every step that an optimizer takes."""
    steps = []

    def look(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        rate = optimizer.param_groups[0]["lr"]
        steps.append((type(optimizer).__name__, rate, torch.cat(gradients).norm().item()))

    hook = register_optimizer_step_pre_hook(look)
    yield steps
    hook.remove()


def test_each_optimizer_has_its_own_rate(optimizer_steps, tiny, scenes, tmp_path):
    """Both warm up and fall together."""
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --steps 3 --lr 1e-3 --muon-lr 8e-3 --min-lr 0")
    rates = {kind: [rate for k, rate, _ in optimizer_steps if k == kind] for kind in ("AdamW", "Muon")}
    assert rates["AdamW"] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates["Muon"] == pytest.approx([4e-3, 8e-3, 8e-3])


# Clipping ---------------------------------------------------------------------------------------------------


def test_gradients_are_clipped(optimizer_steps, tiny, scenes, tmp_path):
    for clip in (0.1, 1e6):
        run(tiny, tmp_path / f"{clip}", f"{PLAIN} --data {scenes} --steps 2 --clip {clip}")
    norms = [norm for _, _, norm in optimizer_steps]
    assert norms[:2] == pytest.approx([0.1, 0.1], rel=1e-3) and min(norms[2:]) > 0.2


def test_no_clipping(tiny, scenes, tmp_path):
    """--clip 0 leaves gradients as they are. (AdamW's first step hides a factor; those after it do not.)"""
    for name, clip in (("none", "0"), ("never", "1e9"), ("hard", "0.01")):
        run(tiny, tmp_path / name, f"--patch-weight 0 --data {scenes} --steps 3 --clip {clip}")
    none, never, hard = (weights(tmp_path / name / "step-0000003") for name in ("none", "never", "hard"))
    assert weights_apart(none, never) == 0 < weights_apart(none, hard)
    assert weights_apart(none, weights(tiny)) > 1e-4

"""What a step and a validation do: each test fails when the one line that does it is changed."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, language_of, launch, metrics, run, same, torchrun, weights, weights_apart
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from model import PaliGemma, gemma
from model.io.image import to_network
from model.io.tokenizer import Tokenizer
from model.lora import add_lora, lora_layers
from train import fit as train
from train import validate
from train.data.open import open_data
from train.data.samples import collate
from train.loss import Objective
from train.validate import Validation

# A step -----------------------------------------------------------------------------------------------------


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


def test_gradients_are_clipped(optimizer_steps, tiny, scenes, tmp_path):
    for clip in (0.1, 1e6):
        run(tiny, tmp_path / f"{clip}", f"{PLAIN} --data {scenes} --steps 2 --clip {clip}")
    norms = [norm for _, _, norm in optimizer_steps]
    assert norms[:2] == pytest.approx([0.1, 0.1], rel=1e-3) and min(norms[2:]) > 0.2


def test_each_optimizer_has_its_own_rate(optimizer_steps, tiny, scenes, tmp_path):
    """Both warm up and fall together."""
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --steps 3 --lr 1e-3 --muon-lr 8e-3 --min-lr 0")
    rates = {kind: [rate for k, rate, _ in optimizer_steps if k == kind] for kind in ("AdamW", "Muon")}
    assert rates["AdamW"] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates["Muon"] == pytest.approx([4e-3, 8e-3, 8e-3])


def test_helper_loss_of_micro_batches(tiny, tmp_path):
    """The helper head's losses of the parts have the mean of the whole."""
    for name, more in (("plain", ""), ("parts", "--accumulate 2")):
        run(tiny, tmp_path / name, f"--patch-weight 1 --steps 3 {more}")
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("plain", "parts"))) < 1e-4


@pytest.mark.parametrize("option", ["", "--shard"], ids=["DDP", "FSDP"])
def test_micro_batches_in_two_processes(option, tiny, pairs, tmp_path):
    """Two micro-batches on each of two processes do what one process does with the batch at once. Answers
    have different lengths, so no part has a loss of the same weight."""
    options = f"--data {pairs} --steps 3"
    run(tiny, tmp_path / "one", f"{PLAIN} {options}")
    launch(tiny, tmp_path / "two", f"{options} --save-every 3 --accumulate 2 {option}", torchrun(2))
    one, two = (weights(tmp_path / name / "step-0000003") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4 and weights_apart(one, weights(tiny)) > 1e-3
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=2e-4)


def test_dropout(tiny, scenes, tmp_path, monkeypatch):
    """As much as is asked for, and other entries in every step."""
    dropped, real = [], F.dropout

    def watched(x, p, training, inplace):
        y = real(x, p, training, inplace)
        dropped.append((y == 0).float())
        return y

    monkeypatch.setattr(F, "dropout", watched)
    run(tiny, tmp_path / "run", f"{PLAIN} --data {scenes} --lora --lora-dropout 0.3 --steps 2")
    assert torch.cat([x.flatten() for x in dropped]).mean().item() == pytest.approx(0.3, abs=0.01)
    half = len(dropped) // 2
    for one, two in zip(dropped[:half], dropped[half:], strict=True):
        assert (one != two).float().mean() > 0.3  # 2 x 0.3 x 0.7, if they are independent
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.3


@pytest.mark.parametrize("kind", ["COCO", "JSONL"])
def test_augment(kind, tiny, scenes, pairs, tmp_path):
    data = scenes if kind == "COCO" else pairs
    for name in ("", "--augment"):
        run(tiny, tmp_path / f"run{name}", f"{PLAIN} --data {data} --steps 2 {name}")
    assert not same(*(weights(tmp_path / name / "step-0000002") for name in ("run", "run--augment")))


def test_autocast(tiny, scenes, tmp_path, monkeypatch):
    """Over float32 weights, in training and in validation's loss."""
    real, seen = gemma.attend, set()

    def watched(q, *rest):
        seen.add((q.requires_grad, torch.is_autocast_enabled("cpu"), q.dtype))
        return real(q, *rest)

    monkeypatch.setattr(gemma, "attend", watched)
    options = f"{PLAIN} --data {scenes} --val {scenes} --val-every 1 --steps 1"
    run(tiny, tmp_path / "with", f"{options} --amp")
    decoded = (False, False, torch.float32)  # for val_mAP, as evaluate.py would
    assert seen == {(True, True, torch.bfloat16), (False, True, torch.bfloat16), decoded}
    seen.clear()
    run(tiny, tmp_path / "without", options)
    assert seen == {(True, False, torch.float32), (False, False, torch.float32)}


# A validation -----------------------------------------------------------------------------------------------


def validation_of(objective, folder, scenes, count=8) -> Validation:
    argv = f"--model x --out x --device cpu --no-amp --val {scenes} --val-every 1 --val-count {count}"
    args = train.arguments(f"{argv} --data x".split())
    return Validation(args, objective.model, objective, Tokenizer(folder), torch.device("cpu"))


def test_validation_drops_nothing(tiny, scenes):
    """The loss is that of the adapter without dropout."""
    losses = []
    for dropout in (0.0, 0.5, 0.5):
        model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
        torch.manual_seed(1)
        add_lora(model, "decoder.*_proj", rank=4, dropout=dropout)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.B)
        objective = Objective(model, language_of(tiny)).train()
        torch.manual_seed(len(losses))
        losses.append(validation_of(objective, tiny, scenes).run()["val_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_validation_changes_nothing(tiny, scenes, tmp_path):
    """Dropout among others goes on after it: the run ends with the same adapter."""
    for name, more in (("plain", ""), ("watched", f"--val {scenes} --val-every 1 --val-count 2")):
        options = f"{PLAIN} --data {scenes} --steps 3 --lora --lora-dropout 0.5 --lr 1e-2 {more}"
        run(tiny, tmp_path / name, options)
    one, two = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("plain", "watched")
    )
    assert same(one, two)


@torch.no_grad()
def test_validation_loss(tiny, scenes, monkeypatch):
    """By hand: the mean of the cross-entropies, each weighed as in training. Batches of different sizes."""
    monkeypatch.setattr(validate, "BATCH", 3)
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    found = validation_of(Objective(model, None), tiny, scenes).run()["val_loss"]
    data = open_data(scenes, None, model, Tokenizer(tiny), seed=0, augment=False)
    batch = collate([data[i, i] for i in range(8)], model.config.pad)
    logits = model(to_network(batch["image"]), batch["text"], batch["prefix_len"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    w = batch["weights"].flatten()
    assert found == pytest.approx(((losses * w).sum() / w.sum()).item(), abs=1e-3)
    assert abs(found - losses[w > 0].mean().item()) > 1e-2, "the weights matter"


def test_validation_map_is_of_all_pictures(tiny, scenes, monkeypatch):
    """Perfect boxes on one process's share are not yet perfect, those of both processes are."""
    shares = []

    def perfect(self, images, items):
        return [
            dict(image_id=item, category_id=int(label), bbox=[x0, y0, x1 - x0, y1 - y0], score=1.0)
            for _, item in zip(images, items)
            for (x0, y0, x1, y1), label in zip(*self.data.objects(item))
        ]

    monkeypatch.setattr(Validation, "_detect", perfect)
    monkeypatch.setattr(validate, "all_gather", lambda mine: shares.append(mine) or shares)
    monkeypatch.setattr(validate.dist, "all_reduce", lambda sums: None)
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    figures = []
    for rank in (0, 1):
        monkeypatch.setattr(validate, "rank_and_world", lambda rank=rank: (rank, 2))
        figures.append(validation_of(Objective(model, None), tiny, scenes, count=6).run()["val_mAP"])
    assert 0 < figures[0] < 0.9 and figures[1] == pytest.approx(1)
    pictures = [{result["image_id"] for result in share} for share in shares]
    assert len(pictures[0] | pictures[1]) == 6 and not pictures[0] & pictures[1]

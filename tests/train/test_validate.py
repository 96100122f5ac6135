"""Validation while training: what it computes, on which pictures, and that training does not notice it."""

import gc
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import complaint, language_of, same, torchrun
from safetensors.torch import load_file
from training import (
    AS_OPTIONS,
    FIT,
    PLAIN,
    PUBLISHED,
    launch,
    metrics,
    parsed,
    plain_loss,
    run,
    weights,
    weights_apart,
)

from model import PaliGemma
from model.cache import KVCache
from model.io.image import to_network
from model.io.tokenizer import Tokenizer
from model.lora import add_lora, lora_layers
from train import fit as train
from train import validate
from train.data.coco import CocoDetections
from train.data.open import open_data
from train.data.samples import collate
from train.loss import Objective
from train.validate import Validation


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
        losses.append(validation_of(objective, tiny, scenes).run()[0]["val_loss"])
    assert losses[0] == losses[1] == losses[2]


def caches() -> set[KVCache]:
    return {x for x in gc.get_objects() if isinstance(x, KVCache)}


def test_validation_leaves_no_cache(tiny, scenes):
    """Training goes on with the memory that decoding took, and the next validation takes it again."""
    objective = Objective(PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), language_of(tiny))
    validation = validation_of(objective, tiny, scenes)
    others = caches()  # of tests before this one
    first = validation.run()
    assert caches() == others
    assert validation.run() == first and "val_mAP" in first[0]


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
    found = validation_of(Objective(model, None), tiny, scenes).run()[0]["val_loss"]
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
        figures.append(validation_of(Objective(model, None), tiny, scenes, count=6).run()[0]["val_mAP"])
    assert 0 < figures[0] < 0.9 and figures[1] == pytest.approx(1)
    pictures = [{result["image_id"] for result in share} for share in shares]
    assert len(pictures[0] | pictures[1]) == 6 and not pictures[0] & pictures[1]


def test_validation_loss_is_of_the_same_kind(with_empty, tiny, tmp_path):
    """The training's noise and mean, at weights that do not move; pictures without objects count."""
    options = (
        f"{AS_OPTIONS} --loss vocabulary --loss-mean example --lr 1e-30 --min-lr 0 --steps 1 --val-every 1"
    )
    run(tiny, tmp_path / "run", f"--patch-weight 0 --data {with_empty} --val {with_empty} {options}")
    model, tokenizer = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), Tokenizer(tiny)
    noise = replace(PUBLISHED, skip_empty=False)
    data = open_data(with_empty, None, model, tokenizer, 0, False, noise=noise)
    expected = plain_loss(tiny, [data[i, i] for i in range(4)], "example")
    before, found = [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert before == found
    assert found == pytest.approx(expected, abs=2e-4)


def test_validation_without_objects(with_empty, tiny):
    """Answers in branches have nothing to teach there: a loss of 0, where NaN would never be beaten."""
    data = json.loads(with_empty.read_text())
    with_empty.write_text(json.dumps(data | dict(annotations=[])))
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    language = language_of(tiny)
    objective = Objective(model, language, branches=language)
    argv = f"--model x --out x --device cpu --no-amp --val {with_empty} --val-every 1 --data x"
    args = train.arguments([*argv.split(), "--answers", "parallel", "--noise-boxes", "0"])
    figures, _ = Validation(args, model, objective, Tokenizer(tiny), torch.device("cpu")).run()
    assert figures == {"val_loss": 0, "val_mAP": 0}


# Its pictures -----------------------------------------------------------------------------------------------


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


def test_validation_of_classes_that_are_not_trained(tiny, scenes):
    model = PaliGemma.from_pretrained(tiny, classes=["cat"])
    said = complaint(open_data, scenes, None, model, model.tokenizer, part="val")
    assert "instances.json has classes that are not among the 1 that are trained (cat, ...): person" in said


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


# In several processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["", "--shard"], ids=["DDP", "FSDP"])
def test_validation_in_two_processes(option, tiny, scenes, tmp_path):
    """Before a checkpoint is written and steps follow. Five pictures: the processes' shares differ."""
    options = f"--data {scenes} --val {scenes} --val-every 2 --val-count 5 --save-every 2 --steps 4"
    run(tiny, tmp_path / "one", f"{PLAIN} {options}")
    printed = launch(tiny, tmp_path / "two", f"{options} {option}", torchrun(2))
    one, two = ([x for x in metrics(tmp_path / name) if "val_loss" in x] for name in ("one", "two"))
    assert [x["step"] for x in two] == [0, 2, 4]
    assert [x["val_loss"] for x in one] == pytest.approx([x["val_loss"] for x in two], abs=2e-4)
    if option:  # said at the start: a decoder's steps of its own do not go together with split weights
        assert "for val_mAP, evaluate" in printed and not any("val_mAP" in x for x in two)
    else:
        assert "for val_mAP, evaluate" not in printed
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
        "    return dict(val_loss=5 + next(figures) * (-1) ** rank), ''\n"
        "def recorded(run, trainer, *rest):\n"
        "    print(trainer['step'], file=open(run.out / f'saves-{rank}', 'a'))\n"
        "    save(run, trainer, *rest)\n"
        "validate.Validation.run, checkpoint.save_checkpoint = differing, recorded\n"
        f"runpy.run_path({str(FIT)!r}, run_name='__main__')\n"
    )
    options = f"--data {scenes} --val {scenes} --val-every 1 --save-every 4 --steps 4"
    launch(tiny, tmp_path / "run", options, torchrun(2), program)
    saves = [(tmp_path / "run" / f"saves-{rank}").read_text().split() for rank in (0, 1)]
    assert saves == [["1", "2", "3", "4"]] * 2  # each before its validation
    trainer = json.loads((tmp_path / "run" / "step-0000004" / "trainer.json").read_text())
    assert trainer["best"]["step"] == 0  # the first process saw the loss rise
    assert [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [5, 6, 7, 8, 9]

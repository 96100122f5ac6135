"""The table before the first step, its warnings, its estimate of memory, and dry runs without data."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from PIL import Image
from test_recipes import argv_of
from training import PLAIN, parsed, run, run_complaint

from model import PaliGemma, lora
from model.config import VARIANTS
from model.decoding.detector import closed_set_decoder
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config
from train import fit
from train.data.open import branches_for, open_data
from train.run.memory import activation_bytes
from train.run.plan import validation_interval, warnings_of


def table(printed: str) -> dict[str, str]:
    """{name: words} of the rows."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model "))
    return {line[:14].strip(): line[14:] for line in lines[start : start + 11] if line[0] != "w"}


def test_a_run_begins_with_what_a_dry_run_prints(tiny, scenes, tmp_path, capsys):
    options = f"{PLAIN} --data {scenes} --val {scenes} --val-count 2 --steps 3"
    run(tiny, tmp_path / "run", options)
    begun = capsys.readouterr().out
    run(tiny, tmp_path / "dry", f"{options} --dry-run")
    dry = table(capsys.readouterr().out.replace(str(tmp_path / "dry"), str(tmp_path / "run")))
    assert begun.index("results ") < begun.index("step 0: ")
    rows = table(begun)
    memory = rows.pop("memory"), dry.pop("memory")
    assert rows == dry and all("GiB" in words for words in memory)
    objects = len(json.loads(scenes.read_text())["annotations"])
    assert f"{scenes}: boxes, 8 samples, {objects} objects of 80 classes (person, " in rows["data"]
    assert rows["objects"].endswith("an answer has 12 boxes") and rows["steps"] == "3, 1.50 epochs"
    assert rows["validation"] == f"up to 2 pictures of {scenes}: at the start, every 2 steps and at the end"
    assert not (tmp_path / "dry").exists()


def test_lines_of_text(tiny, pairs, tmp_path, capsys):
    run(tiny, tmp_path / "run", f"{PLAIN} --data {pairs} --dry-run")
    rows = table(capsys.readouterr().out)
    assert rows["data"] == f"{pairs}: JSON lines, 6 samples of 6 pictures" and "objects" not in rows
    assert rows["validation"].startswith("none")


# Warnings ---------------------------------------------------------------------------------------------------


def test_branches_for_the_data():
    """Half as many again as a full picture has objects, in sixteens; one picture in 200 may have more."""
    counts = torch.full((200,), 30)
    counts[0] = 500
    assert branches_for(SimpleNamespace(offsets=torch.cat((torch.zeros(1), counts.cumsum(0))))) == 48
    assert branches_for(SimpleNamespace(offsets=torch.arange(0, 201 * 5, 5))) == 32


@pytest.mark.parametrize("options", ["--answers parallel", "--lora"])
def test_branches_are_kept(options, tiny, tmp_path, capsys):
    """In a checkpoint and in an adapter, whatever form of answers it was taught."""
    boxes = [dict(id=i + 1, image_id=1, category_id=1, bbox=[i, i, 90, 90]) for i in range(30)]
    record = dict(id=1, file_name="a.png", width=400, height=400)
    data = dict(images=[record], annotations=boxes, categories=[dict(id=1, name="cell")])
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(data))
    options = f"{PLAIN} --data {tmp_path / 'a.json'} --steps 1 --save-every 1 --batch-size 1 {options}"
    run(tiny, tmp_path / "run", options)
    final = tmp_path / "run" / "final"
    if "parallel" in options:
        assert "and 48 when detecting" in capsys.readouterr().out
        model = PaliGemma.from_pretrained(final)
    else:
        model = PaliGemma.from_pretrained(str(tiny), adapter=final)
    assert model.config.branches == closed_set_decoder(model, "parallel").groups == 48


@pytest.fixture
def warned(tiny, tmp_path):
    """The warnings of a run on one picture of 400 x 400 with so many squares of this side."""

    def warned(count: int, side: int, options: str = "--warmup 0") -> list[str]:
        boxes = [dict(id=i + 1, image_id=1, category_id=1, bbox=[i, i, side, side]) for i in range(count)]
        record = dict(id=1, file_name="a.png", width=400, height=400)
        data = dict(images=[record], annotations=boxes, categories=[dict(id=1, name="cell")])
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "a.json").write_text(json.dumps(data))
        args = parsed(f"--data {tmp_path / 'a.json'} {options}")
        model = PaliGemma.from_pretrained(str(tiny), classes=("cell",))
        branches = args.branches if args.answers == "parallel" else None
        data = open_data(args.data, None, model, Tokenizer(tiny), branches=branches)
        return warnings_of(args, model.config, data)

    return warned


def test_no_warning_without_a_reason(warned):
    assert warned(12, 101) == [] and warned(32, 101, "--warmup 0 --answers parallel") == []


def test_more_objects_than_boxes(warned):
    """Of an answer in sequence, 12; in parallel of what is taught, and of what is decoded unless told."""
    (sequence,) = warned(13, 101)
    assert (
        "1 pictures have more than 12 objects (at most 13)" in sequence and "--answers parallel" in sequence
    )
    (taught,) = warned(65, 101, "--warmup 0 --answers parallel")
    assert "more than 64 objects" in taught and "--branches 65" in taught
    (decoded,) = warned(33, 101, "--warmup 0 --answers parallel")
    assert "more than 32 objects" in decoded and "detect and evaluate with --branches 33" in decoded


def test_objects_smaller_than_a_patch(warned):
    """400 pixels become 64, a patch is 16 of them: 100 pixels of the picture."""
    (small,) = warned(12, 50)
    assert "(the objects 8)" in small and "--image-size 128" in small
    assert warned(12, 100) == []


def test_warm_up_longer_than_the_run(warned):
    (warning,) = warned(12, 101, "--warmup 100 --steps 50 --lr 1e-3")
    assert "--warmup 100 exceeds --steps 50" in warning and "0.0005" in warning
    assert warned(12, 101, "--warmup 50 --steps 50") == []


# Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "--lora --dtype float32"], ids=["all weights", "LoRA"])
def test_what_the_layers_keep(options):
    """Counted while nano reads two pictures: the peak is about a third above that, in the backward pass."""
    args = parsed(f"{options} --no-amp")
    model = PaliGemma.from_pretrained("nano", dtype=torch.float32)
    if args.lora:
        lora.add_lora(model, args.lora_targets, dropout=args.lora_dropout)
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().hidden(torch.zeros(2, 3, 128, 128), torch.ones(2, 65, dtype=torch.long), 5)
    counted = sum(storage.nbytes() for key, storage in kept.items() if key not in own) / 2
    assert 0.75 < activation_bytes(args, model.config, 65) / (1.3 * counted) < 1.25


def test_recomputation_and_bfloat16_take_less():
    plain, recomputed, half = (
        activation_bytes(parsed(options), load_config("nano"), 65)
        for options in ("--no-amp", "--no-amp --recompute", "--amp")
    )
    assert recomputed < 0.3 * plain and 0.5 < half / plain < 0.7


def test_a_gpu_holds_no_scores_of_long_sequences():
    """At 896 px they would be most of it; another attention than the project's own makes them."""
    config, found = VARIANTS["paligemma2-3b-896"], {}
    for device, options in (("cpu", ""), ("cuda", ""), ("cuda", "--attention mine:own")):
        args = parsed(f"--amp {options}")
        args.device = device
        found[device, options] = activation_bytes(args, config, 64)
    on_cpu, on_gpu, other = found.values()
    assert on_gpu < 0.5 * on_cpu and on_gpu < other < on_cpu


# Without data -----------------------------------------------------------------------------------------------


def test_recipes_without_their_data(capsys, monkeypatch, tmp_path):
    """Nothing is asked of the hub, nothing written; the number of pictures gives the epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run.plan.resolve", None)
    for name, pictures, words in (
        ("coco_closed_set_lora_10b", 117_266, ("402 adapters", "6.00 epochs", "1024 image tokens + 26")),
        ("captions_3b", 113_287, ("5.00 epochs", "256 samples", "256 image tokens + 64")),
    ):
        argv = argv_of(ROOT / "train" / "recipes" / f"{name}.sh")
        assert fit.train(fit.arguments([*argv, "--dry-run", "--pictures", str(pictures)])) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words) and f"{pictures:,} samples, by --pictures" in printed
    assert not list(tmp_path.iterdir())


def test_pictures_are_for_data_that_is_missing(tiny, scenes, tmp_path):
    missing = tmp_path / "none.json"
    assert "--pictures N" in run_complaint(tiny, tmp_path / "run", f"--data {missing} --dry-run")
    assert "--pictures is for --dry-run" in run_complaint(
        tiny, tmp_path / "run", f"--data {scenes} --pictures 9"
    )


@pytest.mark.parametrize(
    ("options", "items", "steps"),
    [
        ("--data x --val x --batch-size 8", 205, 26),
        ("--data x --val x --batch-size 8 --val-every 7", 205, 7),
        ("--data x --val x --val-every 0", 205, 0),
        ("--data x", 205, 0),
        ("--val x --steps 500", None, 50),
        ("", None, 0),
    ],
)
def test_when_a_run_is_validated(options, items, steps):
    assert validation_interval(parsed(options), items) == steps

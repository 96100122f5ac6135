"""The options that published recipes need: noise, loss, optimizer, soft caps; and the recipes themselves."""

import hashlib
import json
import os
import re
import subprocess
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    language_of,
    launch,
    metrics,
    run,
    run_complaint,
    torchrun,
    weights,
    weights_apart,
)
from PIL import Image

from model import PaliGemma
from model.decoding.boxes import iou, locs_to_boxes
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.image import to_network
from model.io.tokenizer import Tokenizer
from train import fit as train
from train.data.augment import augment
from train.data.coco import CocoDetections, CocoIndex
from train.data.open import open_data
from train.data.samples import StepSampler, collate
from train.data.targets import MAX_NOISE_IOU, Noise, closed_set_target, noise_boxes
from train.practice.dataset import PracticeScenes

LANGUAGE = ClosedSet((2, 500, 600, 108), 1000, 7, 1, tuple("abcdef"), groups=12)
PUBLISHED = Noise(weight=1, disguise=0, near=0, apart=True, skip_empty=True)
AS_OPTIONS = "--noise-weight 1 --noise-disguise 0 --noise-near 0 --noise-apart --skip-empty"


def random_image(rng, n, width=128, height=100):
    sides = rng.integers(5, 41, (n, 2))
    low = (rng.random((n, 2)) * (np.array([width, height]) - sides)).astype(int)
    return np.concatenate((low, low + sides), axis=1).astype(float), rng.integers(0, 6, n), width, height


# Noise ------------------------------------------------------------------------------------------------------


def test_defaults_are_what_nano_was_trained_with():
    """Byte for byte, and not one random number more or less is drawn."""
    digest = hashlib.sha256()
    for seed in range(40):
        for grid in (0, 1):
            rng = np.random.default_rng(seed)
            n = seed % 15
            low = rng.integers(0, 80, (n, 2))
            boxes = np.concatenate((low, low + rng.integers(5, 40, (n, 2))), axis=1).astype(float)
            target = closed_set_target(rng, boxes, rng.integers(0, 6, n), 128, 100, LANGUAGE, grid)
            for array in (target.tokens, target.inputs, target.weights, rng.random(3)):
                digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest().startswith("508a71e5f82626fe")
    assert train.noise_of(train.arguments(["--model", "x", "--out", "x"])) == Noise()


def test_options_become_noise():
    args = train.arguments(["--model", "x", "--out", "x", "--data", "x", *AS_OPTIONS.split()])
    assert train.noise_of(args) == PUBLISHED
    assert len(PUBLISHED.changed()) == len(fields(Noise)) and not Noise().changed()
    assert all(option in AS_OPTIONS for option in PUBLISHED.changed())


def test_noise_weight_and_disguise():
    """One setting changes one thing: the rest of the target stays as it is."""
    for seed in range(20):
        image = random_image(np.random.default_rng(seed), 4)

        def target(image=image, seed=seed, **changes):
            return closed_set_target(np.random.default_rng(seed), *image, LANGUAGE, 1, Noise(**changes))

        usual, heavy, plain, masked = target(), target(weight=1), target(disguise=0), target(disguise=1)
        for other in (heavy, plain, masked):
            assert (other.tokens == usual.tokens).all()
        noise = usual.tokens == LANGUAGE.noise
        assert noise.sum() == 8 and (heavy.weights[noise] == 1).all() and (usual.weights[noise] == 0.5).all()
        assert (heavy.weights[~noise] == usual.weights[~noise]).all() and (heavy.inputs == usual.inputs).all()
        assert (plain.inputs == plain.tokens).all() and (plain.weights == usual.weights).all()
        assert not (masked.inputs == LANGUAGE.noise).any() and (usual.inputs != usual.tokens).any()


def test_noise_near():
    """0: boxes of any size, whatever the objects are; 1: all are like them."""
    real = np.array([[10.0, 10, 40, 20]])
    sides = {}
    for near in (0, 1):
        boxes = [
            noise_boxes(np.random.default_rng(seed), real, 8, 1000, 1000, 0, Noise(near=near))
            for seed in range(20)
        ]
        sides[near] = np.concatenate([box[:, 2:] - box[:, :2] for box in boxes])
    assert (sides[1] <= [45.001, 15.001]).all() and (sides[0] > [45, 15]).any(1).all()


@pytest.mark.parametrize("groups", [16, 51])
def test_noise_apart(groups):
    """The published rule: noise boxes overlap neither real ones nor each other by more than 0.15."""
    language, share = replace(LANGUAGE, groups=groups), {}
    for noise in (Noise(), Noise(apart=True), Noise(apart=True, near=0)):
        overlaps, worst = [], 0
        for seed in range(40):
            real, labels, width, height = random_image(np.random.default_rng(seed), seed % 7, 640, 480)
            rng = np.random.default_rng(seed)
            rng.permutation(len(real))  # closed_set_target draws the order first
            boxes = noise_boxes(rng, real, groups - len(real), width, height, 0, noise)
            assert boxes.shape == (groups - len(real), 4) and (boxes[:, 2:] > boxes[:, :2]).all()
            assert len(np.unique(boxes, axis=0)) == len(boxes)
            overlaps.append(iou(boxes, boxes)[np.triu_indices(len(boxes), 1)])
            worst = max(worst, iou(boxes, real).max(initial=0))
            target = closed_set_target(
                np.random.default_rng(seed), real, labels, width, height, language, 0, noise
            )
            found = target.tokens[:-1].reshape(-1, GROUP)
            found = found[found[:, 4] == language.noise]
            assert np.abs(locs_to_boxes(found[:, :4] - language.loc0, width, height) - boxes).max() < 1
        assert worst <= MAX_NOISE_IOU
        share[noise] = (np.concatenate(overlaps) > MAX_NOISE_IOU).mean()
    assert share.pop(Noise()) > 0.03 and max(share.values()) <= 1e-3


def test_noise_apart_without_room():
    """A small picture full of objects: as many boxes as asked for, none twice."""
    real, *_ = random_image(np.random.default_rng(0), 40, 60, 60)
    for crowd, side in ((real, 60), (np.zeros((0, 4)), 4)):  # in 4 pixels every box is too flat
        boxes = noise_boxes(np.random.default_rng(0), crowd, 11, side, side, 0, Noise(apart=True))
        assert len(np.unique(boxes, axis=0)) == 11


def test_data_sets_use_the_noise(tiny, scenes):
    """Practice scenes and COCO files alike: noise weighs 1 and is fed as it is."""
    language = language_of(tiny)
    index = CocoIndex.read(scenes)
    labels = [language.classes.index(name) for name in index.classes]
    practice = [PracticeScenes(language, 64, 16, noise=noise) for noise in (Noise(), PUBLISHED)]
    files = [
        CocoDetections(index, scenes.parent / "images", language, labels, 64, noise=noise)
        for noise in (Noise(), PUBLISHED)
    ]
    for usual, published in (practice, files):
        for i in range(8):
            one, two = usual[i, i], published[i, i]
            noise = one["labels"] == language.noise
            assert noise.any() and set(one["weights"][noise].tolist()) == {0.5}
            noise = two["labels"] == language.noise
            assert set(two["weights"][noise].tolist()) == {1}
            start = len(language.prompt)
            assert torch.equal(two["text"][start:], two["labels"][start - 1 : -1])
            assert not torch.equal(one["text"], two["text"]) and torch.equal(one["image"], two["image"])


@pytest.fixture
def with_empty(tmp_path):
    """Four pictures; only the second and the last have objects, small ones in a corner."""
    (tmp_path / "images").mkdir()
    images = [dict(id=i, file_name=f"{i}.png", width=80, height=60) for i in range(4)]
    for record in images:
        Image.new("RGB", (80, 60), (50 * record["id"], 0, 0)).save(tmp_path / "images" / record["file_name"])
    annotations = [
        dict(id=k + 1, image_id=i, category_id=1, bbox=[1, 1, 6, 6], iscrowd=0) for k, i in enumerate((1, 3))
    ]
    annotations.append(dict(id=9, image_id=2, category_id=1, bbox=[1, 1, 6, 6], iscrowd=1))  # not an object
    data = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cat")])
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path / "instances.json"


def test_skip_empty(with_empty):
    index, images = CocoIndex.read(with_empty), with_empty.parent / "images"
    for skip, names in ((False, "0123"), (True, "13")):
        data = CocoDetections(index, images, LANGUAGE, [0], 32, noise=Noise(skip_empty=skip))
        assert [data.name(i) for i in range(len(data))] == [f"{name}.png" for name in names]
        for i, name in enumerate(names):
            sample = data[i, i]
            assert (sample["labels"] == LANGUAGE.class0).sum() == (name in "13")
            assert sample["image"][0, 0, 0] == 50 * int(name)


def test_skip_empty_after_augmentation(with_empty):
    """Where augmentation would move every object out of the picture, the picture stays as it is."""
    index, images = CocoIndex.read(with_empty), with_empty.parent / "images"
    usual, skipping = (
        CocoDetections(index, images, LANGUAGE, [0], 32, augment=True, noise=Noise(skip_empty=skip))
        for skip in (False, True)
    )
    moved_out = 0
    for draw in range(60):
        with Image.open(images / "1.png") as image:
            *_, kept = augment(np.random.default_rng([0, draw]), image, index.objects(1)[0])
        one, two = usual[draw, 1], skipping[draw, 0]
        assert (two["labels"] == LANGUAGE.class0).sum() == 1
        assert torch.equal(one["image"], two["image"]) or not len(kept)
        if not len(kept):
            assert not (one["labels"] == LANGUAGE.class0).any()
            assert (two["image"] == torch.tensor([50, 0, 0])).all()
            moved_out += 1
    assert moved_out > 5


def test_skip_empty_counts(with_empty, tiny, tmp_path, capsys):
    """The dry run's epochs are of the pictures that take part; data without any is refused."""
    for option, words in (("", "4 samples, 20.00 epochs"), ("--skip-empty", "2 samples, 40.00 epochs")):
        run(tiny, tmp_path / "run", f"--patch-weight 0 --data {with_empty} --steps 20 --dry-run {option}")
        assert words in capsys.readouterr().out
    all_empty = tmp_path / "all_empty.json"
    all_empty.write_text(json.dumps(json.loads(with_empty.read_text()) | dict(annotations=[])))
    message = run_complaint(tiny, tmp_path / "run", f"--data {all_empty} --skip-empty")
    assert "all_empty.json" in message and "no samples with objects" in message


def test_refusals(tiny, scenes, pairs, tmp_path):
    """Where an option would have no effect, or its value makes no sense; in the dry run too."""
    out = tmp_path / "run"
    for option in PUBLISHED.changed():
        words = re.search(rf"{option}( [\d.]+)?", AS_OPTIONS)[0]
        for dry in ("", "--dry-run"):
            message = run_complaint(tiny, out, f"--data {pairs} {words} {dry}")
            assert option in message and "pairs.jsonl" in message
    assert "--skip-empty" in run_complaint(tiny, out, "--skip-empty")
    for option in (
        "--noise-weight -1", "--noise-weight nan", "--noise-disguise 1.5", "--noise-near -0.1", "--beta2 1"
    ):  # fmt: skip
        with pytest.raises(ValueError, match=option.split()[0]):
            train.arguments(f"--model x --out x --data x {option}".split())
    for dry in ("", "--dry-run"):
        assert "attn_cap" in run_complaint(tiny, out, f"--data {scenes} --attn-cap -1 {dry}")
    assert not out.exists()


# Loss and optimizer -----------------------------------------------------------------------------------------


def plain_loss(folder, samples, mean, **overrides):
    """The loss over the whole vocabulary, one example after the other, means in float64."""
    model = PaliGemma.from_pretrained(str(folder), dtype=torch.float32, **overrides)
    losses, totals = [], []
    for sample in samples:
        with torch.no_grad():
            logits = model(to_network(sample["image"][None]), sample["text"][None], int(sample["prefix_len"]))
        each = F.cross_entropy(logits[0].double(), sample["labels"], reduction="none")
        losses.append((each * sample["weights"].double()).sum().item())
        totals.append(sample["weights"].double().sum().item())
    if mean == "example":
        return np.mean([loss / total for loss, total in zip(losses, totals, strict=True)])
    return sum(losses) / sum(totals)


def first_batch(data):
    (keys,) = StepSampler(len(data), range(1), 4)
    return [data[key] for key in keys]


@pytest.mark.parametrize("mean", ["token", "example"])
@pytest.mark.parametrize("kind", ["pairs", "scenes", "practice"])
def test_loss_of_a_step(kind, mean, tiny, scenes, pairs, tmp_path):
    """The loss that is logged, of texts of different lengths and of detection over the whole vocabulary with
    its eos, is the plain one; micro-batches change nothing."""
    noise = Noise() if kind == "pairs" else Noise(weight=1, disguise=0)
    options = f"--patch-weight 0 --loss vocabulary --loss-mean {mean}"
    options += "" if kind == "pairs" else " --noise-weight 1 --noise-disguise 0"
    if kind == "practice":
        data = PracticeScenes(language_of(tiny), 64, 16, noise=noise)
        samples = [data[i, i] for i in range(4)]
    else:
        file = scenes if kind == "scenes" else pairs
        options += f" --data {file}"
        model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
        samples = first_batch(open_data(file, None, model, Tokenizer(tiny), 0, False, noise=noise))
    assert all(sample["labels"][-1] == 1 and sample["weights"][-1] == 1 for sample in samples)  # eos
    expected = plain_loss(tiny, samples, mean)
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        run(tiny, out, f"{options} --steps 2 --accumulate {accumulate}")
        assert metrics(out)[0]["loss"] == pytest.approx(expected, abs=2e-4)
        assert weights_apart(weights(tmp_path / "1" / "step-0000002"), weights(out / "step-0000002")) < 1e-4
    if kind == "pairs":
        other = plain_loss(tiny, samples, "token" if mean == "example" else "example")
        assert abs(other - expected) > 2e-3, "the test needs means that differ"


def test_weights_of_an_example():
    """Whatever its length and its weights, a text counts as one; padding and prompt stay at 0."""
    samples = [
        dict(weights=torch.tensor(w), text=torch.ones(len(w), dtype=torch.int64))
        for w in ([0.0, 1, 1], [0.0, 0.5, 1, 0, 1, 1])
    ]
    batch = collate(samples, multiple=4, per_example=True)
    assert batch["weights"].shape == (2, 8) and batch["weights"].sum(1).tolist() == pytest.approx([1, 1])
    assert batch["weights"][0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert batch["weights"][1, 1] * 2 == batch["weights"][1, 2] and batch["weights"][1, 6:].sum() == 0
    assert collate(samples)["weights"].sum() == 5.5


def test_loss_mean_in_two_processes(tiny, pairs, tmp_path):
    """Two processes and micro-batches of one text each, of other lengths, do what one process does."""
    options = f"--patch-weight 0 --data {pairs} --loss-mean example --steps 3 --save-every 3"
    run(tiny, tmp_path / "one", options)
    launch(tiny, tmp_path / "two", f"{options} --accumulate 2", torchrun(2))
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("one", "two"))) <= 1e-4
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=2e-4)


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
    (found,) = [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert found == pytest.approx(expected, abs=2e-4)


def test_optimizer_options(tiny):
    model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    objective = train.Objective(model, None)
    for options, beta2, decay in (("", 0.98, 0), ("--beta2 0.999 --weight-decay 0.01", 0.999, 0.01)):
        args = train.arguments(f"--model x --out x --device cpu {options}".split())
        (optimizer,) = train.make_optimizers(objective, args)
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, beta2)}
        assert max(group["weight_decay"] for group in optimizer.param_groups) == decay


def test_no_clipping(tiny, scenes, tmp_path):
    """--clip 0 leaves gradients as they are. (AdamW's first step hides a factor; those after it do not.)"""
    for name, clip in (("none", "0"), ("never", "1e9"), ("hard", "0.01")):
        run(tiny, tmp_path / name, f"--patch-weight 0 --data {scenes} --steps 3 --clip {clip}")
    none, never, hard = (weights(tmp_path / name / "step-0000003") for name in ("none", "never", "hard"))
    assert weights_apart(none, never) == 0 < weights_apart(none, hard)
    assert weights_apart(none, weights(tiny)) > 1e-4


# Soft caps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [dict(attn_cap=0.5), dict(final_cap=1.0), dict(attn_cap=0, final_cap=0)])
def test_caps(caps, tiny, pairs, tmp_path):
    """They are in the loss, and the trained checkpoint has them."""
    options = " ".join(f"--{name.replace('_', '-')} {cap}" for name, cap in caps.items())
    run(tiny, tmp_path / "run", f"--patch-weight 0 --data {pairs} --steps 1 {options}")
    model, tokenizer = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32), Tokenizer(tiny)
    samples = first_batch(open_data(pairs, None, model, tokenizer, 0, False))
    loss = metrics(tmp_path / "run")[0]["loss"]
    assert loss == pytest.approx(plain_loss(tiny, samples, "token", **caps), abs=2e-4)
    if any(caps.values()):
        assert abs(loss - plain_loss(tiny, samples, "token")) > 2e-4
    text = PaliGemma.from_pretrained(str(tmp_path / "run" / "final")).config.text
    assert all(getattr(text, name) == (cap or None) for name, cap in caps.items())
    assert model.config.text.attn_cap == 50 and model.config.text.final_cap == 30


def test_an_adapter_keeps_its_caps(tiny, pairs, tmp_path):
    """It is run as it was trained, whatever its base has; asked for other caps, with those."""
    lora = f"--patch-weight 0 --data {pairs} --lora --dtype float32 --steps 1"
    run(tiny, tmp_path / "off", f"{lora} --attn-cap 0 --final-cap 0")
    run(tiny, tmp_path / "on", lora)
    caps = {}
    for name, overrides in (("off", {}), ("on", {}), ("off", dict(final_cap=20.0))):
        adapter = str(tmp_path / name / "final")
        text = PaliGemma.from_pretrained(str(tiny), adapter=adapter, **overrides).config.text
        caps[(name, *overrides)] = text.attn_cap, text.final_cap
    assert caps == {("off",): (None, None), ("on",): (50, 30), ("off", "final_cap"): (None, 20)}


# Runs and recipes -------------------------------------------------------------------------------------------


def test_resuming_with_another_value_is_refused(tiny, scenes, tmp_path):
    run(tiny, tmp_path / "run", f"--patch-weight 0 --data {scenes} --steps 1")
    options = (
        "--noise-weight 1;--noise-disguise 0;--noise-near 0;--noise-apart;--skip-empty;--loss-mean example;"
    )
    options += "--attn-cap 0;--final-cap 0;--beta2 0.999"
    for option in options.split(";"):
        message = run_complaint(tiny, tmp_path / "run", f"--data {scenes} --resume {option}")
        assert option.split()[0] in message and "cannot go on" in message


def argv_of(recipe):
    """The arguments that a recipe gives to the training program."""
    environment = os.environ | dict(LAUNCH=r"printf %s\n")
    done = subprocess.run(
        ["bash", recipe, "--device", "cpu"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[1:]


RECIPES = sorted((ROOT / "train" / "recipes").glob("*_*.sh"))  # nano.sh is of several programs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    """Their options exist and go together; what is known and what is guessed is said."""
    args = train.arguments(argv_of(recipe))
    train.noise_of(args)
    assert args.beta2 == 0.999 and args.attn_cap == args.final_cap == 0
    text = recipe.read_text()
    assert "# Known, " in text and "# Guessed" in text and "github.com/" in text


@pytest.mark.parametrize("scale", ["1/1000", "0,001", "small"])
def test_nano_recipe_refuses_a_scale_that_is_no_number(scale, tmp_path):
    """awk would take 1/1000 for 1: seven hours."""
    command = ["bash", ROOT / "train" / "recipes" / "nano.sh"]
    environment = os.environ | dict(STEPS_SCALE=scale)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and f"STEPS_SCALE {scale}: must be a number" in done.stderr
    assert not any(tmp_path.iterdir())


def test_published_values():
    """Of the closed-set run, and big_vision's of the captions."""
    found = {recipe.stem: train.arguments(argv_of(recipe)) for recipe in RECIPES}
    closed = found["coco_closed_set_lora_10b"]
    assert train.noise_of(closed) == PUBLISHED and closed.loss == "vocabulary" and closed.loss_mean == "token"
    assert closed.weight_decay == 0.01 and closed.clip == 0 and closed.lr == 1e-5
    assert closed.steps == 6 * 117_266 // 32
    captions = found["captions_3b"]
    assert captions.weight_decay * captions.lr == pytest.approx(1e-6), "PyTorch multiplies the two"
    assert {found[name].loss_mean for name in found if name != "coco_closed_set_lora_10b"} == {"example"}
    full = train.noise_of(found["coco_closed_set_full_3b"])
    assert (full.weight, full.disguise) == (1, 0)

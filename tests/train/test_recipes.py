"""The recipes for the official weights."""

import json
import os
import shutil
import subprocess

import pytest
from helpers import ENVIRONMENT, ROOT
from training import PUBLISHED
from zygote import stand_in

from model.config import VARIANTS
from model.io.config_json import config_to_json
from train import fit as train
from train.run.options import noise_of

DRY_RUNS = {  # what the dry run must tell
    "coco_closed_set_lora_10b": ("paligemma2-10b-448", ["402 adapters", "1024 image tokens + 26", "21,987"]),
    "coco_closed_set_full_3b": ("paligemma2-3b-448", ["92,412", "64 samples"]),
    "coco_parallel_lora": ("paligemma2-10b-448", ["402 adapters", "1024 image tokens + ", "21,987"]),
    "captions_3b": ("paligemma2-3b-224", ["256 samples", "2,213"]),
    "count_crossings_lora_3b": ("paligemma2-3b-224", ["263 adapters", "150", "4 samples"]),
    "refcoco_segmentation_3b": ("paligemma2-3b-224", ["10,000", "64 samples"]),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_recipes(name, tiny, scenes, pairs, tmp_path):
    """Each command for the official weights, dry: their config, a tokenizer, and no weights at all."""
    variant, words = DRY_RUNS[name]
    model, coco = tmp_path / "model", tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True), (coco / "train2017").mkdir(), model.mkdir()
    shutil.copy(scenes, coco / "annotations" / "instances_train2017.json")
    shutil.copy(tiny / "tokenizer.model", model)
    (model / "config.json").write_text(json.dumps(config_to_json(VARIANTS[variant], "bfloat16")))
    own = dict(MODEL=model, COCO=coco, OUT=tmp_path / "run", DATA=pairs, IMAGES=pairs.parent / "images")
    own |= dict(LAUNCH=stand_in())
    recipe = ROOT / "train" / "recipes" / f"{name}.sh"
    done = subprocess.run(
        ["bash", recipe, "--dry-run", "--device", "cpu"],
        env=ENVIRONMENT | {key: str(value) for key, value in own.items()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(word in done.stdout for word in words) and "GiB" in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_parallel_recipe():
    """It differs from the published run in what makes it parallel, and nothing else."""
    recipes = ROOT / "train" / "recipes"
    names = "coco_parallel_lora", "coco_closed_set_lora_10b"
    parallel, published = (vars(train.arguments(argv_of(recipes / f"{name}.sh"))) for name in names)
    changed = {name for name in published if parallel[name] != published[name]}
    form = {"answers", "noise", "branches", "location_smoothing", "loss", "attn_cap", "final_cap", "clip"}
    made_up = {"noise_disguise", "noise_near", "noise_apart", "skip_empty"}
    assert changed == form | made_up | {"model", "out"}


# The published values ---------------------------------------------------------------------------------------


def argv_of(recipe):
    """The arguments that a recipe gives to the training program."""
    environment = os.environ | dict(LAUNCH=r"printf %s\n")
    done = subprocess.run(
        ["bash", recipe, "--device", "cpu"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[1:]


OURS = {"nano.sh", "drawings_nano.sh", "coco_parallel_lora.sh"}  # of no published run
RECIPES = sorted(file for file in (ROOT / "train" / "recipes").glob("*.sh") if file.name not in OURS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    """Their options exist and go together; what is known and what is guessed is said."""
    args = train.arguments(argv_of(recipe))
    noise_of(args)
    assert args.beta2 == 0.999 and args.attn_cap == args.final_cap == 0
    text = recipe.read_text()
    assert "# Known, " in text and "# Guessed" in text and "github.com/" in text


def test_published_values():
    """Of the closed-set run, and big_vision's of the captions."""
    found = {recipe.stem: train.arguments(argv_of(recipe)) for recipe in RECIPES}
    closed = found["coco_closed_set_lora_10b"]
    assert noise_of(closed) == PUBLISHED and closed.loss == "vocabulary" and closed.loss_mean == "token"
    assert closed.weight_decay == 0.01 and closed.clip == 0 and closed.lr == 1e-5
    assert closed.steps == 6 * 117_266 // 32
    captions = found["captions_3b"]
    assert captions.weight_decay * captions.lr == pytest.approx(1e-6), "PyTorch multiplies the two"
    assert {found[name].loss_mean for name in found if name != "coco_closed_set_lora_10b"} == {"example"}
    full = noise_of(found["coco_closed_set_full_3b"])
    assert (full.weight, full.disguise) == (1, 0)


def test_drawings_recipe_refuses_other_tasks(tmp_path):
    command = ["bash", ROOT / "train" / "recipes" / "drawings_nano.sh", "words"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "must be crossings, captions or masks" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["1/1000", "0,001", "small"])
def test_nano_recipe_refuses_a_scale_that_is_no_number(scale, tmp_path):
    """awk would take 1/1000 for 1: seven hours."""
    command = ["bash", ROOT / "train" / "recipes" / "nano.sh"]
    environment = os.environ | dict(STEPS_SCALE=scale)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and f"STEPS_SCALE {scale}: must be a number" in done.stderr
    assert not any(tmp_path.iterdir())

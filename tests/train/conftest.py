"""Fixtures of the tests of training."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import language_of, tiny_config
from PIL import Image
from training import instances

from model import PaliGemma
from model.io.hub import CODEC, NANO
from model.io.tokenizer import Tokenizer
from train.nano.untrained import initialise
from train.practice.dataset import PracticeScenes
from train.practice.write import write_coco


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_file):
    """An untrained checkpoint with everything that nano has, and 0.2 million parameters."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(tokenizer_file, folder)
    tokenizer = Tokenizer(folder)
    torch.manual_seed(0)
    model = PaliGemma(tiny_config(tokenizer))
    initialise(model, tokenizer)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Eight practice scenes as files."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_coco(folder, 8, "same", 64)
    return folder / "instances.json"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Six pictures of one colour with a question and an answer of different lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    with open(folder / "pairs.jsonl", "w") as file:
        for i, name in enumerate(("red", "green", "blue", "black", "white", "yellow")):
            Image.new("RGB", (40, 30), name).save(folder / "images" / f"{i}.png")
            line = dict(
                image=f"{i}.png", prefix="what colour" + " now" * (i % 3), suffix=f"{name} " * (i + 1)
            )
            file.write(json.dumps(line) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def with_codec(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("tasks") / "model")
    shutil.copy(NANO / CODEC, folder / CODEC)
    return folder


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


@pytest.fixture(scope="session")
def all_tasks(tiny, codec):
    """Practice scenes with every kind of prompt."""
    return PracticeScenes(language_of(tiny), 64, 16, tokenizer=Tokenizer(tiny), codec=codec)


@pytest.fixture
def folder(tmp_path):
    """instances.json and its images, each of noise of its own."""
    (tmp_path / "images/sub").mkdir(parents=True)
    for seed, record in enumerate(instances()["images"]):
        noise = np.random.default_rng(seed).integers(0, 256, (int(record["height"]), record["width"], 3))
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "images" / record["file_name"])
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    return tmp_path

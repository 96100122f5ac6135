"""Fixtures of the tests of training."""

import json
import shutil

import pytest
import torch
from helpers import tiny_config
from PIL import Image

from model import PaliGemma
from model.io.tokenizer import Tokenizer
from train.nano.untrained import initialise
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

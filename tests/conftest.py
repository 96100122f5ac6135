"""Fixtures of all tests. Randomness that no test seeds itself starts from the environment variable SEED."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from helpers import picture, save_tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests use no network
if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


from model.decoding.masks import MaskCodec  # noqa: E402
from model.io.hub import CODEC, NANO  # noqa: E402
from model.io.tokenizer import Tokenizer  # noqa: E402
from train.nano.untrained import train_tokenizer  # noqa: E402

SEED = int(os.environ.get("SEED", 0))
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
torch.set_num_threads(1)  # tensors this small only wait for other threads: minutes on a busy machine


def pytest_report_header():
    return f"SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded():
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def signals():
    """What a program of this process does about signals ends with the test, or with the fixture of a module,
    which runs before this one."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer of nano's form."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(file)
    return file


@pytest.fixture(scope="session")
def model(tmp_path_factory, tokenizer_file):
    """A checkpoint of nano's form, smaller, with weights that answer each picture in its own way."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tokenizer_file)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """nano's tokenizer."""
    return Tokenizer(NANO)


@pytest.fixture(scope="session")
def codec():
    """nano's mask codec."""
    return MaskCodec.load(NANO / CODEC)


@pytest.fixture
def coco(tmp_path):
    """A COCO set of three pictures and three classes; x, y, w, h of small, medium and large objects."""
    boxes = [(0, 1, [10, 10, 20, 20]), (0, 2, [50, 50, 60, 40])]
    boxes += [(1, 1, [0, 0, 120, 110]), (2, 3, [5, 6, 30, 40])]
    data = dict(
        images=[dict(id=i, file_name=f"{i}.png", width=128, height=128) for i in range(3)],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(("cat", "dog", "bird"))],
        annotations=[
            dict(id=k + 1, image_id=image, category_id=label, bbox=box, area=box[2] * box[3], iscrowd=0)
            for k, (image, label, box) in enumerate(boxes)
        ],
    )
    (tmp_path / "instances.json").write_text(json.dumps(data))
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", 128, 128, seed=i)
    return tmp_path / "instances.json"

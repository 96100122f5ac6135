"""Fixtures of the tests of training."""

import shutil

import pytest
import torch
from helpers import tiny_config

from model import PaliGemma
from model.io.tokenizer import Tokenizer
from train.nano.untrained import initialise


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

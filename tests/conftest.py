"""Randomness that no test seeds itself starts from the environment variable SEED, told in the header."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = int(os.environ.get("SEED", 0))


def pytest_report_header():
    return f"SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded():
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)

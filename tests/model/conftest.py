"""Fixtures of the tests of the library."""

import contextlib

import pytest
import torch


@pytest.fixture
def current(monkeypatch):
    """The tensors whose device is the current one, innermost last."""
    stack = []

    @contextlib.contextmanager
    def device_of(tensor):
        stack.append(tensor)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return stack

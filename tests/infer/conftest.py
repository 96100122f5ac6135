"""Fixtures of the tests of the programs."""

import pytest
from helpers import FromAList, call, write_listed_set

from infer import evaluate


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A COCO set of noise, for a detector that answers from a list."""
    return write_listed_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture
def evaluate_data(monkeypatch, capsys, data):
    """evaluate.py on that set, with that detector."""

    def run(*argv, detector=None):
        monkeypatch.setattr(evaluate, "load_detector", lambda args: detector or FromAList(data))
        return call(monkeypatch, capsys, evaluate, "--data", data, *argv)

    return run


@pytest.fixture
def run_program(monkeypatch, capsys, here):
    """A program's standard output; it must end well."""

    def run(program, *argv) -> str:
        code, out, err = call(monkeypatch, capsys, program, *argv)
        assert code == 0, err
        return out

    return run

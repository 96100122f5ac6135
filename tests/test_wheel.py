"""The wheel: it holds every module and nano, and detects where nothing else of this repository is."""

import json
import os
import shutil
import zipfile

import pytest
from helpers import ROOT, python
from packaging.requirements import Requirement

PACKAGES = "model", "train", "infer"
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel of these files, unpacked into an empty folder. It is built from a copy, because setuptools also
    packs what an earlier build has left beside the files."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("unpacked")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    python("-c", BUILD, cwd=copy)
    (wheel,) = (copy / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_every_module_is_in_it(unpacked):
    """Those of all sub-packages, nano's five files, the pages of explain.py and demo.py, and nothing else."""
    modules = {file.relative_to(ROOT) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    nano = {file.relative_to(ROOT) for file in (ROOT / "model" / "nano").iterdir()}
    page = {file.relative_to(ROOT) for file in (ROOT / "infer" / "inside" / "web").iterdir()}
    page.add((ROOT / "infer" / "live" / "demo.css").relative_to(ROOT))
    found = {file.relative_to(unpacked) for file in unpacked.rglob("*") if file.is_file()}
    assert {file for file in found if "dist-info" not in file.parts[0]} == modules | nano | page
    assert len(nano) == 5 and len(modules) > 60
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    required = [
        line.partition(": ")[2]
        for line in metadata.read_text().splitlines()
        if "Requires-Dist" in line and "extra ==" not in line
    ]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line.partition("  #")[0]) for line in lines if not line.startswith("#")]
    assert list(map(Requirement, required)) == wanted and len(wanted) == 11


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["programs", "tests"])
def test_requirements(folder):
    """Each has an upper bound and says what it is for."""
    for line in (folder / "requirements.txt").read_text().splitlines()[1:]:
        text, _, purpose = line.partition("  # ")
        assert purpose and any(limit.operator in ("<", "==") for limit in Requirement(text).specifier), line


def test_it_detects(unpacked, tmp_path):
    """With nano, from another working folder; PYTHONPATH has nothing but the wheel's files."""
    shutil.copy(ROOT / "media" / "example.png", tmp_path)
    alone = dict(cwd=tmp_path, PYTHONPATH=str(unpacked))
    where = python(
        "-c", "import model, train, infer; print(model.__file__, train.__file__, infer.__file__)", **alone
    )
    assert where.split() == [os.fspath(unpacked / name / "__init__.py") for name in PACKAGES]
    python("-m", "infer.detect", "--image", "example.png", "--json", "found.json", **alone)
    (record,) = json.loads((tmp_path / "found.json").read_text())
    assert {"wine glass", "kite", "person"} <= {found["label"] for found in record["detections"]}

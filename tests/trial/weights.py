"""Weights, configs, adapters, mask codecs and tokenizers that are damaged, or are made to do harm."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
from helpers import load

from infer import detect, segment
from model.decoding.masks import OFFICIAL_BYTES
from model.io.adapter import save_adapter
from model.io.hub import CODEC, NANO
from model.lora import TARGETS, add_lora
from trial import pictures
from trial.damage import damage_bytes, damage_json, damage_tensors
from trial.frame import Kind, call, fault_of, tiny_model


class Checkpoints(Kind):
    """detect.py with a copy of a good checkpoint in which one file is damaged."""

    name, short, long = "weights and configs", 8, 500
    program, options = detect, ("--groups", 1)

    def __init__(self, place: Path):
        super().__init__(place)
        self.model = tiny_model(place)
        pictures.smooth(np.random.default_rng(0)).save(place / "a.png")
        self.good = self.prepare(place / "good")
        ended = self.run(self.good, place)
        if ended.code:
            raise RuntimeError(f"the good files are refused: {ended.err}")
        self.memory = ended.memory

    def prepare(self, good: Path) -> Path:
        return shutil.copytree(self.model, good)

    def run(self, files: Path, folder: Path):
        argv = ("--image", self.place / "a.png", "--json", "out.json", "--out", "drawn", *self.options)
        return call(folder, self.program, *argv, *self.with_files(files))

    def with_files(self, files: Path) -> tuple:
        return "--model", files

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        if number % 5 == 4:
            (files / "model.safetensors").rename(files / "model-1.safetensors")
            index = dict(weight_map={"a": "model-1.safetensors", "b": "model-1.safetensors"})
            (files / "model.safetensors.index.json").write_text(json.dumps(index))
            way = (damage_json, damage_bytes)[number % 2]
            return way(rng, files / "model.safetensors.index.json")[0], "either"  # it need not be there
        way = (damage_tensors, damage_json, damage_json, damage_bytes)[number % 5]
        json_file, tensors = files / "config.json", files / "model.safetensors"
        return way(
            rng, json_file if way is damage_json or (way is damage_bytes and rng.random() < 0.3) else tensors
        )

    def attempt(self, rng: np.random.Generator, number: int, folder: Path) -> tuple[str, str]:
        files = shutil.copytree(self.good, folder / "files")
        what, must = self.damage(rng, number, files)
        ended = self.run(files, folder)
        shutil.rmtree(files)
        fault = fault_of(ended, folder, ("/files",), self.memory, must)
        records = json.loads((folder / "out.json").read_text()) if ended.code == 0 and not fault else [0]
        return what, fault or ("" if len(records) == 1 else "exit code 0, and nothing in the JSON file")


class Adapters(Checkpoints):
    name, short, long = "adapters", 4, 300

    def prepare(self, good: Path) -> Path:
        tuned = load(self.model)
        add_lora(tuned, TARGETS["decoder"], rank=2)
        save_adapter(tuned, good)
        return good

    def with_files(self, files: Path) -> tuple:
        return "--model", self.model, "--adapter", files

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        file = files / ("adapter_config.json", "detection.json")[rng.integers(2)]
        way = (damage_tensors, damage_json, damage_json, damage_bytes)[number % 4]
        tensors = way is damage_tensors or (way is damage_bytes and rng.random() < 0.7)
        what, must = way(rng, files / "adapter_model.safetensors" if tensors else file)
        return what, "either" if "detection.json" in what else must  # it may be missing


class Codecs(Checkpoints):
    """Mask codecs in both forms, in turns with tokenizers."""

    name, short, long = "codecs and tokenizers", 4, 200
    program, options = segment, ("--classes", "cat", "--max-tokens", 3)

    def prepare(self, good: Path) -> Path:
        shutil.copytree(self.model, good)
        shutil.copy(NANO / CODEC, good)
        with zipfile.ZipFile(good / "vae-oid.npz", "w") as archive:  # one array, of the official file's size
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2119811,), }"
            content = b"\x93NUMPY\x01\0\x76\0" + header.ljust(117) + b"\n" + bytes(4 * 2_119_811)
            archive.writestr("a.npy", content.ljust(OFFICIAL_BYTES - 212))
        return good

    def with_files(self, files: Path) -> tuple:
        return "--model", files, "--codec", files / getattr(self, "codec", CODEC)

    def damage(self, rng: np.random.Generator, number: int, files: Path) -> tuple[str, str]:
        self.codec = "vae-oid.npz" if number % 6 == 5 else CODEC
        if number % 2 == 0:
            return damage_bytes(rng, files / "tokenizer.model", header=9999)
        if number % 6 == 5:  # it is none, whatever is done to it
            return damage_bytes(rng, files / self.codec)[0], "refused"
        return (damage_tensors, damage_bytes)[number % 4 == 1](rng, files / CODEC)

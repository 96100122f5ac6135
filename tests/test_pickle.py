"""No pickle is read or written: reading one runs whatever program is in it.

Each file that is read is replaced by a pickle with a canary, which leaves a file behind if it is ever run.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import complaint, load

from model import PaliGemma
from model.decoding import masks
from model.decoding.masks import OFFICIAL_CODEC, MaskCodec
from model.io.adapter import save_adapter
from model.io.hub import CODEC
from model.io.tokenizer import Tokenizer
from model.lora import TARGETS, add_lora
from train.run.checkpoint import Run, load_trainer_state, newest, save_checkpoint


class Canary:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def canary(tmp_path):
    yield (bird := Canary(tmp_path / "the canary sang"))
    assert not bird.file.exists()


@pytest.fixture
def pickles(canary):
    """The canary in every form that a file of weights has ever had."""
    as_torch, as_numpy, as_npz = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2), "bird": canary}, as_torch)
    np.save(as_numpy, np.array([canary], object), allow_pickle=True)
    with zipfile.ZipFile(as_npz, "w") as archive:
        archive.writestr("decoder.0.weight.npy", as_numpy.getvalue())
    return [pickle.dumps(canary), as_torch.getvalue(), as_numpy.getvalue(), as_npz.getvalue()]


@pytest.fixture
def checkpoint(model, tmp_path):
    """A copy of a checkpoint, with an adapter, a codec and a training checkpoint of its own."""
    small = load(model)
    folder = tmp_path / "checkpoint"
    small.save_pretrained(folder)
    MaskCodec(8, 8).save(folder / CODEC)
    add_lora(small, TARGETS["decoder"], rank=2)
    save_adapter(small, tmp_path / "adapter", base=str(folder))
    save_training(small, tmp_path, folder)
    return folder


def save_training(model: PaliGemma, out: Path, base: Path) -> torch.optim.Optimizer:
    """Write a training checkpoint after a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    save_checkpoint(Run.of(out, str(base), base, 2), {"step": 1}, model, model, [optimizer])
    return optimizer


def test_the_canary_sings(canary):
    """Whoever unpickles it would be found out."""
    pickle.loads(pickle.dumps(canary))
    assert canary.file.exists()
    canary.file.rmdir()


def test_no_pickle_is_read(checkpoint, pickles, tmp_path, monkeypatch):
    """Not in place of the file that is expected, and not under the names that pickles used to have."""
    adapter, training = tmp_path / "adapter", tmp_path / "step-0000001"
    model = load(checkpoint, training)
    optimizer, npz = torch.optim.AdamW(model.parameters()), checkpoint / OFFICIAL_CODEC
    readers = {
        checkpoint / "model.safetensors": (load, checkpoint),
        checkpoint / "tokenizer.model": (Tokenizer, checkpoint),
        checkpoint / "config.json": (load, checkpoint),
        checkpoint / CODEC: (MaskCodec.load, checkpoint / CODEC),
        npz: (MaskCodec.load, npz),
        adapter / "adapter_model.safetensors": (load, checkpoint, adapter),
        adapter / "adapter_config.json": (load, checkpoint, adapter),
    }
    for file, (function, *arguments) in readers.items():
        good = file.read_bytes() if file.exists() else b""
        for content in pickles:
            file.write_bytes(content)
            monkeypatch.setattr(masks, "OFFICIAL_BYTES", len(content))
            assert file.name in complaint(function, *arguments)
        file.write_bytes(good)
    for name in ("optimizer.safetensors", "trainer.json"):
        file = training / name
        good = file.read_bytes()
        for content in pickles:
            file.write_bytes(content)
            assert newest(tmp_path) is None, "a damaged checkpoint"
            if name == "optimizer.safetensors":
                with pytest.raises(ValueError, match="cannot be read as safetensors"):
                    load_trainer_state(training, model, [optimizer])
        file.write_bytes(good)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").write_bytes(pickles[1])
    assert "no *.safetensors" in complaint(load, checkpoint)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickles[1])
    assert "pickle" in complaint(load, checkpoint, adapter)


def test_no_pickle_is_written(checkpoint, tmp_path, monkeypatch):
    """Everything is written and read again where nothing can pickle or unpickle."""

    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    model = load(checkpoint, tmp_path / "adapter")
    optimizer = save_training(model, tmp_path / "again", checkpoint)
    save_adapter(model, tmp_path / "again" / "adapter")
    load(checkpoint).save_pretrained(tmp_path / "again" / "model")
    MaskCodec.load(checkpoint / CODEC).save(tmp_path / "again" / CODEC)
    assert load_trainer_state(tmp_path / "again" / "step-0000001", model, [optimizer]) == {"step": 1}
    written = [file for file in (tmp_path / "again").rglob("*") if file.is_file()]
    kinds = {file.suffix for file in written}
    assert len(written) > 8 and kinds == {".json", ".safetensors", ".model"}

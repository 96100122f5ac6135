"""Mends of the network and the programs: whose memory is given back."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import save, tiny_paligemma
from safetensors.torch import save_file
from torch import nn

from model import PaliGemma
from model.repack import Int8Linear, _forget, _replace, can_pack, pack, quantize
from model.weights import is_mapped

# ---- whose memory is given back ----------------------------------------------------------------------------

MARK = 7.0  # written over weights in memory: what is read from the file again is not MARK
gives_back = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise")


def wide_model(folder: Path, dtype=torch.bfloat16) -> PaliGemma:
    """Loaded from the folder; its matrices are of several pages each, and begin and end inside a page."""
    hf = tiny_paligemma(0, width=96, layers=1)
    raw = {name: x.bfloat16() for name, x in hf.state_dict().items() if "lm_head" not in name}
    save(hf, folder, names="C")
    save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})
    return PaliGemma.from_pretrained(str(folder), dtype=dtype)


def inner_pages(weight: torch.Tensor) -> slice:
    """The elements in the pages that hold nothing but the weight."""
    first, end = -weight.data_ptr() % mmap.PAGESIZE, (weight.data_ptr() + weight.nbytes) % mmap.PAGESIZE
    return slice(first // weight.element_size(), weight.numel() - end // weight.element_size())


@gives_back
@pytest.mark.parametrize("change", [quantize, pack])
def test_mapped_weights_are_given_back(change, tmp_path):
    """All pages of a mapped matrix that hold nothing else: they are the file's again."""
    model = wide_model(tmp_path)
    if change is pack and not can_pack(model):
        pytest.skip("this CPU has no bfloat16 in oneDNN")
    weight = model.decoder.layers[0].mlp.up_proj.weight.data.flatten()
    stored = weight.clone()
    assert is_mapped(weight) and len(stored[inner_pages(weight)]) * 2 >= 2 * mmap.PAGESIZE
    weight.fill_(MARK)
    change(model)
    assert torch.equal(weight[inner_pages(weight)], stored[inner_pages(weight)])


@gives_back
def test_neighbours_in_the_file_keep_their_pages(tmp_path):
    """A page that a weight shares with another tensor of the file stays, at both of its ends."""
    model = wide_model(tmp_path)
    tensors = [x.data.flatten() for x in model.state_dict().values()]
    weight = model.decoder.layers[0].mlp.up_proj.weight
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    assert start % mmap.PAGESIZE and end % mmap.PAGESIZE, "both ends must lie inside a page"
    assert {end, start} <= {x.data_ptr() + offset for x in tensors for offset in (0, x.nbytes)}
    for x in tensors:
        x.fill_(MARK)
    _forget(weight)
    for x in tensors:
        assert x.data_ptr() == start or (x == MARK).all()


@gives_back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_others_stays(dtype, tmp_path):
    """A NumPy array behind a weight, a copy in another dtype, and a weight replaced after loading."""
    array = np.full((512, 256), MARK, np.float32)
    layers = nn.ModuleList([nn.Linear(256, 512, bias=False)])
    layers[0].weight = nn.Parameter(torch.from_numpy(array))
    _replace(layers, Int8Linear)
    assert (array == MARK).all()

    model = wide_model(tmp_path, dtype)
    layer = model.decoder.layers[0].mlp.up_proj
    assert is_mapped(layer.weight) == (dtype == torch.bfloat16)
    copy = layer.weight.detach().to(torch.float64)
    assert not is_mapped(copy)
    layer.weight.data = torch.from_numpy(array)[:192, :96]
    quantize(model)
    assert (array == MARK).all()

"""Mends of the network and the programs, and behaviours of the network that no other test holds."""

import json
import mmap
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import random_inputs, save, tiny_paligemma
from safetensors.torch import save_file
from torch import nn

from infer.lib import predictions
from model import PaliGemma
from model.config import VARIANTS
from model.decoding.detections import Detections
from model.decoding.generate import Sampling
from model.decoding.generate import generate as generate_ids
from model.decoding.packing import Int8Linear, _forget, _replace, can_pack, pack, quantize
from model.io.hub import resolve
from model.io.tokenizer import LOCS, SEGS, Tokenizer
from model.io.weights import is_mapped, load_config

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


# ---- pictures of another size than their annotations -------------------------------------------------------


class FindsNothing:
    """Stands in for a detector."""

    classes = ("cat",)

    def fitting_batch(self):
        return 2

    def __call__(self, images):
        none = np.zeros(0, int)
        return [Detections(np.zeros((0, 4)), none, none, [], tokens=none) for _ in images]


def coco_set(folder: Path, sizes: list[tuple[int, int]], **said: int) -> Path:
    """A file that says every picture has 40 x 30 pixels, or what `said` says, and pictures of these sizes."""
    (folder / "images").mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 0, 0)).save(folder / "images" / f"{i}.png")
    record = said or dict(width=40, height=30)
    data = dict(
        images=[record | dict(id=i, file_name=f"{i}.png") for i in range(len(sizes))],
        annotations=[dict(id=1, image_id=0, category_id=1, bbox=[2, 2, 9, 9], area=81, iscrowd=0)],
        categories=[dict(id=1, name="cat")],
    )
    (folder / "instances.json").write_text(json.dumps(data))
    return folder / "instances.json"


def mean_ap(data: Path) -> float:
    return predictions.evaluate(FindsNothing(), data, data.parent / "images", None, "test")["AP"]


@pytest.mark.parametrize("other", [(80, 60), (30, 40), (40, 31)])
def test_pictures_of_another_size(other, tmp_path):
    """evaluate.py names the file and both sizes; boxes measured on other pixels would all be wrong."""
    data = coco_set(tmp_path, [(40, 30), (40, 30), (40, 30), other])
    fault = rf"3\.png has {other[0]}x{other[1]} pixels \(upright\), its annotations are for 40x30"
    with pytest.raises(ValueError, match=fault):
        mean_ap(data)


def test_pictures_of_the_right_size(tmp_path):
    """Also where the file gives no sizes: COCO's own evaluation does not need them."""
    assert mean_ap(coco_set(tmp_path / "with", [(40, 30)] * 3)) == 0
    assert mean_ap(coco_set(tmp_path / "without", [(40, 30), (80, 60)], license=1)) == 0


# ---- what forward takes ------------------------------------------------------------------------------------

SIZE, LENGTH = 56, 6  # of the tiny model's images, of the text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save(tiny_paligemma(0), tmp_path_factory.mktemp("tiny"))
    return PaliGemma.from_pretrained(str(folder), dtype=torch.float32)


WRONG_IMAGES = {
    "bytes": (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), r"uint8 \[2, 3, 56, 56\], .* in \[-1, 1\]"),
    "whole numbers": (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.int64), "images are int64"),
    "as many patches": (torch.zeros(2, 3, SIZE // 2, 2 * SIZE), r"\[2, 3, 28, 112\], .* \[B, 3, 56, 56\]"),
    "a rim that is no patch": (torch.zeros(2, 3, SIZE + 5, SIZE + 5), r"\[2, 3, 61, 61\]"),
    "larger": (torch.zeros(2, 3, 224, 224), r"\[2, 3, 224, 224\]"),
    "channels last": (torch.zeros(2, SIZE, SIZE, 3), r"\[2, 56, 56, 3\]"),
    "transparency": (torch.zeros(2, 4, SIZE, SIZE), r"\[2, 4, 56, 56\]"),
    "no batch": (torch.zeros(3, SIZE, SIZE), r"\[3, 56, 56\]"),
    "a batch of batches": (torch.zeros(2, 1, 3, SIZE, SIZE), r"\[2, 1, 3, 56, 56\]"),
}
WRONG_TEXT = {
    "int32": (torch.ones(2, LENGTH, dtype=torch.int32), 3, r"tokens are int32 \[2, 6\], .* int64 \[2, T\]"),
    "floats": (torch.ones(2, LENGTH), 3, "tokens are float32"),
    "one row": (torch.ones(LENGTH, dtype=torch.int64), 3, r"int64 \[6\], .* int64 \[2, T\]"),
    "more rows": (torch.ones(3, LENGTH, dtype=torch.int64), 3, r"int64 \[3, 6\], .* int64 \[2, T\]"),
}
WRONG_PREFIX = {
    "none": (0, "prefix_len 0 is outside the text: .* 1 to 6"),
    "negative": (-1, "prefix_len -1 "),
    "longer than the text": (LENGTH + 1, "prefix_len 7 "),
    "none of one row": (torch.tensor([3, 0]), "prefix_len 0 "),
    "too long of one row": (torch.tensor([7, 3]), "prefix_len 7 "),
    "a number on its own": (torch.tensor(9), "prefix_len 9 "),
    "of other rows": (torch.tensor([3, 3, 3]), r"prefix_len is int64 \[3\], .* an int or int64 \[2\]"),
    "not whole": (torch.tensor([3.0, 3.0]), "prefix_len is float32"),
    "half": (2.5, "prefix_len is float32"),
}


def inputs():
    return torch.zeros(2, 3, SIZE, SIZE), torch.ones(2, LENGTH, dtype=torch.int64)


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_images_that_do_not_fit(name, tiny):
    """Some would even have been computed: as other pixels, or cut off."""
    images, fault = WRONG_IMAGES[name]
    tokens = torch.ones(len(images), LENGTH, dtype=torch.int64)
    for refuse in (tiny, tiny.hidden, lambda images, *_: tiny.encode(images)):
        with pytest.raises(ValueError, match=fault):
            refuse(images, tokens, 3)


@pytest.mark.parametrize("name", WRONG_TEXT)
def test_tokens_that_do_not_fit(name, tiny):
    tokens, prefix_len, fault = WRONG_TEXT[name]
    for refuse in (tiny, tiny.hidden):
        with pytest.raises(ValueError, match=fault):
            refuse(inputs()[0], tokens, prefix_len)


@pytest.mark.parametrize("name", WRONG_PREFIX)
def test_prefix_outside_the_text(name, tiny):
    prefix_len, fault = WRONG_PREFIX[name]
    for refuse in (tiny, tiny.hidden):
        with pytest.raises(ValueError, match=fault):
            refuse(*inputs(), prefix_len)


def test_what_fits(tiny):
    """Every prefix from 1 to T, in every form; images of another float type."""
    images, tokens = inputs()
    for prefix_len in (1, LENGTH, torch.tensor(1), torch.tensor([1, LENGTH])):
        assert tiny(images, tokens, prefix_len).shape[:2] == (2, LENGTH)
    assert torch.equal(tiny(images.double(), tokens, 2), tiny(images, tokens, 2))


# ---- SigLIP's epsilon --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["full", "published"])
@torch.no_grad()
def test_epsilon_of_siglip(config, tmp_path):
    """transformers' features where the variance that a LayerNorm divides by is about its epsilon, 1e-6, in
    front of every norm. The hub's files do not give the epsilon."""
    hf = tiny_paligemma(0)
    for name, weight in hf.model.vision_tower.named_parameters():
        if any(part in name for part in ("embedding", "out_proj", "fc2")):  # what is added to the stream
            weight.mul_(1e-3)
    ours = PaliGemma.from_pretrained(str(save(hf, tmp_path, config=config)), dtype=torch.float32)
    images, _ = random_inputs(hf)
    theirs = hf.model.vision_tower(images).last_hidden_state
    assert torch.allclose(ours.vision(images), theirs, atol=1e-4) and theirs.abs().mean() > 0.1
    variances = []
    for norm in (module for module in ours.vision.modules() if isinstance(module, nn.LayerNorm)):
        norm.register_forward_pre_hook(lambda norm, x: variances.append(x[0].var(-1).mean()))
    ours.vision(images)
    assert len(variances) == 5 and all(1e-7 < variance < 1e-5 for variance in variances)


# ---- ids that are no text ----------------------------------------------------------------------------------


def config_and_ids(name):
    """A config, and how many ids its tokenizer has."""
    if name == "nano":
        return load_config("nano"), Tokenizer(resolve("nano")).size
    return VARIANTS[name], 256_000 + LOCS + SEGS  # Gemma's pieces, locations and segmentation codes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["nano", "paligemma-3b-224", "paligemma2-3b-224"])
def test_ids_that_are_no_text_are_never_generated(name, temperature):
    """<image>, and the rows that only fill the embedding up to a multiple of 64: likeliest, and not chosen.
    The last id that the tokenizer has may be."""
    config, size = config_and_ids(name)
    assert config.image_token == size < config.text.vocab_size
    wanted = [size, size + 1, config.text.vocab_size - 1, size - 1]

    def logits(hidden):
        scores = torch.zeros(1, config.text.vocab_size)
        scores[:, 500], scores[:, size - 1] = 50, 60 * (wanted[hidden] == size - 1)
        scores[:, wanted[hidden]] += 100
        return scores

    step = iter(range(len(wanted)))
    model = SimpleNamespace(
        config=config,
        new_cache=lambda *args: None,
        prefill=lambda *args: next(step),
        step=lambda *args: next(step),
        decoder=SimpleNamespace(logits=logits),
    )
    image_tokens = torch.zeros(1, config.vision.tokens, 1)
    steps = generate_ids(model, image_tokens, [[config.bos]], len(wanted), Sampling(temperature))
    assert [int(tokens) for tokens, _ in islice(steps, len(wanted))] == [500, 500, 500, size - 1]

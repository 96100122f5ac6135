"""What a user of the class sees besides logits: answers in words, files that travel, what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import save, tiny_paligemma

from model import Detector, PaliGemma
from model.decoding.generate import Sampling, collect_answers, generate
from model.io.hub import NANO, PHOTOGRAPHS
from model.io.image import load_image, square, to_network
from model.io.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "media" / "example.png"


PROMPT = "caption en"


@pytest.fixture(scope="module")
def nano():
    return PaliGemma.from_pretrained("nano", dtype=torch.float32)


def by_hand(model: PaliGemma, image: Image.Image, limit: int) -> str:
    tokenizer = Tokenizer(NANO)
    image_tokens = model.encode(to_network(square(image, model.config.vision.image_size))[None])
    answers = generate(model, image_tokens, [tokenizer.encode_prompt(PROMPT)], limit)
    return tokenizer.decode(collect_answers(model, answers)[0][0])


# Answers in words -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answer(nano):
    """From a file or an image: what encoder, decoding and tokenizer give when called one by one."""
    expected = by_hand(nano, load_image(EXAMPLE), limit=100)
    assert len(expected.split()) >= 3
    for image in (EXAMPLE, str(EXAMPLE), Image.open(EXAMPLE), load_image(EXAMPLE)):
        assert nano.generate(image, PROMPT) == expected
    assert nano.generate(EXAMPLE, PROMPT, max_new_tokens=2) == by_hand(nano, load_image(EXAMPLE), limit=2)


def test_an_image_is_turned_upright(nano, tmp_path):
    """A PIL image still carries what EXIF says about it, as a file does."""
    image, exif = load_image(EXAMPLE), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter turn makes it upright
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright = nano.generate(image, PROMPT)
    assert nano.generate(image.rotate(90, expand=True), PROMPT) != upright, "the test needs another answer"
    assert nano.generate(tmp_path / "turned.png", PROMPT) == upright
    with Image.open(tmp_path / "turned.png") as opened:
        assert nano.generate(opened, PROMPT) == upright


def test_sampled_answers(nano):
    """They follow from the seed."""
    hot = Sampling(temperature=3.0)
    first, again, other = (
        nano.generate(EXAMPLE, PROMPT, 20, hot, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_without_a_tokenizer(tmp_path):
    """A checkpoint without one can be used for all else; what to do about it is said."""
    hf = tiny_paligemma(layers=1)
    model = PaliGemma.from_pretrained(save(hf, tmp_path), dtype=torch.float32)
    for use in (Detector, lambda model: model.generate(EXAMPLE, PROMPT)):
        with pytest.raises(ValueError, match=f"^{tmp_path} has no .*model.tokenizer = Tokenizer"):
            use(model)
    model.tokenizer = Tokenizer(NANO)
    assert isinstance(model.generate(EXAMPLE, PROMPT, 3), str)
    with pytest.raises(ValueError, match="no tokenizer.model"):  # nor has a model that comes from nowhere
        assert PaliGemma(model.config).tokenizer


# Files that travel with a model -----------------------------------------------------------------------------


def test_saved_with_tokenizer_and_codec(nano, tmp_path):
    """A saved copy answers like the original; it can be saved again, over itself and elsewhere."""
    nano.save_pretrained(tmp_path / "a")
    again = PaliGemma.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert again.generate(EXAMPLE, PROMPT) == nano.generate(EXAMPLE, PROMPT)
    again.save_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.model", "codec.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (NANO / name).read_bytes()
    kept = {file.name for file in NANO.iterdir()} - {PHOTOGRAPHS}  # which is about these weights alone
    assert {file.name for file in (tmp_path / "b").iterdir()} == kept


# What forward takes -----------------------------------------------------------------------------------------


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

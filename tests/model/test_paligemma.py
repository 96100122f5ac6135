"""What a user of the class sees besides logits: answers in words, and the files that travel with a model."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import save, tiny_paligemma

from model import Detector, PaliGemma
from model.decoding.generate import Sampling, collect_answers, generate
from model.io.hub import NANO
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
        with pytest.raises(ValueError, match="model.tokenizer = Tokenizer"):
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
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == sorted(f.name for f in NANO.iterdir())

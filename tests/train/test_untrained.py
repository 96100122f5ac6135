"""The untrained nano and its helper head; what its program makes of a nano that detects."""

import shutil

import pytest
import reference
import torch
from helpers import call, language_of
from reference import difference, reference_logits
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma
from model.config import COCO_CLASSES
from model.io.hub import CODEC, NANO
from model.io.tokenizer import Tokenizer
from train.nano import codec as codec_program
from train.nano import untrained as nano
from train.nano.patch_head import PatchHead, _giou


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    nano.main(["--out", str(folder)])
    return folder


def test_nano_is_small(untrained, tmp_path):
    """The whole checkpoint, as it is shipped, has at most 12 MB."""
    PaliGemma.from_pretrained(str(untrained)).save_pretrained(tmp_path, torch.bfloat16)
    shutil.copy(untrained / "tokenizer.model", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 12e6


def test_nano_is_the_same_every_time(untrained, tmp_path):
    nano.main(["--out", str(tmp_path)])
    for file in ("config.json", "model.safetensors", "tokenizer.model"):
        assert (tmp_path / file).read_bytes() == (untrained / file).read_bytes(), file


def test_nano_has_every_trait(untrained):
    """What the official ones have: grouped heads, both caps, a window that is in use, Gemma's ids."""
    tokenizer = Tokenizer(untrained)
    config = PaliGemma.from_pretrained(str(untrained)).config
    text = config.text
    assert text.version == 2 and 1 < text.kv_heads < text.heads and text.layers >= 3
    assert text.attn_cap == 50 and text.final_cap == 30
    assert text.sliding_window < config.vision.tokens + 5 * config.groups <= text.max_positions
    assert config.groups >= 12 and len(config.classes) == 80
    assert tokenizer.size == config.image_token < text.vocab_size and text.vocab_size % 64 == 0


@torch.no_grad()
def test_transformers_reads_nano(untrained, monkeypatch):
    """The same logits, for the prompt and an answer long enough for the window to matter."""
    ours = PaliGemma.from_pretrained(str(untrained), dtype=torch.float32)
    hf, report = PaliGemmaForConditionalGeneration.from_pretrained(
        untrained, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    monkeypatch.setattr(reference, "IMAGE", ours.config.image_token)
    prompt = language_of(untrained).prompt
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(200, ours.config.image_token, (2, 60), generator=generator)
    tokens = torch.cat((torch.tensor(prompt).expand(2, -1), answer), dim=1)
    images = 2 * torch.rand(2, 3, 128, 128, generator=generator) - 1
    theirs = reference_logits(hf, images, tokens, len(prompt))
    assert difference(ours(images, tokens, len(prompt)), theirs, tokens) <= 2e-4
    unlimited = PaliGemma.from_pretrained(str(untrained), dtype=torch.float32, sliding_window=None)
    assert difference(unlimited(images, tokens, len(prompt)), theirs, tokens) > 1e-3, "the window is in use"


# A vocabulary for words -------------------------------------------------------------------------------------


def test_a_nano_that_detects_learns_to_speak(tmp_path):
    """Its weights, on a vocabulary in another order; the names of classes mean what their class tokens do."""
    old, new = tmp_path / "old", tmp_path / "new"
    nano.main(["--out", str(old), "--seed", "3"])  # another seed: other sentences, other pieces
    nano.main(["--out", str(new), "--start", str(old), "--codec", str(NANO / CODEC)])
    assert {file.name for file in new.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        CODEC,
    }
    words, known = Tokenizer(new), Tokenizer(old)
    models = [PaliGemma.from_pretrained(str(folder), dtype=torch.float32) for folder in (old, new)]
    before, after = (model.decoder.embed.weight for model in models)
    cat, light = (words.unused0 + COCO_CLASSES.index(name) for name in ("cat", "traffic light"))
    for text, token in ((" cat", cat), (" cats", cat), (" traffic light", light)):
        assert torch.equal(after[words.encode(text)[0]], after[token])
    for text in ("<loc0007>", "<seg127>", "<unused5>", "detect", " all", " classes"):
        (i,), (j,) = words.encode(text), known.encode(text)
        assert torch.equal(after[i], before[j])
    image, prompts = torch.rand(1, 3, 128, 128) * 2 - 1, "detect all classes"
    hidden = [
        model.hidden(image, torch.tensor([tokenizer.encode_prompt(prompts)]), 5)
        for model, tokenizer in zip(models, (known, words), strict=True)
    ]
    assert torch.equal(*hidden)


# The helper head --------------------------------------------------------------------------------------------


def test_patch_head():
    """Image tokens that are like the names of what they show cost less, those far from all are background."""
    embed, names = torch.randn(50, 16), [[3], [7, 8], [20]]
    head = PatchHead(16, names, tokens=4)
    labels, boxes = torch.tensor([[0, 1, 2, 3]]), torch.rand(1, 4, 4)
    tokens = torch.stack((embed[3], (embed[7] + embed[8]) / 2, embed[20], torch.zeros(16)))[None]

    def classes_only(tokens, labels):
        """The boxes' part depends on the tokens too: it is taken off."""
        both = head(tokens, embed, labels, boxes)
        guess = head.box(tokens) * 0.25 + head.centres
        per_patch = 5 * (guess - boxes).abs().sum(-1) + 1 - _giou(guess, boxes)
        return (both - (per_patch * (labels != 3)).mean()).item()

    alike = torch.nn.functional.normalize(tokens[0], dim=-1)
    logits = torch.cat((10 * alike @ alike[:3].mT, torch.zeros(4, 1)), dim=1)
    expected = torch.nn.functional.cross_entropy(logits, labels[0]).item()
    assert classes_only(tokens, labels) == pytest.approx(expected, abs=1e-4)
    assert classes_only(tokens * 5, labels) == pytest.approx(expected, abs=1e-4)
    assert classes_only(tokens.roll(1, 1), labels) > expected + 1


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (nano, ("--codec", "none.safetensors"), "untrained.py: none.safetensors: no such file"),
        (nano, ("--start", "none"), "untrained.py: "),
        (codec_program, ("--channels", "12"), "codec.py: --channels 12: must be a multiple of 8"),
    ],
)
def test_programs_complain(program, options, words, tmp_path, monkeypatch, capsys):
    """One line that names the program, and nothing is written."""
    code, _, error = call(monkeypatch, capsys, program, "--out", tmp_path / "out", *options)
    assert code == 1 and error.startswith(words) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""Training on every task of the practice set, and training the mask codec."""

import shutil

import numpy as np
import pytest
import torch
from helpers import call, language_of, run, weights

from model import PaliGemma
from model.config import COCO_CLASSES
from model.decoding.masks import MaskCodec
from model.io.hub import CODEC, NANO
from model.io.tokenizer import Tokenizer
from train import fit as train
from train.data.samples import collate
from train.nano import codec as codec_program
from train.nano import untrained as nano
from train.nano.codec import Codebook, Masks, mean_iou, random_shape
from train.practice.dataset import (
    LOC_WEIGHT,
    MIN_ANSWER_WEIGHT,
    PROMPTS_PER_SCENE,
    SEG_WEIGHT,
    PracticeScenes,
)
from train.practice.tasks import TASK_SHARES


@pytest.fixture(scope="module")
def with_codec(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("tasks") / "model")
    shutil.copy(NANO / CODEC, folder / CODEC)
    return folder


@pytest.fixture(scope="module")
def scenes(tiny):
    return PracticeScenes(
        language_of(tiny), 64, 16, tokenizer=Tokenizer(tiny), codec=MaskCodec.load(NANO / CODEC)
    )


def texts(sample, tokenizer) -> tuple[str, str, torch.Tensor]:
    """Prompt, answer, and the answer's weights of a sample."""
    length = sample["prefix_len"].item()
    answer = sample["labels"][length - 1 :].tolist()
    assert answer[-1] == tokenizer.eos and not sample["weights"][: length - 1].any()
    assert sample["text"][length:].tolist() == answer[:-1] or answer[0] >= tokenizer.loc0
    prompt = tokenizer.decode(sample["text"][1 : length - 1].tolist())
    return prompt, tokenizer.decode(answer[:-1]), sample["weights"][length - 1 :]


def test_samples_of_all_tasks(scenes, tiny):
    """Each prompt with its kind of answer; short answers in words weigh as much as longer ones."""
    tokenizer, starts = Tokenizer(tiny), {}
    drawn = [
        {name: x[k] for name, x in scenes[i, i].items() if isinstance(x, list)}
        for i in range(30)
        for k in range(PROMPTS_PER_SCENE)
    ]
    for sample in drawn:
        prompt, answer, weights = texts(sample, tokenizer)
        start = "detect all" if prompt == "detect all classes" else prompt.split()[0]
        starts[start] = starts.get(start, 0) + 1
        if start in ("caption", "answer"):
            assert answer and weights.sum() == pytest.approx(max(MIN_ANSWER_WEIGHT, len(weights)))
        elif start in ("detect", "segment"):
            locs, segs = answer.count("<loc"), answer.count("<seg")
            assert locs % 4 == 0 and segs == (4 * locs if start == "segment" else 0)
            assert (weights == LOC_WEIGHT).sum() == locs and (weights == SEG_WEIGHT).sum() == segs
    assert len(starts) == len(TASK_SHARES) + 1 and min(starts.values()) > 2


def test_texts_of_a_batch_have_few_lengths(scenes):
    batch = collate([scenes[i, i] for i in range(3)], multiple=16)
    assert batch["text"].shape[1] % 16 == 0
    assert batch["text"].shape == batch["labels"].shape == batch["weights"].shape
    assert not batch["weights"][:, -1].any() or batch["text"].shape[1] == 64
    assert len(batch["text"]) == len(batch["prefix_len"]) == 3 * PROMPTS_PER_SCENE
    assert len(batch["image"]) == len(batch["patch_labels"]) == 3


def test_an_image_is_encoded_once(scenes, with_codec):
    """The loss of a batch with several prompts an image is that of all pairs of image and prompt."""
    model = PaliGemma.from_pretrained(str(with_codec), dtype=torch.float32)
    objective = train.Objective(model, None)
    batch = collate([scenes[i, i] for i in range(2)]) | {"total": torch.ones(())}
    pairs = batch | {"image": batch["image"].repeat_interleave(PROMPTS_PER_SCENE, 0)}
    with torch.no_grad():
        assert torch.allclose(objective(batch)[0], objective(pairs)[0], rtol=1e-5)
        reordered = batch | {"image": batch["image"].flip(0)}
        assert not torch.allclose(objective(batch)[0], objective(reordered)[0], rtol=1e-5)


def test_training(with_codec, tmp_path):
    """The files beside the weights go along; the weights move."""
    run(with_codec, tmp_path / "run", "--tasks all --steps 2")
    assert {file.name for file in (tmp_path / "run" / "final").iterdir()} >= {
        "model.safetensors",
        "tokenizer.model",
        CODEC,
    }
    before, after = weights(with_codec), weights(tmp_path / "run" / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name].float(), before[name].bfloat16().float()) for name in before)


def test_all_tasks_need_a_codec(tiny, tmp_path):
    with pytest.raises(ValueError, match="no mask codec: download"):
        run(tiny, tmp_path / "run", "--tasks all --steps 2")


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


# The codec --------------------------------------------------------------------------------------------------


def test_shapes():
    rng = np.random.default_rng(0)
    shapes = [random_shape(rng) for _ in range(50)]
    assert all(shape.shape == (64, 64) and shape.dtype == bool and shape.any() for shape in shapes)
    assert len({shape.tobytes() for shape in shapes}) > 30


def test_masks_are_the_same_for_a_step():
    assert torch.equal(Masks(3)[2], Masks(3)[2]) and Masks(3)[1].shape[1:] == (64, 64)


def test_codebook_follows_the_features():
    """A code that is used moves to the mean of its features; one that nobody uses is given a new place."""
    codec = MaskCodec(8, 4)
    codec.codebook.zero_()
    codec.codebook[1] = 10.0
    book = Codebook(codec)
    features = torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 0]]).repeat(10, 1)
    codes = torch.zeros(20, dtype=torch.int64)
    for _ in range(600):
        book.update(features, codes, torch.Generator().manual_seed(0))
    assert torch.allclose(codec.codebook[0], torch.tensor([2.0, 2, 2, 2]), atol=0.01)
    distances = (codec.codebook[1] - features).abs().sum(1)
    assert distances.min() < 0.5 and codec.codebook.abs().max() < 5


def test_codec_training(tmp_path, capsys, monkeypatch):
    """A few steps get somewhere, and what is written is a codec."""
    monkeypatch.setattr(codec_program, "SCENES", 4)
    for steps in (1, 100):
        size = "--channels 16 --width 8 --lr 5e-3 --workers 0 --held-out 5".split()
        codec_program.main(["--out", str(tmp_path / str(steps)), "--steps", str(steps), *size])
    assert "mean IoU" in capsys.readouterr().out
    masks = Masks(1)[0]
    codecs = [MaskCodec.load(tmp_path / name / CODEC) for name in ("1", "100")]
    short, longer = ((codec.decode(codec.encode(masks)) - masks).square().mean() for codec in codecs)
    assert longer < short - 0.02
    assert 0 <= mean_iou(codecs[1], masks) < mean_iou(MaskCodec.load(NANO / CODEC), masks) <= 1

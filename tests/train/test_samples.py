"""Samples: what is drawn for a step, by whichever process and worker, and the practice scenes among them."""

import numpy as np
import pytest
import torch
from helpers import language_of, same
from PIL import Image
from torch.utils.data import DataLoader

from model.io.image import square, to_network
from model.io.tokenizer import Tokenizer
from train.data.samples import StepSampler, collate
from train.practice.dataset import (
    LOC_WEIGHT,
    MIN_ANSWER_WEIGHT,
    MIN_COVER,
    PROMPTS_PER_SCENE,
    SEG_WEIGHT,
    PracticeScenes,
    patch_targets,
)
from train.practice.scenes import Scene, make_scene
from train.practice.tasks import TASK_SHARES

# Practice scenes --------------------------------------------------------------------------------------------


def test_samples_are_the_same_whatever_the_worker(tiny):
    """Drawn here, or by one of two workers; by number, not by order."""

    def samples(workers, first=5):
        data, sampler = PracticeScenes(language_of(tiny), 64, 16, first), StepSampler(None, range(6), 2)
        batches = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        return [{name: x[i] for name, x in batch.items()} for batch in batches for i in (0, 1)]

    here = samples(0)
    assert len(here) == 12 and all(same(a, b) for a, b in zip(here, samples(2), strict=True))
    assert all(same(a, b) for a, b in zip(here[2:], samples(0, first=7), strict=False))
    assert len({sample["text"].numpy().tobytes() for sample in here}) == 12


def test_sample(tiny):
    """A scene with its answer and its helper targets, as bytes and numbers of the right size."""
    language = language_of(tiny)
    sample, scene = PracticeScenes(language, 64, 16, 3)[9, 1], make_scene(4, 64)
    text, prompt = len(language.prompt) + 60, len(language.prompt)
    assert (sample["image"].numpy() == scene.image).all()
    assert {name: (tuple(t.shape), t.dtype) for name, t in sample.items()} == {
        "image": ((64, 64, 3), torch.uint8),
        "text": ((text,), torch.int64),
        "labels": ((text,), torch.int64),
        "weights": ((text,), torch.float32),
        "prefix_len": ((), torch.int64),
        "patch_labels": ((16,), torch.int64),
        "patch_boxes": ((16, 4), torch.float32),
    }
    assert (sample["weights"][prompt - 1 : -1].view(12, 5)[:, 0] == 1).sum() == len(scene.labels)
    assert tuple(sample["text"][:prompt]) == language.prompt and sample["prefix_len"] == prompt
    assert sample["labels"][-1] == language.eos and (sample["weights"][: prompt - 1] == 0).all()


def test_noise_is_where_objects_are(tiny):
    """Made-up noise lies on whole pixels in scenes as they were painted, between pixels in the others: else
    fractions would give it away."""
    language, seen = language_of(tiny), set()
    data = PracticeScenes(language, 64, 16)
    for seed in range(20):
        groups = data[0, seed]["text"][len(language.prompt) :].view(12, 5)
        whole = ((groups[:, :4] - language.loc0) % 16 == 0) | (groups[:, :4] == language.loc0 + 1023)
        objects = len(make_scene(seed, 64).labels)
        on_pixels = whole[:objects].all().item()
        assert whole[objects:].all() == on_pixels, seed
        seen.add(on_pixels)
    assert seen == {True, False}


def test_both_forms_of_an_answer(tiny, codec):
    """Beside branches, some texts are the whole answer in sequence: the same objects, in random order."""
    language, tokenizer = language_of(tiny), Tokenizer(tiny)
    data = PracticeScenes(language, 64, 16, tokenizer=tokenizer, codec=codec, branches=64)
    prompt, in_sequence = len(language.prompt), 0
    for seed in range(100):
        sample = data[0, seed]
        text, labels = sample["text"][0], sample["labels"][0][prompt - 1 :]
        if text[:prompt].tolist() != list(language.prompt):
            continue
        in_sequence += 1
        groups = labels[:-1].view(language.groups, 5)
        objects = groups[groups[:, 4] != language.noise]
        branches = sample["objects"][:, :5] + torch.tensor([language.loc0] * 4 + [language.class0])
        assert len(objects) == min(len(branches), language.groups)
        assert all(found in branches.tolist() for found in objects.tolist())
    assert 6 <= in_sequence <= 26


def test_training_sees_what_detection_sees():
    """An image goes into the network alike, whether drawn for training or read from a file."""
    pixels = make_scene(0).image
    ours = to_network(torch.tensor(pixels)[None])
    assert torch.equal(ours[0], to_network(square(Image.fromarray(pixels), 128)))


# The helper head's targets ----------------------------------------------------------------------------------


def slow_patch_targets(scene, patch, background):
    """Patch by patch: count the pixels of every object, take the one with most."""
    size = len(scene.owner)
    labels, boxes = [], []
    for top in range(0, size, patch):
        for left in range(0, size, patch):
            tile = scene.owner[top : top + patch, left : left + patch]
            counts = [int((tile == k).sum()) for k in range(len(scene.labels))]
            best = max(range(len(counts)), key=lambda k: counts[k], default=None)
            if best is None or counts[best] / patch**2 < MIN_COVER:
                labels.append(background)
                boxes.append([0.0] * 4)
            else:
                labels.append(int(scene.labels[best]))
                boxes.append([float(side) / size for side in scene.boxes[best]])
    return labels, boxes


@pytest.mark.parametrize("patch", [16, 8])
def test_patch_targets(patch):
    seen = set()
    for seed in range(15):
        scene = make_scene(seed, 64, "crowded" if seed % 2 else "train")
        labels, boxes = patch_targets(scene, patch, background=80)
        slow_labels, slow_boxes = slow_patch_targets(scene, patch, 80)
        assert labels.dtype == np.int64 and boxes.dtype == np.float32
        assert labels.tolist() == slow_labels and np.allclose(boxes, slow_boxes, atol=1e-7)
        seen |= {label == 80 for label in slow_labels}
    assert seen == {True, False}


def test_patch_targets_by_hand():
    """Row by row from the top left; a fifth of a patch is enough, less is background."""
    owner = np.full((20, 20), -1, np.int8)
    owner[:10, 10:20] = 0
    owner[10:12, :10] = 1  # exactly a fifth
    owner[10:11, 10:20] = 1
    scene = Scene(None, np.array([[10, 0, 20, 10], [0, 10, 20, 12]], np.float32), np.array([7, 3]), owner)
    labels, boxes = patch_targets(scene, 10, background=80)
    assert labels.tolist() == [80, 7, 3, 80]
    assert np.allclose(boxes, [[0] * 4, [0.5, 0, 1, 0.5], [0, 0.5, 1, 0.6], [0] * 4])
    nothing = Scene(None, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.full((20, 20), -1, np.int8))
    assert patch_targets(nothing, 10, 80)[0].tolist() == [80] * 4


# All tasks --------------------------------------------------------------------------------------------------


def texts(sample, tokenizer) -> tuple[str, str, torch.Tensor]:
    """Prompt, answer, and the answer's weights of a sample."""
    length = sample["prefix_len"].item()
    answer = sample["labels"][length - 1 :].tolist()
    assert answer[-1] == tokenizer.eos and not sample["weights"][: length - 1].any()
    assert sample["text"][length:].tolist() == answer[:-1] or answer[0] >= tokenizer.loc0
    prompt = tokenizer.decode(sample["text"][1 : length - 1].tolist())
    return prompt, tokenizer.decode(answer[:-1]), sample["weights"][length - 1 :]


def test_samples_of_all_tasks(all_tasks, tiny):
    """Each prompt with its kind of answer; short answers in words weigh as much as longer ones."""
    tokenizer, starts = Tokenizer(tiny), {}
    drawn = [
        {name: x[k] for name, x in all_tasks[i, i].items() if isinstance(x, list)}
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


def test_texts_of_a_batch_have_few_lengths(all_tasks):
    batch = collate([all_tasks[i, i] for i in range(3)], multiple=16)
    assert batch["text"].shape[1] % 16 == 0
    assert batch["text"].shape == batch["labels"].shape == batch["weights"].shape
    assert not batch["weights"][:, -1].any() or batch["text"].shape[1] == 64
    assert len(batch["text"]) == len(batch["prefix_len"]) == 3 * PROMPTS_PER_SCENE
    assert len(batch["image"]) == len(batch["patch_labels"]) == 3


# Who draws what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sampler(world, accumulate):
    """The processes and micro-batches share every batch, each sample is taken once, after a resume too."""
    parts = [list(StepSampler(None, range(5), 8, rank, world, accumulate)) for rank in range(world)]
    for step in range(5):
        now = slice(step * accumulate, (step + 1) * accumulate)
        dealt = sorted(key for rank in parts for part in rank[now] for key in part)
        assert dealt == [(i, i) for i in range(8 * step, 8 * step + 8)]
        assert {len(part) for rank in parts for part in rank[now]} == {8 // world // accumulate}
    for rank in range(world):
        later = StepSampler(None, range(3, 5), 8, rank, world, accumulate)
        assert list(later) == parts[rank][3 * accumulate :] and len(later) == 2 * accumulate


def test_epochs():
    """Each epoch takes every item once, in an order of its own, that only the seed decides."""
    keys = [key for part in StepSampler(6, range(9), 4, seed=1) for key in part]
    assert [draw for draw, _ in keys] == list(range(36))
    epochs = [tuple(item for _, item in keys[i : i + 6]) for i in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(epochs)) > 3
    assert [key for part in StepSampler(6, range(2, 9), 4, seed=1) for key in part] == keys[8:]
    assert [key for part in StepSampler(6, range(9), 4, seed=2) for key in part] != keys
    with pytest.raises(ValueError, match="--batch-size 6"):
        StepSampler(None, range(9), 6, world=2, accumulate=2)

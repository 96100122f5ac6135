"""The closed-set language: its ids, the training target, the loss over allowed ids, decoded scores."""

import itertools

import numpy as np
import pytest
import torch
from helpers import slow_iou
from reference import BOS, EOS, LOC0, NEWLINE, UNUSED0, VOCAB, random_inputs, save, tiny_paligemma

from model import PaliGemma
from model.config import COCO_CLASSES, VARIANTS, TextConfig
from model.decoding.boxes import boxes_to_locs, locs_to_boxes
from model.decoding.closed_set import ClosedSet, GroupDecoder
from model.gemma import Gemma
from model.io.tokenizer import Tokenizer
from train.data.targets import MAX_NOISE_IOU, Noise, closed_set_target
from train.loss import allowed_loss
from train.nano.untrained import nano_config
from train.practice.scenes import make_scene

G, CLASSES = 12, ("cat", "dog", "traffic light", "bird", "cow", "bear")
LANGUAGE = ClosedSet((BOS, 500, 600, NEWLINE), LOC0, UNUSED0, EOS, CLASSES, G)
NOISE = UNUSED0 + len(CLASSES)
SIZE = 128


# Ids --------------------------------------------------------------------------------------------------------


def test_ids_of_a_checkpoint(tokenizer_file):
    """All from tokenizer and config: bos, the prompt, newline; 1,024 locations; 80 classes and noise."""
    tokenizer = Tokenizer(tokenizer_file)
    language = ClosedSet.of(nano_config(tokenizer), tokenizer)
    assert language.prompt == (2, *tokenizer.encode("detect all classes"), 108)
    assert language.loc0 == tokenizer.loc0 and language.eos == 1
    assert language.classes == COCO_CLASSES and language.noise == 7 + 80 == language.class0 + 80
    assert language.groups == nano_config(tokenizer).groups >= 12
    assert language.allowed(0) == (tokenizer.loc0, tokenizer.seg0)
    assert language.allowed(4) == (7, 88)
    official = ClosedSet.of(VARIANTS["paligemma2-3b-448"], tokenizer)
    assert official.groups == 51 and official.allowed(254) == (7, 88) and official.allowed(255) == (1, 2)


# Training targets -------------------------------------------------------------------------------------------


def random_image(rng, n, width=SIZE, height=SIZE):
    """Whole-pixel boxes [n, 4] with sides of 4 to 40 pixels, and labels [n]."""
    sides = rng.integers(4, 41, (n, 2))
    low = (rng.random((n, 2)) * (np.array([width, height]) - sides + 1)).astype(int)
    return np.concatenate((low, low + sides), axis=1).astype(np.float32), rng.integers(0, len(CLASSES), n)


def target_of(seed, boxes, labels, width=SIZE, height=SIZE, grid=1):
    return closed_set_target(np.random.default_rng(seed), boxes, labels, width, height, LANGUAGE, grid)


def groups_of(target, width=SIZE, height=SIZE):
    """The target's labels as pixel boxes [G, 4] and classes [G]; its other arrays as [G, 5]."""
    tokens, inputs, weights = (a[:-1].reshape(G, 5) for a in (target.tokens, target.inputs, target.weights))
    return locs_to_boxes(tokens[:, :4] - LOC0, width, height), tokens[:, 4] - UNUSED0, tokens, inputs, weights


def rows(boxes, labels):
    """A multiset of objects, whatever their order."""
    return sorted((*map(float, box), int(label)) for box, label in zip(boxes, labels, strict=True))


@pytest.mark.parametrize("n", [0, 1, 3, G - 1, G])
def test_target(n):
    """Over many images of n objects: what is asked, fed and weighted."""
    disguised = 0
    for seed in range(60):
        rng = np.random.default_rng([seed, n])
        image = random_image(rng, n)
        target = target_of(seed, *image)
        assert target.tokens.shape == target.inputs.shape == target.weights.shape == (5 * G + 1,)
        assert target.tokens.dtype == target.inputs.dtype == np.int64 and target.weights.dtype == np.float32
        for position, (token, fed) in enumerate(zip(target.tokens, target.inputs, strict=True)):
            first, last = LANGUAGE.allowed(position)
            assert first <= token < last and first <= fed < last

        boxes, labels, tokens, inputs, weights = groups_of(target)
        assert rows(boxes[:n], labels[:n]) == rows(*image), "the objects come first, whole pixels unharmed"
        assert (labels[n:] == len(CLASSES)).all() and (labels[:n] < len(CLASSES)).all()
        assert (weights[:n] == 1).all() and (weights[n:, :4] == 0).all()
        assert (weights[n:, 4] == np.float32(Noise.weight)).all() and 0 < Noise.weight <= 1
        assert target.tokens[-1] == target.inputs[-1] == EOS and target.weights[-1] == 1
        assert (inputs[:, :4] == tokens[:, :4]).all() and (inputs[:n] == tokens[:n]).all()
        disguised += (inputs[n:, 4] != tokens[n:, 4]).sum()

        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        assert (boxes == boxes.round()).all(), "noise on the grid of the objects"
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        for noise, real in itertools.product(boxes[n:], image[0]):
            assert slow_iou(noise, real) <= MAX_NOISE_IOU == 0.15
        assert len({tuple(box) for box in boxes[n:]}) == G - n
    share = disguised / max(1, 60 * (G - n))
    assert n == G or abs(share - Noise.disguise) < 0.15


def test_order_is_random():
    """Every order of three objects is equally likely, and the seed decides."""
    image = random_image(np.random.default_rng(0), 3)[0], np.array([0, 1, 2])
    orders = [tuple(groups_of(target_of(seed, *image))[1][:3]) for seed in range(300)]
    assert {orders.count(order) > 20 for order in itertools.permutations(range(3))} == {True}
    a, b = target_of(5, *image), target_of(5, *image)
    assert (a.tokens == b.tokens).all() and (a.inputs == b.inputs).all()


def test_disguises_are_random_classes():
    seen = set()
    for seed in range(100):
        *_, inputs, _ = groups_of(target_of(seed, *random_image(np.random.default_rng(seed), 2)))
        seen |= set(inputs[2:, 4].tolist())
    assert seen == set(range(UNUSED0, NOISE + 1))


def test_more_objects_than_groups():
    """A random choice of them, each once; nothing is noise."""
    boxes, labels = random_image(np.random.default_rng(0), 3 * G)
    assert len(set(rows(boxes, labels))) == 3 * G
    chosen = set()
    for seed in range(40):
        target = target_of(seed, boxes, labels)
        of_target, its_labels, *_ = groups_of(target)
        drawn = rows(of_target, its_labels)
        assert len(set(drawn)) == G and set(drawn) <= set(rows(boxes, labels))
        assert (target.weights == 1).all() and (target.inputs == target.tokens).all()
        chosen |= set(drawn)
    assert len(chosen) == 3 * G


@pytest.mark.parametrize("form", ["lists", "arrays"])
def test_no_objects(form):
    """An image without objects is an answer of noise alone."""
    empty = ([], []) if form == "lists" else (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    boxes, labels, _, _, weights = groups_of(target_of(0, *empty))
    assert (labels == len(CLASSES)).all() and (weights[:, :4] == 0).all() and (weights[:, 4] > 0).all()
    assert len(np.unique(boxes, axis=0)) > 1


def test_no_room_for_noise():
    """Where no box is far enough from the objects, the answer still has all its groups."""
    tiles = np.array([[x, y, x + 8, y + 8] for x in range(0, SIZE, 8) for y in range(0, SIZE, 8)][: G - 2])
    crowd = np.concatenate((tiles, [[0, 0, SIZE, SIZE]]))
    for seed in range(20):
        boxes, labels, *_ = groups_of(target_of(seed, crowd, np.zeros(len(crowd), int)))
        assert (labels == len(CLASSES)).sum() == G - len(crowd) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_width_is_not_height():
    """Boxes of a wide picture scale with its width and its height, those of noise too."""
    for seed in range(20):
        boxes, labels = random_image(np.random.default_rng(seed), 3, 640, 200)
        target = target_of(seed, boxes, labels, 640, 200, grid=0)
        locs = target.tokens[:-1].reshape(G, 5)[:3, :4] - LOC0
        assert sorted(locs.tolist()) == sorted(boxes_to_locs(boxes, 640, 200).tolist())
        noise = groups_of(target, 640, 200)[0][3:]
        assert all(slow_iou(a, b) <= MAX_NOISE_IOU + 0.02 for a, b in itertools.product(noise, boxes))


def test_targets_of_scenes():
    """The practice set: boxes and classes of a scene survive the way into tokens and back."""
    language = ClosedSet((2, 3, 108), 300, 7, 1, COCO_CLASSES, G)
    for seed in range(5):
        scene = make_scene(seed)
        target = closed_set_target(
            np.random.default_rng(seed), scene.boxes, scene.labels, SIZE, SIZE, language, grid=1
        )
        n, groups = len(scene.labels), target.tokens[:-1].reshape(G, 5)
        boxes = locs_to_boxes(groups[:n, :4] - 300, SIZE, SIZE)
        assert rows(boxes, groups[:n, 4] - 7) == rows(scene.boxes, scene.labels)
        assert (groups[n:, 4] == 87).all()


# Loss -------------------------------------------------------------------------------------------------------


def tiny_decoder(final_cap, seed=0):
    torch.manual_seed(seed)
    config = TextConfig(2, 32, 1, 2, 1, 8, 48, 8**-0.5, final_cap=final_cap, vocab_size=VOCAB)
    return Gemma(config)


def slow_loss(decoder, hidden, tokens, weights):
    """Logits of the whole vocabulary in float64, all but the allowed ids struck out, token by token."""
    embed, cap, total, weight = decoder.embed.weight.double(), decoder.config.final_cap, 0.0, 0.0
    for row in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            logits = embed @ hidden[row, position].double()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            allowed = torch.full_like(logits, -torch.inf)
            ids = slice(LOC0, LOC0 + 1024) if position % 5 < 4 else slice(UNUSED0, NOISE + 1)
            allowed[ids] = logits[ids]
            total -= weights[row, position].double() * allowed.log_softmax(0)[tokens[row, position]]
            weight += weights[row, position].double()
    return total / weight


@pytest.mark.parametrize("final_cap", [None, 3.0], ids=["no cap", "cap"])
def test_loss(final_cap):
    """Equals the slow one, and so do its gradients; eos has no part in it."""
    decoder = tiny_decoder(final_cap)
    targets = [
        target_of(seed, *random_image(np.random.default_rng(seed), n)) for seed, n in enumerate((2, G, 0))
    ]
    tokens, weights = (
        torch.tensor(np.stack([getattr(t, k) for t in targets])) for k in ("tokens", "weights")
    )
    hidden = torch.randn(3, 5 * G + 1, 32, generator=torch.Generator().manual_seed(1))
    ours, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = allowed_loss(decoder, ours, tokens, weights, LANGUAGE) / weights[:, :-1].sum()
    reference = slow_loss(decoder, slow, tokens, weights)
    assert loss.dtype == torch.float32 and abs(loss.item() - reference.item()) < 1e-5
    loss.backward(), reference.backward()
    assert torch.allclose(ours.grad, slow.grad, atol=1e-6) and ours.grad.abs().max() > 1e-3
    assert (ours.grad[:, -1] == 0).all(), "eos is the only id allowed: nothing to learn"
    assert (ours.grad[2, :-1].unflatten(0, (G, 5))[:, :4] == 0).all(), "noise boxes are not learnt"
    assert (ours.grad[2, :-1].unflatten(0, (G, 5))[:, 4] != 0).any(), "that they are noise is"


def test_loss_in_bfloat16():
    """Under autocast, as in training: the softmax is in float32."""
    decoder = tiny_decoder(None)
    target = target_of(0, *random_image(np.random.default_rng(0), 3))
    tokens, weights = torch.tensor(target.tokens)[None], torch.tensor(target.weights)[None]
    hidden = torch.randn(1, 5 * G + 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = allowed_loss(decoder, hidden, tokens, weights, LANGUAGE) / weights[:, :-1].sum()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - slow_loss(decoder, hidden, tokens, weights).item()) < 0.02


# Decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_feedback", [True, False], ids=["noise fed back", "noise replaced"])
@torch.no_grad()
def test_decoded_scores(noise_feedback, tmp_path):
    """Against one forward over the finished answer: every token the likeliest of those allowed, scores the
    softmax over the classes and noise, noise in it but never the answer."""
    hf = tiny_paligemma(seed=15, window=10)
    hf.get_input_embeddings().weight[NOISE] *= 4  # likeliest in many groups, but not in all
    ours = PaliGemma.from_pretrained(str(save(hf, tmp_path)), dtype=torch.float32)
    images, _ = random_inputs(hf, batch=5, seed=3)
    answer = GroupDecoder(ours, LANGUAGE, noise_feedback=noise_feedback)(images)
    assert answer.tokens.shape == (5, G, 5) and answer.locs.shape == (5, G, 4)
    assert answer.labels.shape == answer.scores.shape == answer.noise.shape == (5, G)

    prompt = torch.tensor(LANGUAGE.prompt).expand(5, -1)
    text = torch.cat((prompt, answer.tokens.flatten(1)), dim=1)
    logits = ours(images, text, prompt.shape[1])[:, prompt.shape[1] - 1 : -1].unflatten(1, (G, 5))
    locs = logits[:, :, :4, LOC0 : LOC0 + 1024]
    assert torch.equal(answer.locs, locs.argmax(-1)) and torch.equal(
        answer.tokens[..., :4], answer.locs + LOC0
    )
    probabilities = logits[:, :, 4, UNUSED0 : NOISE + 1].softmax(-1)
    best, label = probabilities[..., :-1].max(-1)
    assert torch.equal(answer.labels, label) and torch.allclose(answer.scores, best, atol=1e-5)
    assert torch.allclose(answer.noise, probabilities[..., -1], atol=1e-5)
    assert (answer.labels < len(CLASSES)).all()
    is_noise = answer.noise > answer.scores
    assert is_noise.any() and not is_noise.all(), "the test needs groups of both kinds"
    fed = torch.where(is_noise & noise_feedback, NOISE, UNUSED0 + label)
    assert torch.equal(answer.tokens[..., 4], fed)

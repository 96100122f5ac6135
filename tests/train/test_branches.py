"""Training in parallel: what a branch is taught, own boxes, smoothed locations, whole runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import language_of, random_objects, same, torchrun
from reference import ARCHITECTURES, LANGUAGE, noisy
from safetensors.torch import load_file
from training import PLAIN, launch, metrics, run, run_complaint, run_until_killed, weights, weights_apart

from model import PaliGemma
from model.decoding.boxes import iou, locs_to_boxes
from model.decoding.closed_set import GROUP
from model.decoding.masks import MaskCodec
from model.io.hub import codec_file
from model.io.image import to_network
from model.io.tokenizer import LOCS
from model.io.weights import load_config
from train.branches import branches_loss, expected_class, own_boxes, own_noise, smoothed_locations
from train.data.samples import BRANCH_MULTIPLE, NOTHING, closed_set_sample, collate, weight_of
from train.data.targets import Noise, branch_target
from train.loss import Objective
from train.practice.dataset import PracticeScenes

CLASSES = len(LANGUAGE.classes)
PARALLEL = f"{PLAIN} --answers parallel --noise-boxes 4"
SEQUENCE = f"{PLAIN} --answers sequence --noise own"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    """Gemma 1 and 2, with and without windows and soft caps."""
    return noisy(tmp_path_factory.mktemp("noisy"), **ARCHITECTURES[request.param])[1]


OWN = Noise(own=True, boxes=3, weight=0.7)


def batch_of(model, noise=OWN, counts=(2, 5, 0), limit=4):
    """A batch with more objects in one picture than are taught, and none in another."""
    rng, size = np.random.default_rng(3), model.config.vision.image_size
    samples = []
    for n in counts:
        boxes, labels = random_objects(rng, n, 128, 128, CLASSES)
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        samples.append(closed_set_sample(rng, image, boxes, labels, (128, 128), LANGUAGE, limit, 1, noise))
    return collate(samples)


# What a branch is taught ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_branch_is_read_as_a_text(model):
    """Its hidden states are those of the prompt and this box alone."""
    batch = batch_of(model, Noise(boxes=3))
    image_tokens = model.encode(to_network(batch["image"]))
    prompt, bins = torch.tensor(LANGUAGE.prompt), batch["branches"][..., :4]
    end, hidden = model.read_branches(image_tokens, prompt, bins + LANGUAGE.loc0)
    for k in range(bins.shape[1]):
        text = torch.cat((prompt.expand(3, -1), bins[:, k] + LANGUAGE.loc0), dim=1)
        plain = model.read(image_tokens, text, len(prompt))[:, len(prompt) - 1 :]  # [B, 5, D]
        assert torch.allclose(end, plain[:, 0], atol=1e-4)
        assert torch.allclose(hidden[:, k], plain[:, 1:], atol=1e-4)


@torch.no_grad()
def test_own_boxes_are_drawn_token_by_token(model):
    """With the same random numbers, texts that are sampled one after the other have the same boxes."""
    batch = batch_of(model)
    image_tokens, uniform = model.encode(to_network(batch["image"])), batch["uniform"]
    boxes = own_boxes(model, LANGUAGE, image_tokens, uniform)
    assert boxes.shape == (3, 3, 4) and len(boxes.unique()) > 12
    prompt = torch.tensor(LANGUAGE.prompt)
    for k in range(3):
        text = prompt.expand(3, -1)
        for depth in range(4):
            hidden = model.read(image_tokens, text, len(prompt))[:, -1]
            p = model.decoder.logits(hidden)[:, LANGUAGE.loc0 : LANGUAGE.loc0 + LOCS].double().softmax(-1)
            drawn = (p.cumsum(-1) < uniform[:, k, depth, None]).sum(-1)
            # A random number that lies at the border of two bins may fall on either side.
            assert (drawn - boxes[:, k, depth]).abs().max() <= 1
            text = torch.cat((text, boxes[:, k, depth, None] + LANGUAGE.loc0), dim=1)


def slow_loss(model, batch, sigma) -> float:
    """One branch after the other, each as a text of its own, means in float64."""
    model.eval()
    image_tokens = model.encode(to_network(batch["image"]))
    own, prompt, loss = batch["uniform"], list(LANGUAGE.prompt), 0.0
    if own.numel():
        own = own_boxes(model, LANGUAGE, image_tokens, own)
    for b in range(len(own)):
        rows = [
            (row[:4], row[4], weight, 1.0)
            for row, weight in zip(batch["branches"][b].tolist(), batch["branch_weights"][b].tolist())
            if max(weight) > 0
        ]
        objects = np.array([row for row in batch["objects"][b].tolist() if row[4] != NOTHING]).reshape(-1, 5)
        for box, weight in zip(own[b].tolist(), batch["own_weights"][b].tolist()):
            overlaps = [0.0]
            if len(objects):
                overlaps = iou(locs_to_boxes([box], 1, 1), locs_to_boxes(objects[:, :4], 1, 1))[0]
            reached = np.mean([max(overlaps) >= 0.5 + 0.05 * i - 1e-6 for i in range(10)])
            label = int(objects[np.argmax(overlaps), 4]) if len(objects) else 0
            rows.append((box, label, [0, 0, 0, 0, weight], reached))
        for box, label, weight, certainty in rows:
            text = torch.tensor([prompt + [LANGUAGE.loc0 + bin_ for bin_ in box]])
            hidden = model.read(image_tokens[b : b + 1], text, len(prompt))
            log_p = model.decoder.logits(hidden)[0, len(prompt) - 1 :].double()
            for depth, bin_ in enumerate(box):
                log_q = log_p[depth, LANGUAGE.loc0 : LANGUAGE.loc0 + LOCS].log_softmax(-1)
                q = F.one_hot(torch.tensor(bin_), LOCS).double()
                if sigma:
                    q = torch.exp(-((torch.arange(LOCS) - bin_) ** 2) / (2 * sigma**2)).double()
                loss = loss - weight[depth] * (q / q.sum() * log_q).sum()
            of_class = log_p[4, LANGUAGE.class0 : LANGUAGE.noise + 1].log_softmax(-1)
            loss = loss - weight[4] * (certainty * of_class[label] + (1 - certainty) * of_class[-1])
    return loss


@pytest.mark.parametrize("kind", ["own", "made up", "none"])
@pytest.mark.parametrize("sigma", [0, 5.0])
def test_loss(model, kind, sigma):
    """It and its gradients equal the slow ones: in float32, within rounding."""
    batch = batch_of(model, Noise(own=kind == "own", boxes=0 if kind == "none" else 3, weight=0.7))
    model.zero_grad()
    smoothed = smoothed_locations(sigma) if sigma else None
    loss = branches_loss(model, LANGUAGE, model.encode(to_network(batch["image"])), batch, smoothed)
    loss.backward()
    watched = [model.decoder.embed.weight, model.projector.weight, model.decoder.layers[0].attn.k_proj.weight]
    ours = [weight.grad.clone() for weight in watched]
    model.zero_grad()
    slow = slow_loss(model, batch, sigma)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    for grad, weight in zip(ours, watched):
        assert torch.allclose(grad, weight.grad, atol=1e-4 * weight.grad.abs().max())


def test_a_sample():
    """All objects are there to be compared with; a random choice of them is taught, then made-up noise."""
    boxes, labels = random_objects(np.random.default_rng(0), 5, 128, 128, CLASSES)
    args = boxes, labels, 128, 128, LANGUAGE, 3, 1
    target = branch_target(np.random.default_rng(1), *args, Noise(boxes=2, weight=0.25))
    assert sorted(target.objects[:, 4]) == sorted(labels) and len(target.branches) == 5
    assert (target.branches[:3] == target.objects[:3]).all() and (target.branches[3:, 4] == CLASSES).all()
    assert target.weights.tolist() == [[1.0] * 5] * 3 + [[0.0] * 4 + [0.25]] * 2
    assert target.own_weights.shape == (0,) and target.uniform.shape == (0, 4)
    own = branch_target(np.random.default_rng(1), *args, Noise(boxes=2, weight=0.25, own=True))
    assert len(own.branches) == 3 and own.own_weights.tolist() == [0.25, 0.25] and own.uniform.shape == (2, 4)
    assert ((own.uniform >= 0) & (own.uniform < 1)).all()


def test_a_batch_is_padded():
    """With rows that nothing is taught of, to a multiple; its weight is the sum of all."""
    samples = []
    for n in (1, 6):
        boxes, labels = random_objects(np.random.default_rng(n), n, 128, 128, CLASSES)
        image = np.zeros((8, 8, 3), np.uint8)
        noise = Noise(own=True, boxes=2, weight=0.5)
        samples.append(
            closed_set_sample(
                np.random.default_rng(n), image, boxes, labels, (128, 128), LANGUAGE, 9, 1, noise
            )
        )
    batch = collate(samples)
    assert batch["branches"].shape[1] == batch["objects"].shape[1] == 2 * BRANCH_MULTIPLE
    assert (batch["objects"][0, 1:] == NOTHING).all() and batch["branch_weights"][0, 1:].sum() == 0
    assert weight_of(batch) == 5 * 7 + 4 * 0.5


def test_expected_class():
    """By hand: half of an object, all of it, twice its height, nothing; padding is no object."""
    objects = torch.tensor([[[0, 0, 100, 100, 3], [500, 500, 700, 600, 1], [0, 0, 0, 0, NOTHING]]])
    boxes = torch.tensor([[[0, 0, 100, 50], [500, 500, 700, 600], [0, 0, 79, 100], [800, 800, 900, 900]]])
    label, share = expected_class(boxes, objects)
    assert label[0, :3].tolist() == [3, 1, 3]
    assert share[0].tolist() == pytest.approx([0.1, 1.0, 0.6, 0.0])
    _, share = expected_class(boxes, torch.full((1, 2, 5), NOTHING))
    assert share.tolist() == [[0.0] * 4]
    # The last bin stands for the edge, 1024.
    whole = torch.tensor([[[0, 0, 1023, 1023, 0]]])
    label, share = expected_class(torch.tensor([[[0, 0, 512, 1023]]]), whole)
    assert share.item() == pytest.approx(0.1)


def test_smoothed_locations():
    rows = smoothed_locations(2.0)
    assert torch.allclose(rows.sum(-1), torch.ones(LOCS)) and (rows.argmax(-1) == torch.arange(LOCS)).all()
    assert rows[500, 502] / rows[500, 500] == pytest.approx(np.exp(-0.5)), "a sigma away"
    assert rows[0, 0] > 1.5 * rows[500, 500], "what would lie beyond the edge is shared by those within"


@torch.no_grad()
def test_own_noise_in_sequence(model):
    """Noise boxes alone are replaced, by boxes drawn after the prompt; their classes by hand."""
    rng, size, groups = np.random.default_rng(3), model.config.vision.image_size, LANGUAGE.groups
    samples = []
    for n in (2, 0, groups):
        boxes, labels = random_objects(rng, n, 128, 128, CLASSES)
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        noise = Noise(own=True)
        samples.append(closed_set_sample(rng, image, boxes, labels, (128, 128), LANGUAGE, None, 1, noise))
    before = collate(samples, multiple=16)
    image_tokens, start = model.encode(to_network(before["image"])), len(LANGUAGE.prompt)
    batch = own_noise(model, LANGUAGE, image_tokens, before)
    own = own_boxes(model, LANGUAGE, image_tokens, before["uniform"][..., :4])
    assert all(torch.equal(batch[name], before[name]) for name in before.keys() - {"text", "labels"})
    end = start + GROUP * groups
    for name, first in (("text", start), ("labels", start - 1)):
        for rest in (slice(first), slice(first + GROUP * groups, None)):
            assert torch.equal(batch[name][:, rest], before[name][:, rest])
    new, fed = batch["labels"][:, start - 1 : end - 1], batch["text"][:, start:end]
    old, fed_before = before["labels"][:, start - 1 : end - 1], before["text"][:, start:end]
    rows = [x.reshape(3, groups, GROUP) for x in (new, fed, old, fed_before)]
    for b, n in enumerate((2, 0, groups)):
        new, fed, old, fed_before = (row[b] for row in rows)
        assert torch.equal(new[:n], old[:n]) and torch.equal(fed[:n], fed_before[:n])
        assert torch.equal(new[n:, :4], own[b, n:] + LANGUAGE.loc0) and torch.equal(fed[n:, :4], new[n:, :4])
        objects = old[None, :n] - torch.tensor([LANGUAGE.loc0] * 4 + [LANGUAGE.class0])
        number, share = (x[0] for x in expected_class(own[b : b + 1], objects))
        for k in range(n, groups):
            label = LANGUAGE.class0 + number[k]
            assert new[k, 4] == (label if before["uniform"][b, k, 4] < share[k] else LANGUAGE.noise)
            assert fed[k, 4] == (label if share[k] > 0 else fed_before[k, 4])


def test_own_noise_that_is_right(model, monkeypatch):
    """Boxes that are objects are taught as such, with their probability."""
    boxes, labels = random_objects(np.random.default_rng(5), 2, 128, 128, CLASSES)
    image = np.zeros((model.config.vision.image_size,) * 2 + (3,), np.uint8)
    sample = closed_set_sample(
        np.random.default_rng(5), image, boxes, labels, (128, 128), LANGUAGE, None, 1, Noise(own=True)
    )
    batch, start, groups = collate([sample]), len(LANGUAGE.prompt), LANGUAGE.groups
    objects = batch["labels"][:, start - 1 : start + 4]  # the first one
    drawn = (objects[:, None, :4] - LANGUAGE.loc0).expand(1, groups, 4).clone()
    drawn[:, 2:, 2] -= (drawn[:, 2:, 2] - drawn[:, 2:, 0]) // 4  # a quarter shorter: f is 0.5 or 0.6
    monkeypatch.setattr("train.branches.own_boxes", lambda *_: drawn)
    shares = []
    for seed in range(200):
        batch["uniform"] = torch.rand(1, groups, 5, generator=torch.Generator().manual_seed(seed))
        new = own_noise(model, LANGUAGE, torch.zeros(1), batch)
        taught = new["labels"][0, start - 1 : start - 1 + GROUP * groups].view(groups, GROUP)[2:, 4]
        assert (
            new["text"][0, start : start + GROUP * groups].view(groups, GROUP)[2:, 4] == objects[0, 4]
        ).all()
        assert ((taught == objects[0, 4]) | (taught == LANGUAGE.noise)).all()
        shares.append((taught == objects[0, 4]).float().mean().item())
    assert np.mean(shares) == pytest.approx(0.55, abs=0.1)


def test_own_boxes_know_no_dropout(model):
    """An adapter's dropout is for what is taught."""
    batch = batch_of(model)
    image_tokens = model.encode(to_network(batch["image"])).detach()
    plain = own_boxes(model, LANGUAGE, image_tokens, batch["uniform"])
    for module in model.modules():
        module.training = True
    assert torch.equal(plain, own_boxes(model, LANGUAGE, image_tokens, batch["uniform"]))
    assert model.training and all(module.training for module in model.modules())
    model.eval()


# Whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--noise own", "--noise made-up --noise-copies 0.2", "--noise-boxes 0"])
def test_training(option, tiny, scenes, tmp_path):
    """It learns, and says in the checkpoint's config how."""
    run(tiny, tmp_path / "run", f"{PARALLEL} {option} --data {scenes} --steps 30 --lr 3e-3 --save-every 30")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert load_config(tmp_path / "run" / "final").answers == "parallel"


def test_training_in_sequence(tiny, scenes, tmp_path):
    """Of several steps with their own noise, whose loss is not that of made-up noise."""
    for noise in ("own", "made-up"):
        options = (
            f"{PLAIN} --answers sequence --noise {noise} --data {scenes} --steps 30 --lr 3e-3 --save-every 30"
        )
        run(tiny, tmp_path / noise, options)
    own, made_up = ([line["loss"] for line in metrics(tmp_path / noise)] for noise in ("own", "made-up"))
    assert own[-1] < 0.9 * own[0] and own != made_up
    assert load_config(tmp_path / "own" / "final").answers == "sequence"


def test_all_tasks(with_codec, tmp_path):
    """Objects in branches beside texts of other tasks: the loss is the sum of both, over all weights."""
    options = "--answers parallel --noise-boxes 3 --tasks all --steps 1 --save-every 1"
    run(with_codec, tmp_path / "run", options)
    model = PaliGemma.from_pretrained(str(with_codec), dtype=torch.float32)
    language = language_of(with_codec)
    data = PracticeScenes(
        language, 64, 16, tokenizer=model.tokenizer, codec=MaskCodec.load(codec_file(with_codec)),
        noise=Noise(own=True, boxes=3), branches=64,
    )  # fmt: skip
    batch = collate([data[i, i] for i in range(4)])
    assert len(batch["text"]) == 4 and (batch["labels"] < language.class0).any(), "texts of other tasks alone"
    words = {name: batch[name] for name in ("image", "text", "labels", "weights", "prefix_len")}
    branches = {name: x for name, x in batch.items() if name not in words or name == "image"}
    total = weight_of(batch)
    objective = Objective(model, None, branches=language)
    with torch.no_grad():
        parts = [objective(part | {"total": total})[1].item() for part in (words, branches)]
    assert min(parts) > 0.1
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(parts), abs=2e-4)


@pytest.mark.parametrize(
    "form, option", [(PARALLEL, "--accumulate 2"), (PARALLEL, "--recompute"), (SEQUENCE, "--accumulate 2")]
)
def test_less_memory_same_result(form, option, tiny, scenes, tmp_path):
    for name, more in (("plain", ""), ("other", option)):
        run(tiny, tmp_path / name, f"{form} --data {scenes} --steps 3 {more}")
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("plain", "other"))) < 1e-4


@pytest.mark.parametrize("option", ["", "--shard"])
def test_two_processes(option, tiny, scenes, tmp_path):
    """They draw the same own boxes as one process: the random numbers belong to the sample."""
    options = f"{PARALLEL} --data {scenes} --steps 3 --save-every 3"
    run(tiny, tmp_path / "one", options)
    launch(tiny, tmp_path / "two", f"{options} {option}", torchrun(2))
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("one", "two"))) < 1e-4


@pytest.mark.parametrize("form", [PARALLEL, f"{PARALLEL} --lora --lora-rank 4 --lr 1e-2", SEQUENCE])
def test_killed_and_resumed(form, tiny, scenes, tmp_path, monkeypatch):
    """Bit for bit as if it had never stopped."""
    options = f"{form} --data {scenes} --augment --location-smoothing 4 --steps 6 --save-every 3"
    run(tiny, tmp_path / "straight", options)
    run_until_killed(monkeypatch, 5, tiny, tmp_path / "killed", options)
    run(tiny, tmp_path / "killed", options, "--resume")
    final = [next((tmp_path / name / "final").glob("*model.safetensors")) for name in ("straight", "killed")]
    assert same(*map(load_file, final))


def test_validation(tiny, scenes, tmp_path):
    """Its loss is of branches, its mAP of boxes decoded in parallel."""
    run(tiny, tmp_path / "run", f"{PARALLEL} --data {scenes} --val {scenes} --val-every 2 --steps 2")
    _, figures = [line for line in metrics(tmp_path / "run") if "val_loss" in line]
    model = PaliGemma.from_pretrained(str(tmp_path / "run" / "final"), dtype=torch.float32)
    assert figures["val_mAP"] >= 0 and 1 < figures["val_loss"] < 8 and model.config.answers == "parallel"


def test_dry_run(tiny, scenes, tmp_path, capsys):
    run(tiny, tmp_path / "run", f"{PARALLEL} --data {scenes} --dry-run")
    assert "image tokens + " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        ("--answers parallel --loss vocabulary", "--loss vocabulary is for --answers sequence"),
        ("--answers parallel --loss-mean example", "--loss-mean example is for texts"),
        ("--branches 7", "--branches 7 is for --answers parallel"),
        ("--noise own --tasks all", "needs --tasks closed-set and --loss allowed"),
        ("--noise own --loss vocabulary", "needs --tasks closed-set and --loss allowed"),
        ("--answers parallel --noise-copies 0.1", "--noise made-up"),
        ("--location-smoothing -1", "must be at least 0"),
        ("--loss vocabulary --location-smoothing 2", "needs --loss allowed"),
    ],
)
def test_refused(options, words, tiny, tmp_path):
    assert words in run_complaint(tiny, tmp_path / "run", options)


def test_lines_of_text_have_no_branches(tiny, pairs, tmp_path):
    assert "holds lines of text" in run_complaint(
        tiny, tmp_path / "run", f"--answers parallel --data {pairs}"
    )


def test_an_adapter_is_trained(tiny, scenes, tmp_path):
    run(tiny, tmp_path / "run", f"{PARALLEL} --data {scenes} --lora --steps 2")
    adapted = PaliGemma.from_pretrained(str(tiny), adapter=str(tmp_path / "run" / "final"))
    assert adapted.config.answers == "parallel"

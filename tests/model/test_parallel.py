"""Boxes in parallel: a branch is what the plain sequence would be with that box as its first group."""

import copy
import weakref

import pytest
import torch
from helpers import PlainSteps, equal
from reference import ARCHITECTURES, LANGUAGE, noisy

from model.attention import branch_mask
from model.decoding import packing, parallel
from model.decoding.closed_set import GROUP, Head
from model.decoding.layouts import HalfLinear, PackedLinear, PlanesLinear, cpu_has_bfloat16, has_fbgemm
from model.decoding.packing import pack, quantize
from model.decoding.parallel import COORDINATES, ParallelDecoder, Reading, peaks
from model.io.tokenizer import LOCS
from model.lora import TARGETS, add_lora, lora_layers

K = 6


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "int8", "an adapter"])
def model(request, tmp_path_factory):
    """Gemma 1 and 2, with and without windows and soft caps; and other matrices."""
    model = noisy(tmp_path_factory.mktemp("noisy"), **ARCHITECTURES.get(request.param, {}))[1]
    if request.param == "int8":  # the form that leaves x as it is; the other one: test_packed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "has_fbgemm", lambda: False)
            quantize(model)
    if request.param == "an adapter":
        add_lora(model, TARGETS["published"], rank=4)
        for layer in lora_layers(model).values():  # at first, B is zero
            layer.B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def pictures(model, batch, seed=2):
    size = model.config.vision.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def watched(model, images, monkeypatch, change=None, branches=K):
    """The answer, and the hidden states [B, K, D] of the four steps. change(step, bins): what is fed then."""
    hidden, real = [], ParallelDecoder._step

    def step(self, bins, parents):
        bins = change(len(hidden), bins) if change else bins
        hidden.append(real(self, bins, parents))
        return hidden[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ParallelDecoder, "_step", step)
        answer = ParallelDecoder(model, LANGUAGE, branches)(images)
    return answer, hidden


@torch.inference_mode()
def test_a_branch_is_a_sequence(model, monkeypatch):
    """Logits of every step equal those of the whole text with the box as its first group, in float32."""
    images = pictures(model, 2)
    answer, hidden = watched(model, images, monkeypatch)
    prompt = torch.tensor(LANGUAGE.prompt)
    for k in range(K):
        text = torch.cat((prompt.expand(2, -1), answer.tokens[:, k, :COORDINATES]), dim=1)
        plain = model(images, text, len(prompt))[:, len(prompt) :]  # after y0, x0, y1, x1
        ours = torch.stack([h[:, k] for h in hidden[1:]], dim=1)  # the first step's branches were of y0 alone
        assert (model.decoder.logits(ours) - plain[:, 1:]).abs().max() < 1e-4
        p = plain[:, -1, LANGUAGE.class0 : LANGUAGE.noise + 1].softmax(-1)
        assert torch.allclose(answer.noise[:, k], p[:, -1], atol=1e-5)
        assert (answer.labels[:, k] == p[:, :-1].argmax(-1)).all()


@torch.inference_mode()
def test_five_steps_find_the_boxes_of_plain_steps(model):
    """Of each image, against every box as a text of its own: five tokens, one after the other."""
    images = pictures(model, 2)
    answer = ParallelDecoder(model, LANGUAGE, K)(images)
    for i in range(2):
        found = list(zip(answer.locs[i].tolist(), answer.labels[i].tolist()))
        assert found == PlainSteps(model, LANGUAGE, images[i : i + 1]).boxes(K, Reading())


@torch.inference_mode()
def test_branches_never_see_each_other(model, monkeypatch):
    """Another coordinate in one branch leaves the states of all others bit for bit as they were."""
    images = pictures(model, 1)
    _, before = watched(model, images, monkeypatch)

    def change(step, bins):
        bins = bins.clone()
        bins[:, 3] = (bins[:, 3] + 100) % LOCS if step == 2 else bins[:, 3]
        return bins

    _, after = watched(model, images, monkeypatch, change)
    others = [k for k in range(K) if k != 3]
    for step in (2, 3):
        assert not torch.equal(before[step][:, 3], after[step][:, 3])
        assert torch.equal(before[step][:, others], after[step][:, others])


def test_the_number_of_branches_changes_nothing(model):
    """A pair of y0 and x0 that is followed ends in the same box, whatever other pairs are."""
    images, followed = pictures(model, 2), []
    for branches in (K, 3 * K):
        answer = ParallelDecoder(model, LANGUAGE, branches)(images)
        boxes = torch.cat((answer.locs, answer.labels[..., None]), dim=-1).tolist()
        scores = answer.scores.tolist()
        followed.append(
            {(i, *box[:2]): (box[2:], score) for i in (0, 1) for box, score in zip(boxes[i], scores[i])}
        )
    both = followed[0].keys() & followed[1].keys()
    assert len(both) >= K
    for pair in both:
        (one, its_score), (other, score) = followed[0][pair], followed[1][pair]
        assert one == other and its_score == pytest.approx(score, rel=1e-4)


def test_the_order_of_branches_changes_nothing(model, monkeypatch):
    """The peaks of y0 turned round: the same boxes, in the order of their mass."""
    images = pictures(model, 1)
    want = ParallelDecoder(model, LANGUAGE, K)(images)

    def turned(p, count, radius):
        at, mass = peaks(p, count, radius)
        return (at.flip(1), mass.flip(1)) if count == K else (at, mass)

    monkeypatch.setattr(parallel, "peaks", turned)
    found = ParallelDecoder(model, LANGUAGE, K)(images)
    assert torch.equal(found.tokens, want.tokens) and torch.allclose(found.scores, want.scores, rtol=1e-5)


def test_alone_and_in_a_batch(model):
    """And one decoder for batches of different sizes, one after the other."""
    images, decoder = pictures(model, 3), ParallelDecoder(model, LANGUAGE, K)
    together = decoder(images)
    for i in range(3):
        alone = decoder(images[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.allclose(alone.scores[0], together.scores[i], rtol=1e-5)
    assert torch.equal(decoder(images).tokens, together.tokens)


def test_answer(model):
    """Its form is that of the sequence's; a score is the class's probability times a power of the mass."""
    answer = ParallelDecoder(model, LANGUAGE, K, Reading(mass_power=0))(pictures(model, 2))
    assert answer.tokens.shape == (2, K, GROUP) and answer.live.all()
    assert ((answer.locs >= 0) & (answer.locs < LOCS)).all()
    assert torch.equal(answer.tokens[..., :-1], answer.locs + LANGUAGE.loc0)
    assert torch.equal(answer.tokens[..., -1], answer.labels + LANGUAGE.class0)
    assert (answer.scores + answer.noise <= 1 + 1e-6).all()
    lower = ParallelDecoder(model, LANGUAGE, K, Reading(mass_power=1))(pictures(model, 2))
    assert (lower.scores < answer.scores).all()


def test_fused_head(tmp_path):
    """Through the kernel, in Triton's interpreter or on a GPU: 384 rows, the branches of 16 images."""
    head_kernel = pytest.importorskip("model.decoding.head_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = noisy(tmp_path)[1].to(device)
    images = pictures(model, 16).to(device)
    plain, fused = (
        ParallelDecoder(model, LANGUAGE, 24, head=head)(images) for head in (Head, head_kernel.FusedHead)
    )
    assert plain.noise.numel() == 384
    assert torch.equal(plain.tokens, fused.tokens)
    for name in ("scores", "noise"):
        assert torch.allclose(getattr(plain, name), getattr(fused, name), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_many_image_tokens(tmp_path):
    """The layout of 896 px: 4,096 image tokens, of which local layers show the answer only the last."""
    model = noisy(tmp_path, image_size=896, window=300, layers=2, heads=2, kv_heads=1)[1]
    images, prompt = pictures(model, 1), torch.tensor(LANGUAGE.prompt)
    assert model.config.vision.tokens == 4096
    answer = ParallelDecoder(model, LANGUAGE, K)(images)
    found = list(zip(answer.locs[0].tolist(), answer.labels[0].tolist()))
    assert found == PlainSteps(model, LANGUAGE, images).boxes(K, Reading())
    text = torch.cat((prompt, answer.tokens[0, 0, :COORDINATES]))
    p = model(images, text[None], len(prompt))[0, -1, LANGUAGE.class0 : LANGUAGE.noise + 1].softmax(-1)
    assert answer.noise[0, 0] == pytest.approx(p[-1].item(), abs=1e-5)


@pytest.mark.parametrize("layout", [PackedLinear, HalfLinear, PlanesLinear])
@torch.inference_mode()
def test_packed(layout, tmp_path, monkeypatch):
    """Matrices in other layouts, which round: a branch's class is its text's, up to that."""
    if not (cpu_has_bfloat16() if layout is PackedLinear else has_fbgemm()):
        pytest.skip("this CPU has no such layout")
    monkeypatch.setattr(packing, "cpu_has_bfloat16", lambda: layout is PackedLinear)
    model = noisy(tmp_path)[1]
    if layout is PlanesLinear:
        quantize(model)
    else:
        pack(model.bfloat16())
    assert isinstance(model.decoder.layers[0].mlp.down_proj, layout)
    images = pictures(model, 1)
    answer, steps = ParallelDecoder(model, LANGUAGE, K)(images), PlainSteps(model, LANGUAGE, images)
    limit = 1e-3 if layout is PlanesLinear else 0.02
    for locs, noise in zip(answer.locs[0].tolist(), answer.noise[0].tolist(), strict=True):
        assert noise == pytest.approx(steps.probabilities(*locs)[0, -1].item(), abs=limit)


# On a GPU ---------------------------------------------------------------------------------------------------


def test_replays_decode_every_batch(model, taped_graphs):
    """The operations of the five steps, captured once for a size of batch, read each batch's own prefill and
    start from the end of its prompt; what they write to stays in its place."""
    batches = [pictures(model, 2, 0), pictures(model, 2, 1), pictures(model, 1, 2)]
    plain = [ParallelDecoder(model, LANGUAGE, K)(images) for images in batches]
    tapes, decoder = taped_graphs(ParallelDecoder), ParallelDecoder(model, LANGUAGE, K)
    order, answers, places = (0, 1, 0), [], set()
    for i in order:
        answers.append(decoder(batches[i]))
        cache = decoder.cache
        places.add((cache.keys.data_ptr(), cache.slot.data_ptr(), decoder.hidden.data_ptr()))
        assert cache.slot.item() + 1 == cache.keys.shape[3] == decoder.prefix + COORDINATES * K
        assert cache._valid.all() and (cache.last == decoder.prefix + COORDINATES).all()
    assert len(tapes) == len(places) == 1
    # Compared at the end: a later replay leaves an earlier answer alone.
    assert all(equal(answer, plain[i]) for i, answer in zip(order, answers, strict=True))
    assert not torch.equal(plain[0].tokens, plain[1].tokens)
    assert equal(decoder(batches[2]), plain[2]) and len(tapes) == 2, "another size, another graph"
    graph = weakref.ref(decoder.decode_branches)
    decoder.release()
    assert graph() is None and equal(decoder(batches[0]), plain[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graph_and_kernel_equal_the_plain_steps(model):
    """In float32: the replayed graph with the fused head finds the boxes of the plain steps on the CPU."""
    from model.decoding.head_kernel import FusedHead

    on_gpu = ParallelDecoder(copy.deepcopy(model).cuda(), LANGUAGE, K, head=FusedHead)
    plain = ParallelDecoder(model, LANGUAGE, K)
    for batch, seed in ((3, 0), (3, 1), (1, 2)):
        images = pictures(model, batch, seed)
        ours, theirs = on_gpu(images.cuda()), plain(images)
        assert torch.equal(ours.tokens.cpu(), theirs.tokens)
        assert torch.allclose(ours.scores.cpu(), theirs.scores, atol=1e-4)


def test_decoding_is_on_the_gpu_of_the_images(model, current, monkeypatch):
    """The buffers and the graph are made, and the steps taken, with the images' device current."""
    seen, images = [], pictures(model, 2)

    def note(function):
        def noted(*args, **kwargs):
            seen.append(bool(current) and current[-1] is images)
            return function(*args, **kwargs)

        return noted

    for name in ("_prepare", "_decode_branches"):
        monkeypatch.setattr(ParallelDecoder, name, note(getattr(ParallelDecoder, name)))
    ParallelDecoder(model, LANGUAGE, K)(images)
    assert seen == [True, True] and not current


# The parts --------------------------------------------------------------------------------------------------


def test_branch_mask():
    """By hand: two y0, of which the second has both x0; their y1 and x1 go on from them."""
    parents = torch.tensor([[0, 1, 1, 1, 2, 3]])
    seen = [[0], [1], [1, 2], [1, 3], [1, 2, 4], [1, 3, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in branch_mask(parents)[0]] == seen


def test_peaks_by_hand():
    """The window that holds most comes first, though another bin is the likeliest; its mean is the peak, not
    its own likeliest bin. What it holds is taken out."""
    p = torch.zeros(1, LOCS)
    p[0, 500:503] = torch.tensor([0.05, 0.15, 0.2])
    p[0, 1023], p[0, 0], p[0, 505] = 0.3, 0.25, 0.05
    at, mass = peaks(p, 4, radius=2)
    assert at.tolist()[0][:3] == [501, 1023, 0] and torch.allclose(
        mass[0, :3], torch.tensor([0.4, 0.3, 0.25])
    )
    assert at[0, 3] == 505 and mass[0, 3] == pytest.approx(0.05)

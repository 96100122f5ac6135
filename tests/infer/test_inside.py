"""What explain.py collects, against the model and the decoders themselves; and its reasons, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, PlainSteps, apart, call, complaint, load, picture, unpack
from PIL import Image

from infer import explain
from infer.inside import closed_set as inside
from infer.inside.look import look_inside
from infer.inside.page import pack, pack_probabilities, page
from infer.inside.reasons import REASONS, reasons
from infer.lib.knock_out import without_head, without_layer
from model.attention import prefix_lm_mask
from model.decoding.batches import network_images
from model.decoding.closed_set import Answer, ClosedSet, Head
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.decoding.parallel import COORDINATES
from model.io.hub import NANO

FORMS = {"sequence": dict(groups=3), "parallel": dict(branches=6)}
SELECTION = Selection(score_threshold=0.02, nms_iou=0.3)


@pytest.fixture
def tiny(model):
    return load(model)


@pytest.fixture
def image(tmp_path):
    return Image.open(picture(tmp_path / "noise.png", seed=14))


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Nothing is knocked out where that is not what is tested."""
    if "what_if" not in request.node.name:
        monkeypatch.setattr(inside, "is_cheap", lambda model: False)


def look(model, image, form, **options):
    return look_inside(model, image, "a", selection=SELECTION, decode=form, **FORMS[form], **options)


def probabilities(packed: dict) -> np.ndarray:
    return (unpack(packed) / (2 ** packed["bits"] - 1)) ** 2


def rounded(packed: dict, values, bits: int) -> float:
    """The largest difference of the roots, in units of the last bit: at most 1/2 if only rounding made it."""
    roots = np.sqrt(np.asarray(values, np.float64)) * (2**bits - 1)
    return np.abs(unpack(packed) - roots).max()


# Attention --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_in_sequence(tiny, image):
    """Of each text token, as recorded; a row's shares add up to 1."""
    data, P = look(tiny, image, "sequence"), tiny.config.vision.tokens
    decoder = closed_set_decoder(tiny, "sequence", groups=3)
    images, prompt = network_images(tiny, [image]), list(decoder.language.prompt)
    text = torch.tensor([prompt + decoder(images).tokens.flatten().tolist()])
    with tiny.record_attention() as maps:
        tiny.hidden(images, text, len(prompt))
    recorded = np.stack([weights[0, :, P:] for weights in maps.values()])
    assert data["maps"]["shape"] == [2, 4, len(prompt) + 15, P + len(prompt) + 15] == list(recorded.shape)
    assert rounded(data["maps"], recorded, 8) < 0.51
    rows = [token["row"] for box in data["boxes"] for token in box["tokens"]]
    assert rows == list(range(len(prompt) - 1, len(prompt) + 14))  # each is written by the one before it
    assert np.abs(probabilities(data["maps"]).sum(-1) - 1).max() < 0.03


@torch.no_grad()
def test_attention_in_parallel(tiny, image):
    """That of a branch is that of a text of its own."""
    data, P = look(tiny, image, "parallel"), tiny.config.vision.tokens
    language, images = ClosedSet.of(tiny.config, tiny.tokenizer), network_images(tiny, [image])
    start, found = len(language.prompt), probabilities(data["maps"])
    for k, box in enumerate(data["boxes"]):
        locs = [int(token["text"]) for token in box["tokens"][:COORDINATES]]
        text = torch.tensor([[*language.prompt, *(language.loc0 + loc for loc in locs)]])
        with tiny.record_attention() as maps:
            tiny.hidden(images, text, start)
        alone = np.stack(
            [weights[0, :, P + start :] for weights in maps.values()]
        )  # [L, N, 4, P + start + 4]
        own = start + COORDINATES * k + np.arange(COORDINATES)
        rows = found[:, :, own]
        keys = np.concatenate((np.arange(P + start), P + own))
        assert np.abs(np.sqrt(rows[..., keys]) - np.sqrt(alone)).max() < 0.51 / 255 + 1e-3
        assert np.delete(rows, keys, axis=-1).max() == 0
        assert [token["row"] for token in box["tokens"]] == [start - 1, *own]


# Probabilities ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_curves_in_parallel(tiny, image):
    data = look(tiny, image, "parallel")
    language = ClosedSet.of(tiny.config, tiny.tokenizer)
    plain, curves = PlainSteps(tiny, language, network_images(tiny, [image])), unpack(data["coordinates"])
    for k, box in enumerate(data["boxes"]):
        locs = [int(token["text"]) for token in box["tokens"][:COORDINATES]]
        for slot in range(COORDINATES):
            own = np.sqrt(plain.probabilities(*locs[:slot])[0].numpy())
            assert np.abs(curves[k, slot] / 65535 - own).max() < 1e-3
        own = plain.probabilities(*locs)[0].numpy()
        assert np.abs(probabilities(data["classes"])[k] - own).max() < 1e-3
        assert box["tokens"][-1]["text"] == data["names"][own[:-1].argmax()] == box["label"]
    at = {peak["at"] for peak in data["peaks"]}
    assert {int(box["tokens"][0]["text"]) for box in data["boxes"]} <= at and len(data["peaks"]) == 6


@torch.no_grad()
def test_curves_in_sequence(tiny, image, monkeypatch):
    """What the decoder itself chose from, place by place."""
    chosen_from = []

    class Watched(Head):
        def __call__(self, hidden, slot, uniform):
            chosen_from.append(self.decoder.logits(hidden, *self.allowed[slot]).softmax(-1)[0].numpy())
            return super().__call__(hidden, slot, uniform)

    monkeypatch.setattr("model.decoding.detector.head_for", lambda model: Watched)
    data = look(tiny, image, "sequence")
    curves, classes = unpack(data["coordinates"]) / 65535, unpack(data["classes"]) / 65535
    for k in range(3):
        own = chosen_from[5 * k : 5 * k + 5]
        for slot in range(4):
            assert np.abs(curves[k, slot] - np.sqrt(own[slot])).max() < 1e-3
            assert int(data["boxes"][k]["tokens"][slot]["text"]) == own[slot].argmax()
        assert np.abs(classes[k] - np.sqrt(own[4])).max() < 1e-3
        assert abs(data["boxes"][k]["noise"] - own[4][-1]) < 1e-3
        assert abs(data["boxes"][k]["score"] - own[4][:-1].max()) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_lens(tiny, image, form):
    """After the last layer it is the model's own head, before the first it reads the projector's output."""
    data, P = look(tiny, image, form), tiny.config.vision.tokens
    language, images = ClosedSet.of(tiny.config, tiny.tokenizer), network_images(tiny, [image])
    tokens, states = tiny.encode(images), []
    for block in tiny.decoder.layers:
        block.register_forward_pre_hook(lambda module, args: states.append(args[0][0, :P]))
    tiny.read(tokens, torch.tensor([language.prompt]), len(language.prompt))
    assert torch.equal(states[0], tokens[0])
    lens = probabilities(data["lens"]["values"])  # [L + 1, C, P]
    for layer, state in enumerate(states):
        logits = tiny.decoder.norm(state) @ tiny.decoder.embed.weight[language.class0 : language.noise + 1].T
        cap = tiny.config.text.final_cap
        own = (torch.tanh(logits / cap) * cap).softmax(-1)
        assert np.abs(np.sqrt(lens[layer].T) - np.sqrt(own.numpy())).max() < 0.51 / 255 + 1e-3
    assert lens.shape == (3, len(language.classes) + 1, P)


def test_words(tiny, image):
    data = look_inside(tiny, image, "a", prompt="caption en", max_tokens=4)
    assert [word["row"] for word in data["words"]] == list(range(3, 3 + len(data["words"])))
    for word in data["words"]:  # greedy: the likeliest one was taken
        assert word["best"][0] == [word["text"], word["p"]] and len(word["best"]) == 10
    assert data["lens"]["values"]["shape"] == [3, len(data["lens"]["names"]), 16]


def test_words_with_boxes(tiny, image, monkeypatch):
    answer = tiny.tokenizer.encode("<loc0000><loc0128><loc0512><loc1023> cat")
    monkeypatch.setattr("infer.inside.words.collect_answers", lambda model, steps: [(answer, [])])
    data = look_inside(tiny, image, "a", prompt="detect cat")
    assert data["boxes"] == [{"label": "cat", "box": [0.125, 0.0, 1.0, 0.5]}]
    assert data["words"][0]["text"] == "<loc0000>" and "<loc0000>" not in data["lens"]["names"]
    assert all(change["same"] for change in data["what_if"])


# What is kept, and what is left without a part --------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2])
def test_what_is_kept(tiny, image, form, threshold):
    """The same as a detector keeps, whatever the threshold; each double overlaps a better one that stays."""
    decoder, selection = closed_set_decoder(tiny, form, **FORMS[form]), Selection(threshold, nms_iou=0.05)
    images = network_images(tiny, [image])
    [found] = ClosedSetDetector(decoder, selection)([image])
    boxes = inside.boxes_of(decoder(images), decoder.language.classes, selection.nms_iou)
    kept = [box for box in inside.staying(boxes) if box["score"] >= threshold]
    assert [box["label"] for box in kept] == found.labels
    width, height = image.size
    scaled = np.array([box["box"] for box in kept]).reshape(-1, 4) * [width, height, width, height]
    assert np.abs(scaled - found.boxes).max(initial=0) < 0.01
    for box in boxes:
        if isinstance(box["fate"], int):
            better = boxes[box["fate"]]
            assert better["fate"] == "stays" and better["score"] >= box["score"]
            assert better["label"] == box["label"]


def test_fates_by_hand():
    """The best box of its class suppresses a double, not one of another class or an empty one."""
    locs = torch.tensor(
        [[0, 0, 500, 500], [0, 0, 490, 500], [0, 0, 510, 500], [9, 0, 500, 500], [9, 9, 9, 500]]
    )
    scores, labels = torch.tensor([0.5, 0.7, 0.6, 0.3, 0.9]), torch.tensor([0, 0, 1, 1, 0])
    answer = Answer(None, locs[None], labels[None], scores[None], torch.zeros(1, 5), None)
    boxes = inside.boxes_of(answer, ("cat", "dog"), 0.5)
    assert [box["fate"] for box in boxes] == [1, "stays", "stays", 2, "empty"]
    assert [box["score"] for box in inside.staying(boxes)] == [0.7, 0.6]
    assert inside.found_classes(boxes, ["cat", "dog", "noise"]) == [0, 1, 2]


def test_compare():
    def box(label, score, x=0.0, fate="stays"):
        return dict(label=label, score=score, box=[x, 0, x + 0.5, 1], fate=fate)

    before = [box("cat", 0.9), box("dog", 0.8), box("cat", 0.5, fate=0), box("cow", 0.4)]
    after = [box("cat", 0.7, 0.1), box("dog", 0.6, 0.4), box("cow", 0.3, 0.1, fate=5), box("pig", 0.2)]
    expected = {"left": {0: 0.7, 1: None, 3: 0.3}, "new": [["dog", 0.6], ["pig", 0.2]]}
    assert inside.compare(before, after) == expected


def zero_head(model, layer, head):
    H = model.config.text.head_dim
    model.decoder.layers[layer].attn.o_proj.weight.data[:, H * head : H * (head + 1)] = 0


def layer_of_zeros(model, tower, layer):
    block = getattr(model, tower).layers[layer]
    for last in ("attn.o_proj", "mlp.down_proj") if tower == "decoder" else ("attn.out_proj", "mlp.fc2"):
        for weight in block.get_submodule(last).parameters():
            weight.data.zero_()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_if(tiny, model, image, form):
    """The answers of models whose weights of that part are zero."""
    data = look(tiny, image, form)
    where = [(change["tower"], change["layer"], change["head"]) for change in data["what_if"]]
    decoder_parts = [("decoder", layer, head) for layer in (0, 1) for head in (None, 0, 1, 2, 3)]
    assert where == [("vision", 0, None), ("vision", 1, None), *decoder_parts]
    differ = 0
    for change in data["what_if"]:
        other = load(model)
        if change["head"] is None:
            layer_of_zeros(other, change["tower"], change["layer"])
        else:
            zero_head(other, change["layer"], change["head"])
        decoder = closed_set_decoder(other, form, **FORMS[form])
        boxes = inside.boxes_of(
            decoder(network_images(other, [image])), decoder.language.classes, SELECTION.nms_iou
        )
        expected = inside.compare(data["boxes"], boxes)
        scores = (
            [change["left"][k] or 0 for k in expected["left"]],
            [x or 0 for x in expected["left"].values()],
        )
        assert np.abs(np.subtract(*scores)).max() < 2e-3
        assert [label for label, _ in change["new"]] == [label for label, _ in expected["new"]]
        differ += any(x != data["boxes"][k]["score"] for k, x in expected["left"].items())
    assert differ > 6


@torch.no_grad()
@pytest.mark.parametrize("part", [("decoder", 0), ("decoder", 1), ("vision", 1), 0, 1])
def test_knocked_out(tiny, model, part):
    """In the full pass and in the prefill, whose last layer computes one position; and only inside."""
    images, tokens, other = torch.rand(1, 3, 64, 64), torch.randint(3, 900, (1, 6)), load(model)
    usual = tiny(images, tokens, 3)
    if isinstance(part, int):
        missing = without_head(tiny, part, 2)
        zero_head(other, part, 2)
    else:
        missing = without_layer(tiny, *part)
        layer_of_zeros(other, *part)
    expected = other(images, tokens, 3)
    with missing:
        full = tiny(images, tokens, 3)
        last = tiny.decoder.logits(tiny.prefill(tiny.encode(images), tokens, tiny.new_cache(1, 6)))
    assert apart(full, expected) < 1e-4 < apart(full, usual)
    assert apart(last, other(images, tokens, 6)[:, -1]) < 1e-4
    assert torch.equal(tiny(images, tokens, 3), usual)


# The mask ---------------------------------------------------------------------------------------------------

LETTERS = "=pao<>bw+-"  # of REASONS, in their order


def drawn(cells: np.ndarray) -> list[str]:
    return ["".join(LETTERS[cell] for cell in row) for row in cells]


def test_reasons_by_hand():
    """Two of the prefix and three of the answer, with a window of 3; then two branches of two."""
    mask = prefix_lm_mask(torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None] > 1)[0].numpy()
    positions, one = np.arange(5), np.array([-1, -1, 0, 0, 0])
    assert drawn(reasons(mask, 2, positions, one, None)) == ["=p<<<", "p=<<<", "aa=>>", "aao=>", "aaoo="]
    mask[3, 0] = mask[4, :2] = False
    assert drawn(reasons(mask, 2, positions, one, 3)) == ["=p<<<", "p=<<<", "aa=>>", "wao=>", "wwoo="]
    two, positions = np.array([-1, 0, 0, 1, 1]), np.array([0, 1, 2, 1, 2])
    mask = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], bool
    )
    assert drawn(reasons(mask, 1, positions, two, None)) == ["=<<<<", "a=>bb", "ao=bb", "abb=>", "abbo="]


@pytest.mark.parametrize("form", FORMS)
def test_reasons_of_the_model(tiny, image, form):
    """They say of every cell what the layers were given, and nothing is left to another function."""
    given = []
    for layer in tiny.decoder.layers:
        attend = layer.attn.attend
        layer.attn.attend = lambda q, k, v, mask, scale, cap, attend=attend: (
            given.append(mask) or attend(q, k, v, mask, scale, cap)
        )
    data = look(tiny, image, form)
    cells = unpack(data["mask"]["cells"])
    masks = [mask for mask in given if mask.shape[1:] == cells.shape[1:]]
    assert len(masks) >= 2 and not torch.equal(masks[0], masks[-1])
    opened = np.array([may for may, _ in REASONS])[cells]
    assert (opened[0] == masks[0][0].numpy()).all() and (opened[1] == masks[-1][0].numpy()).all()
    assert cells.max() == 7  # the window of 16 cuts off


def test_reasons_of_another_mask(model, image):
    def causal(valid, is_suffix):
        length = valid.shape[1]
        return valid[:, None] & torch.ones(length, length, dtype=torch.bool).tril()

    cells = unpack(look(load(model, mask=causal), image, "sequence")["mask"]["cells"])[1]
    P = 16
    assert (cells[:P, :P][np.triu_indices(P, 1)] == 9).all() and (np.diag(cells) == 0).all()


# The page and the program -----------------------------------------------------------------------------------


def test_packed():
    codes = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9999
    assert np.array_equal(unpack(pack(codes)), codes)
    p = np.random.default_rng(0).random((3, 5, 7)) ** 8
    assert rounded(pack_probabilities(p), p, 8) < 0.501 and rounded(pack_probabilities(p, 16), p, 16) < 0.51


def test_nothing_ends_the_data_early(tiny, image):
    data = look(tiny, image, "sequence") | {"text": "</script><!--<script>"}
    html = page(data)
    _, _, rest = html.partition('<script type="application/json" id="data">')
    body, _, rest = rest.partition("</script>")
    assert json.loads(body) == json.loads(json.dumps(data)) and "<" not in body
    assert rest.count("</script>") == 1 and "{{" not in html.replace(body, "")


@pytest.mark.parametrize("form", ["sequence", "parallel"])
def test_size(form):
    image = Image.open(ROOT / "media" / "example.png").convert("RGB")
    data = look_inside(load(NANO), image, "example.png", decode=form)
    assert len(page(data)) < 1e6


def run(monkeypatch, capsys, *argv):
    return call(monkeypatch, capsys, explain, "--device", "cpu", *argv)


def test_program(here, model, monkeypatch, capsys):
    picture(here / "a.png")
    options = "--image", "a.png", "--model", model
    code, out, err = run(monkeypatch, capsys, *options, "--decode", "parallel", "--branches", 3)
    assert code == 0, err
    assert "explain.html: 0." in out and (here / "explain.html").read_text().startswith("<!doctype html>")
    code, out, err = run(
        monkeypatch, capsys, *options, "--prompt", "caption en", "--max-tokens", 3, "--out", "w.html"
    )
    assert code == 0 and "w.html" in out, err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "caption en", "--branches", "3"), "without --prompt"),
        (("--prompt", "detect unicorn"), "'unicorn' is none of the 80 classes"),
        (("--compile",), "compiled layers"),
        (("--out", "a.png"), "--out a.png: is one of the files that are read"),
        (("--out", "nowhere/a.html"), "--out nowhere/a.html"),
        (("--decode", "parallel", "--groups", "3"), "groups=3 is for boxes in sequence"),
        (("--decode", "sequence", "--branches", "3"), "branches=3"),
        (("--image", "b.png"), "b.png"),
    ],
)
def test_mistakes(here, model, monkeypatch, capsys, argv, words):
    picture(here / "a.png")
    code, out, err = run(monkeypatch, capsys, "--image", "a.png", "--model", model, *argv)
    assert code == 1 and words in err and err.count("\n") == 1
    assert [file.name for file in here.iterdir()] == ["a.png"]


def test_too_many_weights(tiny):
    from infer.inside.recording import check_room

    big = SimpleNamespace(config=SimpleNamespace(
        text=SimpleNamespace(layers=26, heads=8), vision=SimpleNamespace(tokens=4096)
    ))  # fmt: skip
    assert "smaller --image-size" in complaint(check_room, big, 260)
    check_room(tiny, 100)

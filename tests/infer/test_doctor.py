"""infer/doctor.py: nano passes, and each of many deliberate bugs is found and named, with its place."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import call, edit_json, load, picture, write_jsonl
from torch import nn

from infer import doctor
from infer.checkup.answers import check_answers, coco_cases, jsonl_cases
from infer.checkup.data import check_data, check_locations
from infer.checkup.network import check_network, patient_for, special_tokens
from model import attention, paligemma
from model.cache import KVCache, LayerCache
from model.gemma import Gemma
from model.io.hub import NANO
from model.io.tokenizer import Tokenizer
from model.seam import replace_attention
from train.data import jsonl
from train.data.coco import CocoIndex
from train.practice.write import write_coco

CAUSAL, PADDING, BATCH = "a suffix token never", "padding changes nothing", "batch equals single"
CACHED, PARALLEL, PREFIX = "cached equals full", "parallel equals sequence", "the prefix reads all"
WINDOW, FINITE, SPECIAL = "local layers", "no non-finite", "<loc> and <seg>"
SHUFFLED, EXCHANGED, BOUND = "right answers", "boxes cost less", "the loss is not below"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Practice scenes as a COCO file."""
    folder = tmp_path_factory.mktemp("doctor") / "scenes"
    write_coco(folder, 12)
    return folder / "instances.json"


def cases_of(model, file, count=6, images=None):
    images = images or file.parent / "images"
    return coco_cases(model, CocoIndex.read(file, images), images, count, words=False)


def check_nano(file, count=6, model=None, images=None):
    model = model or load(NANO)
    return list(check_answers(model, cases_of(model, file, count, images)))


def broken(findings) -> dict[str, str]:
    """Where it is broken, by check."""
    return {finding.check: finding.where for finding in findings if finding.passed is False}


def assert_named(findings, check: str, where: str) -> None:
    found = broken(findings)
    [name] = [name for name in found if name.startswith(check)]
    assert where in found[name], found


# The network ------------------------------------------------------------------------------------------------


def causal_prefix(model, patch):
    def causal(valid, is_suffix):
        length = valid.shape[1]
        return valid[:, None] & torch.ones(length, length, dtype=torch.bool).tril()

    model.mask = causal


def prefix_reads_suffix(model, patch):
    def both_ways(valid, is_suffix):
        return (attention.prefix_lm_mask(valid, is_suffix) | ~is_suffix[:, :, None]) & valid[:, None]

    model.mask = both_ways


def suffix_reads_ahead(model, patch):
    """By one token: an off-by-one in a causal mask."""

    def ahead(valid, is_suffix):
        block = is_suffix.cumsum(-1)
        return (block[:, None, :] <= block[:, :, None] + is_suffix[:, :, None]) & valid[:, None]

    model.mask = ahead


def padding_is_read(model, patch):
    model.mask = lambda valid, is_suffix: attention.prefix_lm_mask(torch.ones_like(valid), is_suffix)


def padding_takes_positions(model, patch):
    start = KVCache.start

    def counts_all(cache, valid, positions):
        start(cache, valid, torch.ones_like(positions).cumsum(-1))

    patch.setattr(KVCache, "start", counts_all)


def rows_are_mixed(model, patch):
    def mixed(q, k, v, mask, scale, cap=None):
        return attention.attend(q, k, v.mean(0, keepdim=True).expand_as(v), mask, scale, cap)

    replace_attention(model, mixed)


def cache_is_one_position_off(model, patch):
    extend = KVCache.extend
    patch.setattr(KVCache, "extend", lambda cache, count=1: extend(cache, count) + (count == 1))


def cache_forgets_the_newest(model, patch):
    update = LayerCache.update

    def late(cache, k, v):
        keys, values = update(cache, k, v)
        return (keys, values) if cache.new_slots is None else (keys.roll(1, 2), values.roll(1, 2))

    patch.setattr(LayerCache, "update", late)


def branches_follow_each_other(model, patch):
    """All tokens of all branches at positions of their own, as in a sequence."""
    extend = KVCache.extend
    patch.setattr(KVCache, "extend", lambda cache, count=1: extend(cache, count) + torch.arange(count))


def branches_see_each_other(model, patch):
    def all_before(parents):
        N = parents.shape[1]
        return torch.ones(N, N, dtype=torch.bool).tril().expand(len(parents), -1, -1)

    patch.setattr(paligemma, "branch_mask", all_before)


def window_is_ignored(model, patch):
    patch.setattr(paligemma, "window_mask", lambda mask, *others: mask)


def window_is_one_short(model, patch):
    usual = attention.window_mask
    patch.setattr(paligemma, "window_mask", lambda *args: usual(*args[:-1], args[-1] - 1))


def window_in_the_prefix(model, patch):
    """As transformers 4.47 had it."""

    def everywhere(mask, query_pos, key_pos, is_suffix, window):
        return mask & (query_pos[:, :, None] - key_pos[:, None, :] < 9)

    patch.setattr(paligemma, "window_mask", everywhere)


def nan_in_a_weight(model, patch):
    model.decoder.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan


def overflow(model, patch):
    model.decoder.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 1e30 * 1e30)
    model.decoder.layers[1].post_mlp_norm = nn.Identity()


def locations_are_split(model, patch):
    model.tokenizer = Tokenizer(model.folder)
    model.tokenizer.encode = lambda text: model.tokenizer._sp.encode(text)


def locations_start_one_later(model, patch):
    model.tokenizer = Tokenizer(model.folder)
    model.tokenizer.seg0 += 1


def cap_is_applied_twice(model, patch):
    """In the head of the allowed ids, not in the whole one."""
    usual, cap = Gemma.logits, model.config.text.final_cap

    def logits(decoder, hidden, first=0, last=None):
        found = usual(decoder, hidden, first, last)
        return found if last is None else torch.tanh(found / cap) * cap

    patch.setattr(Gemma, "logits", logits)


def image_is_rescaled(model, patch):
    width = model.config.text.width
    model.projector.register_forward_hook(lambda module, args, out: out * width**0.5)


def image_is_ignored(model, patch):
    model.projector.register_forward_hook(lambda module, args, out: out * 0 + 1)


def next_token_is_copied(model, patch):
    """What training with a mask that leaks comes to: the hidden state knows the token that it predicts."""
    read, loc0 = model.read, model.tokenizer.loc0
    rows = model.decoder.embed.weight[loc0 : loc0 + 1024]
    inverse = torch.linalg.inv(rows.T @ rows + 1e-3 * torch.eye(rows.shape[1]))

    def peeking(image_tokens, tokens, prefix_len):
        known = model.decoder.embed(tokens.roll(-1, 1)) @ inverse
        return read(image_tokens, tokens, prefix_len) + 3000 * known

    model.read = peeking


BUGS = {
    causal_prefix: (PREFIX, "layer 0: position 0 does not read position 1"),
    prefix_reads_suffix: (CAUSAL, "of the text changed, token"),
    suffix_reads_ahead: (CAUSAL, "of the text changed"),
    padding_is_read: (PADDING, "step by step after a padded prompt, token"),
    padding_takes_positions: (PADDING, "step by step after a padded prompt"),
    rows_are_mixed: (BATCH, "picture, token"),
    cache_is_one_position_off: (CACHED, "answer, token"),
    cache_forgets_the_newest: (CACHED, "answer, token"),
    branches_follow_each_other: (PARALLEL, "branches, decoded"),
    branches_see_each_other: (PARALLEL, "branches, "),
    window_is_ignored: (WINDOW, "reads position 0, window 16"),
    window_is_one_short: (WINDOW, "does not read position"),
    window_in_the_prefix: (PREFIX, "layer 0: position 9 does not read position 0"),
    nan_in_a_weight: (FINITE, "decoder.layers.1.mlp.up_proj.weight"),
    overflow: (FINITE, "what decoder.layers.1 computes"),
    locations_are_split: (SPECIAL, "<loc0000> is"),
    locations_start_one_later: (SPECIAL, "<seg000> is"),
    cap_is_applied_twice: (PARALLEL, "logits of locations"),
    image_is_rescaled: (SHUFFLED, "do not depend on the pictures"),
    image_is_ignored: (SHUFFLED, "do not depend on the pictures"),
    next_token_is_copied: (BOUND, "the first token is known"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_each_bug_is_named(bug, model, scenes, monkeypatch):
    """What holds for any weights is checked on a small random model, what answers cost on nano."""
    check, where = BUGS[bug]
    of_answers = check in (SHUFFLED, BOUND)
    patient = load(NANO if of_answers else model, **(dict(final_cap=None) if check == BOUND else {}))
    bug(patient, monkeypatch)
    if of_answers:
        return assert_named(check_nano(scenes, model=patient), check, where)
    assert_named(check_network(patient_for(patient, cases_of(patient, scenes, 2))), check, where)


def test_sound_models_pass(model, scenes):
    """Random weights too; in bfloat16, where rounding is a thousand times as coarse; without a window; and
    with an attention that is not the usual one, but breaks nothing."""

    def sinks(q, k, v, mask, scale, cap=None):
        """A score of 0 that nothing belongs to."""
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (k, v))
        scores = (q.transpose(1, 2) @ k.mT * scale).masked_fill(~mask[:, None], -1e30)
        return (nn.functional.pad(scores, (0, 1)).softmax(-1)[..., :-1] @ v).transpose(1, 2)

    changes = dict(), dict(dtype=torch.bfloat16), dict(sliding_window=None), dict(attention=sinks)
    for change in changes:
        patient = load(model, **change)
        found = list(check_network(patient_for(patient, cases_of(patient, scenes, 2))))
        assert not broken(found) and len(found) == 9
        assert sum(finding.passed is None for finding in found) == ("sliding_window" in change)


def test_nano_in_words(scenes):
    """Asked for the same boxes by their names."""
    nano, images = load(NANO), scenes.parent / "images"
    cases = coco_cases(nano, CocoIndex.read(scenes), images, 4, words=True)
    assert "<loc" not in nano.tokenizer.decode(cases[0].prompt) and len(cases[0].answers) > 1
    assert not broken(check_answers(nano, cases))


def test_ids_of_official_checkpoints(tokenizer):
    """They are known: another tokenizer beside an official embedding is found out."""
    finding = special_tokens(tokenizer, rows=257_216)
    assert finding.passed is False and "not [256000]" in finding.where and finding.number == "1,152 of 1,152"


def test_nano_passes(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, doctor, "--count", 4)
    assert code == 0, out + err
    assert out.count("passed") == 12 and "BROKEN" not in out and "nothing is broken" in out
    assert "0 pairs wrong" in out  # the window was crossed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--count", 1], "--count 1: must be at least 2"),
        (["--data", "none.json"], "none.json: no such file"),
        (["--data", "data.yaml"], "make a COCO file of it"),
    ],
)
def test_refused_before_the_work(argv, words, here, monkeypatch, capsys):
    picture(here / "images" / "a.png")
    (here / "data.yaml").write_text("train: images\nnames: [cat]\n")
    code, _, err = call(monkeypatch, capsys, doctor, "--model", "nowhere", *argv)
    assert code == 1 and words in err and len(err.splitlines()) == 1


def test_the_seam_is_examined(monkeypatch, capsys, here, scenes):
    """As a command: a mask of the working folder, and data."""
    (here / "for_doctor.py").write_text(MASK)
    options = "--mask", "for_doctor:causal", "--data", scenes, "--count", 2
    code, out, _ = call(monkeypatch, capsys, doctor, *options)
    assert code == 1 and re.search("the prefix reads all of itself +BROKEN .* does not read position", out)
    assert re.search("pictures open +passed +0 of 12", out)


MASK = """
import torch
def causal(valid, is_suffix):
    return valid[:, None] & torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril()
"""


# Data -------------------------------------------------------------------------------------------------------


def shuffle(data):
    """Each picture gets the objects of another one."""
    ids = [image["id"] for image in data["images"]]
    for record in data["annotations"]:
        record["image_id"] = ids[(ids.index(record["image_id"]) + 5) % len(ids)]


def as_corners(data):
    for record in data["annotations"]:
        x, y, w, h = record["bbox"]
        record["bbox"] = [x, y, x + w, y + h]


def exchange(data):
    for record in data["annotations"]:
        x, y, w, h = record["bbox"]
        record["bbox"] = [y, x, h, w]


def move_one(data):
    data["annotations"][7]["bbox"][0] = 127


def name_badly(data):
    data["categories"][0]["name"] = "ĸœŧ"


def crowd(data):
    first = data["annotations"][0]
    ids = range(1000, 1013)
    data["annotations"] += [first | dict(id=i) for i in ids]


COCO_FAULTS = {
    shuffle: ("right answers cost", "do not depend on the pictures, or belong to others"),
    as_corners: ("boxes are x, y, width, height", "fits as x0, y0, x1, y1"),
    exchange: ("boxes cost less", "the order is y0, x0, y1, x1"),
    move_one: ("boxes lie inside", "in 128 x 128 pixels"),
    name_badly: ("labels tokenise well", "ĸœŧ"),
    crowd: ("no answer is cut off", "objects, an answer 12"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_coco_files(fault, scenes, tmp_path):
    check, where = COCO_FAULTS[fault]
    file, images = tmp_path / "instances.json", scenes.parent / "images"
    file.write_text(scenes.read_text())
    edit_json(file, fault)
    if fault in (shuffle, exchange):
        return assert_named(check_nano(file, 8, images=images), check, where)
    found = list(check_data(load(NANO, answers="sequence"), file, images))
    assert_named(found, check, where)
    assert len(broken(found)) == (2 if fault is as_corners else 1)  # some of those boxes leave their pictures


GOOD = "<loc0000><loc0128><loc0512><loc0640> kite ; <loc0256><loc0300><loc0900><loc1023> person"


def line(suffix=GOOD, prefix="detect kite ; person", image="000000.png") -> dict:
    return dict(image=image, prefix=prefix, suffix=suffix)


LINE_FAULTS = {
    "boxes are y0, x0, y1, x1": (line("<loc0512><loc0128><loc0000><loc0640> kite"), "ends before it begins"),
    "locations and codes exist": (line(GOOD.replace("<loc1023>", "<loc1024>")), "<loc1024>"),
    "locations come in fours": (line("<loc0000><loc0128><loc0512> kite"), "3 locations that are no box"),
    "no answer is cut off": (line("kite " * 600), "more than the 448 tokens"),
    "labels tokenise well": (line(GOOD.replace("kite", "Kite")), "'kite'"),
    "prompts have no line end": (line(prefix="detect kite\n"), "entry 3, 000000.png"),
    "answers have no eos": (line(GOOD + "<eos>"), "<eos> in it"),
    "pictures open": (line(image="missing.png"), "missing.png: no such file"),
    "the data can be read": (
        '{"image": "a.png", "prefix": 5, "suffix": ""}',
        "lines.jsonl:4: 'prefix' must be text",
    ),
}


@pytest.mark.parametrize("check", LINE_FAULTS)
def test_faults_of_lines(check, scenes, tmp_path):
    record, where = LINE_FAULTS[check]
    file = write_jsonl(tmp_path / "lines.jsonl", line(), "", line(), record)
    found = list(check_data(load(NANO), file, scenes.parent / "images"))
    wrong = {finding.check: finding.where for finding in found if finding.passed is False}
    assert len(wrong) <= 2, wrong  # what is no location is no box either
    [name] = [name for name in wrong if name.startswith(check)]
    assert where in wrong[name]


def test_good_lines(scenes, tmp_path):
    """Nothing is broken in them, and the loss of their answers is measured."""
    records = [line(), line(image="000001.png", prefix="caption en", suffix=["a kite", "kites"])]
    file = write_jsonl(tmp_path / "lines.jsonl", *records)
    nano = load(NANO)
    assert not broken(check_data(nano, file, scenes.parent / "images"))
    cases = jsonl_cases(nano, file, scenes.parent / "images", 2)
    assert [len(case.answers) for case in cases] == [2, 2]  # boxes, right answers
    found = {finding.check: finding for finding in check_answers(nano, cases)}
    assert found["the loss is not below what the labels allow"].passed  # the others are made up


def test_samples_without_newline_and_eos(scenes, tmp_path, monkeypatch):
    """What training would be given is looked at, however it is made."""
    file = write_jsonl(tmp_path / "lines.jsonl", line(), line())
    prompt, target = Tokenizer.encode_prompt, jsonl.text_target
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda *args: prompt(*args)[:-1])
    nano = load(NANO)

    def check():
        return broken(check_data(nano, file, scenes.parent / "images")).keys()

    assert check() == {"prompts begin with bos and end in a newline"}
    monkeypatch.undo()

    def without_eos(*args):
        made = target(*args)
        return replace(made, tokens=made.tokens[:-1], inputs=made.inputs[:-1], weights=made.weights[:-1])

    monkeypatch.setattr(jsonl, "text_target", without_eos)
    assert check() == {"answers end in eos"}


def test_locations_on_a_grid():
    assert check_locations(set(range(0, 1024, 8)), 4000).passed is False
    assert check_locations(set(range(0, 1024, 2)), 4000).passed
    assert check_locations(set(range(0, 1024, 8)), 1000).passed is None

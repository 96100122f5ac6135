"""Values in an adapter's JSON files that it cannot have: each is refused in one line that names it."""

import json
import math

import pytest
import torch
from helpers import complaint, load
from peft.utils.other import get_pattern_key

from model import PaliGemma
from model.config import VARIANTS
from model.io.adapter import DETECTION, _by_pattern, _check_patterns, _compiled
from model.lora import TARGETS, add_lora

WRONG = [None, True, -1, 2**70, 1.5, "x", [], {}, [1], {"a": 1}, math.nan, math.inf]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("classes", ["abc", 3, [1], {}, None, [], ["cat", ""], ["cat", "cat"]]),
        ("groups", WRONG),
        ("image_size", WRONG),
        ("attn_cap", [True, -1, "x", [], {}, [1], math.nan]),
        ("final_cap", [True, -1, "x", [], {}, [1], math.inf]),
        ("open_vocabulary", [None, 1, "x", []]),
        ("answers", WRONG),
    ],
)
def test_values_of_detection_json(key, values, model, adapter):
    good = (adapter / DETECTION).read_text()
    for value in values:
        (adapter / DETECTION).write_text(json.dumps(json.loads(good) | {key: value}))
        assert key in complaint(load, model, adapter) and str(adapter) in complaint(load, model, adapter)


@pytest.mark.parametrize("value", [None, 3, "x", [], [{}]])
def test_detection_json_of_another_type(value, model, adapter):
    (adapter / DETECTION).write_text(json.dumps(value))
    assert DETECTION in complaint(load, model, adapter)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lora_alpha", [math.nan, math.inf, 2**70, 1e30, True, "16", None, [], {}]),
        ("r", [0, -1, 2**70, 1.5, True, "4", None, []]),
        ("lora_dropout", [math.nan, -0.1, 1, 2, "x", [], True]),
        ("use_rslora", [1, "x", []]),
        (
            "rank_pattern",
            [
                {"(": 3},
                {"a{99999999999}": 2},
                {f"q_proj{i}": 2 for i in range(3000)},
                {"q_proj": "x"},
                {"q_proj": 0},
                ["q_proj"],
                "q_proj",
            ],
        ),
        ("alpha_pattern", [{"[": 3}, {"q_proj": math.nan}, {"q_proj": None}, {"q_proj": True}, 3]),
    ],
)
def test_values_of_adapter_config_json(key, values, model, adapter):
    file = adapter / "adapter_config.json"
    good = file.read_text()
    for value in values:
        file.write_text(json.dumps(json.loads(good) | {key: value}))
        message = complaint(load, model, adapter)
        assert key in message and str(file) in message and "\n" not in message


@pytest.mark.parametrize(
    "pattern",
    [
        "(.+)+x",
        "((.*)*)*x",
        "(?:.|.)*x",
        ".*" * 12 + "x",
        "(l|l)(a|a)(n|n)x",
        "(?=(.+)+x)",
        "[](]((.+))+x",
        "a" * 400,
    ],
)
def test_patterns_that_could_take_for_ever(pattern, model, adapter):
    """Refused before anything is matched: Python's matching of most of these would not end."""
    file = adapter / "adapter_config.json"
    good = json.loads(file.read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        file.write_text(json.dumps(good | {key: {pattern: 4}}))
        message = complaint(load, model, adapter)
        assert str(file) in message and key in message and "for ever to match" in message
    # These decide nothing here, so they are not matched: the tensors' names say which modules are meant.
    file.write_text(json.dumps(good | dict.fromkeys(("target_modules", "exclude_modules"), pattern)))
    load(model, adapter)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [("q_proj", True), (r"^.*layers\.(0|1)\.self_attn\.q_proj$", True), (r"layers\.\d+\..*_proj", True),
     (r"[a-z]+_model\..*q_proj", True),
     ("^q_proj", False), (r"^model\.language_model\.layers\.1\.self_attn\.q_proj$", True),
     ("xq_proj", False), (r"layers\.(8|9)\..*", False)],
)  # fmt: skip
def test_patterns_that_are_read(pattern, fits):
    """As PEFT reads them: for the end of a path, or a whole one."""
    path = "model.language_model.layers.1.self_attn.q_proj"
    _check_patterns({pattern: 3}, "here")
    assert _by_pattern(_compiled({pattern: 3}), path, 8) == (3 if fits else 8)
    theirs = get_pattern_key([pattern], path)
    assert (theirs == pattern) == fits


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_of_a_new_adapter(alpha):
    with torch.device("meta"):
        model = PaliGemma(VARIANTS["paligemma2-3b-224"])
    assert "alpha" in complaint(add_lora, model, TARGETS["decoder"], alpha=alpha)

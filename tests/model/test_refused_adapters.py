"""Values in an adapter's JSON files that it cannot have: each is refused in one line that names it."""

import json
import math

import pytest
import torch
from helpers import complaint, load

from model import PaliGemma
from model.config import VARIANTS
from model.io.adapter import DETECTION
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
            [{"(": 3}, {"a{99999999999}": 2}, {"q_proj": "x"}, {"q_proj": 0}, ["q_proj"], "q_proj"],
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


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_of_a_new_adapter(alpha):
    with torch.device("meta"):
        model = PaliGemma(VARIANTS["paligemma2-3b-224"])
    assert "alpha" in complaint(add_lora, model, TARGETS["decoder"], alpha=alpha)

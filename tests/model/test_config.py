"""config.json in every published shape, the table of official variants, and values that cannot be."""

import copy

import pytest
import torch
from reference import PaliGemmaConfig as TransformersConfig

from model import PaliGemma
from model.config import VARIANTS
from model.io.config_json import config_from_json, config_to_json

# The whole config.json of google/paligemma-3b-pt-224, which leaves out what is transformers' default.
PALIGEMMA_1 = {
    "_name_or_path": "final-hf",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
    "vocab_size": 257216,
}

# PaliGemma 2 as its conversion script writes it, with what means nothing there: the outer hidden_size,
# the chat model's eos ids, num_positions.
PALIGEMMA_2 = {
    "_vocab_size": 257216,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "num_hidden_layers": 26,
    "pad_token_id": 0,
    "projection_dim": 2304,
    "text_config": {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_hidden_layers": 26,
        "num_image_tokens": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 257216,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "num_positions": 256,
        "patch_size": 14,
        "projection_dim": 2304,
        "torch_dtype": "bfloat16",
        "vision_use_head": False,
    },
}
TEXT_10B = dict(
    hidden_size=3584,
    intermediate_size=14336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
)
TEXT_28B = dict(
    hidden_size=4608,
    intermediate_size=36864,
    num_hidden_layers=46,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=144,
)

PARAMETERS = {  # with 257,216 rows of embedding, counted once; derived from transformers' own models
    "paligemma-3b-224": 2_923_466_480,
    "paligemma-3b-448": 2_924_351_216,
    "paligemma-3b-896": 2_927_890_160,
    "paligemma2-3b-224": 3_032_242_416,
    "paligemma2-3b-448": 3_033_127_152,
    "paligemma2-3b-896": 3_036_666_096,
    "paligemma2-10b-224": 9_662_638_832,
    "paligemma2-10b-448": 9_663_523_568,
    "paligemma2-10b-896": 9_667_062_512,
    "paligemma2-28b-224": 27_650_487_024,
    "paligemma2-28b-448": 27_651_371_760,
    "paligemma2-28b-896": 27_654_910_704,
}
TENSORS = {"paligemma-3b": 603, "paligemma2-3b": 727, "paligemma2-10b": 903, "paligemma2-28b": 947}


def changed(raw: dict, **changes) -> dict:
    """A deep copy with keys set: `text_config__head_dim=128` is the one inside text_config."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (raw[section] if section else raw)[key] = value
    return raw


def published(variant: str) -> dict:
    """The config.json of an official variant."""
    name, _, size = variant.rpartition("-")
    raw = copy.deepcopy(PALIGEMMA_1 if name == "paligemma-3b" else PALIGEMMA_2)
    raw["text_config"] |= {"paligemma2-10b": TEXT_10B, "paligemma2-28b": TEXT_28B}.get(name, {})
    raw["projection_dim"] = raw["vision_config"]["projection_dim"] = raw["text_config"]["hidden_size"]
    if size != "224":
        raw["vision_config"]["image_size"] = int(size)
        raw["text_config"]["num_image_tokens"] = raw["vision_config"]["num_image_tokens"] = (
            int(size) // 14
        ) ** 2
    return raw


# The official variants --------------------------------------------------------------------------------------


def test_variants_are_the_official_ones():
    assert VARIANTS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_count(variant):
    with torch.device("meta"):
        weights = list(PaliGemma(VARIANTS[variant]).parameters())
    assert sum(weight.numel() for weight in weights) == PARAMETERS[variant]
    assert len(weights) == TENSORS[variant.rpartition("-")[0]]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_published(variant):
    assert config_from_json(published(variant)) == VARIANTS[variant]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_written_by_transformers(variant):
    """transformers 5 writes all defaults out and renames some keys: the same config nevertheless."""
    raw = TransformersConfig.from_dict(published(variant)).to_dict()
    assert "rope_theta" not in raw["text_config"] and "rope_parameters" in raw["text_config"]
    assert config_from_json(raw) == VARIANTS[variant]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_round_trip(variant):
    assert config_from_json(config_to_json(VARIANTS[variant], "bfloat16")) == VARIANTS[variant]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_transformers_reads_what_we_write(variant):
    theirs = TransformersConfig.from_dict(config_to_json(VARIANTS[variant], "bfloat16"))
    official = TransformersConfig.from_dict(published(variant))
    for part, keys in {
        "text_config": (
            "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "vocab_size intermediate_size rms_norm_eps max_position_embeddings rope_parameters layer_types "
            "sliding_window query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping"
        ),
        "vision_config": (
            "model_type image_size patch_size hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size hidden_act layer_norm_eps projection_dim vision_use_head"
        ),
    }.items():
        for key in keys.split():
            written, wanted = (getattr(getattr(config, part), key, None) for config in (theirs, official))
            assert written == wanted, f"{part}.{key}"
    for key in ("image_token_index", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(theirs, key) == getattr(official, key), key


# Spellings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (dict(text_config__rope_theta=5e5), "rope_theta", 5e5),
        (dict(text_config__rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_theta", 5e5),
        (dict(text_config__rms_norm_eps=1e-5), "norm_eps", 1e-5),
        (dict(text_config__head_dim=64), "head_dim", 64),
        (dict(text_config__query_pre_attn_scalar=100), "query_scale", 0.1),
        (dict(text_config__attn_logit_softcapping=None), "attn_cap", None),
        (dict(text_config__final_logit_softcapping=0), "final_cap", None),
        (dict(text_config__sliding_window=None), "sliding_window", None),
        (dict(text_config__sliding_window=512), "sliding_window", 512),
        (dict(text_config__hidden_act="gelu"), "width", 2304),  # it has always meant the tanh form
        (dict(text_config__some_future_key=1), "width", 2304),
        (dict(hidden_size=1), "width", 2304),
    ],
)
def test_text_key(changes, field, value):
    assert getattr(config_from_json(changed(PALIGEMMA_2, **changes)).text, field) == value


def test_gemma1_has_no_gemma2_traits():
    """Keys of Gemma 2 in a Gemma 1 file are leftovers."""
    raw = changed(
        PALIGEMMA_1,
        text_config__attn_logit_softcapping=50.0,
        text_config__sliding_window=8,
        text_config__layer_types=[],
    )
    assert config_from_json(raw) == VARIANTS["paligemma-3b-224"]


@pytest.mark.parametrize("key", ["image_token_index", "image_token_id"])
def test_image_token(key):
    raw = copy.deepcopy(PALIGEMMA_2)
    del raw["image_token_index"]
    assert config_from_json(raw | {key: 1234}).image_token == 1234


@pytest.mark.parametrize("eos", [1, [1], [1, 107]])
def test_eos(eos):
    assert config_from_json(changed(PALIGEMMA_2, eos_token_id=eos)).eos == 1


def test_vision_defaults_are_siglips():
    """Keys missing from vision_config mean the defaults of transformers' SigLIP, not those of So400m."""
    raw = changed(PALIGEMMA_2, vision_config={"model_type": "siglip_vision_model", "vision_use_head": False})
    vision = config_from_json(raw).vision
    assert (vision.width, vision.layers, vision.heads, vision.mlp, vision.patch_size) == (
        768,
        12,
        12,
        3072,
        16,
    )


def test_override():
    config = VARIANTS["paligemma2-3b-448"]
    other = config.override(attn_cap=None, final_cap=0, sliding_window=None, groups=3)
    assert (other.text.attn_cap, other.text.final_cap, other.text.sliding_window, other.groups) == (
        None,
        None,
        None,
        3,
    )
    assert other.text.query_scale == config.text.query_scale and other.vision == config.vision
    assert config == VARIANTS["paligemma2-3b-448"]
    assert config.override(classes=["cat", "dog"]).classes == ("cat", "dog")
    with pytest.raises(ValueError, match="no config field 'heads_'"):
        config.override(heads_=3)


# Impossible values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("model_type", "llava", "model_type"),
        ("text_config", None, "text_config"),
        ("vision_config", [], "vision_config"),
        ("text_config__model_type", "llama", "model_type"),
        ("text_config__num_key_value_heads", 3, "kv_heads"),
        ("text_config__num_key_value_heads", 16, "kv_heads"),
        ("text_config__num_key_value_heads", 0, "kv_heads"),
        ("text_config__num_attention_heads", True, "heads"),
        ("text_config__head_dim", 255, "head_dim"),
        ("text_config__head_dim", "256", "head_dim"),
        ("text_config__hidden_size", -1, "width"),
        ("text_config__num_hidden_layers", 0, "layers"),
        ("text_config__num_hidden_layers", 2.5, "layers"),
        ("text_config__num_hidden_layers", "26", "layers"),
        ("text_config__intermediate_size", None, "mlp"),
        ("text_config__query_pre_attn_scalar", 0, "query_scale"),
        ("text_config__query_pre_attn_scalar", -256, "query_scale"),
        ("text_config__query_pre_attn_scalar", "256", "query_scale"),
        ("text_config__attn_logit_softcapping", -50.0, "attn_cap"),
        ("text_config__attn_logit_softcapping", "50", "attn_cap"),
        ("text_config__final_logit_softcapping", [30.0], "final_cap"),
        ("text_config__sliding_window", -1, "sliding_window"),
        ("text_config__sliding_window", 10.5, "sliding_window"),
        ("text_config__rms_norm_eps", 0, "norm_eps"),
        ("text_config__rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope"),
        ("text_config__rope_scaling", {"rope_type": "dynamic", "factor": 4.0}, "rope"),
        ("text_config__rope_scaling", {"type": "linear", "factor": 4.0}, "rope"),
        ("text_config__vocab_size", 2, "bos"),
        ("text_config__attention_bias", True, "attention_bias"),
        ("text_config__hidden_activation", "silu", "hidden_activation"),
        ("text_config__layer_types", ["full_attention"] * 26, "layer_types"),
        ("vision_config__image_size", 225, "image_size"),
        ("vision_config__image_size", "224", "image_size"),
        ("vision_config__patch_size", 0, "patch_size"),
        ("vision_config__num_attention_heads", 7, "heads"),
        ("vision_config__hidden_act", "relu", "hidden_act"),
        ("vision_config__vision_use_head", True, "vision_use_head"),
        ("vision_config__layer_norm_eps", 0, "norm_eps"),
        ("vision_config__layer_norm_eps", "1e-6", "norm_eps"),
        ("bos_token_id", 257216, "bos"),
        ("eos_token_id", -1, "eos"),
        ("eos_token_id", [], "eos"),
        ("pad_token_id", "0", "pad"),
        ("detection", [], "detection"),
        ("detection", {"groups": 0}, "groups"),
        ("detection", {"classes": []}, "classes"),
        ("detection", {"classes": ["x"] * 99}, "classes"),
        ("detection", {"classes": "cat"}, "classes"),
        ("detection", {"classes": ["cat", 3]}, "classes"),
        ("detection", {"open_vocabulary": 1}, "open_vocabulary"),
    ],
    ids=str,
)
def test_impossible_value_is_named(key, value, field):
    """By the key of the file or by the field of our config."""
    with pytest.raises(ValueError, match=f"{field}|{key.rpartition('__')[2]}"):
        config_from_json(changed(PALIGEMMA_2, **{key: value}))

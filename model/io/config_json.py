"""The hub's config.json, read in every published shape and written in full.

Sources: the published config.json of paligemma-3b-pt-224, and transformers' configuration classes.
"""

from model.config import PaliGemmaConfig, TextConfig, VisionConfig, is_number

# {the hub's key: our field}, for reading and for writing
_TOP_KEYS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "image_token_index": "image_token",
}
_VISION_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "layer_norm_eps": "norm_eps",
}
_TEXT_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}
_GEMMA2_KEYS = {
    "attn_logit_softcapping": "attn_cap",
    "final_logit_softcapping": "final_cap",
    "sliding_window": "sliding_window",
}
# The fields of our own section, `detection`, whose keys are their names.
DETECTION_FIELDS = (
    "groups", "classes", "open_vocabulary", "closed_set_only", "answers", "branches", "calibration"
)  # fmt: skip

# What a key missing from a published config.json means: the default of the transformers class that wrote it.
_VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=16, layer_norm_eps=1e-6,
)  # fmt: skip
_TEXT_DEFAULTS = dict(head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=10_000.0)
_GEMMA1_DEFAULTS = dict(
    hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=16,
)  # fmt: skip
_GEMMA2_DEFAULTS = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, sliding_window=4096,
)  # fmt: skip
_GELU = (None, "gelu", "gelu_pytorch_tanh", "gelu_fast")  # every one of them has always meant the tanh form


def _section(raw: dict, name: str) -> dict:
    if not isinstance(raw.get(name), dict):
        raise ValueError(f"config.json has no {name!r:.100} section")
    return raw[name]


def _refuse(condition, what):
    if condition:
        raise ValueError(f"config.json: {what} is not supported")


def config_from_json(raw: dict) -> PaliGemmaConfig:
    """Read a published config.json: sparse or full, old or new spellings. Unknown keys are ignored.

    An impossible value is named by its key, or by the field of our config.
    """
    kind = raw.get("model_type")
    _refuse(kind != "paligemma", f"model_type {kind!r:.100} (want 'paligemma')")
    vision = _VISION_DEFAULTS | _section(raw, "vision_config")
    _refuse(vision.get("vision_use_head"), "vision_config.vision_use_head")
    activation = vision.get("hidden_act")
    _refuse(activation not in _GELU, f"vision_config.hidden_act {activation!r:.100}")
    vocab_size = raw.get("vocab_size") or raw.get("_vocab_size") or 257_216
    text = _text_config(_section(raw, "text_config"), vocab_size)

    if "image_token_id" in raw:  # transformers 5's spelling
        raw = {"image_token_index": raw["image_token_id"]} | raw
    # The eos here is the one that counts: text_config inherits [1, 107] from the chat model.
    if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"]:
        raw = raw | {"eos_token_id": raw["eos_token_id"][0]}
    detection = raw.get("detection", {})
    _refuse(not isinstance(detection, dict), f"detection {detection!r:.100}")
    return PaliGemmaConfig(
        VisionConfig(**{field: vision[key] for key, field in _VISION_KEYS.items()}),
        text,
        **{field: raw[key] for key, field in _TOP_KEYS.items() if key in raw},
        **{name: detection[name] for name in DETECTION_FIELDS if name in detection},
    )


def _text_config(text: dict, vocab_size: int) -> TextConfig:
    """text_config -> TextConfig. vocab_size: if the section has none."""
    kind = text.get("model_type", "gemma")
    _refuse(kind not in ("gemma", "gemma2"), f"text_config.model_type {kind!r:.100}")
    version = 1 if kind == "gemma" else 2
    text = _TEXT_DEFAULTS | (_GEMMA1_DEFAULTS if version == 1 else _GEMMA2_DEFAULTS) | text
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    _refuse(not isinstance(rope, dict), f"text_config rope parameters {rope!r:.100}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    activation = text.get("hidden_activation") or text.get("hidden_act")
    layer_types = text.get("layer_types")
    count = len(layer_types) if isinstance(layer_types, list) else 0
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    other_layers = version == 2 and layer_types not in (None, alternating)
    scalar = text["query_pre_attn_scalar"] if version == 2 else text["head_dim"]
    impossible = not is_number(scalar) or scalar <= 0
    _refuse(activation not in _GELU, f"text_config.hidden_activation {activation!r:.100}")
    _refuse(text.get("attention_bias"), "text_config.attention_bias")
    _refuse(rope_type != "default", f"text_config rope_type {rope_type!r:.100}")
    _refuse(other_layers, "text_config.layer_types other than alternating")
    _refuse(impossible, f"query_pre_attn_scalar (or head_dim) {scalar!r:.100}")

    text["vocab_size"] = text.get("vocab_size") or vocab_size
    text["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
    if not text.get("use_sliding_window", True):
        text["sliding_window"] = None
    keys = _TEXT_KEYS | (_GEMMA2_KEYS if version == 2 else {})  # in a Gemma 1 file, Gemma 2's are leftovers
    return TextConfig(version, query_scale=scalar**-0.5, **{field: text[key] for key, field in keys.items()})


def config_to_json(config: PaliGemmaConfig, dtype: str) -> dict:
    """The hub's config.json, written out in full; `detection` is this project's own section."""
    vision, text = config.vision, config.text
    text_json = {
        "model_type": "gemma" if text.version == 1 else "gemma2",
        **{key: getattr(text, field) for key, field in _TEXT_KEYS.items()},
        "hidden_activation": "gelu_pytorch_tanh",
        "num_image_tokens": vision.tokens,
        "torch_dtype": dtype,
    }
    if text.version == 2:
        scalar = round(text.query_scale**-2, 6)
        # An int wherever it can be one, as in the published files.
        text_json["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
        text_json |= {key: getattr(text, field) for key, field in _GEMMA2_KEYS.items()}
        text_json["sliding_window"] = text.sliding_window or text.max_positions  # transformers knows no "off"
    vision_json = {
        "model_type": "siglip_vision_model",
        **{key: getattr(vision, field) for key, field in _VISION_KEYS.items()},
        "num_image_tokens": vision.tokens,
        "projection_dim": text.width,
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        **{key: getattr(config, field) for key, field in _TOP_KEYS.items()},
        "projection_dim": text.width,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "text_config": text_json,
        "vision_config": vision_json,
        "detection": {name: getattr(config, name) for name in DETECTION_FIELDS},
    }

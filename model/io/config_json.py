"""The hub's config.json, read in every published shape and written in full.

Sources: the published config.json of paligemma-3b-pt-224, and transformers' configuration classes.
"""

from model.config import COCO_CLASSES, PaliGemmaConfig, TextConfig, VisionConfig

# What a key missing from a published config.json means: the default of the transformers class that wrote it.
_VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=16, layer_norm_eps=1e-6,
)  # fmt: skip
_TEXT_DEFAULTS = dict(head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=10_000.0)
_GEMMA1 = dict(
    hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=16,
)  # fmt: skip
_GEMMA2 = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, sliding_window=4096,
)  # fmt: skip
_GELU = {None, "gelu", "gelu_pytorch_tanh", "gelu_fast"}  # every one of them has always meant the tanh form


def _section(raw: dict, name: str) -> dict:
    if not isinstance(raw.get(name), dict):
        raise ValueError(f"config.json has no {name!r} section")
    return raw[name]


def _refuse(condition, what):
    if condition:
        raise ValueError(f"config.json: {what} is not supported")


def config_from_json(raw: dict) -> PaliGemmaConfig:
    """Read a published config.json: sparse or full, old or new spellings. Unknown keys are ignored.

    Raises ValueError that names the key for a missing section or an impossible value.
    """
    _refuse(raw.get("model_type") != "paligemma", f"model_type {raw.get('model_type')!r} (want 'paligemma')")
    vision = {**_VISION_DEFAULTS, **_section(raw, "vision_config")}
    text = _section(raw, "text_config")
    kind = text.get("model_type", "gemma")
    _refuse(kind not in ("gemma", "gemma2"), f"text_config.model_type {kind!r}")
    version = 1 if kind == "gemma" else 2
    text = {**_TEXT_DEFAULTS, **(_GEMMA1 if version == 1 else _GEMMA2), **text}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    window = text.get("sliding_window") if version == 2 else None
    layer_types = text.get("layer_types")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(layer_types or ()))]
    scalar = text["query_pre_attn_scalar"] if version == 2 else text["head_dim"]

    _refuse(vision.get("vision_use_head"), "vision_config.vision_use_head")
    _refuse(vision.get("hidden_act") not in _GELU, f"vision_config.hidden_act {vision.get('hidden_act')!r}")
    activation = text.get("hidden_activation") or text.get("hidden_act")
    _refuse(activation not in _GELU, f"text_config.hidden_activation {activation!r}")
    _refuse(text.get("attention_bias"), "text_config.attention_bias")
    _refuse(rope_type != "default", f"text_config rope_type {rope_type!r}")
    _refuse(
        not isinstance(scalar, int | float) or scalar <= 0, f"query_pre_attn_scalar (or head_dim) {scalar!r}"
    )
    _refuse(
        version == 2 and layer_types not in (None, alternating),
        "text_config.layer_types other than alternating",
    )

    eos = raw.get("eos_token_id", 1)  # the top level's: text_config inherits [1, 107] from the chat model
    detection = raw.get("detection", {})
    _refuse(not isinstance(detection, dict), f"detection {detection!r}")
    classes = detection.get("classes", list(COCO_CLASSES))
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _refuse(not named, f"detection.classes {classes!r} (want a list of names)")
    open_vocabulary = detection.get("open_vocabulary", True)
    _refuse(not isinstance(open_vocabulary, bool), f"detection.open_vocabulary {open_vocabulary!r}")
    return PaliGemmaConfig(
        VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            channels=vision["num_channels"],
            norm_eps=vision["layer_norm_eps"],
        ),
        TextConfig(
            version=version,
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            mlp=text["intermediate_size"],
            query_scale=scalar**-0.5,
            attn_cap=text.get("attn_logit_softcapping") if version == 2 else None,
            final_cap=text.get("final_logit_softcapping") if version == 2 else None,
            sliding_window=window if text.get("use_sliding_window", True) else None,
            vocab_size=text.get("vocab_size") or raw.get("vocab_size") or raw.get("_vocab_size") or 257_216,
            norm_eps=text["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", text["rope_theta"]),
            max_positions=text["max_position_embeddings"],
        ),
        image_token=raw.get("image_token_index", raw.get("image_token_id", 257_152)),
        bos=raw.get("bos_token_id", 2),
        eos=eos[0] if eos and isinstance(eos, list) else eos,
        pad=raw.get("pad_token_id", 0),
        groups=detection.get("groups", 51),
        classes=tuple(classes),
        open_vocabulary=open_vocabulary,
    )


def config_to_json(config: PaliGemmaConfig, dtype: str) -> dict:
    """The hub's config.json, written out in full; `detection` is this project's own section."""
    vision, text = config.vision, config.text
    text_json = {
        "model_type": "gemma" if text.version == 1 else "gemma2",
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.mlp,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": text.max_positions,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "vocab_size": text.vocab_size,
        "num_image_tokens": vision.tokens,
        "torch_dtype": dtype,
    }
    if text.version == 2:
        scalar = round(text.query_scale**-2, 6)
        text_json |= {
            "query_pre_attn_scalar": int(scalar)
            if scalar.is_integer()
            else scalar,  # transformers wants an int
            "attn_logit_softcapping": text.attn_cap,
            "final_logit_softcapping": text.final_cap,
            "sliding_window": text.sliding_window or text.max_positions,
        }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": config.bos,
        "eos_token_id": config.eos,
        "pad_token_id": config.pad,
        "image_token_index": config.image_token,
        "projection_dim": text.width,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "text_config": text_json,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.channels,
            "layer_norm_eps": vision.norm_eps,
            "num_image_tokens": vision.tokens,
            "projection_dim": text.width,
            "vision_use_head": False,
        },
        "detection": {
            "groups": config.groups,
            "classes": list(config.classes),
            "open_vocabulary": config.open_vocabulary,
        },
    }

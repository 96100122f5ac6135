"""Adapters on disk, in PEFT's files: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, "runs/mine/adapter")
    model = PaliGemma.from_pretrained("nano", adapter="runs/mine/adapter")

PEFT loads what is written here and vice versa, whatever generation of transformers named the modules. An
adapter that computes more than the plain product is refused by name, never half applied.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import MAX_SIZE, is_number
from model.io.config_json import DETECTION_FIELDS
from model.io.hub import resolve
from model.io.tensors import read_tensors
from model.io.weights import official_name, short_name
from model.io.writing import explain, read_json, save_tensors, write_json
from model.lora import lora_layers, replace_linear

PEFT_PREFIX = "base_model.model."  # of every tensor in PEFT's file
DETECTION = "detection.json"  # beside it, ours: fields of the config that the adapter was trained with
CAPS = ("attn_cap", "final_cap")  # of the config's text part

# Keys of adapter_config.json that are honoured here, or change nothing; any other key must be empty.
_HANDLED_KEYS = set(
    "peft_type task_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias init_lora_weights "
    "base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core runtime_config "
    "ensure_weight_tying qalora_group_size".split()
)
# Patterns are names, as PEFT writes them, or regular expressions written by hand. Python's matching tries all
# ways to match, of which "(a+)+" has exponentially many: so everything that multiplies them has a limit.
_PLAIN_NAME = re.compile(r"\^?(\w|\\?\.)+\$?")
_ESCAPE_OR_SET = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_MAX_CHOICES, _MAX_BARS, _MAX_LENGTH = 2, 50, 300  # groups and repetitions, |, characters of a pattern
_MAX_PATTERNS, _MAX_NAMES = 10, 2000  # of an adapter: regular expressions; all, with plain names
_TOO_LARGE = OverflowError, RecursionError  # of regular expressions, such as "a{99999999999}"
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # others (pissa, olora, ...) change the base weights

# ---- from disk ---------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, source: str | Path) -> None:
    """Put the adapter of a folder or hub id on a model without one; A and B become trainable, W does not."""
    folder = resolve(source)
    config, tensors = _read(folder)
    pairs, whole, problems = _match(model, config, tensors)
    if problems or not pairs:
        what = "; ".join(sorted(problems)) or "it holds no LoRA matrices"
        made_for = config.get("base_model_name_or_path")
        raise ValueError(f"the adapter {folder} does not fit the model (it was made for {made_for}): {what}")
    _attach(model, config, pairs, whole)


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter_config.json, checked to be plain LoRA, and the tensors."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    wrong = [key for key in sorted(config.keys() - _HANDLED_KEYS) if config[key]]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_INITS else []
    if wrong:
        what = ", ".join(f"{key} = {config[key]!r}" for key in wrong)
        raise ValueError(f"{file}: {what} is not supported; merge the adapter with PEFT and load the result")
    _check_settings(config, file)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{file} is missing (adapters in pickle form, adapter_model.bin, are not read)")
    return config, read_tensors(file)


def _check_settings(config: dict, file: Path) -> None:
    """Refuse values that PEFT does not write: of another type, not finite, or bad patterns."""

    def check(good, key, value):
        if not good:
            raise ValueError(f"{file}: {key} = {value!r:.200} is not what PEFT writes there")

    def is_rank(value):
        return type(value) is int and 1 <= value <= MAX_SIZE

    def is_alpha(value):
        return is_number(value) and abs(value) <= MAX_SIZE

    checks = dict(
        r=is_rank,
        lora_alpha=is_alpha,
        lora_dropout=lambda value: value is None or is_number(value) and 0 <= value < 1,
        use_rslora=lambda value: isinstance(value, bool | None),
    )
    for key, good in checks.items():
        check(key not in config or good(config[key]), key, config.get(key))
    for key, good in dict(rank_pattern=is_rank, alpha_pattern=is_alpha).items():
        patterns = config.get(key) or {}
        check(isinstance(patterns, dict) and all(map(good, patterns.values())), key, patterns)
        _check_patterns(patterns, f"{file}: {key}")


def _check_patterns(patterns: Iterable[str], where: str) -> None:
    """Refuse patterns that are no regular expressions, or that might take for ever to match."""
    by_hand = [pattern for pattern in patterns if not _PLAIN_NAME.fullmatch(pattern)]
    if len(by_hand) > _MAX_PATTERNS or len(patterns) > _MAX_NAMES:
        many = f"{len(patterns):,} patterns, {len(by_hand):,} of them no plain names"
        raise ValueError(f"{where} has {many}: at most {_MAX_NAMES:,} and {_MAX_PATTERNS} are read")
    for pattern in patterns:
        rest = _ESCAPE_OR_SET.sub("", pattern).replace("(?:", "(")
        most = {"*+?{(": _MAX_CHOICES, "|": _MAX_BARS}
        many = any(sum(map(rest.count, signs)) > limit for signs, limit in most.items())
        if many or len(pattern) > _MAX_LENGTH or "(?" in rest or re.search(r"\)[*+?{]", rest):
            raise ValueError(
                f"{where} {pattern!r:.200} could take for ever to match (at most {_MAX_LENGTH} characters, "
                f"{_MAX_CHOICES} groups or repetitions, {_MAX_BARS} alternatives); "
                "merge the adapter with PEFT and load the result"
            )
        with explain(f"{where} {pattern!r:.200} is not a regular expression", re.error, *_TOO_LARGE):
            re.compile(pattern)


def _match(model: nn.Module, config: dict, tensors: dict[str, Tensor]) -> tuple[list, dict, list[str]]:
    """Stored tensors -> [(our module's name, A, B, alpha)], {our parameter's name: tensor} of
    modules_to_save, and what does not fit."""
    version = model.config.text.version
    modules = {_short_path(name, version): name for name, m in model.named_modules() if type(m) is nn.Linear}
    params = {short_name(official_name(name, version)): name for name, _ in model.named_parameters()}
    found, pairs, whole, problems = {}, [], {}, []
    ranks, alphas = (_compiled(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    for name, tensor in tensors.items():
        from_peft, inner = name.startswith(PEFT_PREFIX), name.removeprefix(PEFT_PREFIX)
        path, _, matrix = inner.rpartition(".lora_")
        param = params.get(short_name(inner))
        if from_peft and matrix in ("A.weight", "B.weight") and short_name(path) in modules:
            found.setdefault(path, {})[matrix[0]] = tensor
        elif not from_peft or param is None:
            problems.append(f"unexpected {name}")
        elif param == "decoder.embed.weight":
            problems.append(f"{name}: an embedding of its own cannot be tied to the head")
        elif tensor.shape != model.get_parameter(param).shape:
            problems.append(f"{name} has shape {list(tensor.shape)}")
        else:
            whole[param] = tensor
    for path, pair in found.items():
        module = modules[short_name(path)]
        linear = model.get_submodule(module)
        rank = _by_pattern(ranks, path, config.get("r", 8))
        alpha = _by_pattern(alphas, path, config.get("lora_alpha", 8))
        wanted = {"A": [rank, linear.in_features], "B": [linear.out_features, rank]}
        shapes = {matrix: list(tensor.shape) for matrix, tensor in pair.items()}
        if shapes == wanted:
            pairs.append((module, pair["A"], pair["B"], alpha))
        else:
            problems.append(f"{path} has shapes {shapes}, this model and rank {rank} need {wanted}")
    return pairs, whole, problems


@torch.no_grad()
def _attach(model: nn.Module, config: dict, pairs: list, whole: dict[str, Tensor]) -> None:
    model.requires_grad_(False)
    options = dict(dropout=config.get("lora_dropout") or 0.0, rslora=bool(config.get("use_rslora")))
    for module, A, B, alpha in pairs:
        layer = replace_linear(model, module, rank=len(A), alpha=alpha, **options)
        layer.A.copy_(A)
        layer.B.copy_(B)
    for name, tensor in whole.items():
        model.get_parameter(name).requires_grad_().copy_(tensor)


def _compiled(patterns: dict) -> list[tuple[re.Pattern, float]]:
    """PEFT's patterns for the ends of paths, with their ranks or alphas."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def _by_pattern(patterns: list[tuple[re.Pattern, float]], path: str, default):
    """PEFT's lookup of a rank or alpha: the first pattern that matches the end of a module's path wins."""
    for pattern, value in patterns:
        # The file's path may be of another generation than that of the model which PEFT saw: try both.
        if any(pattern.match(p) for p in (path, short_name(path))):
            return value
    return default


def detection_overrides(source: str | Path) -> dict:
    """What an adapter was trained to detect, at which image size and with which caps, as fields of the
    config. {} if its folder does not say, as a published adapter's does not: then the base's config holds,
    for an official base the published language of 51 groups in sequence and COCO's classes."""
    file = resolve(source) / DETECTION
    raw = read_json(file) if file.exists() else {}
    return {name: raw[name] for name in (*DETECTION_FIELDS, *CAPS, "image_size") if name in raw}


# ---- to disk -----------------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's name: tensor} of all that is trained: A and B, and modules trained in full."""
    layers, tensors = lora_layers(model), {}
    for name, p in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        is_lora = path in layers and leaf in ("A", "B")
        if is_lora or p.requires_grad:
            leaf = f"lora_{leaf}.weight" if is_lora else leaf
            tensors[f"{PEFT_PREFIX}{_runtime_path(path, model.config.text.version)}.{leaf}"] = p.detach()
    return tensors


def save_adapter(
    model: nn.Module, folder: str | Path, base: str = "", tensors: dict[str, Tensor] | None = None
) -> None:
    """Write PEFT's two files, and what the adapter detects. base: the hub id or folder that it belongs to;
    tensors: adapter_tensors(model), if they are not simply the model's (sharded ones, put together)."""
    folder, version, layers = Path(folder), model.config.text.version, lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    first = next(iter(layers.values()))  # its settings are the rule; others are exceptions, in the patterns
    paths = {_short_path(name, version): layer for name, layer in layers.items()}
    tensors = adapter_tensors(model) if tensors is None else tensors
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    whole = [short_name(name.removeprefix(PEFT_PREFIX)) for name in tensors if ".lora_" not in name]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {_end(path): x.rank for path, x in paths.items() if x.rank != first.rank},
        "alpha_pattern": {_end(path): x.alpha for path, x in paths.items() if x.alpha != first.alpha},
        "modules_to_save": sorted({_end(name.rpartition(".")[0]) for name in whole}) or None,
        "target_modules": _targets_regex(paths),
    }
    detection = {name: getattr(model.config, name) for name in DETECTION_FIELDS}
    detection |= {name: getattr(model.config.text, name) for name in CAPS}
    detection["image_size"] = model.config.vision.image_size  # to which loading resamples the base
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "adapter_model.safetensors")
    write_json(detection, folder / DETECTION)
    write_json(config, folder / "adapter_config.json")


def _runtime_path(name: str, version: int) -> str:
    """Our module path -> transformers' since 4.52, which every later version (and PEFT) still reads."""
    path = official_name(name + ".", version).removesuffix(".")
    return "model." + path.replace("language_model.model.", "language_model.", 1)


def _short_path(name: str, version: int) -> str:
    """Our module path -> the form that all generations reduce to (weights.short_name)."""
    return short_name(official_name(name + ".", version)).removesuffix(".")


def _end(short_path: str) -> str:
    """The end that a module's path has in every generation: PEFT's patterns match ends of paths."""
    return short_path.removeprefix("vision_tower.")


def _targets_regex(paths: Iterable[str]) -> str:
    """One expression for exactly these modules. PEFT matches it with the whole path, of any generation.

    Layers are gathered twice, by what is adapted in each, so that hundreds of paths become a line or two:
    (?:.*\\.)?language_model\\.(?:.*\\.)?layers\\.(0|1|2)\\.(self_attn\\.q_proj|mlp\\.up_proj)
    """
    layers_of: dict[tuple[str, str], list[str]] = {}  # (tower, leaf) -> layers
    for path in paths:
        if match := re.fullmatch(r"(\w+)\.(?:.*\.)?layers\.(\d+)\.(.+)", path):
            layers_of.setdefault((match[1], match[3]), []).append(match[2])
    leaves_of: dict[tuple[str, str], list[str]] = {}  # (tower, layers) -> leaves
    for (tower, leaf), layers in layers_of.items():
        leaves_of.setdefault((tower, "|".join(layers)), []).append(leaf.replace(".", r"\."))
    parts = [rf"(?:.*\.)?{path}" for path in paths if ".layers." not in path]
    parts += [
        rf"(?:.*\.)?{tower}\.(?:.*\.)?layers\.({layers})\.({'|'.join(leaves)})"
        for (tower, layers), leaves in leaves_of.items()
    ]
    return "|".join(parts)

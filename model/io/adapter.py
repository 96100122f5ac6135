"""Adapters on disk, in PEFT's files: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, "runs/mine/adapter")
    model = PaliGemma.from_pretrained("nano", adapter="runs/mine/adapter")

PEFT loads what is written here, and the other way round, whatever generation of transformers named the
modules. An adapter that computes something else than the plain product is refused by name, never ignored.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.io.hub import resolve
from model.io.weights import official_name, short_name
from model.io.writing import read_json, save_tensors, write_json
from model.lora import lora_layers, replace_linear

PREFIX = "base_model.model."  # of every tensor in PEFT's file
DETECTION = "detection.json"  # beside it, ours: what the adapter was trained to detect, and with which caps
DETECTION_FIELDS = ("groups", "classes", "open_vocabulary")  # of the config
CAPS = ("attn_cap", "final_cap")  # of the config's text part

# What is read (or means nothing for the result); any other key must be off.
_READ = set(
    "peft_type task_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias init_lora_weights "
    "base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core runtime_config "
    "ensure_weight_tying qalora_group_size".split()
)
_PLAIN_INITS = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # the others (pissa, olora, ...) change the base weights


def _check_config(raw: dict, file: Path) -> None:
    """Raise ValueError for an adapter that is not plain LoRA, naming the key."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {raw.get('peft_type')!r} is not supported, only LORA")
    wrong = [key for key in sorted(raw.keys() - _READ) if raw[key]]
    wrong += ["bias"] if raw.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if raw.get("init_lora_weights", True) not in _PLAIN_INITS else []
    if wrong:
        told = ", ".join(f"{key} = {raw[key]!r}" for key in wrong)
        raise ValueError(f"{file}: {told} is not supported; merge the adapter with PEFT and load the result")
    kinds = dict(r=int, lora_alpha=int | float, rank_pattern=dict | None, alpha_pattern=dict | None)
    for key, kind in kinds.items():
        if key in raw and (not isinstance(raw[key], kind) or isinstance(raw[key], bool)):
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not what PEFT writes there")


def _by_pattern(patterns: dict | None, path: str, default):
    """PEFT's lookup: the first pattern that matches the end of a module's path wins. The path in the file and
    that of the model which PEFT saw may be of different generations."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", p) for p in (path, short_name(path))):
            return value
    return default


def load_adapter(model: nn.Module, source: str | Path) -> None:
    """Put the adapter of a folder or hub id on a model without one; A and B become trainable, W does not.

    Raises ValueError for an adapter that is damaged, of another model, or more than plain LoRA.
    """
    folder = resolve(source)
    raw, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    _check_config(raw, folder / "adapter_config.json")
    if not file.exists():
        raise ValueError(f"{file} is missing (adapters in pickle form, adapter_model.bin, are not read)")
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}); download it again") from error

    version = model.config.text.version
    modules = {_short_path(name, version): name for name, m in model.named_modules() if type(m) is nn.Linear}
    params = {short_name(official_name(name, version)): name for name, _ in model.named_parameters()}
    pairs, whole, problems = {}, {}, []
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX):
            problems.append(f"unexpected {name}")
        elif kind in ("A.weight", "B.weight") and short_name(path) in modules:
            pairs.setdefault(path, {})[kind[0]] = tensor
        elif not path and (ours := params.get(short_name(name.removeprefix(PREFIX)))):
            whole[ours] = tensor  # of modules_to_save
            if ours == "decoder.embed.weight":
                problems.append(f"{name}: an embedding of its own cannot be tied to the head")
            elif tensor.shape != model.get_parameter(ours).shape:
                problems.append(f"{name} has shape {list(tensor.shape)}")
        else:
            problems.append(f"unexpected {name}")
    for path, pair in pairs.items():
        linear = model.get_submodule(modules[short_name(path)])
        rank = _by_pattern(raw.get("rank_pattern"), path, raw.get("r", 8))
        wanted = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
        found = {kind: tuple(tensor.shape) for kind, tensor in pair.items()}
        if found != wanted:
            problems.append(f"{path} has shapes {found}, this model and rank {rank} need {wanted}")
    if problems or not pairs:
        made_for = raw.get("base_model_name_or_path")
        what = "; ".join(sorted(problems)) or "it holds no LoRA matrices"
        raise ValueError(f"{file} does not fit the model (it was made for {made_for}): {what}")

    model.requires_grad_(False)
    for path, pair in pairs.items():
        alpha = _by_pattern(raw.get("alpha_pattern"), path, raw.get("lora_alpha", 8))
        options = dict(dropout=raw.get("lora_dropout") or 0.0, rslora=bool(raw.get("use_rslora")))
        layer = replace_linear(model, modules[short_name(path)], rank=len(pair["A"]), alpha=alpha, **options)
        with torch.no_grad():
            layer.A.copy_(pair["A"]), layer.B.copy_(pair["B"])
    for name, tensor in whole.items():
        with torch.no_grad():
            model.get_parameter(name).requires_grad_().copy_(tensor)


def detection_overrides(source: str | Path) -> dict:
    """What an adapter was trained to detect and with which caps, as fields of the config; {} if its folder
    does not say."""
    file = resolve(source) / DETECTION
    if not file.exists():
        return {}
    found = {name: value for name, value in read_json(file).items() if name in DETECTION_FIELDS + CAPS}
    return found | dict(classes=tuple(found.get("classes", ())))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's name: tensor} of all that is trained: A and B, and modules trained whole."""
    version, layers = model.config.text.version, lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        path = PREFIX + _runtime_path(name, version)
        tensors |= {f"{path}.lora_A.weight": layer.A, f"{path}.lora_B.weight": layer.B}
    own = {id(p) for layer in layers.values() for p in (layer.A, layer.B)}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in own:
            path, _, leaf = name.rpartition(".")
            tensors[f"{PREFIX}{_runtime_path(path, version)}.{leaf}"] = p
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save_adapter(
    model: nn.Module, folder: str | Path, base: str = "", tensors: dict[str, Tensor] | None = None
) -> None:
    """Write PEFT's two files, and the classes. base: what the adapter belongs to, a hub id or a folder;
    tensors: adapter_tensors(model), if they are not simply the model's (sharded ones, put together)."""
    folder, version, layers = Path(folder), model.config.text.version, lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    first = next(iter(layers.values()))
    paths = {_short_path(name, version): layer for name, layer in layers.items()}
    tensors = adapter_tensors(model) if tensors is None else tensors
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    whole = {
        short_name(name.removeprefix(PREFIX)).rpartition(".")[0] for name in tensors if ".lora_" not in name
    }
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
        "modules_to_save": sorted(map(_end, whole)) or None,
        "target_modules": _targets_regex(paths),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "adapter_model.safetensors")
    detection = {name: getattr(model.config, name) for name in DETECTION_FIELDS}
    detection |= {name: getattr(model.config.text, name) for name in CAPS}
    write_json(detection, folder / DETECTION)
    write_json(config, folder / "adapter_config.json")


def _runtime_path(name: str, version: int) -> str:
    """Our module path -> transformers' since 4.52, which every later version (and PEFT) still reads."""
    path = official_name(name + ".", version).removesuffix(".")
    return "model." + path.replace("language_model.model.", "language_model.", 1)


def _short_path(name: str, version: int) -> str:
    return short_name(official_name(name + ".", version)).removesuffix(".")


def _end(short_path: str) -> str:
    """The end that a module's path has in every generation: PEFT's patterns match ends of paths."""
    return short_path.removeprefix("vision_tower.")


def _targets_regex(paths) -> str:
    """One expression for exactly these modules, in the names of every generation of transformers."""
    layers_of: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        if match := re.fullmatch(r"(\w+)\.(?:.*\.)?layers\.(\d+)\.(.+)", path):
            layers_of.setdefault((match[1], match[3]), []).append(match[2])
    leaves_of: dict[tuple[str, str], list[str]] = {}
    for (tower, leaf), layers in layers_of.items():
        leaves_of.setdefault((tower, "|".join(layers)), []).append(leaf.replace(".", r"\."))
    parts = [rf"(?:.*\.)?{path}" for path in paths if ".layers." not in path]
    parts += [
        rf"(?:.*\.)?{tower}\.(?:.*\.)?layers\.({layers})\.({'|'.join(leaves)})"
        for (tower, layers), leaves in leaves_of.items()
    ]
    return "|".join(parts)

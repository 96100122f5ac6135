"""Weights: a folder, a hub id or "nano" -> a PaliGemma, and back to the hub's layout.

The hub has used three generations of tensor names for the same checkpoint; all reduce to one short form
(`short_name`). Tensors are mapped from the file and assigned to a model built on the meta device, so memory
never holds two copies.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from model.io.config_json import config_from_json, config_to_json
from model.io.hub import CODEC, resolve
from model.io.writing import read_json, save_tensors, write_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # those that weights may be loaded in

# our name -> official name (transformers up to 4.51), longest prefix first
_NAMES = {
    "vision.patch_embedding.": "vision_tower.vision_model.embeddings.patch_embedding.",
    "vision.position_embedding.": "vision_tower.vision_model.embeddings.position_embedding.",
    "vision.norm.": "vision_tower.vision_model.post_layernorm.",
    "vision.layers.": "vision_tower.vision_model.encoder.layers.",
    "projector.": "multi_modal_projector.linear.",
    "decoder.embed.": "language_model.model.embed_tokens.",
    "decoder.": "language_model.model.",
    ".attn.": ".self_attn.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".pre_attn_norm.": ".input_layernorm.",
    ".post_attn_norm.": ".post_attention_layernorm.",
    ".pre_mlp_norm.": ".pre_feedforward_layernorm.",
    ".post_mlp_norm.": ".post_feedforward_layernorm.",
}
_GEMMA1_NAMES = {".pre_mlp_norm.": ".post_attention_layernorm."}  # a name that means another norm in Gemma 2


def official_name(name: str, version: int) -> str:
    """Our tensor or module name -> the official one, for Gemma `version`."""
    for ours, theirs in (_NAMES | (_GEMMA1_NAMES if version == 1 else {})).items():
        if name.startswith(ours) or (ours[0] == "." and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def short_name(name: str) -> str:
    """What the names of all generations have in common: no `model.`, no `vision_model.`."""
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    return name.replace("language_model.model.", "language_model.").replace(
        "language_model.lm_head", "lm_head"
    )


def load_config(source: str | Path):
    """The PaliGemmaConfig of a source. Of a hub id, nothing but the small files is downloaded."""
    path = resolve(source, weights=False) / "config.json"
    try:
        return config_from_json(read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _open_shards(folder: Path) -> dict:
    """{stored name: opened file}. With an index, only the files that it names, and only inside the folder."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # first, as in transformers: old shards may lie beside it
        files = ["model.safetensors"]
    elif index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise ValueError(f"{index} points outside its folder: {outside}")
    else:
        files = sorted(
            path.name
            for path in folder.glob("*.safetensors")
            if path.name != CODEC and not path.name.startswith("adapter_")
        )
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    stored = {}
    for file in files:
        try:
            shard = safe_open(folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder / file} cannot be read as safetensors ({error}); download it again"
            ) from error
        for name in shard.keys():  # noqa: SIM118 - a safetensors file is no dict
            if name in stored:
                raise ValueError(f"{folder}: tensor {name} is stored twice")
            stored[name] = shard
    return stored


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it sets nothing, but importing what it needs takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def load_pretrained(cls, source, *, dtype, device, **config_overrides):
    """See PaliGemma.from_pretrained."""
    if dtype not in (torch.bfloat16, torch.float32):
        why = " (its range is too small for Gemma's activations)" if dtype == torch.float16 else ""
        raise ValueError(f"dtype {dtype} is not supported{why}: use torch.bfloat16 or torch.float32")
    folder = resolve(source)
    with torch.device("meta"), _NoInit():
        model = cls(load_config(folder).override(**config_overrides))
    stored = _open_shards(folder)
    _assign(model, stored, f"{folder} does not fit its config.json", dtype, device)
    return model.eval()


def _assign(model: nn.Module, stored: dict, complaint: str, dtype: torch.dtype, device: str) -> None:
    """Give every parameter of a meta model its stored tensor; one ValueError names all that do not fit."""
    version = model.config.text.version
    ours = {short_name(official_name(name, version)): name for name in model.state_dict()}
    sources = {short_name(name): name for name in stored}
    twice = [f"unexpected {name}: stored twice" for name in stored if sources[short_name(name)] != name]
    head = sources.pop("lm_head.weight", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = twice + [
        f"missing {official_name(ours[key], version)}" for key in ours.keys() - sources.keys()
    ]
    problems += [f"unexpected {sources[key]}" for key in sources.keys() - ours.keys()]
    for key in ours.keys() & sources.keys():
        shape = tuple(stored[sources[key]].get_slice(sources[key]).get_shape())
        if shape != shapes[ours[key]]:
            problems.append(
                f"{sources[key]} has shape {list(shape)}, the config asks for {list(shapes[ours[key]])}"
            )
    if problems:
        raise ValueError(f"{complaint}: " + "; ".join(sorted(problems)))
    if head is not None:
        embed = sources["language_model.embed_tokens.weight"]
        if not torch.equal(stored[head].get_tensor(head), stored[embed].get_tensor(embed)):
            raise ValueError(
                f"{complaint}: {head} differs from {embed}, but PaliGemma's head is tied to its embedding"
            )
    for key, name in ours.items():
        tensor = stored[sources[key]].get_tensor(sources[key])
        _mark_mapped(tensor)
        tensor = tensor.to(device=device, dtype=dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))


def _mark_mapped(tensor: torch.Tensor) -> None:
    """Remember that a tensor just read is the file's own pages. The mark is on the storage, so views and
    Parameters of this memory have it, and copies (another dtype, a GPU, deepcopy) do not."""
    storage = tensor.untyped_storage()
    storage.mapped_by_loader = not storage.resizable()  # memory of its own could grow, a mapping cannot


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the pages of a file that the loader mapped."""
    return getattr(tensor.untyped_storage(), "mapped_by_loader", False)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """See PaliGemma.save_pretrained. state: the tensors by our names, if they are not the model's own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.projector.weight.dtype
    shards, size = [[]], 0
    for name, tensor in (state or model.state_dict()).items():
        nbytes = tensor.numel() * dtype.itemsize
        if size and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((official_name(name, model.config.text.version), tensor))
        size += nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        save_tensors({name: x.detach().to("cpu", dtype).contiguous() for name, x in shard}, folder / file)
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        total = sum(x.numel() for shard in shards for _, x in shard) * dtype.itemsize
        weight_map = {name: file for file, shard in zip(files, shards) for name, _ in shard}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, index)
    write_json(config_to_json(model.config, str(dtype).removeprefix("torch.")), folder / "config.json")
    # Weights that were here before would be taken for these ones.
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()
    if len(shards) == 1:
        index.unlink(missing_ok=True)

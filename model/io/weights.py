"""Weights: the tensors of a checkpoint's files -> a model, and back to the hub's layout.

The hub has used three generations of tensor names for the same checkpoint; all reduce to one short form
(`short_name`). Tensors are mapped from the file and assigned to a model on the meta device, so there are
never two copies.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from model.config import PaliGemmaConfig
from model.io.config_json import config_from_json, config_to_json
from model.io.hub import CODEC, PHOTOGRAPHS, resolve
from model.io.npz import NpzTensors, npz_config, variant_of
from model.io.tensors import bound, check_bounds, open_tensors
from model.io.writing import explain, read_json, save_tensors, write_json
from model.siglip import resample_positions

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # those that weights may be loaded in

# our name -> official name (transformers up to 4.51); an earlier prefix wins
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
_POSITIONS = "vision.position_embedding.weight"


def official_name(name: str, version: int) -> str:
    """Our tensor or module name -> the official one, for Gemma `version`."""
    for ours, theirs in (_NAMES | (_GEMMA1_NAMES if version == 1 else {})).items():
        if name.startswith(ours) or (ours[0] == "." and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def short_name(name: str) -> str:
    """What the names of all generations have in common: no `model.`, no `vision_model.`."""
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    name = name.replace("language_model.lm_head", "lm_head")
    return name.replace("language_model.model.", "language_model.")


# ---- from disk ---------------------------------------------------------------------------------------------


def load_config(source: str | Path) -> PaliGemmaConfig:
    """The config of a source. Of a hub id, only the small files are downloaded."""
    path = resolve(source, weights=False)
    if path.suffix == ".npz":
        return npz_config(path)
    path = path / "config.json"
    raw = read_json(path)
    with explain(f"{path} cannot be used", TypeError, ValueError):
        return config_from_json(raw)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES.values():
        why = " (its range is too small for Gemma's activations)" if dtype == torch.float16 else ""
        raise ValueError(f"dtype {dtype} is not supported{why}: use torch.bfloat16 or torch.float32")


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it sets nothing, but importing what it needs takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside know their shapes, but have no memory and no values until load_weights."""
    with torch.device("meta"), _NoInit():
        yield


def load_weights(
    model: nn.Module, folder: Path, image_tokens: int, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Load the tensors of a folder, or of an .npz file, wherever the model is on the meta device; adapters
    have their values already. One error names all tensors that do not fit.

    image_tokens: of the folder's own config. If the model is for another image size, the position embeddings
    are resampled. If FSDP2 has sharded the model meanwhile, each process reads and converts only its rows.
    """
    version = model.config.text.version
    targets = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    shapes = {name: list(tensor.shape) for name, tensor in targets.items()}
    shapes[_POSITIONS][0] = image_tokens
    shards = _open_npz(folder, version) if folder.suffix == ".npz" else _open_shards(folder)
    ours = {short_name(official_name(name, version)): name for name in shapes}  # {short name: ours}
    stored = {short_name(name): name for name in shards}  # {short name: the file's}

    def read(name):
        return shards[name].get_tensor(name)

    # Not left to load_state_dict: it would complain in our names, and the user's file has the official ones.
    problems = [f"unexpected {name}: stored twice" for name in shards if stored[short_name(name)] != name]
    head = stored.pop("lm_head.weight", None)
    problems += [f"missing {official_name(ours[key], version)}" for key in ours.keys() - stored.keys()]
    problems += [f"unexpected {stored[key]}" for key in stored.keys() - ours.keys()]
    for key in ours.keys() & stored.keys():
        name, wanted = stored[key], shapes[ours[key]]
        if (found := shards[name].get_slice(name).get_shape()) != wanted:
            problems.append(f"{name} has shape {found}, the config asks for {wanted}")
    if head and not problems:
        embed = stored[short_name(official_name("decoder.embed.weight", version))]
        if not torch.equal(read(head), read(embed)):
            problems.append(f"{head} differs from {embed}, but PaliGemma's head is tied to its embedding")
    if problems:
        what = "its config.json" if folder.is_dir() else f"the variant {variant_of(folder)}"
        raise ValueError(f"{folder} does not fit {what}: " + "; ".join(sorted(problems)))

    state, bounds = {}, {}
    for key, name in ours.items():
        tensor = read(stored[key])
        _mark_mapped(tensor)
        if name == _POSITIONS:
            tensor = resample_positions(tensor, model.config.vision.tokens)
        state[name] = own_rows(tensor, targets[name]).to(device=device, dtype=dtype)
        bounds[stored[key]] = bound(state[name])
        release_pages(state[name])
    check_bounds(bounds, {stored[key]: state[name] for key, name in ours.items()}, folder)
    state = {name: as_shard(rows, targets[name]) for name, rows in state.items()}
    model.load_state_dict(model.state_dict() | state, assign=True)  # the model takes these very tensors


def own_rows(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of `whole` that this process holds if FSDP2 has sharded `like`; all of them if it has not."""
    if not hasattr(like, "device_mesh"):
        return whole
    mesh = like.device_mesh
    rows = -(-len(whole) // mesh.size())  # as torch.chunk counts them: the last processes may have fewer
    return whole[mesh.get_local_rank() * rows :][:rows]


def as_shard(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows that `own_rows` returned as this process's part of a tensor sharded like `like`. Nothing is
    sent between processes."""
    if not hasattr(like, "device_mesh"):
        return rows
    mesh, placements, whole = like.device_mesh, like.placements, dict(shape=like.shape, stride=like.stride())
    return type(like).from_local(rows.contiguous(), mesh, placements, run_check=False, **whole)


def _open_npz(file: Path, version: int) -> dict[str, NpzTensors]:
    tensors = NpzTensors(file, lambda name: official_name(name, version))
    return dict.fromkeys(tensors.keys(), tensors)


def _open_shards(folder: Path) -> dict[str, safe_open]:
    """{stored name: opened file}"""
    shards = {}
    for file in _weight_files(folder):
        shard = open_tensors(folder / file)
        for name in shard.keys():  # noqa: SIM118 - a safetensors file is no dict
            if name in shards:
                raise ValueError(f"{folder}: tensor {name} is stored twice")
            shards[name] = shard
    return shards


def _weight_files(folder: Path) -> list[str]:
    """The names of a folder's weight files; with an index, those that it names, inside the folder only."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # first, as in transformers: old shards may lie beside it
        files = ["model.safetensors"]
    elif index.exists():
        shards = read_json(index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise ValueError(f"{index}: weight_map must give the file of each tensor")
        files = sorted(set(shards.values()))
        if outside := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{index} points outside its folder: {outside}")
    else:
        found = (path.name for path in sorted(folder.glob("*.safetensors")))
        files = [f for f in found if f not in (CODEC, PHOTOGRAPHS) and not f.startswith("adapter_")]
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    return files


def _mark_mapped(tensor: torch.Tensor) -> None:
    """Mark a tensor just read whose memory is the file's own pages. The mark is on the storage: views and
    Parameters of this memory share it, copies (another dtype, a GPU, deepcopy) do not."""
    storage = tensor.untyped_storage()
    storage.mapped_by_loader = not storage.resizable()  # memory of its own could grow, a mapping cannot


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the pages of a file that the loader mapped."""
    return getattr(tensor.untyped_storage(), "mapped_by_loader", False)


def release_pages(weight: torch.Tensor) -> None:
    """Release the pages of a weight that the loader mapped from a file: they would stay in memory for as long
    as the file is mapped. If they are read again, the system reads the file again.

    Any other memory (a NumPy array's, say) would read as zeros afterwards, and is not ours to release."""
    if not is_mapped(weight) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    # Whole pages only: those at both ends hold a part of the neighbouring weights.
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def trim_memory() -> None:
    """Give back to the system what was freed: glibc keeps a gigabyte of temporaries of a large model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        libc.malloc_trim(0)


# ---- to disk -----------------------------------------------------------------------------------------------


def save_weights(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write config.json and *.safetensors, with an index if there are several.

    state: the tensors by our names, if they are not simply the model's (sharded ones, put together).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.projector.weight.dtype
    shards, room = [{}], max_shard_bytes
    for name, tensor in (state or model.state_dict()).items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][official_name(name, model.config.text.version)] = tensor
        room -= nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        save_tensors(
            {name: x.detach().to("cpu", dtype).contiguous() for name, x in shard.items()}, folder / file
        )
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        total = sum(x.numel() for shard in shards for x in shard.values()) * dtype.itemsize
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, index)
    else:
        index.unlink(missing_ok=True)
    write_json(config_to_json(model.config, str(dtype).removeprefix("torch.")), folder / "config.json")
    # Weights of an earlier model in this folder would be taken for a part of this one.
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()

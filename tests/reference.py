"""The other implementation: tiny random PaliGemmas made with transformers, in every form the hub has used.

    hf = tiny_paligemma(window=8)                        # a transformers model, eager attention, float32
    save(hf, folder, names="B", shards=3)                # config.json and *.safetensors as once published
    images, tokens = random_inputs(hf, batch=2, length=9)
    reference_logits(hf, images, tokens, prefix_len=5)   # what model(images, tokens, prefix_len) must return

Everything random comes from a seed, which is printed: pytest shows it when a test fails.
"""

import json
from pathlib import Path

import torch
from helpers import load
from safetensors.torch import save_file
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.utils import logging

from model import PaliGemma
from model.decoding.closed_set import ClosedSet

logging.set_verbosity_error()
logging.disable_progress_bar()

# Gemma's special ids in Gemma's order, the ranges moved down into a small vocabulary
PAD, EOS, BOS, UNUSED0, NEWLINE, LOC0, IMAGE, VOCAB = 0, 1, 2, 7, 108, 300, 1452, 1536
CLASSES = ("cat", "dog", "traffic light", "bird", "cow")
LANGUAGE = ClosedSet(
    prompt=(BOS, 500, 600, NEWLINE), loc0=LOC0, class0=UNUSED0, eos=EOS, classes=CLASSES, groups=6
)
NOISE = UNUSED0 + len(CLASSES)


ARCHITECTURES = {  # arguments of tiny_paligemma, for what decodes step by step
    "gemma1": dict(family="gemma"),
    "gemma2": dict(),
    "window shorter than the image": dict(window=10, layers=4),
    "window shorter than the answer": dict(window=3, layers=4),
    "one kv head, no caps": dict(kv_heads=1, attn_cap=None, final_cap=None),
    "window of one": dict(window=1),
}


def tiny_paligemma(
    seed: int = 0,
    *,
    family: str = "gemma2",
    width: int = 48,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    query_scalar: int | None = None,
    attn_cap: float | None = 4.0,
    final_cap: float | None = 5.0,
    window: int = 4096,
    image_size: int = 56,
) -> PaliGemmaForConditionalGeneration:
    """A random PaliGemma 1 (family "gemma": no caps, no window, no query scale) or 2, eager and float32.

    The caps are far below the official 50 and 30, because what a random model has to cap is smaller too.
    """
    print("tiny_paligemma", locals())
    text = dict(
        model_type=family,
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    if family == "gemma2":
        text |= dict(
            query_pre_attn_scalar=query_scalar or head_dim,
            attn_logit_softcapping=attn_cap,
            final_logit_softcapping=final_cap,
            sliding_window=window,
        )
    vision = dict(
        model_type="siglip_vision_model",
        image_size=image_size,
        patch_size=14,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=width,
    )
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"  # sdpa drops the soft cap
    hf = PaliGemmaForConditionalGeneration(config).eval()
    randomize(hf, seed)
    return hf


@torch.no_grad()
def randomize(hf: PaliGemmaForConditionalGeneration, seed: int) -> None:
    """Weights with which every part matters: norms off their identity, attention scores of about +-10, logits
    of about +-8, and greedy answers that do not repeat one token."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in hf.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name == "model.language_model.norm.weight":
            weight.copy_(3 + 0.3 * noise)  # Gemma's norms multiply by 1 + weight
        elif "language_model" in name and "norm" in name:
            weight.copy_(0.3 * noise)
        elif "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif "position_embedding" in name:
            weight.copy_(0.5 * noise)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "o_proj", "down_proj")) else 1.0
            gain = 0.5 if "embed_tokens" in name else gain
            weight.copy_(gain * noise / weight[0].numel() ** 0.5)


def noisy(folder: Path, **architecture) -> tuple[PaliGemmaForConditionalGeneration, PaliGemma]:
    """A transformers model and ours, the embedding of noise made longer: it is likeliest in many groups, but
    not in all."""
    hf = tiny_paligemma(seed=15, **architecture)
    with torch.no_grad():
        hf.get_input_embeddings().weight[NOISE] *= 4
    return hf, load(save(hf, folder))


def random_inputs(
    hf: PaliGemmaForConditionalGeneration, batch: int = 2, length: int = 9, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images float [B, 3, S, S] in [-1, 1], and tokens int64 [B, T]: bos and random words, no padding."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size = hf.config.vision_config.image_size
    images = 2 * torch.rand(batch, 3, size, size, generator=generator) - 1
    tokens = torch.randint(NEWLINE, IMAGE, (batch, length), generator=generator)
    tokens[:, 0] = BOS
    print(f"random_inputs: seed {seed}, batch {batch}, length {length}")
    return images, tokens


def pad_right(tokens: Tensor, lengths: list[int]) -> Tensor:
    """A copy whose row i keeps only its first lengths[i] tokens."""
    keep = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return tokens.where(keep, PAD)


def reference_inputs(
    hf: PaliGemmaForConditionalGeneration, images: Tensor, tokens: Tensor, prefix_len: int | Tensor
) -> dict[str, Tensor]:
    """Our arguments as transformers takes them: image placeholders, token types that tell the prefix apart.

    Without token_type_ids transformers 5 is causal everywhere. Its default positions count padding, which
    moves no real token as long as the padding is on the right.
    """
    B, T = tokens.shape
    P = hf.config.text_config.num_image_tokens
    is_suffix = torch.arange(T).expand(B, T) >= torch.as_tensor(prefix_len).reshape(-1, 1)
    image = tokens.new_zeros(B, P)
    return {
        "pixel_values": images,
        "input_ids": torch.cat((image + IMAGE, tokens), dim=1),
        "token_type_ids": torch.cat((image, is_suffix.long()), dim=1),
        "attention_mask": torch.cat((image + 1, (tokens != PAD).long()), dim=1),
    }


@torch.no_grad()
def reference_logits(
    hf: PaliGemmaForConditionalGeneration, images: Tensor, tokens: Tensor, prefix_len: int | Tensor
) -> Tensor:
    """transformers' logits at the text positions, float32 [B, T, vocab]."""
    logits = hf(**reference_inputs(hf, images, tokens, prefix_len), use_cache=False).logits
    return logits[:, -tokens.shape[1] :].float()


def difference(ours: Tensor, theirs: Tensor, tokens: Tensor) -> float:
    """The largest absolute difference of two logits [B, T, vocab] at tokens that are no padding."""
    real = tokens != PAD
    return (ours[real] - theirs[real]).abs().max().item()


# Writing checkpoints ----------------------------------------------------------------------------------------

DECODER, VISION, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
NAMES = {  # from transformers 5's names to ...
    "A": {  # the official files, and what transformers wrote up to 4.51
        DECODER: "language_model.model.",
        VISION: "vision_tower.vision_model.",
        PROJECTOR: "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "B": {VISION: "model.vision_tower.vision_model."},  # 4.52 to 4.57
    "C": {},  # 5
    "hybrid": {  # what 5 writes: the first generation's names, but for the vision tower's
        DECODER: "language_model.model.",
        VISION: "vision_tower.",
        PROJECTOR: "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}


def rename(name: str, names: str) -> str:
    """A tensor name of transformers 5 in another generation."""
    for new, old in NAMES[names].items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def save(
    hf: PaliGemmaForConditionalGeneration,
    folder: Path,
    *,
    names: str = "A",
    shards: int = 1,
    head: bool = False,
    config: str = "full",
) -> Path:
    """Write a checkpoint: names is a key of NAMES; head stores a copy of the embedding as lm_head; config is
    "published" (the sparse files of the hub) or "full" (transformers 5's own). Returns the folder."""
    state = {
        name: tensor.clone() for name, tensor in hf.state_dict().items() if head or "lm_head" not in name
    }
    write_shards({rename(name, names): tensor for name, tensor in state.items()}, folder, shards)
    raw = published_config(hf) if config == "published" else hf.config.to_dict()
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    print(f"save: names {names}, {shards} shards, head {head}, config {config}")
    return folder


def write_shards(state: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """One model.safetensors, or several with their index; neighbours go to different files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        part = {name: tensor for name, tensor in state.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def published_config(hf: PaliGemmaForConditionalGeneration) -> dict:
    """config.json as on the hub: defaults left out (head_dim 256, image_size 224, ...), leftovers left in."""
    text, vision = hf.config.text_config, hf.config.vision_config
    tokens = text.num_image_tokens
    text_raw = {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "num_image_tokens": tokens,
        "vocab_size": VOCAB,
    }
    if text.head_dim != 256:
        text_raw["head_dim"] = text.head_dim
    vision_raw = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_attention_heads": vision.num_attention_heads,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_image_tokens": tokens,
        "patch_size": vision.patch_size,
        "projection_dim": text.hidden_size,
        "projector_hidden_act": "gelu_fast",  # the projector has no activation
        "vision_use_head": False,
    }
    if vision.image_size != 224:
        vision_raw["image_size"] = vision.image_size
    raw = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_size": 2048,  # in PaliGemma 2 files it is wrong for every size: the text section knows
        "ignore_index": -100,
        "image_token_index": IMAGE,
        "model_type": "paligemma",
        "projection_dim": text.hidden_size,
    }
    if text.model_type == "gemma":
        text_raw |= {"torch_dtype": "float32"}
        raw |= {"_name_or_path": "final-hf", "torch_dtype": "float32", "vocab_size": VOCAB}
    else:
        text_raw |= {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": text.attn_logit_softcapping,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],  # of the chat model
            "final_logit_softcapping": text.final_logit_softcapping,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": text.query_pre_attn_scalar,
            "sliding_window": text.sliding_window,
            "torch_dtype": "bfloat16",
        }
        vision_raw |= {"num_positions": 256, "torch_dtype": "bfloat16"}  # 256 whatever the resolution
        raw |= {"_vocab_size": VOCAB, "num_hidden_layers": text.num_hidden_layers, "torch_dtype": "bfloat16"}
    return raw | {"text_config": text_raw, "vision_config": vision_raw, "transformers_version": "4.47.0"}

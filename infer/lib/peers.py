"""What the benchmark compares with, none of it required: transformers, and llama.cpp by llama-cpp-python.

Both are given the weights of this project's side. llama.cpp reads them from a GGUF file of the decoder: it
has no vision tower here, so its prefill is of the decoder alone, over random ids in the place of the image's.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infer.lib.measuring import installed, language_of, now
from model import PaliGemma
from model.config import PaliGemmaConfig, TextConfig
from model.decoding.closed_set import GROUP
from model.io.tokenizer import LOCS
from model.io.weights import DTYPES, load_config
from model.io.writing import atomic_write

PEERS = {  # the packages of each, and a remark on installing them
    "transformers": (["transformers"], ""),
    "llama.cpp": (["llama-cpp-python", "gguf"], " (which compiles C++ for several minutes)"),
}


def choose_peers(asked: list[str] | None, device: str) -> list[str]:
    """The peers to compare with: those asked for, which must be installed; by default (None) all that are
    installed. llama.cpp is timed on CPUs only."""
    missing = {peer: [name for name in names if not installed(name)] for peer, (names, _) in PEERS.items()}
    on_cpu = torch.device(device).type == "cpu"
    if asked is None:
        return [peer for peer in PEERS if not missing[peer] and (on_cpu or peer != "llama.cpp")]
    for peer in asked:
        if peer == "llama.cpp" and not on_cpu:
            raise ValueError(f"--peers llama.cpp: is timed on a CPU only, not on --device {device}")
        if missing[peer]:
            how = f"python -m pip install {' '.join(missing[peer])}{PEERS[peer][1]}"
            raise ValueError(f"--peers {peer}: {' and '.join(missing[peer])} not installed; {how}")
    return asked


# ---- transformers ------------------------------------------------------------------------------------------


class Transformers:
    """transformers, with its eager attention: its other kinds leave out Gemma 2's soft caps."""

    set_threads = staticmethod(torch.set_num_threads)
    batches = True  # reads several images at once

    def __init__(self, folder: Path, device: str, dtype: str):
        from transformers import PaliGemmaForConditionalGeneration
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager"
        ).to(device)
        self.model.generation_config.eos_token_id = None  # the answer always has all its groups
        self.language = language_of(folder)

    @torch.inference_mode()
    def decode(self, images: Tensor, groups: int) -> Tensor:
        """Images [B, 3, S, S] -> tokens [B, 5 * groups]; self.prefilled: when the prefill ended."""
        prompt = torch.tensor(self.language.prompt, device=images.device).expand(len(images), -1)
        image_tokens = self.model.config.text_config.num_image_tokens
        image = prompt.new_full((len(images), image_tokens), self.model.config.image_token_index)
        ids = torch.cat((image, prompt), dim=1)
        generated = self.model.generate(
            pixel_values=images.to(self.model.dtype),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),  # without them, the prompt is causal
            max_new_tokens=GROUP * groups,
            do_sample=False,
            logits_processor=[partial(self._allow, ids.shape[1])],
        )
        return generated[:, ids.shape[1] :]

    def _allow(self, start: int, ids: Tensor, scores: Tensor) -> Tensor:
        """The logits with all but the ids that the grammar allows at this position masked."""
        if ids.shape[1] == start:
            self.prefilled = now(str(scores.device))
        first, last = self.language.allowed((ids.shape[1] - start) % GROUP)
        if last - first < LOCS:
            last -= 1  # a class, but not noise, as ours
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:last] = scores[:, first:last]
        return allowed


# ---- llama.cpp ---------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp on a CPU, for a single image. Every token costs all logits: it knows no grammar of ids."""

    batches = False

    def __init__(self, file: Path, config: PaliGemmaConfig, prompt: int, groups: int):
        import llama_cpp

        self.prefix = config.vision.tokens + prompt
        self.vocab_size = config.text.vocab_size
        slots = self.prefix + GROUP * groups
        options = dict(n_ctx=slots, n_batch=self.prefix, swa_full=False)
        self.model = llama_cpp.Llama(str(file), verbose=False, **options)
        self._set_threads = llama_cpp.llama_set_n_threads

    def set_threads(self, threads: int) -> None:
        self._set_threads(self.model.ctx, threads, threads)

    def decode(self, images: Tensor, groups: int) -> Tensor:
        """Read a prefix of random tokens, then more of them one by one. self.prefilled: when the prefix was
        read. Returns no tokens: they say nothing."""
        generator = torch.Generator().manual_seed(0)
        count = self.prefix + GROUP * groups - 1  # the last one that is chosen is not read
        ids = torch.randint(self.vocab_size, (count,), generator=generator).tolist()
        self.model.reset()
        self.model.eval(ids[: self.prefix])
        self.prefilled = now("cpu")
        for token in ids[self.prefix :]:
            self.model.eval([token])
        return torch.empty(0)


GGUF_NAMES = {
    "pre_attn_norm": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "post_attn_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}


def gguf_name(name: str) -> str:
    """layers.0.attn.q_proj.weight -> blk.0.attn_q.weight"""
    path = name.removesuffix(".weight")
    if path in ("embed", "norm"):
        return dict(embed="token_embd", norm="output_norm")[path] + ".weight"
    _, layer, matrix = path.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[matrix]}.weight"


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Write a checkpoint's decoder for llama.cpp, one tensor after the other.

    kind: float32, bfloat16, or int8 for Q8_0: blocks of 32 weights with a scale each, the embedding's too.
    """
    import gguf

    text, dtype = load_config(folder).text, "float32" if kind == "float32" else "bfloat16"
    weights = PaliGemma.from_pretrained(folder, dtype=DTYPES[dtype]).decoder.state_dict()
    matrices = gguf.GGMLQuantizationType[dict(float32="F32", bfloat16="BF16", int8="Q8_0")[kind]]
    with atomic_write(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "gemma2" if text.version == 2 else "gemma")
        describe(text, writer)
        for name, weight in weights.items():
            form = matrices if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            block, block_bytes = gguf.GGML_QUANT_SIZES[form]
            size = weight.numel() // block * block_bytes
            writer.add_tensor_info(gguf_name(name), weight.shape, np.dtype("float32"), size, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in weights.values():
            # Gemma's norms multiply by 1 + weight, llama.cpp's by weight.
            data = as_stored(weight, kind) if weight.ndim > 1 else 1 + weight.float()
            writer.write_tensor_data(data.numpy())
        writer.close()


def as_stored(matrix: Tensor, kind: str) -> Tensor:
    """A matrix as a GGUF file holds it."""
    if kind == "float32":
        return matrix
    if kind == "bfloat16":
        return matrix.view(torch.int16)  # NumPy has no bfloat16
    return torch.cat([q8_0(rows.float().view(-1, 32)) for rows in matrix.split(1 << 12)])


def q8_0(blocks: Tensor) -> Tensor:
    """Blocks of weights [N, 32] -> the bytes of each, [N, 34]: a scale in float16 and 32 whole numbers. gguf
    has this as well, but would take minutes for a 3B."""
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    rounded = (blocks / scale).round_().to(torch.int8)
    return torch.cat((scale.half().view(torch.int8), rounded), dim=-1)


def describe(text: TextConfig, writer) -> None:
    """Add to a GGUFWriter what llama.cpp reads about a decoder."""
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.width)
    writer.add_block_count(text.layers)
    writer.add_feed_forward_length(text.mlp)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("none")  # ids go in, and nothing comes out
    if text.version == 2:
        writer.add_attn_logit_softcapping(text.attn_cap)
        writer.add_final_logit_softcapping(text.final_cap)
        writer.add_sliding_window(text.sliding_window)

"""PaliGemma: SigLIP's image features, projected and put in front of the text, decoded by Gemma.

The sequence is [image | prefix | suffix]. Image and prefix (bos, prompt, newline) read each other freely; the
suffix, which is the answer, is causal.

Axes: B batch, P image tokens, T text tokens, D decoder width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import branch_mask, prefix_lm_mask, window_mask
from model.cache import KVCache
from model.config import PaliGemmaConfig
from model.gemma import Block, Gemma, at
from model.inputs import check_images, check_text
from model.lora import lora_layers
from model.seam import find_function, is_own, record_attention, replace_attention
from model.siglip import SigLIP

FUSED_FROM = 1024  # image tokens (448 px) from which it is worth compiling FlexAttention on a GPU


class PaliGemma(nn.Module):
    """The whole network. Training calls `forward` or its parts; decoding, `prefill` once and then `step`."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config.vision)
        self.projector = nn.Linear(config.vision.width, config.text.width)
        self.decoder = Gemma(config.text)
        self.mask = prefix_lm_mask  # or what model/seam.py puts in its place
        self.folder: Path | None = None  # where it was loaded from
        self.photograph_test = None  # set by model/decoding/photographs.py

    # ---- training: image and text at once ------------------------------------------------------------------

    def forward(self, images: Tensor, tokens: Tensor, prefix_len: int | Tensor) -> Tensor:
        """Float32 logits [B, T, vocab] at every text position.

        images float [B, 3, S, S] in [-1, 1]; tokens int64 [B, T], text only, right-padded with config.pad;
        prefix_len, int or int64 [B]: how many text tokens (bos, prompt, newline) belong to the bidirectional
        prefix.
        """
        return self.decoder.logits(self.hidden(images, tokens, prefix_len))

    def hidden(self, images: Tensor, tokens: Tensor, prefix_len: int | Tensor) -> Tensor:
        """The hidden states [B, T, D] of the text positions, which `forward` turns into logits."""
        check_text(tokens, prefix_len, len(images))
        return self.read(self.encode(images), tokens, prefix_len)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> image tokens [B, P, D]."""
        check_images(images, self.config)
        features = self.vision(images.to(self.projector.weight.dtype))  # [B, P, width of the vision tower]
        # Not multiplied by sqrt(D), as text embeddings are: the projector was trained to meet their scale.
        return self.projector(features)

    def read(self, image_tokens: Tensor, tokens: Tensor, prefix_len: int | Tensor) -> Tensor:
        """Image tokens [B, P, D], text [B, T] -> hidden states of the text [B, T, D]."""
        x, valid, is_suffix, positions = self._sequence(image_tokens, tokens, prefix_len)
        masks = self._masks(valid, is_suffix, positions)
        return self.decoder(x, positions, masks)[:, image_tokens.shape[1] :]

    def read_branches(self, image_tokens: Tensor, prompt: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [B, P, D], a prompt int64 [T], and K branches of N tokens, int64 [B, K, N] -> hidden
        states at the end of the prompt [B, D] and of the branches [B, K, N, D]. Each branch follows the
        prompt as if it were the only one. N is at most 4 (attention.branch_mask)."""
        (B, P, D), (K, N) = image_tokens.shape, branches.shape[1:]
        start, ids = P + len(prompt), torch.arange(K * N, device=prompt.device)
        positions = torch.cat((torch.arange(1, start + 1, device=prompt.device), start + 1 + ids % N))[None]
        text = torch.cat((prompt.expand(B, -1), branches.flatten(1)), dim=1)
        x = torch.cat((image_tokens, self.decoder.embed_tokens(text).to(image_tokens.dtype)), dim=1)
        hidden = self.decoder(x, positions, self._branch_masks(positions.expand(B, -1), start, N))
        return hidden[:, start - 1], hidden[:, start:].view(B, K, N, D)

    def _branch_masks(self, positions: Tensor, start: int, N: int) -> tuple:
        """The masks of read_branches, as `_masks` returns them: `start` tokens of image and prompt, then
        branches of N tokens each. positions int64 [B, S]."""
        window, is_suffix = self.config.text.sliding_window, positions > start
        ids = torch.arange(positions.shape[1] - start, device=positions.device)
        if self._is_fused(positions):
            from model.flex import block_mask

            branch = F.pad(ids // N + 1, (start, 0)).expand_as(positions)
            there = torch.ones_like(is_suffix)
            return tuple(block_mask(there, is_suffix, positions, width, branch) for width in (window, None))
        # Each branch token reads of the prefix what the first token of an answer reads: one more row.
        first = torch.arange(start + 1, device=positions.device)[None] == start
        reads = self.mask(torch.ones_like(first), first)[..., :start]  # [1, start + 1, start]
        own = branch_mask(torch.where(ids % N > 0, ids - 1, ids)[None])  # [1, K * N, K * N]
        answers = torch.cat((reads[:, start:].expand(-1, len(ids), -1), own), dim=-1)
        mask = torch.cat((F.pad(reads[:, :start], (0, len(ids))), answers), dim=1)
        return window_mask(mask, positions[:1], positions[:1], is_suffix[:1], window), mask

    def _sequence(
        self, image_tokens: Tensor, tokens: Tensor, prefix_len: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[image | text] as the decoder reads it: embeddings [B, P + T, D], and [B, P + T] each: valid (not
        padding), is_suffix and positions."""
        (B, P, _), T = image_tokens.shape, tokens.shape[1]
        prefix_len = torch.as_tensor(prefix_len, device=tokens.device).expand(B)
        valid = torch.cat((tokens.new_ones(B, P, dtype=torch.bool), tokens != self.config.pad), dim=1)
        is_suffix = torch.arange(P + T, device=tokens.device) >= P + prefix_len[:, None]  # [B, P + T]
        positions = valid.cumsum(-1)  # from 1, as in transformers; padding does not count
        x = torch.cat((image_tokens, self.decoder.embed_tokens(tokens).to(image_tokens.dtype)), dim=1)
        return x, valid, is_suffix, positions

    def _masks(self, valid: Tensor, is_suffix: Tensor, positions: Tensor) -> tuple:
        """[B, S] each -> who reads whom in the local and in the global layers: bool [B, S, S], or what
        FlexAttention takes."""
        window = self.config.text.sliding_window
        if self._is_fused(valid):
            from model.flex import block_mask  # here, because it brings torch.compile along

            return tuple(block_mask(valid, is_suffix, positions, width) for width in (window, None))
        mask = self.mask(valid, is_suffix)
        return window_mask(mask, positions, positions, is_suffix, window), mask

    def _is_fused(self, tokens: Tensor) -> bool:
        """Whether FlexAttention reads a sequence: a long one, on a GPU, of a model with this project's own
        attention and mask."""
        long = self.config.vision.tokens >= FUSED_FROM and tokens.is_cuda
        return long and is_own(self) and self.mask is prefix_lm_mask

    # ---- decoding: a prefill, then token by token ----------------------------------------------------------

    def new_cache(self, batch: int, text_tokens: int) -> KVCache:
        """A cache for `batch` sequences of an image and `text_tokens` tokens of prompt and answer."""
        weight, slots = self.projector.weight, self.config.vision.tokens + text_tokens
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        compiled = self.decoder.run_step is not Block.__call__
        whole = compiled or kind != "cpu"  # on a GPU, decoders capture a graph
        return KVCache(self.config.text, batch, slots, dtype, weight.device, whole)

    def prefill(self, image_tokens: Tensor, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read image tokens [B, P, D] and right-padded prompts [B, T] into the cache, which forgets what it
        held; returns the hidden state at the end of each prompt [B, D]."""
        lengths = (tokens != self.config.pad).sum(-1)
        x, valid, is_suffix, positions = self._sequence(image_tokens, tokens, lengths)  # all of it is prefix
        cache.start(valid, positions)
        masks = self._masks(valid, is_suffix, positions)
        end = image_tokens.shape[1] + lengths - 1  # [B], in the sequence
        last = masks[(self.config.text.layers - 1) % 2]
        only = end, at(last, end) if isinstance(last, Tensor) else valid[:, None]  # its row of the last mask
        return self.decoder(x, positions, masks, cache, only)[:, 0]

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token [B] to every sequence of the cache; returns its hidden state [B, D]."""
        positions = cache.extend()  # [B, 1]
        return self._decode(tokens[:, None], positions, self._newest_rows(cache), cache)[:, 0]

    def step_branches(self, tokens: Tensor, parents: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each of K branches, tokens [B, K]; returns their hidden states [B, K, D].

        parents [B, N]: of all branch tokens so far, these K last (see attention.branch_mask). All K have the
        same position, and lie next to each other in the cache: nothing in it is copied.
        """
        K, N = tokens.shape[1], parents.shape[1]
        positions = cache.extend(K)  # [B, K]
        prefix = self._newest_rows(cache)[..., : cache.used - N].expand(-1, K, -1)
        mask = torch.cat((prefix, branch_mask(parents)[:, -K:]), dim=-1)
        mask = F.pad(mask, (0, cache.slots_read - mask.shape[-1]))  # [B, K, S]: later slots hold nothing
        return self._decode(tokens, positions, mask, cache)

    def _decode(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """The tokens that the cache took last, their positions [B, T], their mask [B, T, S] -> hidden states
        [B, T, D]."""
        is_suffix = torch.ones_like(positions, dtype=torch.bool)
        local = window_mask(mask, positions, cache.positions, is_suffix, self.config.text.sliding_window)
        return self.decoder(self.decoder.embed_tokens(tokens), positions, (local, mask), cache)

    def _newest_rows(self, cache: KVCache) -> Tensor:
        """bool [B, 1 or T, S]: what the T tokens that the cache took last may read, if they are one text."""
        if self.mask is prefix_lm_mask:
            return cache.valid[:, None]  # whatever was read before, and the token itself
        return self.mask(cache.valid, cache.is_suffix)[:, cache.new_slots]

    # ---- the seam ------------------------------------------------------------------------------------------

    def record_attention(self, tower: str = "text") -> AbstractContextManager[dict[int, Tensor]]:
        """`with model.record_attention() as maps:` fills {layer: weights [B, N, T, S]}, see model/seam.py."""
        return record_attention(self, tower)

    # ---- answers in words ----------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        """The model.io.tokenizer.Tokenizer of the folder that the model was loaded from, read at its first
        use; another may be assigned. The embedding may have more rows than the tokenizer has ids, as in
        official checkpoints, but not fewer."""
        from model.io.tokenizer import Tokenizer

        if self.folder is None or not (self.folder / "tokenizer.model").exists():
            how = "put the checkpoint's into its folder, or assign model.tokenizer = Tokenizer(file)"
            raise ValueError(f"{self.folder or 'the model'} has no tokenizer.model: {how}")
        tokenizer, rows = Tokenizer(self.folder), self.config.text.vocab_size
        if tokenizer.size > rows:
            raise ValueError(
                f"{self.folder / 'tokenizer.model'} is of another checkpoint: it has {tokenizer.size:,} ids, "
                f"locations and codes of masks included, the embedding {rows:,} rows"
            )
        return tokenizer

    @torch.inference_mode()
    def generate(self, image, prompt: str, max_new_tokens: int = 100, sampling=None, generator=None) -> str:
        """The answer to a prompt about an image: model.generate("photo.jpg", "caption en").

        image: a file or a PIL image. sampling: a model.decoding.generate.Sampling, greedy if None. generator:
        a torch.Generator on the CPU, from which sampling draws.
        """
        from model.decoding.batches import network_images
        from model.decoding.generate import GREEDY, collect_answers, generate
        from model.io.image import load_image

        image_tokens = self.encode(network_images(self, [load_image(image)]))
        prompts = [self.tokenizer.encode_prompt(prompt)]
        steps = generate(self, image_tokens, prompts, max_new_tokens, sampling or GREEDY, generator)
        [(tokens, _)] = collect_answers(self, steps)
        return self.tokenizer.decode(tokens)

    # ---- files ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        adapter: str | Path | None = None,
        attention: str | Callable | None = None,
        attention_in: str = "text",
        mask: str | Callable | None = None,
        **config_overrides,
    ) -> "PaliGemma":
        """Load a folder, a hub id ("owner/name" or "owner/name@revision"), the shipped "nano", or an .npz
        file as big_vision and Kaggle publish it.

        dtype: torch.bfloat16 or torch.float32; adapter: a LoRA adapter's folder or hub id. attention, mask: a
        function or "package.module:function" to use instead of attend (in the layers of "text", "vision" or
        "both") or prefix_lm_mask of model/attention.py, see model/seam.py. config_overrides: fields of the
        config, e.g. attn_cap=None, or image_size=448 to start training at another resolution.
        An error names every tensor that is missing, unexpected or of another shape.
        """
        from model.io.adapter import detection_overrides, load_adapter
        from model.io.hub import folder_of, resolve
        from model.io.weights import check_dtype, load_config, load_weights, without_memory
        from model.io.writing import located

        check_dtype(dtype)
        folder = resolve(source)
        if adapter is not None:
            config_overrides = detection_overrides(adapter) | config_overrides
        stored = load_config(folder)
        with located(f"{source} with the adapter {adapter}" if adapter is not None else str(source)):
            config = stored.override(**config_overrides)
        with without_memory():
            model = cls(config)
        load_weights(model, folder, stored.vision.tokens, dtype, device)
        if adapter is not None:
            load_adapter(model, adapter)
        if attention is not None:
            replace_attention(model, attention, attention_in)
        if mask is not None:
            model.mask = find_function(mask)
        model.folder = folder_of(folder)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Write the model in the hub's layout, which transformers loads too: config.json, *.safetensors, and
        the tokenizer and mask codec of the folder that it was loaded from.

        dtype: the weights' own if None. Adapters must have been folded into the weights (lora.fold).
        """
        from model.io.hub import copy_companions
        from model.io.weights import save_weights

        if lora_layers(self):
            how = "lora.fold(model) merges it, adapter.save_adapter saves it"
            raise ValueError(f"the model has an adapter: {how}")
        save_weights(self, folder, dtype, max_shard_bytes)
        if self.folder is not None:
            copy_companions(self.folder, Path(folder))

"""PaliGemma: SigLIP features, projected and put in front of the text, decoded by Gemma.

Axes: B batch, P image tokens, T text tokens, D decoder width. The sequence is [image | prefix | suffix]:
image and prefix read each other freely, the suffix is causal.
"""

import torch
from torch import Tensor, nn

from model.attention import prefix_lm_mask, window_mask
from model.cache import KVCache
from model.config import PaliGemmaConfig
from model.gemma import Gemma, at
from model.io import weights
from model.io.adapter import detection_overrides, load_adapter
from model.lora import lora_layers
from model.siglip import SigLIP

FUSED_FROM = 1024  # image tokens from which a GPU's prefill is worth compiling FlexAttention


class PaliGemma(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config.vision)
        self.projector = nn.Linear(config.vision.width, config.text.width)
        self.decoder = Gemma(config.text)

    @classmethod
    def from_pretrained(
        cls, source: str, *, dtype=torch.bfloat16, device="cpu", adapter=None, **config_overrides
    ) -> "PaliGemma":
        """Load a folder, a hub id ("owner/name" or "owner/name@revision"), or the shipped "nano".

        dtype: torch.bfloat16 or torch.float32; adapter: a LoRA adapter's folder or hub id. config_overrides:
        fields of the config, e.g. attn_cap=None. Raises ValueError that says what is wrong and what to do;
        every bad tensor is named.
        """
        if adapter is not None:
            config_overrides = detection_overrides(adapter) | config_overrides
        model = weights.load_pretrained(cls, source, dtype=dtype, device=device, **config_overrides)
        if adapter is not None:
            load_adapter(model, adapter)
        return model

    def save_pretrained(self, folder: str, dtype: torch.dtype | None = None, **sharding) -> None:
        """Write config.json and *.safetensors in the hub's layout, which transformers loads too.

        dtype: the weights' own if None; max_shard_bytes: 5 GB a file unless told. Adapters must have been
        folded into the weights before (lora.fold).
        """
        if lora_layers(self):
            raise ValueError(
                "the model has an adapter: lora.fold(model) merges it, adapter.save_adapter saves it"
            )
        weights.save_pretrained(self, folder, dtype, **sharding)

    def forward(self, images: Tensor, tokens: Tensor, prefix_len: int | Tensor) -> Tensor:
        """Float32 logits [B, T, vocab] at every text position.

        images float [B, 3, S, S] in [-1, 1]; tokens int64 [B, T], text only, right-padded with config.pad;
        prefix_len, int or int64 [B]: how many text tokens (bos, prompt, newline) belong to the bidirectional
        prefix. Raises ValueError if any of the three is something else.
        """
        return self.decoder.logits(self.hidden(images, tokens, prefix_len))

    def hidden(self, images: Tensor, tokens: Tensor, prefix_len: int | Tensor) -> Tensor:
        """What `forward` makes the logits of: the hidden states [B, T, D] of the text positions."""
        _check_text(tokens, prefix_len, len(images))
        return self.read(self.encode(images), tokens, prefix_len)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> image tokens [B, P, D]. They are not rescaled: only text embeddings are."""
        _check_images(images, self.config)
        return self.projector(self.vision(images.to(self.projector.weight.dtype)))

    def read(
        self,
        image_tokens: Tensor,
        tokens: Tensor,
        prefix_len: int | Tensor,
        cache: KVCache | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Image tokens [B, P, D], text [B, T] -> states of the text [B, T, D]; fills the cache anew.

        only int64 [B]: the one text position of each row that is wanted; [B, 1, D] then.
        """
        (B, P, _), T = image_tokens.shape, tokens.shape[1]
        prefix_len = torch.as_tensor(prefix_len, device=tokens.device).expand(B)
        valid = torch.cat((tokens.new_ones(B, P, dtype=torch.bool), tokens != self.config.pad), dim=1)
        is_suffix = torch.arange(P + T, device=tokens.device) >= P + prefix_len[:, None]
        positions = valid.cumsum(-1)  # from 1; padding does not count
        mask = prefix_lm_mask(valid, is_suffix)
        local = window_mask(mask, positions, positions, is_suffix, self.config.text.sliding_window)
        if cache is not None:
            cache.start(valid, positions)
        masks = local, mask
        if only is not None:
            only = only + P, at(masks[(self.config.text.layers - 1) % 2], only + P)
        if mask.is_cuda and P >= FUSED_FROM and not torch.is_grad_enabled():
            from model.flex import block_mask

            masks = tuple(map(block_mask, masks))
        x = torch.cat((image_tokens, self.decoder.embed_tokens(tokens).to(image_tokens.dtype)), dim=1)
        hidden = self.decoder(x, positions, masks, cache, only)
        return hidden[:, P:] if only is None else hidden

    def new_cache(self, batch: int, text_tokens: int) -> KVCache:
        """Room for the image and so many text tokens, prompt and answer, of each of a batch."""
        weight, slots = self.projector.weight, self.config.vision.tokens + text_tokens
        return KVCache(self.config.text, batch, slots, weight.dtype, weight.device)

    def prefill(self, image_tokens: Tensor, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read image tokens [B, P, D] and right-padded prompts [B, T] into the cache; returns the state at
        each prompt's end [B, D]."""
        lengths = (tokens != self.config.pad).sum(-1)
        return self.read(image_tokens, tokens, lengths, cache, only=lengths - 1)[:, 0]

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token [B] to every sequence of the cache: its hidden state [B, D]."""
        positions = cache.extend()
        mask, is_suffix = cache.valid[:, None], torch.ones_like(positions, dtype=torch.bool)  # [B, 1, S]
        local = window_mask(mask, positions, cache.positions, is_suffix, self.config.text.sliding_window)
        return self.decoder(self.decoder.embed_tokens(tokens[:, None]), positions, (local, mask), cache)[:, 0]


def _check_images(images: Tensor, config: PaliGemmaConfig) -> None:
    """Raise ValueError for images that the vision tower would take for others: bytes, or as many patches of
    another shape."""
    if not images.is_floating_point():
        raise ValueError(f"images are {_form(images)}, the model takes floats in [-1, 1]: pixels / 127.5 - 1")
    shape = [config.vision.channels, config.vision.image_size, config.vision.image_size]
    if list(images.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images have the shape {list(images.shape)}, the model takes [B, {wanted}]")


def _check_text(tokens: Tensor, prefix_len: int | Tensor, batch: int) -> None:
    """Raise ValueError for tokens that are not int64 [B, T], and a prefix that is not 1 to T of them."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or len(tokens) != batch:
        raise ValueError(f"tokens are {_form(tokens)}, the model takes int64 [{batch}, T], a row an image")
    shortest = longest = prefix_len
    if not isinstance(prefix_len, int):
        lengths = torch.as_tensor(prefix_len)
        if lengths.dtype != torch.int64 or lengths.shape not in ((), (batch,)):
            raise ValueError(f"prefix_len is {_form(lengths)}, the model takes an int or int64 [{batch}]")
        # Waits for the GPU if it is there. Training and decoding do not: they call `read`.
        shortest, longest = lengths.min().item(), lengths.max().item()
    if not 1 <= shortest <= longest <= tokens.shape[1]:
        wrong = shortest if shortest < 1 else longest
        raise ValueError(f"prefix_len {wrong} is outside the text: it must be 1 to {tokens.shape[1]} tokens")


def _form(tensor: Tensor) -> str:
    """Its dtype and shape: "int64 [2, 6]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

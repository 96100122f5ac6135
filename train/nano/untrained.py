"""An untrained nano: everything PaliGemma 2 has, in under 12 MB.

    python train/nano/untrained.py --out runs/nano-init
    python train/nano/untrained.py --out runs/words-init --start runs/nano-2/final \\
        --codec runs/codec/codec.safetensors

Writes config.json, model.safetensors and tokenizer.model, ready for train/fit.py. The vocabulary has
Gemma's special pieces in Gemma's order and a few hundred pieces of the practice set's own sentences.

--start copies the weights of a nano that detects, to teach it to speak (--tasks all): pieces that are in both
vocabularies keep their embeddings, and the first piece of a class's name takes over that of its class token,
which means the same.
"""

import io
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

from model import PaliGemma
from model.config import PaliGemmaConfig, TextConfig, VisionConfig
from model.decoding.masks import MaskCodec
from model.io.hub import CODEC
from model.io.tokenizer import LOCS, SEGS, Tokenizer
from model.io.weights import load_config
from train.practice.sentences import plural, random_sentences
from train.run.program import not_negative, parser, run

MAX_TEXT_PIECES = 900  # the trainer may find fewer worth having
_TABLES, _BLOCKS = "table caption thead tbody tfoot tr th td".split(), "h1 h2 h3 h4 h5 h6 blockquote".split()
_INLINE = "strong em b i u s sub sup code".split()


def special_pieces() -> list[str]:
    """Gemma's ids 4 to 216: <mask> and others, <unused...>, turns, runs of newlines and spaces, HTML tags."""
    pieces = ["<mask>", "<2mass>", "[@BOS@]"] + [f"<unused{i}>" for i in range(99)]
    pieces += ["<start_of_turn>", "<end_of_turn>"]
    pieces += ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
    for tags in (_TABLES, _BLOCKS, _INLINE):
        pieces += [f"<{tag}>" for tag in tags] + [f"</{tag}>" for tag in tags]
    return pieces


def train_tokenizer(file: Path, seed: int = 0) -> None:
    """Train the sentencepiece model and write it. Bytes are the fallback, so that any text can be encoded."""
    rng = np.random.default_rng(seed)
    sentences = [sentence for _ in range(3000) for sentence in random_sentences(rng)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=4 + len(special_pieces()) + 256 + MAX_TEXT_PIECES,  # <pad> to <unk>, special, bytes, text
        hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=special_pieces(),
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())


def nano_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    """The 3B in everything but size. The sliding window is shorter than the sequence of 130: it is in use."""
    return PaliGemmaConfig(
        VisionConfig(image_size=128, patch_size=16, width=192, layers=8, heads=6, mlp=768),
        TextConfig(
            version=2,
            width=160,
            layers=4,
            heads=4,
            kv_heads=2,
            head_dim=40,
            mlp=640,
            query_scale=40**-0.5,
            attn_cap=50.0,
            final_cap=30.0,
            sliding_window=112,
            vocab_size=64 * math.ceil((tokenizer.size + 1) / 64),
            max_positions=512,
        ),
        image_token=tokenizer.size,
        groups=12,
        open_vocabulary=False,
    )


def fourier_features(count: int, width: int) -> Tensor:
    """Sines and cosines [count, width] of the positions 0..count-1: neighbours start out similar."""
    x = torch.arange(count)[:, None] / count
    waves = 2 ** torch.linspace(0, math.log2(count) - 2, width // 2) * math.pi
    return torch.cat(((x * waves).sin(), (x * waves).cos()), dim=1)


def initialise(model: PaliGemma, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Normal weights scaled by fan-in; location embeddings and vision positions start as Fourier features."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # The last matrix of each branch starts small, so that the residual stream keeps its scale.
    for tower in (model.vision, model.decoder):
        for name, weight in tower.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                weight.data *= (2 * len(tower.layers)) ** -0.5
    width = model.config.text.width
    embed = model.decoder.embed.weight.data
    nn.init.normal_(embed, std=width**-0.5, generator=generator)
    embed[tokenizer.loc0 : tokenizer.loc0 + LOCS] = fourier_features(LOCS, width) * (2 / width) ** 0.5
    assert tokenizer.size == tokenizer.loc0 + LOCS + SEGS
    side = round(model.config.vision.tokens**0.5)
    half = fourier_features(side, model.config.vision.width // 2)
    rows = half[:, None].expand(-1, side, -1), half[None].expand(side, -1, -1)
    model.vision.position_embedding.weight.data = torch.cat(rows, dim=-1).flatten(0, 1) * 0.5


def copy_weights(model: PaliGemma, tokenizer: Tokenizer, start: Path) -> None:
    """Give an initialised model the weights of another nano, whose vocabulary may differ."""
    source = PaliGemma.from_pretrained(start, dtype=torch.float32)
    old_tokenizer = source.tokenizer
    rows, old_rows = model.decoder.embed.weight.data.clone(), source.decoder.embed.weight.data
    for i in range(tokenizer.loc0):
        if (j := old_tokenizer.id_of(tokenizer.piece(i))) is not None:
            rows[i] = old_rows[j]
    rows[tokenizer.loc0 : tokenizer.size] = old_rows[old_tokenizer.loc0 : old_tokenizer.size]
    class_tokens = defaultdict(list)  # by the first piece of a class's name, which several may share
    for label, name in enumerate(model.config.classes):
        for word in (name, plural(name).removeprefix("pairs of ")):
            class_tokens[tokenizer.encode(f" {word}")[0]].append(tokenizer.unused0 + label)
    for piece, tokens in class_tokens.items():
        rows[piece] = rows[tokens].mean(0)
    source.decoder.embed.weight.data = rows
    model.load_state_dict(source.state_dict())


def main(argv=None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--out", type=Path, required=True)
    add("--start", type=Path, help="checkpoint of a nano that detects, whose weights are copied")
    add("--codec", type=Path, help="file of train/nano/codec.py, for --tasks all")
    add("--seed", type=not_negative, default=0)
    args = options.parse_args(argv)
    if args.codec:
        MaskCodec.load(args.codec)  # both are checked before anything is written
    if args.start:
        load_config(args.start)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.codec:
        shutil.copy(args.codec, args.out / CODEC)
    train_tokenizer(args.out / "tokenizer.model", args.seed)
    tokenizer = Tokenizer(args.out)
    model = PaliGemma(nano_config(tokenizer))
    initialise(model, tokenizer, args.seed)
    if args.start:
        copy_weights(model, tokenizer, args.start)
    model.save_pretrained(args.out, torch.float32)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.size} pieces")


if __name__ == "__main__":
    run(main, __file__)

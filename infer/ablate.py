"""What each part of the model is worth: nano on held-out scenes with one thing changed at a time.

    python infer/ablate.py                                    # all changes, 200 scenes
    python infer/ablate.py --only "no RoPE" "causal prefix"   # some of them
    python infer/ablate.py --count 1000 --out media/ablation.png

Nothing is trained again, so a figure says how much this model relies on what it was trained with, not how
good a model without it could be. The loss is that of the right answers, in nats a token; a change of decoding
alone leaves it as it is. A change that does nothing at all would not be in use: it is marked with "=".
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from infer.lib.knock_out import skip_layer
from infer.lib.measuring import print_table
from infer.lib.options import add_device_argument, usable_device
from infer.lib.plots import RIGHT, WRONG, check_plot, new_figure
from infer.lib.scenes import BATCH, drawn_scenes, evaluate_scenes
from model import PaliGemma
from model.attention import attend
from model.decoding.closed_set import ClosedSet
from model.decoding.detector import closed_set_decoder
from model.seam import attention_layers, replace_attention
from train.data.open import open_data
from train.data.samples import collate, weight_of
from train.data.targets import Noise
from train.loss import Objective
from train.practice.write import HELD_OUT_SETS
from train.run.program import parser, positive, run


@dataclass(frozen=True)
class Change:
    """One difference: fields of the config, what is done to the loaded model, or how it decodes."""

    name: str
    config: dict = field(default_factory=dict)
    model: Callable[[PaliGemma], None] = lambda model: None
    decoding: dict = field(default_factory=dict)  # options of closed_set_decoder


# ---- the changes -------------------------------------------------------------------------------------------


def causal(valid, is_suffix):
    """A mask: image and prompt do not read ahead either."""
    length = valid.shape[1]
    return valid[:, None] & torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()


def causal_prefix(model: PaliGemma) -> None:
    model.mask = causal


def one_kv_head(model: PaliGemma) -> None:
    """All query heads read the first kv head."""

    def attend_to_first(q, k, v, mask, scale, cap=None):
        return attend(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), mask, scale, cap)

    replace_attention(model, attend_to_first)


def no_rotation(model: PaliGemma) -> None:
    for layer in attention_layers(model):
        layer.rotate = lambda x, rope: x


def scaled_image_tokens(model: PaliGemma) -> None:
    """Image tokens times sqrt(width), as text embeddings are: a mistake that is easily made."""
    width = model.config.text.width
    model.projector.register_forward_hook(lambda module, args, out: out * width**0.5)


def unscaled_embeddings(model: PaliGemma) -> None:
    model.decoder.embed_tokens = model.decoder.embed.forward


def no_post_norms(model: PaliGemma) -> None:
    for block in model.decoder.layers:
        block.post_attn_norm = block.post_mlp_norm = nn.Identity()


def no_vision_positions(model: PaliGemma) -> None:
    model.vision.position_embedding.weight.data.zero_()


def changes_of(model: PaliGemma) -> list[Change]:
    """All that can be changed in this model; the first one is no change."""
    text, form = model.config.text, model.config.answers
    changes = [
        Change("as it is"),
        Change("causal prefix", model=causal_prefix),
        Change("no soft cap of the attention", dict(attn_cap=None)),
        Change("no soft cap of the logits", dict(final_cap=None)),
        Change("no sliding window, as big_vision", dict(sliding_window=None)),
        Change("a sliding window of 16", dict(sliding_window=16)),
        Change("query scale 1 / head_dim", dict(query_scale=1 / text.head_dim)),
        Change("no RoPE", model=no_rotation),
        Change("RoPE with base 100", dict(rope_theta=100.0)),
        Change("one kv head for all", model=one_kv_head),
        Change("image tokens times sqrt(width)", model=scaled_image_tokens),
        Change("embeddings not scaled", model=unscaled_embeddings),
        Change("no position embeddings in the vision tower", model=no_vision_positions),
    ]
    if text.version == 2:
        changes.append(Change("norms after attention and MLP left out", model=no_post_norms))
    for tower, name in (("vision", "vision"), ("decoder", "text")):
        for i in range(len(getattr(model, tower).layers)):
            skip = partial(skip_layer, tower=tower, layer=i)
            changes.append(Change(f"{name} layer {i} left out", model=skip))
    other = "sequence" if form == "parallel" else "parallel"
    changes.append(Change(f"decoded in {other}", decoding=dict(decode=other)))
    fed_back = dict(decode="sequence", noise_feedback=True)
    changes.append(Change("noise fed back (in sequence)", decoding=fed_back))
    counts = (6, 12, 48)
    changes += [Change(f"{k} branches", decoding=dict(decode="parallel", branches=k)) for k in counts]
    return changes


# ---- what they do ------------------------------------------------------------------------------------------


def measure(source: str, change: Change, data: Path, device: str) -> dict[str, float]:
    """{"mAP", "AP50", "loss"} of a model with a change."""
    model = PaliGemma.from_pretrained(source, dtype=torch.float32, device=device, **change.config)
    change.model(model)
    figures = evaluate_scenes(closed_set_decoder(model, **change.decoding), data, change.name)
    return {"mAP": figures["AP"], "AP50": figures["AP50"], "loss": answer_loss(model, data, device)}


@torch.inference_mode()
def answer_loss(model: PaliGemma, data: Path, device: str) -> float:
    """The mean cross-entropy, a token, of the right answers in the form that the model is taught in."""
    branches = 64 if model.config.answers == "parallel" else None
    samples = open_data(data, None, model, model.tokenizer, noise=Noise(boxes=0), branches=branches)
    language = ClosedSet.of(model.config, model.tokenizer)
    objective = Objective(model, language, branches=language).eval()
    loss = weight = 0.0
    pairs = [(i, i) for i in range(len(samples))]  # a sample is asked for by two numbers
    loader = DataLoader(samples, BATCH, sampler=pairs, collate_fn=lambda s: collate(s, pad=model.config.pad))
    for batch in loader:
        batch = {name: x.to(device) for name, x in batch.items()}
        loss += objective(batch | {"total": torch.ones((), device=device)})[1].item()
        weight += weight_of(batch).item()
    return loss / weight


def table_row(name: str, found: dict[str, float], usual: dict[str, float] | None) -> dict[str, str]:
    mark = " =" if usual is not None and found == usual else ""
    row = {"changed": name + mark, "mAP": f"{found['mAP']:.3f}", "AP50": f"{found['AP50']:.3f}"}
    return row | {"loss": f"{found['loss']:.3f}"}


def draw(measured: dict[str, dict[str, float]], file: Path) -> None:
    """A bar for each change. The first, of the unchanged model, has another colour and a line at its end."""
    names, values = list(measured), [found["mAP"] for found in measured.values()]
    with new_figure(file, 8, 1 + 0.27 * len(names)) as figure:
        axes = figure.subplots()
        colours = [RIGHT] + [WRONG] * (len(names) - 1)
        bars = axes.barh(range(len(names)), values, color=colours, height=0.7)
        axes.axvline(values[0], color=RIGHT, linewidth=1, linestyle=":", zorder=0)
        for label in axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9):
            label.set_bbox(dict(facecolor="white", edgecolor="none", pad=1))
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="mAP on held-out scenes", xlim=(0, 1.1 * max(*values, 0.01)), ylim=(len(names), -1))
        axes.grid(axis="y", visible=False)
        figure.suptitle("One thing changed at a time, nothing trained again")


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--model", default="nano", help="a folder, a hub id, or nano: any that does closed-set detection")
    add("--set", choices=list(HELD_OUT_SETS), default="same", help="held-out practice set")
    add("--count", type=positive, default=200, help="scenes of it")
    add("--only", nargs="+", metavar="NAME", help="these changes, by their names in the table")
    add("--out", type=Path, metavar="FILE", help="draw the table there")
    add_device_argument(options)
    args = options.parse_args()
    ablate(args)


def ablate(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure, print and draw; returns {name of a change: its figures}."""
    if args.out:
        check_plot(args.out)
    device = usable_device(args.device)
    model = PaliGemma.from_pretrained(args.model, dtype=torch.float32)
    usual, *changes = changes_of(model)
    if args.only:
        if unknown := set(args.only) - {change.name for change in changes}:
            known = ", ".join(f'"{change.name}"' for change in changes)
            raise ValueError(f"--only: {', '.join(sorted(unknown))} is none of {known}")
        changes = [change for change in changes if change.name in args.only]
    with drawn_scenes(args.count, args.set, model.config.vision.image_size) as data:
        measured = {change.name: measure(args.model, change, data, device) for change in (usual, *changes)}
    first = measured[usual.name]
    rows = [table_row(name, found, None if found is first else first) for name, found in measured.items()]
    print_table(rows)
    if args.out:
        draw(measured, args.out)
    return measured


if __name__ == "__main__":
    run(main, __file__)

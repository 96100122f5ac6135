"""Where a detector looks while it writes a box, and which of its attention heads matter.

    python infer/heads.py                                       # nano, 500 held-out scenes
    python infer/heads.py --count 100 --out media/heads.png     # and a picture of it

For every object of the scenes, given as a branch of its own (model/decoding/parallel.py), the attention of
the five tokens that predict y0, x0, y1, x1 and the class: its entropy over the image tokens, and how much of
it lies inside the object's box. Pix2seq (arXiv 2109.10852) saw attention that is diverse at the first
coordinate and then settles on the object. Then mAP without the k heads that look most at the object, and
without k others: if a few heads did the finding, the first would cost far more.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infer.lib.knock_out import knock_out
from infer.lib.measuring import print_table
from infer.lib.options import add_device_argument, usable_device
from infer.lib.plots import MIDDLE, RIGHT, WRONG, check_plot, new_figure
from infer.lib.scenes import drawn_scenes, evaluate_scenes
from model import PaliGemma
from model.decoding.boxes import boxes_to_locs
from model.decoding.closed_set import ClosedSet
from model.decoding.detector import closed_set_decoder
from model.io.image import to_network
from train.practice.scenes import make_scene
from train.practice.write import HELD_OUT_SETS
from train.run.program import not_negative, parser, positive, run

PREDICTED = ("y0", "x0", "y1", "x1", "class")
KNOCKED_OUT = (1, 2, 4, 8)  # heads


# ---- where it looks ----------------------------------------------------------------------------------------


def patch_cover(boxes: np.ndarray, side: int) -> np.ndarray:
    """Boxes [n, 4] in fractions of the image -> [n, side * side]: how much of each patch a box covers."""
    edges = np.arange(side) / side

    def along(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        inside = np.minimum(high[:, None], edges + 1 / side) - np.maximum(low[:, None], edges)
        return inside.clip(0) * side  # [n, side]

    rows, columns = along(boxes[:, 1], boxes[:, 3]), along(boxes[:, 0], boxes[:, 2])
    return (rows[:, :, None] * columns[:, None, :]).reshape(len(boxes), -1)


def looks(weights: Tensor, image_tokens: int, start: int, objects: int) -> Tensor:
    """Attention of the positions that predict the five tokens of each object, to the image: [n, 5, N, P].

    weights [1, N, T, S]: of a layer, over image, prompt and branches of four tokens. start: the position
    where the branches begin. Axes: n objects, N heads, P image tokens.
    """
    to_image = weights[0, :, :, :image_tokens]  # [N, T, P]
    first = to_image[:, start - 1].expand(objects, -1, -1)  # [n, N, P]: the end of the prompt, for all
    branches = to_image[:, start:].unflatten(1, (objects, 4))  # [N, n, 4, P]
    return torch.cat((first[:, None], branches.permute(1, 2, 0, 3)), dim=1)


@torch.inference_mode()
def where_it_looks(
    model: PaliGemma, split: str, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Means over the objects of `count` scenes, each [L, N, 5]: the attention's entropy over the image, in
    bits, its share on the image, and of that the share inside the box; and [5], the share of the image that
    the box covers, which is what uniform attention would have inside.

    Axes: L layers, N heads, 5 predicted tokens. At y0 the object is still open: there, the box stands for the
    boxes of all objects of the scene.
    """
    language = ClosedSet.of(model.config, model.tokenizer)
    prompt = torch.tensor(language.prompt, device=model.projector.weight.device)
    size, tokens = model.config.vision.image_size, model.config.vision.tokens
    entropies, on_image, inside, areas = [], [], [], []
    for number in range(count):
        scene = make_scene(number, size, split)
        if not len(scene.labels):
            continue
        locs = torch.from_numpy(boxes_to_locs(scene.boxes, size, size)).to(prompt.device)
        cover = patch_cover(scene.boxes / size, math.isqrt(tokens))  # [n, P]
        own = np.stack([cover.max(0)[None].repeat(len(cover), 0)] + [cover] * 4, axis=1)  # [n, 5, P]
        image = to_network(torch.tensor(scene.image)[None]).to(prompt.device)
        with model.record_attention() as maps:
            model.read_branches(model.encode(image), prompt, (locs + language.loc0)[None])
        seen = [looks(w.float(), tokens, tokens + len(prompt), len(locs)) for w in maps.values()]
        seen = torch.stack(seen, dim=3).cpu().numpy()  # [n, 5, N, L, P]
        mass = seen.sum(-1)
        share = seen / mass[..., None].clip(1e-12)
        entropies.append((-share * np.log2(share.clip(1e-12))).sum(-1))
        on_image.append(mass)
        inside.append((share * own[:, :, None, None]).sum(-1))
        areas.append(own.mean(-1))
    means = [np.concatenate(x).mean(0).transpose(2, 1, 0) for x in (entropies, on_image, inside)]
    return *means, np.concatenate(areas).mean(0)


# ---- without some heads ------------------------------------------------------------------------------------


def mean_ap(args: argparse.Namespace, device: str, heads: list[tuple[int, int]], data: Path) -> float:
    model = PaliGemma.from_pretrained(args.model, dtype=torch.float32, device=device)
    knock_out(model, heads)
    return evaluate_scenes(closed_set_decoder(model), data, f"without {len(heads)}")["AP"]


def draw(entropy: np.ndarray, inside: np.ndarray, area: np.ndarray, rows: list, file: Path) -> None:
    """Two panels: inside the box and entropy by token, each head a line; mAP against heads knocked out."""
    with new_figure(file, 11, 3.6) as figure:
        left, middle, right = figure.subplots(1, 3)
        panels = (left, entropy, "entropy, bits"), (middle, inside, "share inside the box")
        for axes, values, label in panels:
            for head in values.reshape(-1, len(PREDICTED)):
                axes.plot(PREDICTED, head, color="#bbbbbb", linewidth=0.8)
            axes.plot(PREDICTED, values.mean((0, 1)), "o-", color=RIGHT, label="mean of all heads")
            axes.set(xlabel="token that is predicted", ylabel=label)
        middle.plot(PREDICTED, area, ":", color=WRONG, label="the same everywhere")
        left.set_title("Attention to the image")
        middle.set_title("and to the object")
        counts = [row["heads"] for row in rows]
        right.plot(counts, [row["best"] for row in rows], "o-", color=WRONG, label="those most on the object")
        right.plot(counts, [row["others"] for row in rows], "o-", color=MIDDLE, label="others")
        right.set(xlabel="heads knocked out", ylabel="mAP", ylim=(0, None), title="Without some heads")
        for axes in (left, middle, right):
            axes.legend(fontsize=9)


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--model", default="nano", help="a folder, a hub id, or nano: any that does closed-set detection")
    add("--set", choices=list(HELD_OUT_SETS), default="same", help="held-out practice set")
    add("--count", type=positive, default=500, help="scenes of it")
    add("--out", type=Path, metavar="FILE", help="draw it there")
    add("--seed", type=not_negative, default=0, help="of which other heads are knocked out")
    add_device_argument(options)
    args = options.parse_args()
    if args.out:
        check_plot(args.out)
    device = usable_device(args.device)
    model = PaliGemma.from_pretrained(args.model, dtype=torch.float32, device=device)
    entropy, on_image, inside, area = where_it_looks(model, args.set, args.count)
    columns = {"entropy, bits": entropy.mean((0, 1)), "on the image": on_image.mean((0, 1))}
    columns |= {"of that in the box": inside.mean((0, 1)), "of the best head": inside.max((0, 1))}
    columns |= {"area of the box": area}
    table = [{name: f"{values[i]:.2f}" for name, values in columns.items()} for i in range(len(PREDICTED))]
    print_table([{"predicts": token} | row for token, row in zip(PREDICTED, table)])
    # How much a head is on the object after y0, when it is settled which object it is.
    on_object = inside[..., 1:].mean(-1)  # [L, N]
    order = [divmod(int(i), on_object.shape[1]) for i in on_object.flatten().argsort()[::-1]]
    rows = []
    with drawn_scenes(args.count, args.set, model.config.vision.image_size) as data:
        usual = mean_ap(args, device, [], data)
        rows.append(dict(heads=0, best=usual, others=usual))
        for k in (k for k in KNOCKED_OUT if 2 * k <= len(order)):
            others = np.random.default_rng(args.seed).permutation(np.array(order[k:]))[:k].tolist()
            found = [mean_ap(args, device, heads, data) for heads in (order[:k], others)]
            rows.append(dict(heads=k, best=found[0], others=found[1]))
    titles = "knocked out", "most on the object: mAP", "others: mAP"
    table = [(str(row["heads"]), f"{row['best']:.3f}", f"{row['others']:.3f}") for row in rows]
    print_table([dict(zip(titles, cells)) for cells in table])
    print("most on the object, layer.head: " + " ".join(f"{layer}.{head}" for layer, head in order[:8]))
    if args.out:
        draw(entropy, inside, area, rows, args.out)


if __name__ == "__main__":
    run(main, __file__)

"""What detection costs, and what it loses when it costs less: two tables with a plot each.

    python infer/tradeoffs.py early-stop --out media/early_stop.png    # mAP and time of --early-stop, on nano
    python infer/tradeoffs.py growth --out media/growth.png    # time against groups, batch, image tokens

Needs matplotlib. The growth runs on random weights of nano's form, for images of several sizes.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from infer.benchmark import seconds  # noqa: E402
from infer.evaluate import evaluate  # noqa: E402
from model import PaliGemma  # noqa: E402
from model.decoding.closed_set import (  # noqa: E402
    ClosedSet,  # noqa: E402
    EarlyStop,
    GroupDecoder,
)
from model.decoding.detector import Detector, Selection  # noqa: E402
from model.io.hub import resolve  # noqa: E402
from model.io.image import load_image, square, to_network  # noqa: E402
from model.io.tokenizer import Tokenizer  # noqa: E402
from train.practice.scenes import write_coco  # noqa: E402

BATCH = 16
TIMED = 60  # images, one at a time
PATIENCE = 1, 2
NOISE = 0.5, 0.8, 0.95, 0.99


def nano() -> tuple[PaliGemma, ClosedSet]:
    folder = resolve("nano")
    model = PaliGemma.from_pretrained(str(folder), dtype=torch.float32)
    return model, ClosedSet.of(model.config, Tokenizer(folder))


def early_stop(count: int, repeats: int, axes) -> None:
    """mAP on held-out scenes, boxes decoded an image, and images a second, one at a time."""
    model, language = nano()
    print(f"{'noise >':>8}{'in a row':>10}{'mAP':>8}{'boxes':>8}{'images/s':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "instances.json"
        write_coco(data.parent, count, "same", model.config.vision.image_size)
        files = sorted((data.parent / "images").iterdir())[:TIMED]
        size = model.config.vision.image_size
        few = torch.stack([to_network(square(load_image(file), size)) for file in files])
        stops = [None] + [EarlyStop(noise, patience) for patience in PATIENCE for noise in NOISE]
        decoders = [GroupDecoder(model, language, early_stop=stop) for stop in stops]
        times = [[] for _ in stops]
        for _ in range(repeats):  # in turns, as the machine's speed drifts
            for decoder, taken in zip(decoders, times, strict=True):
                taken.append(seconds(lambda call=decoder: [call(image[None]) for image in few], "cpu"))
        curves = {}
        for stop, decoder, taken in zip(stops, decoders, times, strict=True):
            ap = evaluate(
                Detector(decoder, Selection(nms_iou=0.5)), data, data.parent / "images", BATCH, "same"
            )["AP"]
            boxes = decoder(few).live.sum(-1).float().mean().item()
            noise, patience = (stop.noise, stop.patience) if stop else ("-", "-")
            print(f"{noise:>8}{patience:>10}{ap:8.3f}{boxes:8.1f}{len(few) / min(taken):10.1f}", flush=True)
            curves.setdefault(patience, []).append((len(few) / min(taken), ap))
    for patience, points in curves.items():
        label = "no early stop" if patience == "-" else f"stop behind {patience} in a row"
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes.set(xlabel="images a second, one at a time", ylabel="mAP, held-out scenes")
    axes.legend()


def growth(repeats: int, figure) -> None:
    """Seconds of a call, each of three quantities varied alone: groups, images, image tokens."""
    model, language = nano()
    size, every = model.config.vision.image_size, figure.subplots(1, 3)

    def measure(model, batch=1, groups=12):
        decoder, side = GroupDecoder(model, language, groups), model.config.vision.image_size
        images = torch.rand(batch, 3, side, side)
        decoder(images)
        return min(seconds(lambda: decoder(images), "cpu") for _ in range(repeats))

    def larger(side):
        config = replace(model.config, vision=replace(model.config.vision, image_size=side))
        return PaliGemma(config).eval()

    curves = {
        "groups": {groups: measure(model, groups=groups) for groups in (1, 3, 6, 12, 24, 51)},
        "images a batch": {batch: measure(model, batch=batch) for batch in (1, 2, 4, 8, 16, 32)},
        "image tokens": {(s // 16) ** 2: measure(larger(s)) for s in (size, 224, 320, 448, 640)},
    }
    for axes, (name, curve) in zip(every, curves.items(), strict=True):
        print(f"{name}: " + ", ".join(f"{x} {1000 * y:.0f} ms" for x, y in curve.items()))
        axes.plot(list(curve), [1000 * y for y in curve.values()], "o-")
        axes.set(xlabel=name, ylabel="milliseconds", xlim=(0, None), ylim=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["early-stop", "growth"])
    parser.add_argument("--out", type=Path, required=True, help="the plot, a PNG file")
    parser.add_argument("--count", type=int, default=1000, help="scenes of early-stop")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing, of which the fastest counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    figure = plt.figure(figsize=(6, 4) if args.what == "early-stop" else (11, 3.2), layout="constrained")
    if args.what == "early-stop":
        early_stop(args.count, args.repeats, figure.subplots())
    else:
        growth(args.repeats, figure)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()

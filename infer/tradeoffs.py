"""What detection costs, and what it loses when it costs less: tables, and plots of two of them.

    python infer/tradeoffs.py early-stop --out media/early_stop.png    # mAP and time of --early-stop, on nano
    python infer/tradeoffs.py growth --out media/growth.png    # mAP and time of both forms of decoding
    python infer/tradeoffs.py head    # a choice among the ids that a position allows, three ways
    python infer/tradeoffs.py layouts    # the products of a layer, with its matrices laid out in each way
    python infer/tradeoffs.py seam    # nano's prefill before, during and after its attention is recorded

growth uses random weights of nano's form where images are of another size than nano's. The three ways of
head, on random hidden states: "full", the logits of the whole vocabulary with those not allowed masked;
"slice", the allowed rows alone, in plain PyTorch (model/decoding/closed_set.py); "kernel", the same fused in
two launches, on a GPU only (model/decoding/head_kernel.py). On a GPU each is timed inside a CUDA graph, as in
the decode loop.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from infer.lib.measuring import print_table, seconds
from infer.lib.options import add_device_argument, usable_device
from infer.lib.plots import check_plot, new_figure
from infer.lib.scenes import drawn_scenes, evaluate_scenes
from model import PaliGemma
from model.config import COCO_CLASSES, VARIANTS
from model.decoding import layouts as kinds
from model.decoding.batches import network_images
from model.decoding.closed_set import GROUP, ClosedSet, EarlyStop, GroupDecoder, Head, capture_graph
from model.decoding.generate import GREEDY
from model.decoding.parallel import ParallelDecoder
from model.gemma import Block
from model.io.hub import NANO
from model.io.image import load_image
from model.io.tokenizer import LOCS
from model.io.weights import DTYPES, load_config
from train.run.program import parser, positive, run

# early-stop
TIMED = 60  # images, one at a time
# head
LOC0, CLASS0, CAP = 256_000, 7, 30.0  # official
ALLOWED = [(LOC0, LOC0 + LOCS)] * (GROUP - 1) + [(CLASS0, CLASS0 + len(COCO_CLASSES) + 1)]
WIDTHS = {"nano": 160, "3B": 2304}
VOCABULARY = 257_216


def load_nano() -> tuple[PaliGemma, ClosedSet]:
    model = PaliGemma.from_pretrained("nano", dtype=torch.float32)
    return model, ClosedSet.of(model.config, model.tokenizer)


# ---- early stop --------------------------------------------------------------------------------------------


def early_stop(args: argparse.Namespace) -> None:
    """mAP on held-out scenes, boxes decoded for an image, and images a second, one at a time."""
    check_plot(args.out)
    model, language = load_nano()
    stops = [None] + [EarlyStop(noise, patience) for patience in args.patience for noise in args.noise]
    decoders = [GroupDecoder(model, language, early_stop=stop) for stop in stops]
    with drawn_scenes(args.count, "same", model.config.vision.image_size) as data:
        files = sorted((data.parent / "images").iterdir())[:TIMED]
        images = network_images(model, [load_image(file) for file in files])

        def one_at_a_time(decoder: GroupDecoder) -> None:
            for image in images:
                decoder(image[None])

        times = [[] for _ in stops]
        for _ in range(args.repeats):  # in turns, as the machine's speed drifts
            for decoder, taken in zip(decoders, times, strict=True):
                taken.append(seconds(partial(one_at_a_time, decoder), "cpu"))
        rows, curves = [], {}
        for stop, decoder, taken in zip(stops, decoders, times, strict=True):
            ap = evaluate_scenes(decoder, data, "same")["AP"]
            boxes = decoder(images).live.sum(-1).float().mean().item()
            noise, patience = (str(stop.noise), str(stop.patience)) if stop else ("-", "-")
            row = {"noise >": noise, "in a row": patience, "mAP": f"{ap:.3f}", "boxes": f"{boxes:.1f}"}
            rows.append(row | {"images/s": f"{len(images) / min(taken):.1f}"})
            curves.setdefault(patience, []).append((len(images) / min(taken), ap))
    print_table(rows)
    with new_figure(args.out, 6, 4) as figure:
        axes = figure.subplots()
        for patience, points in curves.items():
            label = "no early stop" if patience == "-" else f"stop after {patience} in a row"
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(xlabel="images a second, one at a time", ylabel="mAP, held-out scenes", title="Early stop")
        axes.legend()


# ---- growth ------------------------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> None:
    """Of both forms of decoding: mAP on held-out scenes against the number of boxes, and milliseconds of a
    call against boxes, images and image tokens, each varied alone."""
    check_plot(args.out)
    model, language = load_nano()
    forms = {"in sequence": (GroupDecoder, 12), "in parallel": (ParallelDecoder, model.config.branches)}

    def decoder_of(form: str, model: PaliGemma, boxes: int | None) -> GroupDecoder | ParallelDecoder:
        make, usual = forms[form]
        return make(model, language, boxes or usual)

    def mean_ap(form: str, boxes: int) -> float:
        return evaluate_scenes(decoder_of(form, model, boxes), data, form)["AP"]

    def measure(form: str, boxes: int | None = None, batch: int = 1, model: PaliGemma = model) -> float:
        decoder, side = decoder_of(form, model, boxes), model.config.vision.image_size
        images = torch.rand(batch, 3, side, side)
        decoder(images)  # warms up: makes the cache
        return 1000 * min(seconds(partial(decoder, images), "cpu") for _ in range(args.repeats))

    def resized(tokens: int) -> PaliGemma:
        return PaliGemma(model.config.override(image_size=sides[tokens])).eval()

    sides = {(side // model.config.vision.patch_size) ** 2: side for side in args.sides}
    panels = [
        ("boxes", "mAP", args.groups, mean_ap),
        ("boxes", "milliseconds", args.groups, measure),
        ("images a batch", "milliseconds", args.batch_size, lambda form, n: measure(form, batch=n)),
        ("image tokens", "milliseconds", sides, lambda form, n: measure(form, model=resized(n))),
    ]
    scenes = drawn_scenes(args.count, "same", model.config.vision.image_size)
    with scenes as data, new_figure(args.out, 9, 6) as figure:
        for axes, (x, y, points, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            # The forms take turns at each point, as the machine's speed drifts.
            rows = [[value(form, point) for form in forms] for point in points]
            for form, values in zip(forms, zip(*rows, strict=True), strict=True):
                shown = ", ".join(f"{point} {v:.3g}" for point, v in zip(points, values, strict=True))
                print(f"{y} against {x}, {form}: {shown}", flush=True)
                label = form if x == "boxes" else f"{forms[form][1]} boxes {form}"
                axes.plot(list(points), values, "o-", label=label)
            title = f"{y} against {x}".replace("milli", "Milli")
            axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None), title=title)
            axes.legend()


# ---- the head ----------------------------------------------------------------------------------------------


class TiedHead(nn.Module):
    """What a head needs of a decoder: the embedding and the cap."""

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype, device: str):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype, device=device)
        self.config = argparse.Namespace(final_cap=CAP)

    def logits(self, hidden: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        logits = nn.functional.linear(hidden, self.embed.weight[first:last]).float()
        return torch.tanh(logits / CAP) * CAP


def three_ways(decoder: TiedHead, hidden: Tensor, slot: int) -> dict:
    """{name: a function without arguments that chooses an id} for a slot of the group."""
    uniform = torch.rand(len(hidden), device=hidden.device)
    first, last = ALLOWED[slot]
    mask = torch.full((decoder.embed.num_embeddings,), -torch.inf, device=hidden.device)
    mask[first:last] = 0
    how = dict(allowed=ALLOWED, noise_feedback=False, sampling=GREEDY)
    functions = {
        "full": lambda: torch.softmax(decoder.logits(hidden) + mask, dim=-1).max(-1),
        "slice": partial(Head(decoder, **how), hidden, slot, uniform),
    }
    if hidden.is_cuda:
        from model.decoding.head_kernel import FusedHead

        functions["kernel"] = partial(FusedHead(decoder, **how), hidden, slot, uniform)
        functions = {name: capture_graph(function, lambda: None) for name, function in functions.items()}
    return functions


@torch.inference_mode()
def head(args: argparse.Namespace) -> None:
    """Microseconds of choosing an id, median, for coordinates and classes."""
    device = usable_device(args.device)
    print(f"microseconds, {args.dtype}, {device}, torch {torch.__version__}")
    rows = []
    for name in args.widths:
        decoder = TiedHead(WIDTHS[name], VOCABULARY, DTYPES[args.dtype], device)
        for batch in args.batch_size:
            hidden = torch.randn(batch, WIDTHS[name], device=device, dtype=DTYPES[args.dtype])
            for slot, what in ((0, "1,024 coordinates"), (4, "81 classes")):
                row = {"": f"{name}, batch {batch}, {what}"}
                for way, function in three_ways(decoder, hidden, slot).items():
                    row[way] = f"{1e6 * median(seconds(function, device) for _ in range(args.repeats)):.0f}"
                rows.append(row)
    print_table(rows)


# ---- layouts -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def layouts(args: argparse.Namespace) -> None:
    """Milliseconds of the seven products of a layer for so many rows of x, its matrices laid out in every way
    that this CPU has, and the largest relative error. In turns; the fastest counts."""
    torch.set_num_threads(args.threads)
    config = load_config(NANO) if args.model == "nano" else VARIANTS[args.model]
    plain = [module.bfloat16() for module in Block(config.text).modules() if type(module) is nn.Linear]
    ways = {"bfloat16, plain": plain, "float32, plain": [copy.deepcopy(linear).float() for linear in plain]}
    made = [kinds.PackedLinear] * kinds.cpu_has_bfloat16() + [kinds.Int8Linear]
    made += [kinds.HalfLinear, kinds.PlanesLinear] * kinds.has_fbgemm()
    ways |= {layout.__name__: [layout(linear) for linear in plain] for layout in made}

    def products(name: str) -> list[Tensor]:
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        return [module(x.to(dtype)) for module, x in zip(ways[name], inputs)]

    table = {name: {"layout": name, "error": ""} for name in ways}
    for rows in args.rows:
        inputs = [torch.randn(rows, linear.in_features).bfloat16() for linear in plain]
        exact = [x.double() @ linear.weight.T.double() for x, linear in zip(inputs, plain)]
        turns = [
            {name: seconds(partial(products, name), "cpu") for name in ways} for _ in range(args.repeats)
        ]
        for name, row in table.items():
            row[f"{rows} rows, ms"] = f"{1e3 * min(turn[name] for turn in turns):.1f}"
            off = [(y - right).norm() / right.norm() for y, right in zip(products(name), exact)]
            row["error"] = f"{max(off):.4f}"
    print_table(list(table.values()), left=("layout",))


# ---- seam --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def seam(args: argparse.Namespace) -> None:
    """Milliseconds of nano's prefill: of a model that never was recorded, one that was, and while it is. In
    turns; medians."""
    (never, language), (once, _) = load_nano(), load_nano()
    images, prompt = torch.zeros(1, 3, 128, 128), torch.tensor([language.prompt])
    cache = never.new_cache(1, prompt.shape[1])

    def prefill(model: PaliGemma) -> None:
        model.prefill(model.encode(images), prompt, cache)

    def recorded() -> None:
        with once.record_attention():
            prefill(once)

    ways = {"never recorded": partial(prefill, never), "recorded before": partial(prefill, once)}
    ways["while recording"] = recorded
    times = [{name: seconds(way, "cpu") for name, way in ways.items()} for _ in range(args.repeats + 5)][5:]
    print_table([{name: f"{1e3 * median(row[name] for row in times):.2f}" for name in ways}])


COMMANDS = {"early-stop": early_stop, "growth": growth, "head": head, "layouts": layouts, "seam": seam}


def main() -> None:
    options = parser(__doc__)
    commands, parsers = options.add_subparsers(required=True, metavar=" | ".join(COMMANDS)), {}
    for name, function in COMMANDS.items():
        parsers[name] = commands.add_parser(name, description=function.__doc__)
        parsers[name].set_defaults(function=function)
    for name in ("early-stop", "growth"):
        add = parsers[name].add_argument
        add("--out", type=Path, required=True, metavar="FILE", help="the plot, a PNG file")
        add("--repeats", type=positive, default=5, help="of each timing; the fastest counts")
    add = parsers["early-stop"].add_argument
    add("--count", type=positive, default=1000, help="held-out scenes")
    add("--noise", nargs="+", type=float, default=[0.5, 0.8, 0.95, 0.99], metavar="P", help="as --early-stop")
    add("--patience", nargs="+", type=positive, default=[1, 2], metavar="K", help="as --early-stop")
    add = parsers["growth"].add_argument
    add("--count", type=positive, default=1000, help="held-out scenes, for mAP")
    what = "boxes decoded, groups or branches"
    add("--groups", nargs="+", type=positive, default=[1, 3, 6, 12, 24, 51], help=what)
    add("--batch-size", nargs="+", type=positive, default=[1, 2, 4, 8, 16, 32])
    add("--sides", nargs="+", type=positive, default=[128, 224, 320, 448, 640], help="of images, in pixels")
    add = parsers["head"].add_argument
    add_device_argument(parsers["head"])
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--batch-size", nargs="+", type=positive, default=[1, 32])
    add("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="hidden states of which model")
    add("--repeats", type=positive, default=50, help="of each timing; their median counts")
    add = parsers["layouts"].add_argument
    add("--model", default="paligemma2-3b-224", choices=["nano", *VARIANTS], help="whose layer")
    add("--rows", nargs="+", type=positive, default=[1, 24, 51, 261], help="261: a prefill at 224 px")
    add("--threads", type=positive, default=1)
    add("--repeats", type=positive, default=5, help="of each, in turns")
    parsers["seam"].add_argument("--repeats", type=positive, default=500, help="of each, in turns")
    args = options.parse_args()
    torch.manual_seed(0)
    args.function(args)


if __name__ == "__main__":
    run(main, __file__)

"""From options to a model or a detector: what every program of infer/ shares."""

import argparse
import difflib
from importlib.util import find_spec
from pathlib import Path

import torch

from model import PaliGemma
from model.config import PaliGemmaConfig
from model.decoding.closed_set import ClosedSet, EarlyStop, GroupDecoder, Head
from model.decoding.detector import Asker, Detector, OpenSetDetector, Selection
from model.decoding.generate import Sampling
from model.decoding.masks import MaskCodec
from model.decoding.packing import load_for_decoding
from model.io.hub import CODEC, OFFICIAL_CODEC, codec_file, resolve
from model.io.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PER_CALL = 8  # classes of an open-set prompt
LONGEST = 200  # tokens of an answer in words


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose and load a model."""
    add = parser.add_argument
    add("--model", default="nano", help="a folder, a hub id (owner/name or owner/name@revision), or nano")
    add("--adapter", metavar="PATH_OR_ID", help="a LoRA adapter for it, as PEFT or fit.py writes them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 for small models on a CPU")
    add("--attn-cap", type=float, help="soft cap of the attention scores instead of the checkpoint's; 0: off")
    add("--final-cap", type=float, help="soft cap of the logits instead of the checkpoint's; 0: off")
    add("--int8", action="store_true", help="the decoder's matrices in 8 bits: half the memory")
    add("--compile", action="store_true", help="torch.compile the decoder: slow to start, meant for a GPU")
    add("--seed", type=int, default=0, help="of torch's random numbers; greedy decoding draws none")


def usable_device(name: str) -> str:
    """A device that torch can use here; of auto, a GPU if there is one. Raises ValueError if it cannot.

    A GPU given by its number becomes the current one, for whatever asks for no device of its own: new
    streams, Triton's launches, the clocks of a benchmark.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); try --device cpu") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return name


def load_model(args: argparse.Namespace) -> tuple[PaliGemma, Tokenizer]:
    """What the arguments ask for. Raises ValueError for anything a user can get wrong."""
    torch.manual_seed(args.seed)
    device = usable_device(args.device)
    folder = resolve(args.model)
    overrides = dict(attn_cap=args.attn_cap, final_cap=args.final_cap)
    model = load_for_decoding(
        folder,
        dtype=DTYPES.get(args.dtype),
        device=device,
        adapter=args.adapter,
        int8=args.int8,
        packed=not args.compile,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    if args.compile:
        model.decoder.compile()
    return model, Tokenizer(folder)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of how tokens are chosen."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that together reach p")
    add("--eos-offset", type=float, default=0.0, help="make the end less likely: longer answers")


def sampling_options(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.eos_offset)


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of answers with boxes: which are kept, and how much is done at a time."""
    add = parser.add_argument
    add(
        "--nms-iou",
        type=float,
        default=0.5,
        help="of two boxes of a class that overlap more, the better stays; 1: off",
    )
    add("--min-size", type=float, default=0.0, help="drop boxes with a side shorter than this, in pixels")
    add("--max-tokens", type=int, help=f"longest answer in words (default: {LONGEST})")
    add(
        "--batch-size",
        type=int,
        help="pictures decoded together (default: what memory holds, at most 16 or 64)",
    )


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--codec", metavar="FILE", help=f"weights of the mask codec (default: {CODEC} or {OFFICIAL_CODEC} "
        "beside the model's)")  # fmt: skip
    add(
        "--check-codec",
        action="store_true",
        help=f"accept only big_vision's {OFFICIAL_CODEC}, by its sha256",
    )


def load_codec(args: argparse.Namespace) -> MaskCodec:
    """Raises ValueError if there is none, or it is not what it should be."""
    return MaskCodec.load(args.codec or codec_file(args.model), args.check_codec)


def add_detection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the model and of decoding, for every detection program."""
    add_model_arguments(parser)
    add_selection_arguments(parser)
    add_sampling_arguments(parser)
    add = parser.add_argument
    add("--classes", metavar='"A ; B"', help="open-set detection of these; all: of all the model's classes")
    add("--classes-per-call", type=int, help=f"of an open-set prompt, at most (default: {PER_CALL})")
    add("--groups", type=int, help="boxes decoded an image instead of the checkpoint's number")
    add(
        "--noise-feedback",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="feed the noise token back where it is likeliest, instead of the best class",
    )
    add(
        "--early-stop",
        nargs=2,
        type=float,
        metavar=("P", "K"),
        help="stop an image behind K boxes in a row whose noise probability exceeds P",
    )


def class_names(text: str, config: PaliGemmaConfig) -> tuple[str, ...]:
    """The names of --classes "A ; B". Raises ValueError if there are none, or the model cannot know one."""
    if text.strip() == "all":
        return config.classes
    names = ()
    for name in (" ".join(part.split()) for part in text.split(";")):
        if name and name.casefold() not in map(str.casefold, names):
            names += (name,)
    if not names:
        raise ValueError(f'--classes {text!r} names nothing; write --classes "cat ; traffic light"')
    for name in names:
        if "<" in name or ">" in name:
            raise ValueError(f"--classes: {name!r} cannot be asked for: it has < or > in it")
        if name not in config.classes and not config.open_vocabulary:
            near = difflib.get_close_matches(name, config.classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "an official checkpoint may"
            raise ValueError(
                f"{name!r} is none of the {len(config.classes)} classes that this model knows; {hint}"
            )
    return names


def check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def head_for(model: PaliGemma) -> type:
    """The fused head on a GPU that has Triton (Windows has none), the plain one elsewhere."""
    if model.projector.weight.is_cuda and find_spec("triton"):
        from model.decoding.head_kernel import FusedHead

        return FusedHead
    return Head


OPEN_ONLY = ("classes_per_call", "max_tokens", "top_k", "eos_offset")  # options
CLOSED_ONLY = ("groups", "noise_feedback", "early_stop")


def load_detector(args: argparse.Namespace, score_threshold: float) -> Detector | OpenSetDetector:
    """The detector that the arguments ask for. Raises ValueError for anything a user can get wrong."""
    check_counts(args, "groups", "batch_size", "classes_per_call", "max_tokens")
    how, selection = sampling_options(args), Selection(score_threshold, args.nms_iou, args.min_size)
    open_set = args.classes is not None
    for name in CLOSED_ONLY if open_set else OPEN_ONLY:
        if getattr(args, name):
            mode = "closed-set detection, without" if open_set else "open-set detection, with"
            raise ValueError(f"--{name.replace('_', '-')} is of {mode} --classes")
    model, tokenizer = load_model(args)
    if open_set:
        names = class_names(args.classes, model.config)
        ask = Asker(model, tokenizer, args.max_tokens or LONGEST, how, args.seed)
        return OpenSetDetector(ask, names, args.classes_per_call or PER_CALL, selection)
    stop = EarlyStop(*args.early_stop) if args.early_stop else None
    language = ClosedSet.of(model.config, tokenizer)
    decode = GroupDecoder(
        model, language, args.groups, args.noise_feedback, how, early_stop=stop, head=head_for(model)
    )
    return Detector(decode, selection)


def check_json(file: Path | None) -> None:
    """Raise ValueError, before the work, if --json FILE cannot be written after it."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--json {file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")

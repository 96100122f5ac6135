"""The options that the programs share, and the model or detector that they ask for."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from model import PaliGemma
from model.config import FORMS
from model.decoding.closed_set import EarlyStop
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.decoding.generate import Prompter, Sampling
from model.decoding.masks import MaskCodec
from model.decoding.open_set import CLASSES_PER_PROMPT, MAX_ANSWER_TOKENS, OpenSetDetector, class_names
from model.decoding.packing import load_for_decoding
from model.io.hub import OFFICIAL_CODEC, codec_file, resolve
from model.io.names import shown
from model.io.npz import variant_of
from model.io.weights import DTYPES
from model.io.writing import explain, write_json
from train.run.program import add_seam_arguments, complain, positive

# Options that have no effect in the other mode, and are refused there.
OPEN_SET_ONLY = ("classes_per_call", "max_tokens", "top_k", "eos_offset")
CLOSED_SET_ONLY = ("groups", "noise_feedback", "early_stop", "branches", "mirror")
SEQUENCE_ONLY = ("groups", "noise_feedback", "early_stop", "temperature")

STDOUT = Path("-")  # of --json: standard output


# ---- the options -------------------------------------------------------------------------------------------


def add_model_arguments(options: argparse.ArgumentParser) -> None:
    """The options that choose and load a model."""
    add = options.add_argument
    add("--model", default="nano", help="a folder, a hub id (owner/name or owner/name@revision), or nano")
    add("--adapter", metavar="PATH_OR_ID", help="a LoRA adapter for it, as PEFT or fit.py writes them")
    add("--image-size", type=positive, help="pixels a side, not the checkpoint's: fine-tune at it first")
    add_device_argument(options)
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 for small models on a CPU")
    add("--attn-cap", type=float, help="soft cap of the attention scores instead of the checkpoint's; 0: off")
    add("--final-cap", type=float, help="soft cap of the logits instead of the checkpoint's; 0: off")
    add_seam_arguments(add)
    add("--int8", action="store_true", help="the decoder's matrices in 8 bits: half the memory")
    add("--compile", action="store_true", help="torch.compile decoding steps: slow to start, meant for a GPU")
    add("--seed", type=int, default=0, help="of torch's random numbers; greedy decoding draws none")


def add_device_argument(options: argparse.ArgumentParser) -> None:
    note = "auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)"
    options.add_argument("--device", default="auto", help=note)


def add_sampling_arguments(options: argparse.ArgumentParser) -> None:
    """The options of how tokens are chosen."""
    add = options.add_argument
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that together reach p")
    add("--eos-offset", type=float, default=0.0, help="make the end less likely: longer answers")


def add_codec_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the mask codec."""
    add = options.add_argument
    add("--codec", metavar="FILE", help="weights of the mask codec (default: those beside the model's)")
    add("--check-codec", action="store_true", help=f"accept only big_vision's {OFFICIAL_CODEC} (by sha256)")


def add_detection_arguments(options: argparse.ArgumentParser, masks: bool = False) -> None:
    """All options that load_detector reads, except --score-threshold. masks: those of a segmenter."""
    add_model_arguments(options)
    add_sampling_arguments(options)
    add = options.add_argument
    add("--nms-iou", type=float, default=0.5, help="of two boxes that overlap more, keep the better; 1: off")
    add("--min-size", type=float, default=0.0, help="drop boxes with a side shorter than this, in pixels")
    add("--max-tokens", type=positive, help=f"most tokens of a text answer (default: {MAX_ANSWER_TOKENS})")
    add("--batch-size", type=positive, help="pictures decoded together (default: what memory holds)")
    if masks:
        add("--classes", required=True, metavar='"A ; B"', help="all: all the model's classes")
        add_codec_arguments(options)
        return
    add("--classes", metavar='"A ; B"', help="open-set detection of these; all: of all the model's classes")
    add("--classes-per-call", type=positive, help=f"asked for in one prompt (default: {CLASSES_PER_PROMPT})")
    add("--decode", choices=FORMS,
        help="one box after the other, or all in five steps (default: as it was taught)")  # fmt: skip
    add("--branches", type=positive, help="boxes decoded in parallel (default: as the checkpoint says)")
    add("--mirror", action="store_true", help="read every mirror image, too: better boxes in twice the time")
    add("--groups", type=positive, help="boxes decoded for an image instead of the checkpoint's number")
    feedback = dict(action=argparse.BooleanOptionalAction, default=False)
    add("--noise-feedback", **feedback, help="feed the noise token back where it is likeliest")
    stop = "end an image's answer after K boxes in a row whose noise probability exceeds P"
    add("--early-stop", nargs=2, type=float, metavar=("P", "K"), help=stop)


# ---- what they write ---------------------------------------------------------------------------------------


def check_output(file: Path | None, option: str = "--json", read: Iterable[Path | str | None] = ()) -> None:
    """Complain before the work if its result could not be written afterwards, or would replace what the
    program reads. option: that names the file."""
    if file is None or file == STDOUT:
        return
    fault = None
    if file.is_dir():
        fault = "is a folder"
    elif not file.parent.is_dir():
        fault = "its folder does not exist"
    elif file.exists() and not file.is_file():  # renaming another file to its name would remove the device
        fault = "is a FIFO, a socket or a device"
    elif os.path.realpath(file) in map(os.path.realpath, filter(None, read)):
        fault = "is one of the files that are read"
    if fault:
        raise ValueError(f"{option} {shown(file)}: {fault}")
    with explain(f"{option} {shown(file)} cannot be written", OSError):
        tempfile.TemporaryFile(dir=file.parent).close()


def write_output(value: dict | list, file: Path, quiet: bool = False) -> None:
    """Write the JSON file that an option names, and say so if there was one, or print it."""
    if file == STDOUT:
        print(json.dumps(value, indent=2))
        return
    replaced = file.exists()
    write_json(value, file)
    if replaced and not quiet:
        print(f"{shown(file)}: replaced")


@contextlib.contextmanager
def tables(file: Path | None, quiet: bool = False) -> Iterator[None]:
    """Inside, what is printed goes to stderr if `file`, of --json, is stdout, and nowhere if quiet."""
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif file == STDOUT:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def check_folder(folder: Path, overwrite: bool) -> None:
    """Complain before the work if `make_folder` could not make a folder of results."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {shown(folder)}: is not a folder")
    if folder.name in ("", "..") and not overwrite and is_taken(folder):  # no name to put a number after
        raise ValueError(f"--out {folder}: has files in it; name another folder, or give --overwrite")


def make_folder(wanted: Path, overwrite: bool) -> Path:
    """The folder of the results, made if it is not there. One that has anything in it is left alone unless
    it may be overwritten: the results are then in wanted2, wanted3, ..., as users of ultralytics expect."""
    folder, number = wanted, 2
    while not overwrite and is_taken(folder):
        folder, number = wanted.with_name(f"{wanted.name}{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_taken(folder: Path) -> bool:
    return any(folder.iterdir()) if folder.is_dir() else os.path.lexists(folder)


# ---- what they ask for -------------------------------------------------------------------------------------


def usable_device(name: str) -> str:
    """A device that torch can use here; for auto, a GPU if there is one.

    A GPU given by its number becomes the current one, for whatever asks for no device of its own: new
    streams, Triton's launches, the clocks of a benchmark.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {name} cannot be used here, try --device cpu", RuntimeError, AssertionError):
        torch.empty(1, device=name).item()  # on "meta" there is nothing to read
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return name


def load_model(args: argparse.Namespace) -> PaliGemma:
    """The model that the options ask for, ready to decode."""
    with explain(f"--seed {args.seed} is none that torch takes", ValueError, RuntimeError):
        torch.manual_seed(args.seed)
    device = usable_device(args.device)
    if (source := resolve(args.model)).suffix == ".npz":
        print(f"{shown(source)}: {variant_of(source)}, by its shapes")
    overrides = dict(image_size=args.image_size, attn_cap=args.attn_cap, final_cap=args.final_cap)
    return load_for_decoding(
        source,
        dtype=DTYPES.get(args.dtype),
        device=device,
        adapter=args.adapter,
        int8=args.int8,
        compiled=args.compile,
        attention=args.attention,
        attention_in=args.attention_in,
        mask=args.mask,
        **{name: value for name, value in overrides.items() if value is not None},
    )


def note_closed_set_only(model: PaliGemma) -> None:
    """Say so on stderr if a model that is to answer in words may have forgotten them."""
    if model.config.closed_set_only:
        complain(
            "this checkpoint was last trained on closed-set detection alone and may have forgotten other "
            "answers: without --classes, detect.py asks for what it was taught; for words, take its base",
            sys.argv[0],
        )


def load_codec(args: argparse.Namespace) -> MaskCodec:
    return MaskCodec.load(args.codec or codec_file(args.model), args.check_codec)


def sampling_options(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.eos_offset)


def load_detector(args: argparse.Namespace, masks: bool = False) -> ClosedSetDetector | OpenSetDetector:
    """The detector that the options ask for: closed-set, or open-set with --classes. masks: open-set, with
    masks."""
    sampling = sampling_options(args)
    selection = Selection(args.score_threshold, args.nms_iou, args.min_size)
    if not masks:
        check_mode(args, args.decode)
    codec = load_codec(args) if masks else None
    model = load_model(args)
    if args.classes is None:
        form = args.decode or model.config.answers
        check_mode(args, form)
        options = sequence_options(args, sampling) if form == "sequence" else {}
        decoder = closed_set_decoder(model, form, args.branches, **options)
        return ClosedSetDetector(decoder, selection, args.mirror)
    prompter = Prompter(model, args.max_tokens or MAX_ANSWER_TOKENS, sampling, args.seed)
    names = class_names(args.classes, model.config)
    note_closed_set_only(model)
    # Checkpoints are trained to segment one class at a time.
    per_prompt = 1 if masks else args.classes_per_call or CLASSES_PER_PROMPT
    return OpenSetDetector(prompter, names, per_prompt, selection, codec)


def sequence_options(args: argparse.Namespace, sampling: Sampling) -> dict:
    """The arguments of GroupDecoder, which decodes in sequence, that ParallelDecoder does not have."""
    stop = EarlyStop(*args.early_stop) if args.early_stop else None
    own = dict(groups=args.groups, noise_feedback=args.noise_feedback)
    return own | dict(sampling=sampling, early_stop=stop)


def check_mode(args: argparse.Namespace, form: str | None) -> None:
    """Refuse options that have no effect: those of open-set detection without --classes, of closed-set
    detection with it, and of the other form of closed-set answers. form: of FORMS; None: not known yet."""
    open_set = args.classes is not None
    for name in CLOSED_SET_ONLY if open_set else OPEN_SET_ONLY:
        if getattr(args, name):
            mode = "closed-set detection, without" if open_set else "open-set detection, with"
            raise ValueError(f"--{name.replace('_', '-')} is for {mode} --classes")
    if open_set and args.decode:
        raise ValueError(f"--decode {args.decode} is for closed-set detection, without --classes")
    for name in {"parallel": SEQUENCE_ONLY, "sequence": ("branches",)}.get(form, ()):
        if getattr(args, name):
            other = "sequence" if form == "parallel" else "parallel"
            raise ValueError(f"--{name.replace('_', '-')} is for --decode {other}")

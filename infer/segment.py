"""Cut objects out of pictures.

    python infer/segment.py --image photo.jpg --classes "cat ; dog"
    python infer/segment.py --image a.jpg folder/ --classes all --json out.json --out drawn/

Each class is asked for on its own, "segment cat"; an answer has a box and 16 codes for each object, and the
mask codec (model/decoding/masks.py) turns the codes into a mask. Writes each picture with its masks and boxes
to --out, and each mask as a picture of its own; --json has them in COCO's run-length encoding too. The exit
code is 0 only if every picture was processed.
"""

import argparse

from infer import detect
from infer.lib.options import (
    LONGEST,
    add_codec_arguments,
    add_model_arguments,
    add_sampling_arguments,
    add_selection_arguments,
    check_counts,
    class_names,
    load_codec,
    load_model,
    sampling_options,
)
from model.decoding.detector import Asker, OpenSetDetector, Selection


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    detect.add_file_arguments(parser)
    parser.add_argument("--classes", required=True, metavar='"A ; B"', help="all: all the model's classes")
    add_codec_arguments(parser)
    add_model_arguments(parser)
    add_selection_arguments(parser)
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def load_segmenter(args: argparse.Namespace, score_threshold: float) -> OpenSetDetector:
    """The segmenter that the arguments ask for. Raises ValueError for anything a user can get wrong."""
    check_counts(args, "batch_size", "max_tokens")
    how, selection = sampling_options(args), Selection(score_threshold, args.nms_iou, args.min_size)
    codec = load_codec(args)
    model, tokenizer = load_model(args)
    ask = Asker(model, tokenizer, args.max_tokens or LONGEST, how, args.seed)
    names = class_names(args.classes, model.config)
    return OpenSetDetector(ask, names, selection=selection, codec=codec)


def main() -> None:
    detect.main(arguments, load_segmenter, "segment.py")


if __name__ == "__main__":
    main()

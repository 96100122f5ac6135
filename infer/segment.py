"""Cut objects out of pictures.

    python infer/segment.py --image photo.jpg --classes "cat ; dog"
    python infer/segment.py --image a.jpg folder/ --classes all --json out.json --out drawn/

Each class is asked for on its own, "segment cat"; an answer has a box and 16 codes for each object, and the
mask codec (model/mask_codec.py) turns the codes into a mask. Writes each picture with its masks and boxes to
--out, and each mask as a picture of its own; --json has them in COCO's run-length encoding too. The exit code
is 0 only if every picture was processed.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from infer import detect
from infer.detector import KEEP_ALL, Detections, Selection, fitting_batch
from infer.loading import (
    add_choosing_arguments,
    add_codec_arguments,
    add_model_arguments,
    add_selection_arguments,
    check_counts,
    choosing,
    class_names,
    load_codec,
    load_model,
)
from infer.open_set import Asker, scored
from model.mask_codec import MaskCodec


class Segmenter:
    """Has the form of infer.detector.Detector; its Detections have masks."""

    def __init__(
        self,
        ask: Asker,
        codec: MaskCodec,
        classes: Sequence[str],
        selection: Selection = KEEP_ALL,
    ):
        self.ask, self.codec, self.classes, self.selection = ask, codec, tuple(classes), selection

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Cut out in a batch of upright RGB images of any sizes."""
        asked = [(i, f"segment {name}") for i in range(len(images)) for name in self.classes]
        said, count = self.ask(images, asked), len(self.classes)
        return [self._select(image, said[i * count : (i + 1) * count]) for i, image in enumerate(images)]

    def fitting_batch(self) -> int:
        """Images that are worth reading together."""
        return fitting_batch(self.ask.model, 8, self.ask.max_tokens)

    def _select(self, image: Image.Image, said) -> Detections:
        """said: the answer to each class. An object without its 16 codes is passed over."""
        rows = [
            (one.box.locs, one.score, label, one.box.seg)
            for label, (tokens, log_p) in enumerate(said)
            for one in scored(self.ask.tokenizer, tokens, log_p, [self.classes[label]])
            if one.box.seg
        ]
        locs, scores, labels, codes = zip(*rows) if rows else ((), (), (), ())
        masks = self.codec.decode(torch.tensor(codes)).numpy() if rows else []
        raw = np.array([token for tokens, _ in said for token in tokens], np.int64)
        columns = np.array(locs).reshape(-1, 4), np.array(scores), np.array(labels, np.int64)
        return self.selection(image, *columns, raw, masks)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    detect.add_file_arguments(parser)
    parser.add_argument("--classes", required=True, metavar='"A ; B"', help="all: all the model's classes")
    add_codec_arguments(parser)
    add_model_arguments(parser)
    add_selection_arguments(parser)
    add_choosing_arguments(parser)
    return parser.parse_args(argv)


def load_segmenter(args: argparse.Namespace, score_threshold: float) -> Segmenter:
    """The segmenter that the arguments ask for. Raises ValueError for anything a user can get wrong."""
    check_counts(args, "batch_size", "max_tokens")
    how, selection = choosing(args), Selection(score_threshold, args.nms_iou, args.min_size)
    codec = load_codec(args)
    model, tokenizer = load_model(args)
    ask = Asker(model, tokenizer, args.max_tokens, how, args.seed)
    return Segmenter(ask, codec, class_names(args.classes, model.config), selection)


def main() -> None:
    detect.main(arguments, load_segmenter, "segment.py")


if __name__ == "__main__":
    main()

"""Cut objects out of pictures.

    python infer/segment.py --image photo.jpg --classes "cat ; dog"
    python infer/segment.py --image a.jpg folder/ --classes all --json out.json --out drawn/

Each class is asked for on its own, "segment cat"; an answer has a box and 16 codes for each object, and the
mask codec (model/decoding/masks.py) turns the codes into a mask. Writes each picture with its masks and boxes
to --out, and each mask as a picture of its own; --json has them in COCO's run-length encoding too. The exit
code is 0 only if every picture was processed.
"""

from infer.detect import add_file_arguments, detect_files
from infer.lib.options import add_detection_arguments
from train.run.program import parser, run


def main() -> int:
    options = parser(__doc__)
    add_file_arguments(options)
    add_detection_arguments(options, masks=True)
    return detect_files(options.parse_args(), masks=True)


if __name__ == "__main__":
    run(main, __file__)

"""A page for the browser: drop a picture, see what the model finds, and move the filters.

    python -m pip install -e ".[demo]"                             # once: gradio
    python infer/demo.py                                           # the shipped nano, http://127.0.0.1:7860
    python infer/demo.py --model FOLDER_OR_HUB_ID --adapter PATH_OR_ID --port 8000

Only this computer can open it unless --host says otherwise; then everybody who reaches the port can.
Nothing is sent anywhere. Ctrl-C ends it.
"""

import os
import tempfile
from functools import partial
from importlib.util import find_spec

from PIL import Image

from infer.lib.options import add_codec_arguments, add_model_arguments, load_codec, load_model
from infer.live.app import build, launch
from infer.live.asking import Asker
from model.decoding.detections import Selection
from model.io.hub import NANO
from train.practice.scenes import SPRITES, make_scene
from train.run.program import parser, positive, run

SCENES, SCENE_SIDE = 4, 384  # how many are offered; pixels


def practice_scenes() -> list[tuple[str, Image.Image]]:
    """Names and pictures of the first held-out scenes; none where the drawings are not installed."""
    if not SPRITES.is_dir():
        return []
    scenes = (make_scene(seed, SCENE_SIDE, "same").image for seed in range(SCENES))
    return [(f"scene-{seed}.png", Image.fromarray(image)) for seed, image in enumerate(scenes)]


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: all of this computer's")
    add("--port", type=positive, help="default: the first free one from 7860")
    add("--score-threshold", type=float, default=0.6, help="where the slider stands at first")
    add("--nms-iou", type=float, default=0.5, help="where the slider stands at first")
    add_codec_arguments(options)
    add_model_arguments(options)
    args = options.parse_args()
    if (args.port or 0) > 65535:
        raise ValueError(f"--port {args.port}: the last one is 65535")
    selection = Selection(args.score_threshold, args.nms_iou)
    if find_spec("gradio") is None:
        raise ValueError('gradio is not installed; install it with: python -m pip install -e ".[demo]"')
    model = load_model(args)
    # Uploads and what gradio writes vanish with the program. It reads its settings when it is imported.
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= dict(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        is_nano = model.folder.resolve() == NANO.resolve()
        page = build(Asker(model, partial(load_codec, args)), practice_scenes(), selection, is_nano)
        launch(page, args.host, args.port)


if __name__ == "__main__":
    run(main, __file__)

"""Look inside one answer: where it looked, what it weighed, and what each part was worth, in one HTML file.

    python infer/explain.py --image photo.jpg                                   # boxes of all classes
    python infer/explain.py --image photo.jpg --decode sequence --out look.html
    python infer/explain.py --image photo.jpg --prompt "caption en"             # an answer in words

Open the file in a browser; it needs no network and no server.
"""

from pathlib import Path

from infer.inside.closed_set import staying
from infer.inside.look import look_inside
from infer.inside.page import page
from infer.lib.options import add_model_arguments, check_output, load_model
from model.config import FORMS
from model.decoding.closed_set import PROMPT
from model.decoding.detections import Selection
from model.io.image import load_image
from model.io.names import shown
from model.io.writing import write_lines
from train.run.program import parser, positive, run


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--image", type=Path, required=True, metavar="FILE")
    add("--prompt", default=PROMPT, help="what is asked; without it, the boxes of all classes")
    add("--decode", choices=FORMS, help="one box after the other, or all in five steps (default: as taught)")
    add("--branches", type=positive, help="boxes decoded in parallel")
    add("--groups", type=positive, help="boxes decoded in sequence")
    add("--max-tokens", type=positive, default=100, help="most tokens of an answer in words")
    add("--score-threshold", type=float, default=0.6, help="boxes with a lower score are not kept")
    add("--nms-iou", type=float, default=0.5, help="of two boxes that overlap more, the better is kept")
    add("--out", type=Path, default=Path("explain.html"), metavar="FILE", help="the page")
    add_model_arguments(options)
    args = options.parse_args()
    check(args)
    selection, image = Selection(args.score_threshold, args.nms_iou), load_image(args.image)
    how = dict(prompt=args.prompt.strip(), selection=selection, max_tokens=args.max_tokens)
    how |= dict(decode=args.decode, branches=args.branches, groups=args.groups)
    data = look_inside(load_model(args), image, args.image.name, **how)
    write_lines([page(data)], args.out)
    said = data.get("text") or ", ".join(
        f"{box['label']} {box['score']:.2f}"
        for box in staying(data["boxes"])
        if box["score"] >= args.score_threshold
    )
    print(f"{shown(args.image)}: {said or 'nothing found'}")
    print(f"{shown(args.out)}: {args.out.stat().st_size / 1e6:.1f} MB, for a browser")


def check(args) -> None:
    """Refuse what cannot be, before the model is loaded."""
    check_output(args.out, "--out", [args.image])
    if not args.prompt.strip():
        raise ValueError('--prompt is empty; write --prompt "caption en", or leave it out')
    if args.prompt.strip() != PROMPT and (args.decode or args.branches or args.groups):
        raise ValueError("--decode, --branches and --groups are for boxes of all classes, without --prompt")
    if args.compile:
        raise ValueError("--compile: compiled layers cannot be looked into")


if __name__ == "__main__":
    run(main, __file__)

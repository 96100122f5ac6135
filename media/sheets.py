"""Draw the sheets of the READMEs: the first ten scenes of two held-out sets, and nano's answers about them.

python media/sheets.py    # writes detections, unseen_vendor, open_set, segmentation and answers.jpg
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.lib.draw import draw_boxes, framed
from model import Detector
from model.config import COCO_CLASSES
from model.decoding.detections import Detections
from train.practice.scenes import make_scene
from train.practice.sentences import QUESTIONS, answer_prompt
from train.practice.tasks import caption, things_of

HERE = Path(__file__).parent
SCENES, ACROSS = 10, 5
TILE, GAP = 300, 12  # pixels of the sheets
GOOD, BAD, INK = "#00693e", "#b3261e", "#222222"
ABSENT = "zebra", "toaster", "kite", "pizza"  # asked for beside what is there


def drawn(image: Image.Image, found: Detections) -> Image.Image:
    captions = [f"{label} {score:.2f}" for label, score, _ in found]
    return draw_boxes(image, found.boxes, captions, found.class_ids, found.masks)


def sheet(name: str, pictures: list[Image.Image], texts: list[list[tuple[str, str]]] | None = None) -> None:
    """Rows of pictures, each with lines of (text, colour) below it."""
    font = ImageFont.load_default(13)
    texts = texts or [[]] * len(pictures)
    texts = [[line for text in lines for line in wrapped(*text, font)] for lines in texts]
    height = TILE + GAP + 18 * max(map(len, texts))
    size = ACROSS * (TILE + GAP) + GAP, -(-len(pictures) // ACROSS) * height + GAP
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x, y = GAP + i % ACROSS * (TILE + GAP), GAP + i // ACROSS * height
        canvas.paste(framed(picture.resize((TILE, TILE), Image.Resampling.LANCZOS)), (x, y))
        for row, (text, colour) in enumerate(lines):
            pen.text((x, y + TILE + 4 + 18 * row), text, font=font, fill=colour)
    canvas.save(HERE / name, quality=82)


def wrapped(text: str, colour: str, font) -> list[tuple[str, str]]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= TILE else [*lines, word]
    return [(line, colour) for line in lines]


def said(answer: str, right: str) -> tuple[str, str]:
    """A line of (text, colour): an answer, and whether it is right, in words too as not all see colours."""
    return (f"{answer} (right)", GOOD) if answer == right else (f"{answer} (wrong: it is {right})", BAD)


def main() -> None:
    nano = Detector.from_pretrained("nano", device="cpu")
    scenes = {split: [make_scene(i, 128, split) for i in range(SCENES)] for split in ("same", "vendor")}
    images = {split: [Image.fromarray(scene.image) for scene in of] for split, of in scenes.items()}
    for name, split in (("detections.jpg", "same"), ("unseen_vendor.jpg", "vendor")):
        sheet(name, [drawn(image, nano(image)) for image in images[split]])

    opened, cut, asked, segmented, words = [], [], [], [], []
    for i, (scene, image) in enumerate(zip(scenes["same"], images["same"], strict=True)):
        present = list(dict.fromkeys(COCO_CLASSES[label] for label in scene.labels))
        names = present[:2] + [next(name for name in ABSENT if name not in present)]
        opened.append(drawn(image, nano(image, classes=names)))
        asked.append([("detect " + " ; ".join(names), INK)])
        cut.append(drawn(image, nano(image, classes=present[:1], masks=True)))
        segmented.append([(f"segment {present[0]}", INK)])

        rng, lines = np.random.default_rng([i, 2]), []
        prompt, right = caption(rng, scene)
        lines += [(prompt, INK), said(nano.model.generate(image, prompt), right)]
        questions = [q for question in QUESTIONS.values() if (q := question(rng, things_of(scene)))]
        for k in rng.choice(len(questions), 2, replace=False):
            question, right = questions[k]
            answer = nano.model.generate(image, answer_prompt(question))
            lines += [(question, INK), said(answer, right)]
        words.append(lines)
    sheet("open_set.jpg", opened, asked)
    sheet("segmentation.jpg", cut, segmented)
    sheet("answers.jpg", images["same"], words)


if __name__ == "__main__":
    main()

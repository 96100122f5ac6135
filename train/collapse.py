"""Whether a detector has collapsed: it answers most pictures alike, or with nothing, whatever they show."""

from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO

from model.decoding.boxes import areas, iou

FEW = 4  # pictures: of fewer, nothing is said
ALIKE_IOU, COMPARED = 0.9, 3  # of boxes that are the same; the best boxes of each answer, which are compared
WHOLE = 0.8  # of a picture: what fills it is in the same place in all pictures
SAMPLE = 50  # answers that are compared with each other
REMEDY = (
    "it may have collapsed: take OUT/best of its run, or train again with more --steps, another --lr, "
    "or all weights instead of --lora (train/README.md, What a run says)"
)

# Boxes [n, 4] in shares of the picture's sides, best first; classes [n].
Answer = tuple[np.ndarray, np.ndarray]


def collapse(answers: Sequence[Answer], truth: Sequence[Answer] | None = None) -> str:
    """A warning if most answers are the same or empty, or "".

    truth: the objects of the same pictures. Pictures without any then say nothing, and answers may be alike
    where the objects are. Without it, empty answers are as good as any: there may be nothing to find.
    """
    if truth is not None:
        answers = [answer for answer, objects in zip(answers, truth, strict=True) if len(objects[0])]
        truth = [objects for objects in truth if len(objects[0])]
    count = len(answers)
    if count < FEW:
        return ""
    empty = sum(not len(boxes) for boxes, _ in answers)
    if truth is not None and 2 * empty > count:
        what = f"no boxes in {empty} of {count} pictures with objects"
        return f"{what}: the model has not learned them, or {REMEDY}"
    step = -(-count // SAMPLE)
    same = most_alike(answers[::step])
    looked = len(answers[::step])
    if 2 * same > looked and (truth is None or 2 * most_alike(truth[::step]) <= looked):
        return f"the same boxes in {same} of {looked} pictures: the model does not look at them, {REMEDY}"
    return ""


def most_alike(answers: Sequence[Answer]) -> int:
    """How many answers are like one of them, itself among them, at most. Empty ones are like none."""
    best = [(boxes[:COMPARED], classes[:COMPARED]) for boxes, classes in answers if len(boxes)]
    best = [one for one in best if areas(one[0]).min() < WHOLE]
    return max((sum(alike(one, other) for other in best) for one in best), default=0)


def alike(one: Answer, other: Answer) -> bool:
    """Whether each box has one of its class in the other answer, in nearly the same place."""
    same = (iou(one[0], other[0]) >= ALIKE_IOU) & (one[1][:, None] == other[1])
    return bool(same.any(1).all() and same.any(0).all())


def collapse_of_set(coco: COCO, results: list[dict]) -> str:
    """The same of results in COCO's format and the objects of their set."""

    def by_image(records: Sequence[dict]) -> list[Answer]:
        boxes, classes = {i: [] for i in coco.imgs}, {i: [] for i in coco.imgs}
        for record in sorted(records, key=lambda record: -record.get("score", 0)):
            boxes[record["image_id"]].append(record["bbox"])
            classes[record["image_id"]].append(record["category_id"])
        return [in_shares(coco.imgs[i], boxes[i], classes[i]) for i in coco.imgs]

    truth = [record for record in coco.dataset["annotations"] if not record["iscrowd"]]
    return collapse(by_image(results), by_image(truth))


def in_shares(image: dict, boxes: list, classes: list) -> Answer:
    """Boxes [x, y, width, height] in pixels of an image, which need not say its size."""
    x, y, width, height = np.array(boxes, float).reshape(-1, 4).T
    size = np.array([image.get("width", 1), image.get("height", 1)] * 2)
    return np.stack((x, y, x + width, y + height), axis=1) / size, np.array(classes)

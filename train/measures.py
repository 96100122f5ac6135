"""How boxes and answers in words are scored.

Boxes: COCO's average precision and recall, computed by pycocotools, and the calibration of the scores.
Answers: exact match, CIDEr-D for captions, and the mean IoU of masks.
"""

import contextlib
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.decoding.boxes import locs_to_boxes, parse_answer
from model.decoding.detections import Detections
from model.decoding.masks import MaskCodec, from_rle, mask_iou, paste_mask
from model.io.tokenizer import LOCS
from train.data.jsonl import right_answers
from train.data.records import read_records

FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")  # in pycocotools' order
FIGURES += ("AR1", "AR10", "AR100", "AR small", "AR medium", "AR large")
CALIBRATION_BINS = 10
TASKS = {"answer": "question", "caption": "caption", "describe": "caption", "cap": "caption"}  # by first word
LONGEST_N_GRAM, LENGTH_SIGMA = 4, 6.0  # of CIDEr-D; sigma: how far a caption's length may be off, in words


# ---- boxes -------------------------------------------------------------------------------------------------


def read_coco(file: Path, images: Path | None = None) -> COCO:
    """A COCO annotation file, checked as for training, except that its images need no width and height.
    images: their folder, if it is to be checked."""
    categories, pictures, annotations = read_records(file, images, sizes=False)
    for number, record in enumerate(annotations.values(), start=1):
        record["id"] = number  # pycocotools takes 0 for "no match"
        if record["area"] is None:
            record["area"] = record["bbox"][2] * record["bbox"][3]
    return make_coco(pictures.values(), annotations.values(), categories.values())


def make_coco(images, annotations, categories) -> COCO:
    """pycocotools' data set from lists of records."""
    coco = COCO()
    coco.dataset = dict(images=list(images), annotations=list(annotations), categories=list(categories))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def without_images(coco: COCO, ids: Collection[int]) -> COCO:
    """The data set without some of its images and what is in them."""
    images = [record for record in coco.dataset["images"] if record["id"] not in ids]
    annotations = [record for record in coco.dataset["annotations"] if record["image_id"] not in ids]
    return make_coco(images, annotations, coco.dataset["categories"])


def category_ids(coco: COCO, classes: tuple[str, ...], file: Path) -> list[int]:
    """The file's category id for each class of the model, matched by name; -1 where the file has none."""
    by_name = {category["name"]: category["id"] for category in coco.dataset["categories"]}
    unknown = [name for name in by_name if name not in classes]
    if unknown:
        shown = ", ".join(unknown[:5])
        raise ValueError(f"{file} has categories that are not among the {len(classes)} to detect: {shown}")
    return [by_name.get(name, -1) for name in classes]


def to_results(found: Detections, image_id: int, ids: Sequence[int]) -> list[dict]:
    """An image's boxes in COCO's format. ids: the category id of each class of the model."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.class_ids.tolist(), strict=True)
    return [
        dict(image_id=image_id, category_id=ids[class_id], bbox=[x0, y0, x1 - x0, y1 - y0], score=score)
        for (x0, y0, x1, y1), score, class_id in rows
    ]


def run_cocoeval(coco: COCO, results: list[dict], use_classes: bool = True) -> COCOeval:
    """pycocotools' evaluation of results in COCO's format, without its printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            detected = coco.loadRes([dict(result) for result in results])  # it adds keys to what it gets
        else:  # loadRes cannot take an empty list
            detected = make_coco(coco.dataset["images"], [], coco.dataset["categories"])
        evaluation = COCOeval(coco, detected, "bbox")
        evaluation.params.useCats = int(use_classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def match_boxes(evaluation: COCOeval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, whether right at IoU 0.5, and image id of every box, each [n]; boxes in crowds are left out."""
    all_sizes = evaluation.params.areaRng[0]
    rows = [
        (score, match > 0, e["image_id"])
        for e in evaluation.evalImgs
        if e and e["aRng"] == all_sizes
        for score, match, ignored in zip(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0])
        if not ignored
    ]
    scores, right, images = zip(*rows) if rows else ((), (), ())
    return np.array(scores, float), np.array(right, bool), np.array(images)


def calibration_error(evaluation: COCOeval) -> tuple[float, list[dict]]:
    """Expected calibration error of the scores (a box is right at IoU 0.5), and the table it comes from."""
    scores, right, _ = match_boxes(evaluation)
    if not len(scores):
        return 0.0, []
    bins = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = []
    for b in np.unique(bins).tolist():
        inside = bins == b
        row = dict(bin=f"{b / CALIBRATION_BINS:.1f}-{(b + 1) / CALIBRATION_BINS:.1f}")
        row["boxes"] = int(inside.sum())
        row["mean_score"] = round(float(scores[inside].mean()), 4)
        row["right"] = round(float(right[inside].mean()), 4)
        table.append(row)
    error = sum(row["boxes"] * abs(row["mean_score"] - row["right"]) for row in table) / len(scores)
    return float(error), table


def fit_calibration(scores: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    """The PaliGemmaConfig.calibration that makes it likeliest that just these boxes are right. scores float
    [n], right bool [n]."""
    scores, right = torch.from_numpy(scores).clamp(1e-6, 1 - 1e-6), torch.from_numpy(right).double()
    features = torch.stack((scores.log(), -torch.log1p(-scores)), dim=1)  # [n, 2]
    logs, c = (torch.zeros(shape, dtype=torch.double, requires_grad=True) for shape in (2, ()))
    optimizer = torch.optim.LBFGS([logs, c], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ logs.exp() + c, right)
        value.backward()
        return value

    optimizer.step(loss)
    return (*logs.exp().tolist(), c.item())


# ---- answers in words --------------------------------------------------------------------------------------


def task_of(record: dict) -> str:
    """What a line of JSONL is measured as: "mask", "question", "caption" or "other"."""
    return "mask" if "mask" in record else TASKS.get(record["prefix"].split(" ")[0], "other")


def folded(text: str) -> str:
    """A text in the form in which answers are compared: case folded, with single spaces."""
    return " ".join(text.casefold().split())


def is_right(answer: str, record: dict) -> bool:
    """Whether an answer is one of the right ones of its line of JSONL."""
    return folded(answer) in map(folded, right_answers(record))


def judge_answers(
    records: list[dict], answers: list[str], codec: MaskCodec | None, bins: int = LOCS
) -> dict[str, dict]:
    """{task: figures} of the answers to lines of JSONL. Case and the number of spaces are ignored.

    figures: "lines"; of masks, "mean IoU"; of words, "exact", by "kinds" too if the lines have several; of
    captions, "CIDEr-D". codec, bins: see first_mask_iou.
    """
    by_task = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        by_task[task_of(record)].append((record, answer))
    figures = {}
    for task, pairs in by_task.items():
        figures[task] = dict(lines=len(pairs))
        if task == "mask":
            ious = [first_mask_iou(answer, from_rle(record["mask"]), codec, bins) for record, answer in pairs]
            figures[task]["mean IoU"] = round(sum(ious) / len(ious), 4)
            continue
        references = [right_answers(record) for record, _ in pairs]
        exact, kinds = [], defaultdict(list)
        for record, answer in pairs:
            exact.append(is_right(answer, record))
            kinds[record.get("kind", "others")].append(exact[-1])
        figures[task]["exact"] = round(sum(exact) / len(exact), 4)
        if task == "caption":
            figures[task]["CIDEr-D"] = round(cider_d([answer for _, answer in pairs], references), 3)
        if len(kinds) > 1:
            exact_of = {kind: round(sum(hits) / len(hits), 4) for kind, hits in kinds.items()}
            figures[task]["kinds"] = {k: dict(exact=x, lines=len(kinds[k])) for k, x in exact_of.items()}
    return figures


def first_mask_iou(answer: str, mask: np.ndarray, codec: MaskCodec, bins: int = LOCS) -> float:
    """IoU of an answer's first mask with the right one, bool [H, W]; 0 if it has none. bins: see
    locs_to_boxes."""
    found = first_mask(answer, mask.shape, codec, bins)
    return 0.0 if found is None else float(mask_iou(found, mask))


def first_mask(answer: str, shape: tuple[int, int], codec: MaskCodec, bins: int) -> np.ndarray | None:
    """An answer's first mask, bool [H, W], or None if its first object has none. shape: H, W."""
    objects = parse_answer(answer)
    if not objects or not objects[0].seg:
        return None
    height, width = shape
    box = locs_to_boxes(objects[0].locs, width, height, bins)
    decoded = codec.decode(torch.tensor(objects[0].seg)[None])[0].numpy()
    return paste_mask(decoded, box, width, height)


def cider_d(answers: list[str], references: list[list[str]]) -> float:
    """Mean CIDEr-D of captions, each against its references, 0 to 10 (arXiv 1411.5726).

    An answer is compared by the n-grams that it shares with a reference, weighted by how rare they are: by
    the number of images with the n-gram in one of their references.
    """
    reference_grams = [[n_grams(text) for text in texts] for texts in references]
    images_with = Counter(
        gram for texts in reference_grams for gram in {g for grams in texts for of_n in grams for g in of_n}
    )

    def weigh(grams: list[Counter]) -> list[dict]:
        """TF-IDF weights of the n-grams of each length."""

        def idf(gram: tuple[str, ...]) -> float:
            return math.log(len(references)) - math.log(max(1, images_with[gram]))

        return [{gram: count * idf(gram) for gram, count in of_n.items()} for of_n in grams]

    def similarity(a: dict, b: dict) -> float:
        """Cosine, in which repeating an n-gram more often than the reference does brings nothing."""
        norms = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        return sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b) / norms if norms else 0.0

    scores = []
    for answer, texts in zip(answers, reference_grams, strict=True):
        grams = n_grams(answer)
        for reference in texts:
            gap = sum(grams[0].values()) - sum(reference[0].values())  # in words
            of_n = [similarity(a, b) for a, b in zip(weigh(grams), weigh(reference), strict=True)]
            penalty = math.exp(-(gap**2) / (2 * LENGTH_SIGMA**2))
            scores.append(10 * sum(of_n) / LONGEST_N_GRAM * penalty / len(texts))
    return sum(scores) / len(answers)


def n_grams(text: str) -> list[Counter]:
    """Counts of the text's single words, of its pairs, and so on up to LONGEST_N_GRAM words."""
    words = re.findall(r"\w+", text.casefold())
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, LONGEST_N_GRAM + 1)]

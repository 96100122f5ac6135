"""How boxes and answers are measured: figures by hand, calibration, CIDEr-D, the IoU of masks."""

import json
from pathlib import Path

import pytest
import torch
from helpers import disc, edit_json
from pycocotools.coco import COCO

from model.decoding.boxes import format_answer
from model.decoding.masks import crop, tight_box, to_rle
from train import measures
from train.measures import cider_d, first_mask_iou, judge_answers

# ---- boxes -------------------------------------------------------------------------------------------------


def tiny_set(folder: Path, images: int) -> Path:
    """Two cats in image 1, of 20 x 20; the other images are empty."""
    boxes = [[0, 0, 20, 20], [50, 50, 20, 20]]
    annotations = [
        dict(id=i + 1, image_id=1, category_id=1, bbox=box, area=400, iscrowd=0)
        for i, box in enumerate(boxes)
    ]
    records = [dict(id=i + 1, file_name=f"{i}.png", width=99, height=99) for i in range(images)]
    data = dict(images=records, annotations=annotations, categories=[dict(id=1, name="cat")])
    (folder / "tiny.json").write_text(json.dumps(data))
    return folder / "tiny.json"


def test_figures_by_hand(tmp_path):
    """One object found exactly (0.9), a wrong box (0.8), one found with IoU 0.6 (0.7).

    At IoU 0.5 to 0.6: precision 1 up to recall 0.5 (51 of 101 points), then 2/3 (50 points). Above: 1 up to
    recall 0.5, then nothing.
    """
    coco = measures.read_coco(tiny_set(tmp_path, 1))
    boxes = [([0, 0, 20, 20], 0.9), ([0, 70, 20, 20], 0.8), ([50, 50, 20, 12], 0.7)]
    results = [dict(image_id=1, category_id=1, bbox=box, score=score) for box, score in boxes]
    found = dict(zip(measures.FIGURES, measures.run_cocoeval(coco, results).stats, strict=True))
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert found["AP50"] == pytest.approx(low) and found["AP75"] == pytest.approx(high)
    assert found["AP"] == pytest.approx((3 * low + 7 * high) / 10)  # 0.50, 0.55, 0.60; seven above
    assert found["AP small"] == pytest.approx(found["AP"]) and found["AP large"] == -1
    assert found["AR1"] == pytest.approx(0.5)
    assert found["AR100"] == found["AR10"] == found["AR small"] == pytest.approx((3 + 7 * 0.5) / 10)


def results_of(coco: COCO, score=0.9, shift=0, labels=None) -> list[dict]:
    """The set's own boxes as predictions."""
    return [
        dict(image_id=a["image_id"], category_id=labels or a["category_id"], score=score,
             bbox=[a["bbox"][0] + shift, *a["bbox"][1:]])
        for a in coco.dataset["annotations"]
    ]  # fmt: skip


def test_perfect_predictions(coco):
    """AP 1 for every size; results are not changed on the way."""
    data = measures.read_coco(coco)
    results = results_of(data)
    before = json.dumps(results)
    evaluation = measures.run_cocoeval(data, results)
    assert evaluation.stats[:6].tolist() == pytest.approx([1] * 6)
    assert json.dumps(results) == before


def test_imperfect_predictions(coco):
    """Nothing found; wrong classes count only with classes; boxes moved by a quarter of the smallest side."""
    data = measures.read_coco(coco)
    assert measures.run_cocoeval(data, []).stats[0] == 0
    mislabelled = results_of(data, labels=2)
    assert measures.run_cocoeval(data, mislabelled).stats[0] < 0.4
    assert measures.run_cocoeval(data, mislabelled, use_classes=False).stats[0] == pytest.approx(1)
    moved = measures.run_cocoeval(data, results_of(data, shift=5)).stats
    assert 0.3 < moved[0] < 0.9 and moved[1] == pytest.approx(1)


def test_calibration(coco):
    """By hand: scores of 0.95 (right, right), 0.65 (right, wrong) and 0.15 (wrong: the wrong class)."""
    data = measures.read_coco(coco)
    scores = [0.95, 0.95, 0.65]
    results = [dict(result, score=score) for result, score in zip(results_of(data), scores)]
    results.append(dict(image_id=2, category_id=3, bbox=[80, 80, 40, 40], score=0.65))
    results.append(dict(image_id=2, category_id=1, bbox=[5, 6, 30, 40], score=0.15))
    error, table = measures.calibration_error(measures.run_cocoeval(data, results))
    assert table == [
        dict(bin="0.1-0.2", boxes=1, mean_score=0.15, right=0.0),
        dict(bin="0.6-0.7", boxes=2, mean_score=0.65, right=0.5),
        dict(bin="0.9-1.0", boxes=2, mean_score=0.95, right=1.0),
    ]
    assert error == pytest.approx((1 * 0.15 + 2 * 0.15 + 2 * 0.05) / 5)
    assert measures.calibration_error(measures.run_cocoeval(data, [])) == (0.0, [])
    _, table = measures.calibration_error(measures.run_cocoeval(data, results_of(data, score=1.0)))
    assert table == [dict(bin="0.9-1.0", boxes=4, mean_score=1.0, right=1.0)]


def test_files_may_leave_out(coco):
    """What pycocotools needs and files need not have: areas, iscrowd, and ids from 1. Sizes stay out."""

    def leave_out(data):
        for i, record in enumerate(data["annotations"]):
            record["id"] = i
            del record["area"], record["iscrowd"]
        del data["images"][0]["width"], data["images"][0]["height"]

    edit_json(coco, leave_out)
    data = measures.read_coco(coco)
    assert [a["id"] for a in data.dataset["annotations"]] == [1, 2, 3, 4]
    assert [a["area"] for a in data.dataset["annotations"]] == [400, 2400, 13200, 1200]
    assert measures.run_cocoeval(data, results_of(data)).stats[0] == pytest.approx(1)
    assert "width" not in data.imgs[0] and data.imgs[1]["width"] == 128


def test_images_without_objects_count(tmp_path):
    """A box in an empty image is wrong; one that is surer than the right ones costs precision."""
    coco = measures.read_coco(tiny_set(tmp_path, 2))
    results = [
        dict(image_id=1, category_id=1, bbox=a["bbox"], score=0.5) for a in coco.dataset["annotations"]
    ]
    perfect = measures.run_cocoeval(coco, results)
    false = dict(image_id=2, category_id=1, bbox=[1, 1, 9, 9], score=0.9)
    evaluation = measures.run_cocoeval(coco, [*results, false])
    assert perfect.stats[0] == pytest.approx(1) and evaluation.stats[0] == pytest.approx(2 / 3)
    scores, right, images = measures.match_boxes(evaluation)
    assert sorted(zip(images.tolist(), scores.tolist(), right.tolist())) == [
        (1, 0.5, True), (1, 0.5, True), (2, 0.9, False)
    ]  # fmt: skip


def test_crowds_are_neither_right_nor_wrong(tmp_path):
    file = tiny_set(tmp_path, 1)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    coco = measures.read_coco(file)
    boxes = [[0, 0, 10, 10], [50, 50, 20, 20]]
    results = [dict(image_id=1, category_id=1, bbox=box, score=0.5) for box in boxes]
    scores, right, _ = measures.match_boxes(measures.run_cocoeval(coco, results))
    assert (scores.tolist(), right.tolist()) == ([0.5], [True])


# ---- answers -----------------------------------------------------------------------------------------------

MASK, MOVED = disc(120, 80, 50, 40, 20), disc(120, 80, 60, 45, 20)
ELSEWHERE = disc(120, 80, 100, 20, 8)


def answer(mask, codec) -> str:
    box = tight_box(mask)
    codes = codec.encode(torch.from_numpy(crop(mask, box))[None]).numpy()
    return format_answer(box[None], ["cat"], 120, 80, codes)


def test_cider_d():
    """10 for captions that are right, 0 for those that share nothing; figures of coco-caption's program."""
    right = [["a cat left of two dogs"], ["three people above a bus"], ["a red kite at the top left"]]
    assert cider_d([texts[0] for texts in right], right) == pytest.approx(10)
    assert cider_d(["zebra", "zebra", "zebra"], right) == 0
    said = ["a cat left of a dog", "two people above a bus", "a kite"]
    better = cider_d(["A cat, left of two dogs!", *said[1:]], right)
    assert 0 < cider_d(said, right) < better < 10
    # of coco-caption's own scorer (pycocoevalcap)
    assert cider_d(said, right) == pytest.approx(4.170767508276349)
    several = [right[0] + ["a cat and two dogs"], *right[1:]]
    assert cider_d(said, several) == pytest.approx(3.534315323953491)


def test_first_mask_iou(codec):
    said = answer(MASK, codec)
    assert first_mask_iou(said, MASK, codec) > 0.9
    assert first_mask_iou(f"{said} ; {answer(ELSEWHERE, codec)}", MASK, codec) == first_mask_iou(
        said, MASK, codec
    )
    assert first_mask_iou(said, MASK, codec, bins=1023) != first_mask_iou(said, MASK, codec)
    assert 0 < first_mask_iou(answer(MOVED, codec), MASK, codec) < 0.8
    assert first_mask_iou(answer(ELSEWHERE, codec), MASK, codec) == 0


def test_invalid_answers_score_nothing(codec):
    """Too few tokens, codes out of range, a box turned inside out."""
    said = answer(MASK, codec)
    locs, rest = said[:36], said[36:]
    for text in ("", "a cat", locs, said[: 36 + 15 * 8], said.replace("<seg", "<sag"), locs[9:] + rest):
        assert first_mask_iou(text, MASK, codec) == 0
    turned = locs[18:] + locs[:18] + rest
    assert first_mask_iou(turned, MASK, codec) == 0


def test_judge_answers(codec):
    records = [
        dict(image="a", prefix="answer en how many?", suffix="2", kind="how many"),
        dict(image="a", prefix="answer en how many?", suffix=["3", "three"], kind="how many"),
        dict(image="a", prefix="answer en where?", suffix="top left", kind="where"),
        dict(image="a", prefix="caption en", suffix="a cat left of two dogs"),
        dict(image="b", prefix="caption en", suffix="a bus and a zebra"),
        dict(image="a", prefix="segment cat", suffix="", mask=to_rle(MASK)),
        dict(image="b", prefix="segment cat", suffix="", mask=to_rle(MASK)),
    ]
    said = [
        "2",
        "Three",
        "top right",
        "a cat left of two dogs",
        "a bus",
        answer(MASK, codec),
        "none",
    ]
    records.append(dict(image="a", prefix="count the lines", suffix=["two  crossings", "2"]))
    figures = judge_answers(records, [*said, " Two crossings"], codec)
    assert figures["other"] == dict(lines=1, exact=1.0)
    assert figures["question"]["exact"] == 0.6667 and figures["question"]["lines"] == 3
    assert figures["question"]["kinds"] == {
        "how many": dict(exact=1.0, lines=2),
        "where": dict(exact=0.0, lines=1),
    }
    assert figures["caption"]["exact"] == 0.5 and 0 < figures["caption"]["CIDEr-D"] < 10
    assert 0.45 < figures["mask"]["mean IoU"] <= 0.5 and figures["mask"]["lines"] == 2

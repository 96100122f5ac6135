"""What is to be seen of a closed-set answer.

Axes: n boxes, R = 1,024 coordinates, C classes, D width.
"""

import numpy as np
import torch
from torch import Tensor

from infer.inside.page import pack_probabilities
from infer.inside.recording import check_room, logit_lens, recording, text_data
from infer.inside.what_if import is_cheap, what_if
from model import PaliGemma
from model.decoding.boxes import areas, iou, locs_to_boxes, nms
from model.decoding.closed_set import GROUP, Answer
from model.decoding.detections import Selection
from model.decoding.detector import closed_set_decoder
from model.decoding.generate import check_finite
from model.decoding.parallel import COORDINATES, peaks
from model.io.names import shown
from model.io.tokenizer import LOCS

SLOTS = "y0", "x0", "y1", "x1", "class"
SAME_BOX = 0.5  # IoU from which two boxes of a class are the same object


def closed_set(
    model: PaliGemma,
    images: Tensor,
    selection: Selection,
    decode: str | None = None,
    branches: int | None = None,
    groups: int | None = None,
) -> dict:
    """images [1, 3, S, S]; for the others see closed_set_decoder."""
    form = decode or model.config.answers
    sequence = form == "sequence"
    if groups and not sequence:
        raise ValueError(f"groups={groups} is for boxes in sequence")

    def new_decoder():
        return closed_set_decoder(model, form, branches, **({"groups": groups} if sequence else {}))

    decoder = new_decoder()
    language, found = decoder.language, decoder(images)
    boxes = boxes_of(found, language.classes, selection)
    prompt = torch.tensor(language.prompt, device=images.device)
    start, n, per_box = len(prompt), len(boxes), GROUP if sequence else COORDINATES  # tokens that are read
    check_room(model, start + n * per_box)
    image_tokens = model.encode(images)
    with recording(model) as seen:
        if sequence:
            answer = found.tokens[0]
            text = torch.cat((prompt, answer.flatten()))
            hidden = model.read(image_tokens, text[None], start)[0, start - 1 : -1].unflatten(0, (n, GROUP))
        else:
            answer = found.locs[0] + language.loc0
            end, inside = model.read_branches(image_tokens, prompt, answer[None])
            hidden = torch.cat((end[0].expand(n, 1, -1), inside[0]), dim=1)  # [n, 5, D]

    def probabilities(of: Tensor, first: int, count: int) -> np.ndarray:
        return model.decoder.logits(of, first, first + count).softmax(-1).cpu().numpy()

    coordinates = probabilities(hidden[:, :COORDINATES], language.loc0, LOCS)  # [n, 4, R]
    classes = probabilities(hidden[:, COORDINATES], language.class0, len(language.classes) + 1)  # [n, C + 1]
    for k, (box, locs) in enumerate(zip(boxes, found.locs[0].tolist())):
        # The text token that wrote each is the one before it; before a branch, that is the prompt's last one.
        rows = [start + per_box * k + i for i in range(-1, GROUP - 1)]
        rows[0] = rows[0] if sequence else start - 1
        texts = [*map(str, locs), box["label"]]
        box["tokens"] = [dict(text=t, slot=slot, row=row) for t, slot, row in zip(texts, SLOTS, rows)]
    names = [*map(shown, language.classes), "noise"]
    states = logit_lens(model, seen.states, image_tokens.shape[1], slice(language.class0, language.noise + 1))
    labels = [f"{SLOTS[i]} of {k + 1}" for k in range(n) for i in range(per_box)]
    data = {
        "form": form,
        "boxes": boxes,
        "names": names,
        "threshold": selection.score_threshold,
        "coordinates": pack_probabilities(coordinates, 16),
        "classes": pack_probabilities(classes, 16),
        "lens": {"names": names, "shown": found_classes(boxes, names), "values": pack_probabilities(states)},
        **text_data(model, seen, [*language.prompt, *answer.flatten().tolist()], start, labels,
            depth=None if sequence else COORDINATES),
    }  # fmt: skip
    if not sequence:
        at, mass = peaks(torch.from_numpy(coordinates[:1, 0]), n, decoder.reading.radius)
        data["peaks"] = [dict(at=a, mass=round(m, 4)) for a, m in zip(at[0].tolist(), mass[0].tolist())]

    def answer_again() -> list[dict]:
        # By a decoder of its own, as on a GPU the graph of another keeps the model as it was.
        return boxes_of(new_decoder()(images), language.classes, selection)

    changes = what_if(model, answer_again) if is_cheap(model) else []
    return data | {"what_if": [where | compare(boxes, others) for where, others in changes]}


def boxes_of(answer: Answer, classes: tuple[str, ...], selection: Selection) -> list[dict]:
    """Every box of an answer, kept or not, with the reason: "kept", "score", "empty" or the number of the
    better box that it is a double of."""
    scores, labels = answer.scores[0].cpu().numpy(), answer.labels[0].cpu().numpy()
    check_finite(np.isfinite(scores).all())
    boxes = locs_to_boxes(answer.locs[0].cpu().numpy(), 1, 1)
    good = np.flatnonzero((scores >= selection.score_threshold) & (areas(boxes) > 0))
    kept = good[nms(boxes[good], scores[good], labels[good], selection.nms_iou)]
    overlaps, found = iou(boxes, boxes), []
    for i, noise in enumerate(answer.noise[0].tolist()):
        fate = "kept" if i in kept else "empty" if areas(boxes[i]) <= 0 else "score"
        if i in good and fate != "kept":
            better = (labels[kept] == labels[i]) & (overlaps[kept, i] > selection.nms_iou)
            fate = int(kept[better.argmax()])
        numbers = dict(
            score=round(float(scores[i]), 4), noise=round(noise, 4), box=boxes[i].round(5).tolist()
        )
        found.append({"label": shown(classes[labels[i]]), "fate": fate, **numbers})
    return found


def found_classes(boxes: list[dict], names: list[str]) -> list[int]:
    """The classes of the boxes that are kept, best first, and noise."""
    best = sorted((box for box in boxes if box["fate"] == "kept"), key=lambda box: -box["score"])
    return [names.index(name) for name in dict.fromkeys(box["label"] for box in best)] + [len(names) - 1]


def compare(boxes: list[dict], others: list[dict]) -> dict:
    """What is no longer kept: [number of the box, best score that it has left or None]; and what is new."""

    def is_same(a: dict, b: dict) -> bool:
        return a["label"] == b["label"] and iou(np.array([a["box"]]), np.array([b["box"]]))[0, 0] >= SAME_BOX

    def kept(of: list[dict]) -> list[dict]:
        return [box for box in of if box["fate"] == "kept"]

    vanished = []
    for i, box in enumerate(boxes):
        if box["fate"] == "kept" and not any(is_same(box, other) for other in kept(others)):
            left = [other["score"] for other in others if is_same(box, other)]
            vanished.append([i, max(left, default=None)])
    new = [box for box in kept(others) if not any(is_same(box, other) for other in kept(boxes))]
    return {"vanished": vanished, "new": [f"{box['label']} {box['score']:.2f}" for box in new]}

"""What the page shows of a closed-set answer.

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
    """The page's data, a dict that JSON can hold. images [1, 3, S, S]; the others: see closed_set_decoder."""
    form = decode or model.config.answers
    sequence = form == "sequence"
    if groups and not sequence:
        raise ValueError(f"groups={groups} is for boxes in sequence")

    def new_decoder():
        return closed_set_decoder(model, form, branches, **({"groups": groups} if sequence else {}))

    decoder = new_decoder()
    language, found = decoder.language, decoder(images)
    boxes = boxes_of(found, language.classes, selection.nms_iou)
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
    read = [
        dict(text=token["text"], of=f"{token['slot']} of {box['label']}, box {k + 1}")
        for k, box in enumerate(boxes)
        for token in box["tokens"][:per_box]
    ]
    data = {
        "form": form,
        "boxes": boxes,
        "names": names,
        "threshold": selection.score_threshold,
        "coordinates": pack_probabilities(coordinates, 16),
        "classes": pack_probabilities(classes, 16),
        "lens": {"names": names, "shown": found_classes(boxes, names), "values": pack_probabilities(states)},
        **text_data(model, seen, list(language.prompt), read, depth=None if sequence else COORDINATES),
    }
    if not sequence:
        at, mass = peaks(torch.from_numpy(coordinates[:1, 0]), n, decoder.reading.radius)
        data["peaks"] = [dict(at=a, mass=round(m, 4)) for a, m in zip(at[0].tolist(), mass[0].tolist())]

    def answer_again() -> list[dict]:
        # By a decoder of its own, as on a GPU the graph of another keeps the model as it was.
        return boxes_of(new_decoder()(images), language.classes, selection.nms_iou)

    changes = what_if(model, answer_again) if is_cheap(model) else []
    return data | {"what_if": [where | compare(boxes, others) for where, others in changes]}


def boxes_of(answer: Answer, classes: tuple[str, ...], nms_iou: float) -> list[dict]:
    """Every box of an answer, in shares of the picture's sides. "fate": "stays" if only its score decides
    whether it is kept, "empty" if it has no area, or the number of the better box that suppresses it."""
    scores, labels = answer.scores[0].cpu().numpy(), answer.labels[0].cpu().numpy()
    check_finite(np.isfinite(scores).all())
    boxes = locs_to_boxes(answer.locs[0].cpu().numpy(), 1, 1)
    # Suppressed whatever their scores: a threshold only ends the list, which is in order of scores.
    real = np.flatnonzero(areas(boxes) > 0)
    stays = real[nms(boxes[real], scores[real], labels[real], nms_iou)]
    overlaps, found = iou(boxes, boxes), []
    for i, noise in enumerate(answer.noise[0].tolist()):
        fate = "stays" if i in stays else "empty"
        if i in real and i not in stays:
            better = (labels[stays] == labels[i]) & (overlaps[stays, i] > nms_iou)
            fate = int(stays[better.argmax()])
        numbers = dict(score=round(float(scores[i]), 4), noise=round(noise, 4))
        numbers["box"] = boxes[i].round(5).tolist()
        found.append({"label": shown(classes[labels[i]]), "fate": fate, **numbers})
    return found


def staying(boxes: list[dict]) -> list[dict]:
    """The boxes that NMS keeps, best first."""
    return sorted((box for box in boxes if box["fate"] == "stays"), key=lambda box: -box["score"])


def found_classes(boxes: list[dict], names: list[str]) -> list[int]:
    """Numbers of the classes that stay, best first, and of noise."""
    found = dict.fromkeys(names.index(box["label"]) for box in staying(boxes))
    return [*found, len(names) - 1]


def compare(boxes: list[dict], others: list[dict]) -> dict:
    """What another answer makes of the boxes that stay. "left": {number of a box: its best score there, or
    None if it is not found}; "new": [label, score] of the boxes that only the other has."""

    def is_same(a: dict, b: dict) -> bool:
        return a["label"] == b["label"] and iou(np.array([a["box"]]), np.array([b["box"]]))[0, 0] >= SAME_BOX

    left = {
        i: max((other["score"] for other in others if is_same(box, other)), default=None)
        for i, box in enumerate(boxes)
        if box["fate"] == "stays"
    }
    new = [box for box in staying(others) if not any(is_same(box, one) for one in staying(boxes))]
    return {"left": left, "new": [[box["label"], box["score"]] for box in new]}

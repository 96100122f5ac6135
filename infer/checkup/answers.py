"""What right answers cost a model, in nats a token, beside wrong ones and beside what their labels allow.

An answer that lists objects in any order is read as often as it has objects, each time with another one
first, and only the first one counts: so it costs the same whether the model was taught in sequence or in
parallel.

Axes: B batch, P image tokens, T text tokens, D width.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infer.checkup.finding import Finding
from model import PaliGemma
from model.decoding.batches import network_images
from model.decoding.boxes import box_prompt, boxes_to_locs, format_answer, parse_answer
from model.decoding.closed_set import ClosedSet
from model.io.image import load_image
from model.io.tokenizer import LOCS
from train.data.coco import CocoIndex
from train.data.jsonl import read_lines, right_answers

MOST_OBJECTS = 4  # of a picture
SURE = 2.0  # standard errors by which one loss must differ from another
MARGIN = 0.5  # nats a token that the right picture must save of a box: a model that finds it saves 1 or more


@dataclass(frozen=True)
class Case:
    """A picture [1, 3, S, S] as the network takes it, the ids of a prompt, and those of its answers: each
    object that may come first, or each right answer."""

    name: str
    image: Tensor
    prompt: list[int]
    answers: list[list[int]]


# ---- where they come from ----------------------------------------------------------------------------------


def network_image(model: PaliGemma, file: Path) -> Tensor | None:
    """[1, 3, S, S]; None for a picture that does not open, which check_data reports."""
    try:
        return network_images(model, [load_image(file)])
    except (ValueError, OSError):
        return None


def coco_cases(model: PaliGemma, index: CocoIndex, images: Path, count: int, words: bool) -> list[Case]:
    """Pictures of a COCO file that open, those with most objects first. words: ask for the classes by name
    ("detect cat ; dog"), else in the closed-set language."""
    language, tokenizer = ClosedSet.of(model.config, model.tokenizer), model.tokenizer
    cases = []
    for row in index.offsets.diff().clamp(max=MOST_OBJECTS).argsort(descending=True, stable=True).tolist():
        (boxes, labels), size = index.objects(row), index.sizes[row].tolist()
        names = [index.classes[label] for label in labels[:MOST_OBJECTS]]
        if len(cases) == count or not names:
            break
        if (image := network_image(model, images / index.name(row))) is None:
            continue
        if words:
            prompt = tokenizer.encode_prompt(box_prompt(list(dict.fromkeys(names))))
            texts = (format_answer(box[None], [name], *size) for box, name in zip(boxes, names))
            answers = [tokenizer.encode(text) for text in texts]
        else:
            prompt, locs = list(language.prompt), boxes_to_locs(boxes, *size) + language.loc0
            ids = [language.class0 + language.classes.index(name) for name in names]
            answers = [[*box, label] for box, label in zip(locs.tolist(), ids)]
        cases.append(Case(index.name(row), image, prompt, answers))
    return cases


def jsonl_cases(model: PaliGemma, file: Path, images: Path, count: int) -> list[Case]:
    """The first lines of a file whose pictures open, each of another picture."""
    cases, seen = [], set()
    for _, record in read_lines(file, images):
        if len(cases) == count:
            break
        name = record["image"]
        if name in seen or (image := network_image(model, images / name)) is None:
            continue
        seen.add(name)
        answers = right_answers(record)
        if len(answers) == 1 and len(parse_answer(answers[0])) > 1:
            answers = answers[0].split(" ; ")[:MOST_OBJECTS]
        ids = [model.tokenizer.encode(answer) or [model.config.eos] for answer in answers]
        prompt = model.tokenizer.encode_prompt(record["prefix"])
        cases.append(Case(name, image, prompt, ids))
    return cases


# ---- what they cost ----------------------------------------------------------------------------------------


def losses(
    model: PaliGemma, image_tokens: Tensor, prompt: list[int], answers: list[list[int]]
) -> list[Tensor]:
    """The cross-entropies [n] of the tokens of each answer, read one by one after image and prompt; where a
    location or a class is right, over the ids that the closed-set language allows there."""
    language, found = ClosedSet.of(model.config, model.tokenizer), []
    ranges = [(language.loc0, language.loc0 + LOCS), (language.class0, language.noise + 1)]
    for answer in answers:
        text = torch.tensor([prompt + answer], device=image_tokens.device)
        hidden = model.read(image_tokens, text, len(prompt))[0, len(prompt) - 1 : -1]  # [n, D]
        of_answer = []
        for state, token in zip(hidden, answer):
            first, last = next(((a, b) for a, b in ranges if a <= token < b), (0, None))
            of_answer.append(-model.decoder.logits(state, first, last).log_softmax(-1)[token - first])
        found.append(torch.stack(of_answer))
    return found


def compared(check: str, right: list[float], wrong: list[float], margin: float, meaning: str) -> Finding:
    """Whether right answers cost less than wrong ones, pair by pair, by more than the margin and by more than
    chance explains. With a negative margin they only must not cost more than chance explains."""
    if len(right) < 2:
        return Finding(check, None, where="too few answers")
    gap = torch.tensor(wrong) - torch.tensor(right)
    error = SURE * gap.std().item() / math.sqrt(len(gap))
    passed = gap.mean().item() > (-error if margin < 0 else max(margin, error))
    right, wrong = sum(right) / len(right), sum(wrong) / len(wrong)
    return Finding(check, passed, f"{right:.2f} and {wrong:.2f}", "" if passed else meaning)


@torch.inference_mode()
def check_answers(model: PaliGemma, cases: list[Case]) -> Iterator[Finding]:
    """If a model reads its pictures and the answers belong to them, an answer costs less with its own picture
    than with another one, and a box less than with x and y exchanged. Which of n objects comes first no model
    can know: a mean loss below the entropy of that choice shows that it has seen the answer."""
    encoded = [model.encode(case.image) for case in cases]
    right, shuffled, kept, exchanged, lowest = [], [], [], [], (math.inf, 0.0, 0.0, "")
    for i, (case, image_tokens) in enumerate(zip(cases, encoded)):
        own = losses(model, image_tokens, case.prompt, case.answers)
        other = losses(model, encoded[i - 1], case.prompt, case.answers)
        right += [loss.mean().item() for loss in own]
        shuffled += [loss.mean().item() for loss in other]
        boxes = [k for k, answer in enumerate(case.answers) if is_box(answer, model.tokenizer.loc0)]
        turned = [[case.answers[k][j] for j in (1, 0, 3, 2)] for k in boxes]
        kept += [own[k][:4].mean().item() for k in boxes]
        exchanged += [loss.mean().item() for loss in losses(model, image_tokens, case.prompt, turned)]
        firsts = [answer[0] for answer in case.answers]
        entropy = sum(-math.log(n / len(firsts)) * n / len(firsts) for n in Counter(firsts).values())
        loss = sum(loss[0].item() for loss in own) / len(own)
        if entropy:
            lowest = min(lowest, (loss - entropy, loss, entropy, case.name))
    meaning = "nats a token: the answers do not depend on the pictures, or belong to others"
    margin = MARGIN if kept else 0
    yield compared("right answers cost less than shuffled ones", right, shuffled, margin, meaning)
    meaning = "nats a token: the order is y0, x0, y1, x1"
    yield compared("boxes cost less than with x and y exchanged", kept, exchanged, -1, meaning)
    check, (gap, loss, entropy, name) = "the loss is not below what the labels allow", lowest
    if gap == math.inf:
        yield Finding(check, None, where="no picture with several objects")
    else:
        passed = gap > -1e-3
        where = "" if passed else f"{name}: the first token is known before it is read"
        yield Finding(check, passed, f"{loss:.2f}, least {entropy:.2f}", where)


def is_box(answer: list[int], loc0: int) -> bool:
    return len(answer) >= 4 and all(0 <= token - loc0 < LOCS for token in answer[:4])

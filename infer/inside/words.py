"""What the page shows of an answer in words, in which there may be boxes."""

import numpy as np
import torch
from torch import Tensor

from infer.inside.page import pack_probabilities
from infer.inside.recording import check_room, logit_lens, recording, text_data, token_text
from infer.inside.what_if import is_cheap, what_if
from model import PaliGemma
from model.decoding.boxes import locs_to_boxes, parse_answer
from model.decoding.generate import collect_answers, generate
from model.decoding.open_set import check_prompt
from model.io.names import shown

BEST = 10  # tokens that could have stood at each place


def words(model: PaliGemma, images: Tensor, prompt: str, max_tokens: int) -> dict:
    """The page's data, a dict that JSON can hold. images [1, 3, S, S]; max_tokens: of the answer."""
    check_prompt(prompt, model.config)
    tokenizer, asked = model.tokenizer, model.tokenizer.encode_prompt(prompt)

    def answer() -> list[int]:
        steps = generate(model, model.encode(images), [asked], max_tokens)
        [(ids, _)] = collect_answers(model, steps)
        return ids

    ids = answer()
    start, image_tokens = len(asked), model.encode(images)
    check_room(model, start + len(ids))
    with recording(model) as seen:
        text = torch.tensor([asked + ids], device=images.device)
        hidden = model.read(image_tokens, text, start)[0, start - 1 :]  # what writes each token, and the end
    written = ids + [tokenizer.eos] * (len(ids) < max_tokens)
    logits = model.decoder.logits(hidden[: len(written)])
    logits[:, model.config.image_token :] = -torch.inf  # rows that stand for no text, as in generate
    p = logits.softmax(-1)
    best = p.topk(min(BEST, tokenizer.size))
    columns = zip(written, best.values.tolist(), best.indices.tolist(), strict=True)
    spelled = [
        {
            "text": token_text(tokenizer, i),
            "row": start - 1 + k,
            "p": round(p[k, i].item(), 4),
            "best": [[token_text(tokenizer, j), round(q, 4)] for q, j in zip(values, indices)],
        }
        for k, (i, values, indices) in enumerate(columns)
    ]
    said = tokenizer.decode(ids)
    boxes = [
        {"label": shown(box.label), "box": locs_to_boxes(np.array(box.locs), 1, 1).round(5).tolist()}
        for box in parse_answer(said)
    ]
    words_in = list(dict.fromkeys(i for i in ids if i < tokenizer.loc0))  # without locations: for the lens
    lens = logit_lens(model, seen.states, image_tokens.shape[1], torch.tensor(words_in, dtype=torch.int64))
    names = [token_text(tokenizer, i) for i in words_in]
    read = [dict(text=token_text(tokenizer, i), of="answer") for i in ids]
    changes = what_if(model, answer) if is_cheap(model) else []
    return {
        "form": "words",
        "text": shown(said),
        "boxes": boxes,
        "words": spelled,
        "lens": {"names": names, "shown": list(range(len(names))), "values": pack_probabilities(lens)},
        **text_data(model, seen, asked, read),
        "what_if": [
            where | {"same": other == ids, "text": shown(tokenizer.decode(other))} for where, other in changes
        ],
    }

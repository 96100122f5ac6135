"""What the demo asks a model, and all that it keeps of an answer, so that filters need no new one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from infer.inside.look import look_inside
from infer.inside.page import page, picture
from model import PaliGemma
from model.config import FORMS
from model.decoding.boxes import box_prompt
from model.decoding.closed_set import PROMPT
from model.decoding.detections import Detections, Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.decoding.generate import Prompter
from model.decoding.masks import MaskCodec
from model.decoding.open_set import (
    CLASSES_PER_PROMPT,
    MAX_ANSWER_TOKENS,
    OpenSetDetector,
    check_prompt,
    class_names,
)
from model.decoding.photographs import are_photographs
from model.io.image import load_image, open_image
from model.io.names import shown

CLOSED_SET, OPEN_SET, SEGMENT, WORDS = MODES = ("All classes", "Named classes", "Masks", "Ask")
MAX_PIXELS = 50_000_000  # of an upload; every session keeps its picture, 3 bytes a pixel


@dataclass(frozen=True)
class RawAnswer:
    """An answer of which nothing has been dropped. Detectors make it in place of a Selection: its fields are
    the arguments that Selection is called with."""

    size: tuple[int, int]
    classes: Sequence[str]
    locs: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    tokens: np.ndarray
    masks: Sequence[np.ndarray] | None = None
    photograph: bool = False

    def select(self, selection: Selection, names: Sequence[str] = ()) -> Detections:
        """What is kept of it, of these classes; no names: of all."""
        wanted = np.array([not names or self.classes[c] in names for c in self.class_ids], bool)
        return selection(
            self.size,
            self.classes,
            locs=self.locs[wanted],
            scores=self.scores[wanted],
            class_ids=self.class_ids[wanted],
            tokens=self.tokens,
            masks=None if self.masks is None else [self.masks[i] for i in np.flatnonzero(wanted)],
            photograph=self.photograph,
        )

    def names(self) -> list[str]:
        """The classes in it, that of the best score first."""
        return list(dict.fromkeys(self.classes[c] for c in self.class_ids[np.argsort(-self.scores)]))


@dataclass(frozen=True)
class Session:
    """What the demo keeps for one visitor: a picture, and the last answer about it.

    name: for people; view: of inside.page.picture; prompts: what was asked; form: of a closed-set answer,
    else None; raw or text: the answer; photograph: whether the picture looks like one to a model that knows
    none; seconds: the time of the last answer of each form or mode.
    """

    name: str
    image: Image.Image
    view: dict
    prompts: tuple[str, ...] = ()
    form: str | None = None
    raw: RawAnswer | None = None
    text: str | None = None
    photograph: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, image: Image.Image) -> "Session":
        return cls(name, image, picture(image))


def open_upload(file: Path) -> Session:
    """A picture that somebody has sent. Complaints name it without its folder here."""
    try:
        with open_image(file) as header:
            if header.width * header.height > MAX_PIXELS:
                size = f"{header.width} x {header.height} pixels"
                raise ValueError(f"{size}; the demo's limit is {MAX_PIXELS:,}")
        return Session.of(file.name, load_image(file))
    except ValueError as error:
        raise ValueError(str(error).replace(shown(file), shown(file.name))) from error


class Asker:
    """Asks one model about pictures. codec: reads the mask codec, when masks are first asked for."""

    def __init__(self, model: PaliGemma, codec: Callable[[], MaskCodec]):
        self.model, self.read_codec = model, codec
        self.prompter = Prompter(model, MAX_ANSWER_TOKENS)
        self.decoders = {}  # of the form that was asked for last: on a GPU, it keeps its recorded graph

    @cached_property
    def codec(self) -> MaskCodec:
        return self.read_codec()

    def closed_set(self, form: str) -> ClosedSetDetector:
        if form not in self.decoders:
            self.decoders = {form: closed_set_decoder(self.model, form)}
        return ClosedSetDetector(self.decoders[form], RawAnswer)

    def open_set(self, text: str, masks: bool) -> OpenSetDetector:
        names = class_names(text, self.model.config)
        codec, per_prompt = (self.codec, 1) if masks else (None, CLASSES_PER_PROMPT)
        return OpenSetDetector(self.prompter, names, per_prompt, RawAnswer, codec)

    def ask(self, session: Session, mode: str, text: str = "", form: str = FORMS[0]) -> Session:
        """The session with an answer. text: names of classes, or the prompt of WORDS; form: of CLOSED_SET."""
        text, raw, said = text.strip(), None, None
        if mode == CLOSED_SET:
            detect, prompts = self.closed_set(form), (PROMPT,)
        elif mode == WORDS:
            if not text:
                raise ValueError("nothing is asked; write, for example: caption en")
            check_prompt(text, self.model.config)
            prompts = (text,)
        else:
            detect = self.open_set(text, mode == SEGMENT)
            prompts = tuple(
                box_prompt([detect.classes[c] for c in chunk], masks=mode == SEGMENT)
                for chunk in detect.chunks
            )
        start = time.perf_counter()
        if mode == WORDS:
            said = self.model.generate(session.image, text, MAX_ANSWER_TOKENS)
        else:
            [raw] = detect([session.image])
        form = form if mode == CLOSED_SET else None
        seconds = session.seconds | {form or mode: time.perf_counter() - start}
        [photograph] = are_photographs(self.model, 1)
        answer = dict(prompts=prompts, form=form, raw=raw, text=said, photograph=photograph, seconds=seconds)
        return replace(session, **answer)

    def look_inside(self, session: Session, selection: Selection) -> str:
        """The page of explain.py about the session's answer, or about that to its first prompt."""
        if not session.prompts:
            raise ValueError("there is no answer yet to look into")
        options = dict(prompt=session.prompts[0], selection=selection, max_tokens=MAX_ANSWER_TOKENS)
        return page(look_inside(self.model, session.image, session.name, decode=session.form, **options))

"""Gemma's sentencepiece tokenizer with PaliGemma's location and segmentation tokens.

Official tokenizer.model files hold 1,024 <locNNNN> and 128 <segNNN> pieces after the text. Where they are
missing (in Gemma's own file, and in nano's), their ids follow the last piece, in that order. No id is taken
for granted: all are read from the pieces.
"""

import re
from pathlib import Path

import sentencepiece

from model.config import MAX_CLASSES
from model.io.hub import replacement
from model.io.writing import explain

MAX_BYTES = 1 << 26  # of tokenizer.model: the official one has 4.3 MB
LOCS, SEGS = 1024, 128  # locations along a side of an image; codes of masks
# Exactly the pieces that exist: any other <loc...> is text, and cutting it out would change its tokens.
LOC_PATTERN = "<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>"
_SPECIAL = re.compile(f"({LOC_PATTERN}|<seg0[0-9]{{2}}>|<seg1[01][0-9]>|<seg12[0-7]>)")


class Tokenizer:
    """Text <-> ids. loc0, seg0, unused0: first ids of their ranges; size: number of ids, without <image>."""

    def __init__(self, source: str | Path):
        """source: a tokenizer.model file or its folder."""
        file = Path(source) / "tokenizer.model" if Path(source).is_dir() else Path(source)
        if not file.is_file():
            raise ValueError(f"{file} is missing: copy the checkpoint's tokenizer.model there")
        if (size := file.stat().st_size) > MAX_BYTES:  # sentencepiece would read all of it
            raise ValueError(f"{file} has {size:,} bytes; a tokenizer has at most {MAX_BYTES:,}")
        errors = OSError, RuntimeError, UnicodeDecodeError
        with explain(f"{file} is not a sentencepiece model{replacement(file)}", *errors):
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
            self._sp.id_to_piece([*range(len(self._sp))])  # all are text, or else an answer would fail
        self.bos, self.eos, self.pad = (self._id(piece, file) for piece in ("<bos>", "<eos>", "<pad>"))
        self.newline, self.unused0 = self._id("\n", file), self._id("<unused0>", file)
        inside = self._sp.piece_to_id("<loc0000>") != self._sp.unk_id()
        self.loc0 = self._id("<loc0000>", file) if inside else len(self._sp)
        self.seg0 = self._id("<seg000>", file) if inside else self.loc0 + LOCS
        self.size = len(self._sp) + (0 if inside else LOCS + SEGS)
        runs = [("<unused{}>", self.unused0, MAX_CLASSES + 1)]  # classes, and noise
        runs += [("<loc{:04d}>", self.loc0, LOCS), ("<seg{:03d}>", self.seg0, SEGS)] if inside else []
        for form, first, count in runs:  # ids of a run are computed from its first
            for i, piece in enumerate(map(form.format, range(count)), first):
                if self._id(piece, file) != i:
                    raise ValueError(f"{file}: {piece} is not piece {i}, {i - first} after {form.format(0)}")

    def _id(self, piece: str, file: Path) -> int:
        if (i := self.id_of(piece)) is None:
            raise ValueError(f"{file} has no piece {piece!r}: not a Gemma tokenizer")
        return i

    def piece(self, i: int) -> str:
        """The text of an id below loc0, as sentencepiece spells it."""
        return self._sp.id_to_piece(i)

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, None if there is none."""
        i = self._sp.piece_to_id(piece)  # the id of <unk> if there is none
        return i if self._sp.id_to_piece(i) == piece else None

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without bos and eos. <locNNNN> and <segNNN> become their own ids."""
        with explain(f"{text!r:.60} is not text: its bytes were not UTF-8", UnicodeEncodeError):
            text.encode()
        ids = []
        for part in _SPECIAL.split(text):
            if _SPECIAL.fullmatch(part):
                ids.append((self.loc0 if part[1] == "l" else self.seg0) + int(part[4:-1]))
            else:
                ids += self._sp.encode(part)
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """bos, the prompt, and the newline that ends every prefix, tokenised on its own as in training."""
        return [self.bos, *self.encode(prompt), self.newline]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; locations and segmentation codes come back as <locNNNN> and <segNNN>."""
        parts, run = [], []  # run: neighbouring ids of text, as a character may be several byte pieces
        for i in ids:
            if i < len(self._sp) and not self.loc0 <= i < self.seg0 + SEGS:
                run.append(i)
            else:
                parts += [self._sp.decode(run), self._special(i)]
                run = []
        return "".join([*parts, self._sp.decode(run)])

    def _special(self, i: int) -> str:
        """The text of an id from loc0 on; "" for those after the last one, such as <image>."""
        if i < self.seg0:
            return f"<loc{i - self.loc0:04d}>"
        return f"<seg{i - self.seg0:03d}>" if i < self.seg0 + SEGS else ""

"""The tokenizer: Gemma's special ids, location and segmentation pieces inside the file or not, any text.

The yardstick is sentencepiece itself, given the file with all pieces inside, and transformers' processor.
"""

import io
import os
import re

import numpy as np
import pytest
import sentencepiece
from helpers import complaint, load
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PaliGemmaProcessor, SiglipImageProcessor

from model import Detector
from model.config import COCO_CLASSES
from model.io.tokenizer import Tokenizer
from train.practice.sentences import random_sentences

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
LOC = [f"<loc{i:04d}>" for i in range(1024)]
SEG = [f"<seg{i:03d}>" for i in range(128)]
BOX = "<loc0001><loc0002><loc0003><loc0004>"

TEXTS = [
    "",
    "detect all classes",
    f"{BOX} cat ; {BOX} traffic light",
    f"{BOX}cat;{BOX} ; dog <loc1023>",
    f"{BOX}{''.join(SEG[100:116])} wine glass ; {BOX}{''.join(SEG[:16])} cat",
    "detect cat ; dog\nsegment dog\n\n\nyes",
    " leading, trailing ",
    "two  three   thirty-two" + 32 * " " + "forty" + 40 * " ",
    32 * "\n" + "cat" + 40 * "\n",
    "tabs\tand\r\nlines\u2028of\u00a0others",
    "é漢字😀 e\u0301 ﷽ ａ \u202eright to left\u202c \x00\x7f",
    "<bos>cat<eos><pad><unk><0x41><mask><unused7><table></td><start_of_turn>",
    "<loc1024>", "<loc9999>", "<loc001>", "<loc00001>", "<loc 0001>", "<LOC0001>", "<loc-001>", "<loc٠٠٠١>",
    "<seg128>", "<seg999>", "<seg0001>", "<<loc0001>>", "<loc<loc0001>0002>", "<loc0001",
    "cat <loc1024> dog", "a cat<seg128>dog",
]  # fmt: skip


@pytest.fixture(scope="session")
def plain(tokenizer_file):
    """A small model of Gemma's form, without location and segmentation pieces."""
    return tokenizer_file


def with_pieces(source, target, pieces, kind=Piece.USER_DEFINED, score=0.0):
    """A copy of a sentencepiece file with more pieces after the last one."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(source.read_bytes())
    model.pieces.extend(Piece(piece=piece, score=score, type=kind) for piece in pieces)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(model.SerializeToString())
    return target


@pytest.fixture(scope="session")
def full(plain):
    """The same as PaliGemma's own files are: with <loc0000> to <seg127> inside."""
    return with_pieces(plain, plain.parent / "full" / "tokenizer.model", LOC + SEG)


@pytest.fixture(params=["pieces inside", "pieces appended"])
def tokenizer(request, plain, full):
    return Tokenizer(full if request.param == "pieces inside" else plain)


def processor_of(file):
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


# Ids --------------------------------------------------------------------------------------------------------


def test_gemmas_special_ids(plain):
    """Every id up to 472 as in the official file; text starts right after it."""
    sp = processor_of(plain)
    pieces = [sp.id_to_piece(i) for i in range(473)]
    assert pieces[:7] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
    assert pieces[7:106] == [f"<unused{i}>" for i in range(99)]
    assert pieces[106:108] == ["<start_of_turn>", "<end_of_turn>"]
    assert pieces[108:139] == ["\n" * n for n in range(1, 32)]
    assert pieces[139:169] == ["▁" * n for n in range(2, 32)]
    assert pieces[169:172] == ["<table>", "<caption>", "<thead>"] and pieces[177] == "</table>"
    assert pieces[185] == "<h1>" and pieces[199] == "<strong>" and pieces[216] == "</code>"
    assert all(re.fullmatch(r"</?[a-z0-9]+>", piece) for piece in pieces[169:217])
    assert pieces[217:473] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert all(sp.is_byte(i) for i in range(217, 473)) and not sp.is_byte(473)


def test_ids_come_from_the_pieces(plain, full):
    """With the pieces inside or appended: the same ids, locations first, in order, after the text."""
    appended, inside, sp = Tokenizer(plain), Tokenizer(full), processor_of(full)
    text_pieces = processor_of(plain).get_piece_size()
    for tokenizer in (appended, inside):
        assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
        assert (tokenizer.unused0, tokenizer.newline) == (7, 108)
        assert tokenizer.loc0 == text_pieces == sp.piece_to_id("<loc0000>")
        assert tokenizer.seg0 == text_pieces + 1024 == sp.piece_to_id("<seg000>")
        assert tokenizer.size == text_pieces + 1152 == sp.get_piece_size()
        assert [tokenizer.encode(piece) for piece in LOC + SEG] == [
            [i] for i in range(text_pieces, tokenizer.size)
        ]


def test_pieces_elsewhere(plain):
    """Their ids are where the file has the pieces, even if others follow them."""
    file = with_pieces(plain, plain.parent / "others" / "tokenizer.model", [*LOC, *SEG, "<image>", "<more>"])
    tokenizer, first = Tokenizer(file), Tokenizer(plain).loc0
    assert (tokenizer.loc0, tokenizer.seg0) == (first, first + 1024)
    assert tokenizer.encode("<loc0003><image>") == [first + 3, first + 1152]
    assert tokenizer.decode([first + 3, first + 1152]) == "<loc0003><image>"


def test_folder_is_as_good_as_file(plain):
    assert vars(Tokenizer(plain.parent)).keys() == vars(Tokenizer(plain)).keys()
    assert Tokenizer(plain.parent).encode("cat") == Tokenizer(str(plain)).encode("cat")


# Text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_encode(text, tokenizer, full):
    """As sentencepiece does it with all pieces inside, and back again."""
    ids = tokenizer.encode(text)
    assert ids == processor_of(full).encode(text)
    assert tokenizer.decode(ids) == text


def test_space_before_a_location_is_a_token_of_its_own(tokenizer, full):
    sp, loc0 = processor_of(full), tokenizer.loc0
    box = [loc0 + 1, loc0 + 2, loc0 + 3, loc0 + 4]
    word = {piece: sp.piece_to_id(piece) for piece in ("▁cat", "▁;", "▁", "▁dog")}
    assert sp.unk_id() not in word.values()
    assert tokenizer.encode(f"{BOX} cat ; {BOX} dog") == [
        *box, word["▁cat"], word["▁;"], word["▁"], *box, word["▁dog"],
    ]  # fmt: skip


def test_what_is_no_location_is_text_like_any_other(plain, tmp_path):
    """Gemma has a piece for a space and `<`: a word that only looks like a location must not be cut out."""
    some = with_pieces(plain, tmp_path / "a" / "tokenizer.model", ["▁<", ">."], Piece.NORMAL, score=-1e4)
    sp = processor_of(with_pieces(some, tmp_path / "b" / "tokenizer.model", LOC + SEG))
    for text in ("cat <loc1024> dog", "cat <seg128>", "<loc1024>.", "<seg999>. <loc0001> <loc1024>"):
        assert Tokenizer(some).encode(text) == sp.encode(text), text


def test_random_sentences(plain, full):
    """What the practice set can say, with boxes and masks in between; then noise from all of Unicode."""
    rng = np.random.default_rng(0)
    appended, inside, sp = Tokenizer(plain), Tokenizer(full), processor_of(full)
    alphabet = [
        *"abc \n\t<>loc0123seg;",
        "  ",
        "\u00e9",
        "\u4f60",
        "\U0001f600",
        "\u0301",
        "<loc",
        "<seg0",
        *LOC[::200],
    ]
    for round_ in range(100):
        texts = random_sentences(rng)
        joined = "".join(f"{rng.choice(LOC)}{rng.choice(SEG)} {text} ; " for text in texts[:3])
        noise = "".join(rng.choice(alphabet, 30))
        points = rng.integers(1, 0x11_0000, 20)
        anything = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000 and p != ord("▁"))
        for text in (*texts, joined, noise, anything):
            ids = inside.encode(text)
            assert appended.encode(text) == ids == sp.encode(text), (round_, text)
            assert appended.decode(ids) == inside.decode(ids) == text, (round_, text)


def test_class_names_are_short(plain):
    """The vocabulary is made for them: no class name falls apart into letters or bytes."""
    tokenizer = Tokenizer(plain)
    assert max(len(tokenizer.encode(f" {name}")) for name in COCO_CLASSES) <= 6


def test_decode_leaves_out_what_is_no_text(tokenizer):
    """bos, eos, padding and the spare rows of the embedding have no text."""
    ids = [tokenizer.bos, *tokenizer.encode(" cat"), tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(ids) == " cat"
    assert tokenizer.decode([tokenizer.seg0 + 127, tokenizer.size, tokenizer.size + 40, 108]) == "<seg127>\n"
    assert tokenizer.decode([]) == ""


# Prompts ----------------------------------------------------------------------------------------------------


def test_prompt(tokenizer, full):
    sp = processor_of(full)
    for prompt in ("detect all classes", "", " cat", f"segment {BOX}", "<seg003>"):
        assert tokenizer.encode_prompt(prompt) == [2, *sp.encode(prompt), 108]


def test_newline_is_tokenised_on_its_own(tokenizer):
    """As in training: a prompt that ends in a newline does not merge with the one that ends every prefix."""
    assert tokenizer.encode_prompt("cat\n") == [2, *tokenizer.encode("cat"), 108, 108]


def test_prompt_is_what_transformers_builds(plain, full):
    """Its processor's ids without the image placeholders, for text, locations and segments, and suffixes."""
    hf_tokenizer = AutoTokenizer.from_pretrained(full.parent, tokenizer_type="gemma")
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, hf_tokenizer)
    image = Image.new("RGB", (28, 28))
    for prompt in ("detect all classes", "detect cat ; traffic light", f"{BOX} cat ; {BOX}", "<seg003>  x"):
        for suffix in (None, f"{BOX} cat ; {BOX}{''.join(SEG[:16])} dog", "a cat", ""):
            ids = processor(images=image, text=prompt, suffix=suffix)["input_ids"]
            ids = [i for i in (ids[0] if isinstance(ids[0], list) else ids) if i != processor.image_token_id]
            for ours in (Tokenizer(plain), Tokenizer(full)):
                answer = [] if suffix is None else [*ours.encode(suffix), ours.eos]
                assert ids == ours.encode_prompt(prompt) + answer


# Files that are none ----------------------------------------------------------------------------------------


def foreign(form: str) -> bytes:
    """A sentencepiece model that is not Gemma's: the defaults, or one that lacks a special piece."""
    model = io.BytesIO()
    names = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    names |= dict(pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(COCO_CLASSES),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **(names if form != "defaults" else {}),
        **(dict(user_defined_symbols=["\n"]) if form == "no unused" else {}),
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("form", "piece"), [("defaults", "'<bos>'"), ("no newline", r"'\n'"), ("no unused", "'<unused0>'")]
)
def test_foreign_model(form, piece, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(foreign(form))
    with pytest.raises(ValueError) as error:
        Tokenizer(file)
    assert str(file) in str(error.value) and piece in str(error.value) and "Gemma" in str(error.value)


@pytest.mark.parametrize("gone", ["<loc0007>", "<seg127>", "<unused98>"])
def test_pieces_out_of_order(gone, full, tmp_path):
    """Ids are computed from the first of a run, so a file whose runs have gaps would be read wrongly."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(full.read_bytes())
    (piece,) = (piece for piece in model.pieces if piece.piece == gone)
    for name in (f"{gone}?", None):  # renamed; then put at the end
        if name is None:
            model.pieces.add(piece=gone, type=Piece.USER_DEFINED)
        else:
            piece.piece = name
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        message = complaint(Tokenizer, tmp_path)
        assert str(tmp_path / "tokenizer.model") in message and gone in message


def test_more_ids_than_the_embedding_has(model, tmp_path):
    """Of another checkpoint. As many are fine, and so is an embedding with more rows."""
    grown, tokenizer = load(model), tmp_path / "tokenizer.model"
    rows, ids = grown.config.text.vocab_size, Tokenizer(model).size
    assert rows > ids
    grown.folder = tmp_path
    with_pieces(model / "tokenizer.model", tokenizer, [f"<more{i}>" for i in range(rows - ids)])
    assert grown.tokenizer.size == rows
    del grown.tokenizer
    with_pieces(tokenizer, tokenizer, ["<one more>"])
    message = complaint(getattr, grown, "tokenizer")
    assert f"{rows + 1:,} ids" in message and f"{rows:,} rows" in message and "another checkpoint" in message
    assert message == complaint(Detector, grown)


@pytest.mark.parametrize("source", ["file", "folder"])
def test_missing(source, tmp_path):
    with pytest.raises(ValueError, match="missing") as error:
        Tokenizer(tmp_path / "tokenizer.model" if source == "file" else tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


@pytest.mark.parametrize("form", ["text", "json", "empty", "cut", "no UTF-8", "a terabyte"])
def test_no_sentencepiece_file(form, plain, tmp_path):
    """One piece that is no text is enough: an answer with it would fail."""
    file = tmp_path / "tokenizer.model"
    whole = plain.read_bytes()
    forms = {"text": b"hello\n", "json": b"{}", "empty": b"", "cut": whole[: len(whole) // 2]}
    forms |= {"no UTF-8": whole.replace("▁bear".encode(), "▁bea".encode() + b"\xe9")}
    file.write_bytes(forms.get(form, b""))
    if form == "a terabyte":  # of zeros, which take no room on the disk
        os.truncate(file, 1 << 40)
    with pytest.raises(ValueError) as error:
        Tokenizer(file)
    assert str(file) in str(error.value)

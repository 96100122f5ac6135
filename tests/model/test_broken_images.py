"""What is no image: damaged files, formats that are off, bombs, special files, names of nothing.

Each is a ValueError in one line with the file's name, soon and in little memory.
"""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import complaint, complaint_about, picture
from PIL import Image

from model.io import image as model_image
from model.io.image import load_image

ORIENTATION, DESCRIPTION, COMMENT = 0x0112, 0x010E, "a picture"


def encoded(form: str, **options) -> bytes:
    """A smooth picture of 60 x 50 pixels."""
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    rough.resize((60, 50)).save(buffer, form, **options)
    return buffer.getvalue()


def test_missing(tmp_path):
    assert complaint_about(tmp_path / "none.jpg", load_image).endswith("no such file")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(form, tmp_path):
    """A download that broke off, wherever it did."""
    whole = encoded(form)
    file = tmp_path / f"a.{form.lower()}"
    for share in (0.05, 0.5, 0.8):
        file.write_bytes(whole[: int(share * len(whole))])
        complaint_about(file, load_image)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"<svg></svg>", bytes(1000)], ids=repr)
def test_no_picture(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    assert "not a readable image" in complaint_about(tmp_path / "a.jpg", load_image)


@pytest.mark.parametrize("error", [RuntimeError, EOFError, KeyError, MemoryError, AttributeError, OSError])
@pytest.mark.parametrize("where", ["open", "ImageFile.ImageFile.load"])
def test_whatever_a_decoder_raises(error, where, tmp_path, monkeypatch):
    """Is a complaint about this file."""

    def fail(*args, **kwargs):
        raise error

    file = picture(tmp_path / "a.png")
    monkeypatch.setattr(f"PIL.{'Image.' * (where == 'open')}{where}", fail)
    assert f"not a readable image ({error.__name__})" in complaint_about(file, load_image)


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "ICO", "PPM", "TGA", "PCX", "EPS"])
def test_formats_that_are_off(form, tmp_path):
    """Good files too, whatever they are called."""
    (tmp_path / "a.png").write_bytes(encoded(form))
    assert "not in one of the formats JPEG, PNG" in complaint_about(tmp_path / "a.png", load_image)


def test_folder(tmp_path):
    assert "is a folder" in complaint_about(tmp_path, load_image)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_only_regular_files_are_opened(kind, tmp_path):
    """A FIFO that nobody writes to, and a device without an end: neither is waited for."""
    file = tmp_path / "a.png"
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(file))
    assert "is a FIFO, a socket or a device, not a regular file" in complaint_about(file, load_image)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'': no such file"),
        ("a\0b.png", "a\\x00b.png: embedded null byte"),
        ("x" * 300, "xxx: File name too long"),
        ("loop.png", "loop.png: Too many levels of symbolic links"),
        ("none.png/a.png", "none.png/a.png: no such file"),
        ("file/a.png", "file/a.png: Not a directory"),
        ("line\nend \x1b[31m.png", "line\\nend \\x1b[31m.png: no such file"),
        (os.fsdecode(b"\xff.png"), "\\xff.png: no such file"),
    ],
    ids=lambda value: ascii(value[-30:]),
)
def test_names_of_nothing(name, words, here):
    Path("loop.png").symlink_to("loop.png")
    Path("file").touch()
    assert complaint(load_image, name).endswith(words)


def test_bomb(tmp_path):
    """A small file of an enormous image, and the largest side that a header can name: refused unread."""
    for width, height in ((20_000, 20_000), (2**31 - 1, 2**31 - 1)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
        body = (kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
        sized = (struct.pack(">I", len(part) - 8) + part for part in body)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sized))
        complaint_about(tmp_path / "a.png", load_image)


def test_our_limit(tmp_path, monkeypatch):
    """It holds wherever Pillow's own has been switched off."""
    file = picture(tmp_path / "a.png", 60, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(model_image, "MAX_PIXELS", 2999)
    assert "60 x 50 pixels; the limit is 2,999 pixels" in complaint_about(file, load_image)


def tiled_tiff(side: int, tile: int) -> bytes:
    """A black square of one tile, deflated."""
    data, tags = zlib.compress(bytes(tile * tile), 1), 10
    offset = 8 + 2 + 12 * tags + 4
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: offset}
    tags[325] = len(data)  # all of type 4, one whole number
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_tile_bomb(tmp_path):
    """A tile is decoded whole: one of 1.6 GB for 10 x 10 pixels is refused, one of 256 x 256 is usual."""
    file = tmp_path / "a.tif"
    file.write_bytes(tiled_tiff(10, 256))
    assert load_image(file).size == (10, 10)
    side, claim = (struct.pack("<HHII", 322, 4, 1, length) for length in (256, 6_250_000))
    file.write_bytes(tiled_tiff(10, 256).replace(side, claim))
    assert "tiles of 6250000 x 256 pixels in 10 x 10 pixels" in complaint_about(file, load_image)


def test_scan_bomb(tmp_path):
    """Thousands of scans of 30 bytes, each of which takes time for all pixels. Without them, and with their
    bytes where they are no scans, the picture is good."""
    whole = encoded("JPEG", progressive=True)
    start, file = whole.rindex(b"\xff\xda"), tmp_path / "a.jpg"
    last, no_scans = whole[start:-2], b"\xff\xda" * 1000
    comment = b"\xff\xfe" + struct.pack(">H", len(no_scans) + 2) + no_scans
    for good in (whole, whole[:2] + comment + whole[2:] + no_scans):
        file.write_bytes(good)
        assert load_image(file).size == (60, 50)
    file.write_bytes(whole[:start] + 3000 * last + whole[-2:])
    assert "more than 50 scans" in complaint_about(file, load_image)


def test_nonsense_in_exif(tmp_path):
    """An editor's broken entry: text where a number belongs, in a file that must be turned."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = 6, COMMENT
    tile_width = b"\x01\x42"
    raw = exif.tobytes().replace(DESCRIPTION.to_bytes(2, "big"), tile_width, 1)
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=raw))
    try:
        assert load_image(tmp_path / "a.jpg").size in [(60, 50), (50, 60)]
    except ValueError as error:
        assert str(tmp_path / "a.jpg") in str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_random_damage(form, tmp_path):
    """Bytes changed at random: an image, or a ValueError with the file's name, and nothing else."""
    rng = np.random.default_rng(7)
    whole = np.frombuffer(encoded(form), np.uint8)
    file = tmp_path / "a.bin"
    outcomes = set()
    for _ in range(60):
        damaged = whole.copy()
        where = rng.integers(0, min(len(whole), int(rng.choice([60, 400, len(whole)]))), 4)
        damaged[where] = rng.integers(0, 256, 4)
        file.write_bytes(damaged.tobytes())
        try:
            outcomes.add(load_image(file).mode)
        except ValueError as error:
            assert str(file) in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes and ("RGB" in outcomes or form == "PNG")  # PNG has checksums

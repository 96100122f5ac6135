"""Picture files that are hard: made at random, each with what must come of it.

A maker takes a random generator and a folder, and returns the file's name as a program is given it, what it
is, and "good", "refused" or "either".
"""

import functools
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif")
OFF = ("AVIF", "JPEG2000", "ICO", "PPM", "TGA", "PCX", "EPS", "SGI", "DDS", "IM", "MSP", "XBM")
WIDTH, HEIGHT = 60, 50
Made = tuple[str, str, str]


def smooth(
    rng: np.random.Generator, mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT
) -> Image.Image:
    rough = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(np.asarray(rough.convert("L")).astype(np.uint16) * 257)
    return rough.convert("L").convert(mode) if mode in ("I", "F", "LA", "1") else rough.convert(mode)


def encoded(rng: np.random.Generator, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    mode = dict(MSP="1", XBM="1").get(form, "RGB")
    smooth(rng, mode).save(buffer, form, **options)
    return buffer.getvalue()


def any_form(rng: np.random.Generator) -> tuple[str, bytes]:
    """A good file of one of FORMS, in one of its varieties."""
    form = str(rng.choice(FORMS))
    varieties = dict(
        JPEG=[{}, dict(progressive=True), dict(quality=100, subsampling=0)],
        WEBP=[{}, dict(lossless=True)],
        TIFF=[
            {},
            dict(compression="tiff_lzw"),
            dict(compression="tiff_adobe_deflate"),
            dict(compression="jpeg"),
        ],
        PNG=[{}, dict(compress_level=0)],
    ).get(form, [{}])
    return form, encoded(rng, form, **varieties[rng.integers(len(varieties))])


def write(folder: Path, content: bytes, suffix: str = ".png") -> str:
    file = folder / f"case{suffix}"
    file.write_bytes(content)
    return str(file)


# ---- damaged -----------------------------------------------------------------------------------------------


def truncated(rng, folder) -> Made:
    form, whole = any_form(rng)
    length = int(rng.integers(len(whole)))
    return write(folder, whole[:length]), f"{form}, {length} of {len(whole)} bytes", "either"


def flipped(rng, folder) -> Made:
    form, whole = any_form(rng)
    damaged, count = np.frombuffer(whole, np.uint8).copy(), int(rng.integers(1, 9))
    reach = min(len(whole), int(rng.choice([60, 400, len(whole)])))
    damaged[rng.integers(0, reach, count)] = rng.integers(0, 256, count)
    return write(folder, damaged.tobytes()), f"{form}, {count} bytes changed", "either"


def spliced(rng, folder) -> Made:
    (one, first), (two, second) = any_form(rng), any_form(rng)
    at = int(rng.integers(20, len(first)))
    return write(folder, first[:at] + second[at // 2 :]), f"{one}, from byte {at} on {two}", "either"


def no_picture(rng, folder) -> Made:
    contents = [b"", b"not a picture", b"<svg></svg>", bytes(5000), b"<!DOCTYPE html>", b"{}", rng.bytes(999)]
    contents += [
        form[: int(rng.integers(2, 9))] for form in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF")
    ]
    content = contents[rng.integers(len(contents))]
    return write(folder, content, ".jpg"), f"no picture: {content[:20]}", "refused"


def exif_nonsense(rng, folder) -> Made:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = int(rng.integers(0, 2**16)), "text" * int(rng.integers(1, 99))
    raw = bytearray(exif.tobytes())
    for at in rng.integers(6, len(raw), 3):
        raw[at] = rng.integers(256)
    form = ("JPEG", "PNG", "WEBP")[rng.integers(3)]
    return write(folder, encoded(rng, form, exif=bytes(raw))), f"{form} with nonsense in EXIF", "either"


# ---- good, though unusual ----------------------------------------------------------------------------------

MODES = [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")]
MODES += [("1", "PNG"), ("1", "TIFF"), ("LA", "PNG"), ("L", "JPEG"), ("RGBA", "PNG"), ("RGBA", "WEBP")]
MODES += [("P", "PNG"), ("P", "GIF"), ("P", "BMP"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("1", "BMP")]


def modes(rng, folder) -> Made:
    mode, form = MODES[rng.integers(len(MODES))]
    image, buffer, options = smooth(rng, mode), io.BytesIO(), {}
    if mode == "P" and form != "BMP":  # a palette whose entries have an alpha each, or one transparent entry
        options = dict(transparency=bytes(rng.integers(0, 256, 40, np.uint8)) if form == "PNG" else 3)
    image.save(buffer, form, **options)
    return write(folder, buffer.getvalue()), f"{mode} in {form}", "good"


def animated(rng, folder) -> Made:
    form, buffer = ("GIF", "WEBP", "PNG", "TIFF", "MPO")[rng.integers(5)], io.BytesIO()
    frames = [smooth(rng) for _ in range(4)]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return write(folder, buffer.getvalue()), f"{form} of four frames", "good"


def turned(rng, folder) -> Made:
    exif, form = Image.Exif(), ("JPEG", "PNG", "WEBP", "TIFF")[rng.integers(4)]
    exif[0x0112] = orientation = int(rng.integers(1, 9))
    return write(folder, encoded(rng, form, exif=exif.tobytes())), f"{form}, EXIF {orientation}", "good"


def wrong_suffix(rng, folder) -> Made:
    form, whole = any_form(rng)
    suffix = (*SUFFIXES, ".txt", "", ".PNG.exe")[rng.integers(9)]
    return write(folder, whole, suffix), f"{form} called case{suffix}", "good"


def one_colour(rng, folder) -> Made:
    side = int(rng.choice([1, 2, 900]))
    Image.new("RGB", (side, 2 * side), (1, 2, 3)).save(folder / "case.png")
    return str(folder / "case.png"), f"{side} x {2 * side} of one colour", "good"


# ---- bombs -------------------------------------------------------------------------------------------------


def png(width: int, height: int, body: bytes = b"", *more: tuple[bytes, bytes], depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", body or zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [(kind + data, struct.pack(">I", len(data))) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        n + part + struct.pack(">I", zlib.crc32(part)) for part, n in parts
    )


def tiff(**tags: int) -> bytes:
    """A TIFF file of whole numbers as tags; its one strip or tile is deflated."""
    data = zlib.compress(bytes(65536), 1)
    numbers = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1} | {int(k[1:]): v for k, v in tags.items()}
    place = 324 if 322 in numbers else 273
    numbers |= {place: 8 + 2 + 12 * (len(numbers) + 2) + 4, place + (1 if place == 324 else 6): len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, numbers[tag]) for tag in sorted(numbers))
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + entries + bytes(4) + data


@functools.cache
def blank_png() -> bytes:
    """20,000 x 20,000 pixels of one colour, really there: 50 kB."""
    squeeze, row = zlib.compressobj(9), bytes(20_000 // 8 + 1)
    body = b"".join(squeeze.compress(row * 500) for _ in range(40)) + squeeze.flush()
    return png(20_000, 20_000, body, depth=1)


def jpeg_sized(rng, width: int, height: int) -> bytes:
    whole = encoded(rng, "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


@functools.cache
def megabytes() -> bytes:
    """200 MB of zeros, deflated."""
    return zlib.compress(bytes(200 << 20), 1)


def bomb(rng, folder) -> Made:
    side = 60_000
    scans = encoded(rng, "JPEG", progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    bombs = {
        "PNG of 60,000 x 60,000": lambda: png(side, side),
        "PNG of 20,000 x 20,000, of one colour": blank_png,
        "PNG of 2**31 - 1 x 2**31 - 1": lambda: png(2**31 - 1, 2**31 - 1),
        "PNG with 200 MB of text": lambda: png(9, 9, b"", (b"zTXt", b"a\0\0" + megabytes())),
        "PNG with a profile of 200 MB": lambda: png(9, 9, b"", (b"iCCP", b"a\0\0" + megabytes())),
        "BMP of 60,000 x 60,000": lambda: _put(encoded(rng, "BMP"), 18, struct.pack("<ii", side, side)),
        "BMP of height -60,000": lambda: _put(encoded(rng, "BMP"), 18, struct.pack("<ii", side, -side)),
        "GIF of 60,000 x 60,000": lambda: _put(encoded(rng, "GIF"), 6, struct.pack("<HH", side, side)),
        "JPEG of 60,000 x 60,000": lambda: jpeg_sized(rng, side, side),
        "JPEG of 3,000 scans": lambda: scans[:-2] + 3000 * last + scans[-2:],
        "TIFF of 60,000 x 60,000": lambda: tiff(t256=side, t257=side, t278=side),
        "TIFF with a tile of 60,000 x 60,000": lambda: tiff(t322=60_000, t323=60_000),
        "TIFF with strips of 2**31 rows": lambda: tiff(t278=2**31),
        "TIFF of 10**9 samples": lambda: tiff(t277=10**9, t278=10),
        "WebP of 16,384 x 16,384": lambda: _put(encoded(rng, "WEBP"), 26, struct.pack("<HH", 0x3FFF, 0x3FFF)),
    }
    what = list(bombs)[rng.integers(len(bombs))]
    limited = any(word in what for word in ("text", "profile", "strips"))  # the picture itself may be read
    return write(folder, bombs[what]()), what, "either" if limited else "refused"


def _put(whole: bytes, at: int, part: bytes) -> bytes:
    return whole[:at] + part + whole[at + len(part) :]


# ---- formats that are off, special files, names ------------------------------------------------------------


def off(rng, folder) -> Made:
    form = OFF[rng.integers(len(OFF))]
    return write(folder, encoded(rng, form)), f"a good {form}", "refused"


def special(rng, folder) -> Made:
    file = folder / "case.png"
    kinds: dict[str, Callable] = {
        "FIFO": lambda: os.mkfifo(file),
        "socket": lambda: _bind(file),
        "/dev/zero": lambda: file.symlink_to("/dev/zero"),
        "/dev/stdin": lambda: file.symlink_to("/dev/stdin"),
        "/proc/self/mem": lambda: file.symlink_to("/proc/self/mem"),
        "loop of links": lambda: file.symlink_to("case.png"),
        "link to nothing": lambda: file.symlink_to("none"),
        "folder of links to itself": lambda: [file.mkdir(), (file / "a.png").symlink_to("../case.png")],
        "empty folder": lambda: file.mkdir(),
        "1 TB of zeros": lambda: [file.touch(), os.truncate(file, 1 << 40)],
    }
    what = list(kinds)[rng.integers(len(kinds))]
    kinds[what]()
    return str(file), what, "refused"


def _bind(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(file.parent)  # the path of a socket has 107 bytes at most
        server.bind(file.name)
        os.chdir(here)


def name_of_nothing(rng, folder) -> Made:
    names = [
        "",
        "a\0b.png",
        "x" * 300,
        "x" * 5000,
        "none.png/a.png",
        "a/" * 2000,
        "none\n\x1b[2J.png",
        "./\r\n",
    ]
    names += [
        os.fsdecode(b"\xff\xfe.png"),
        "\u202egnp.",
        "none/" + "y" * 254,
        "/proc/none",
        "\\\\host\\a.png",
    ]
    name = names[rng.integers(len(names))]
    return name, f"the name {name[:40]!a}", "refused"


def hostile_name(rng, folder) -> Made:
    names = [
        "x" * 250 + ".png",
        "a\n\x1b[31mb.png",
        os.fsdecode(b"caf\xe9.png"),
        "\u202egnp.png",
        " .png",
        "a b.png",
    ]
    names += [
        "'; rm -rf ~; '.png",
        "$(id).png",
        "<script>.png",
        "%s%n.png",
        "日" * 83 + ".png",
        "a\\x1b.png",
        "~",
    ]
    name = names[rng.integers(len(names))]
    (folder / name).write_bytes(encoded(rng, "PNG"))
    return str(folder / name), f"a picture called {name[:40]!a}", "good"


MAKERS = (truncated, flipped, spliced, no_picture, exif_nonsense, modes, animated, turned, wrong_suffix)
MAKERS += (one_colour, bomb, off, special, name_of_nothing, hostile_name)

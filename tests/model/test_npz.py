"""Damaged .npz files of mask codecs: what they say of themselves is not believed."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import complaint_about

from model.decoding import masks as mask_codec
from model.decoding.masks import MaskCodec


@pytest.fixture
def small_npz(tmp_path, monkeypatch):
    """make(name=content of its .npy, ...): an .npz that is large enough to be taken for the official one."""

    def make(compression=zipfile.ZIP_STORED, **contents) -> Path:
        file = tmp_path / "vae-oid.npz"
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in contents.items():
                archive.writestr(f"{name}.npy", content)
        monkeypatch.setattr(mask_codec, "OFFICIAL_BYTES", file.stat().st_size)
        return file

    return make


def npy(header: str, content=b"") -> bytes:
    """A .npy file that says of its content what it should not."""
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + content


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",  # 3.6 TiB
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 0), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)",
        "(" * 100,
        "{'descr': '<f4', 'shape': (3,), }",
        "__import__('os')",
        "",
    ],
)
def test_headers_in_npz(header, small_npz):
    """What a header says is compared with the array's bytes; nothing is evaluated or allocated for it."""
    message = complaint_about(small_npz(a=npy(header, np.ones(3, "<f4").tobytes())), MaskCodec.load)
    assert "numpy" in message


def test_flips_in_npz(small_npz):
    """Flipped bytes anywhere in the file are a complaint, or change nothing but a number."""
    good = small_npz(
        a=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", b"\0" * 12), b=b"x" * 50
    )
    content, rng = good.read_bytes(), np.random.default_rng(0)
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= int(rng.integers(1, 256))
        good.write_bytes(spoiled)
        complaint_about(good, MaskCodec.load)


def test_compressed_npz(small_npz):
    """A gigabyte of zeros in a file of a megabyte."""
    content = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (25000000,), }", bytes(10**8))
    assert "compressed" in complaint_about(small_npz(zipfile.ZIP_DEFLATED, a=content), MaskCodec.load)

"""The page: one HTML file with its style, program and data in it, which asks no network for anything."""

import base64
import io
import json
import zlib
from importlib.resources import files

import numpy as np
from PIL import Image

MAX_SIDE = 768  # pixels of the picture in the page


def pack(codes: np.ndarray) -> dict:
    """An array of uint8 or uint16 -> what web/page.js unpacks."""
    whole = np.ascontiguousarray(codes, codes.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode()
    return {"shape": list(codes.shape), "bits": 8 * codes.dtype.itemsize, "data": data}


def pack_probabilities(p: np.ndarray, bits: int = 8) -> dict:
    """Probabilities as whole numbers of 8 or 16 bits: (2^bits - 1) times their square roots, as these keep
    more of small values, which most attention has."""
    whole = np.round(np.sqrt(np.asarray(p, np.float32).clip(0, 1)) * (2**bits - 1))
    return pack(whole.astype(np.uint8 if bits == 8 else np.uint16))


def picture(image: Image.Image) -> dict:
    """An image's size, and itself as a data URL."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    small.save(file, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"width": image.width, "height": image.height, "url": url}


def page(data: dict) -> str:
    """What look_inside collects -> the HTML file."""
    web = files("infer.inside") / "web"
    names = "page.html", "page.css", "panels.js", "page.js"
    html, css, *scripts = ((web / name).read_text("utf-8") for name in names)
    # "<" could end the script element that holds the data, wherever in a name it stands.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    html = html.replace("{{css}}", css).replace("{{js}}", "\n".join(scripts))
    return html.replace("{{data}}", text)

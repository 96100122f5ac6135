"""An answer as HTML: boxes and masks over the picture, a table, the JSON file. Names come from anywhere, and
are escaped."""

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from infer.inside.page import MAX_SIDE
from infer.lib.draw import MASK_OPACITY, class_colour
from infer.lib.record import make_record
from infer.live.asking import Session
from model.decoding.boxes import areas
from model.decoding.detections import Detections, Selection
from model.io.names import shown


def text(name: str) -> str:
    return escape(shown(name))


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def problem(error: BaseException | str) -> str:
    return f'<p class="problem" role="alert">{text(str(error))}</p>'


def mask_url(mask: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A mask bool [H, W] as a PNG of one colour."""
    opacity = Image.fromarray(mask.astype(np.uint8) * round(255 * MASK_OPACITY))
    opacity.thumbnail((MAX_SIDE, MAX_SIDE))
    layer, file = Image.new("RGB", opacity.size, colour), io.BytesIO()
    layer.putalpha(opacity)
    layer.save(file, "PNG")
    return data_url(file.getvalue(), "image/png")


def drawing(session: Session, found: Detections | None) -> str:
    """The picture, each box a group that can be pointed at or reached by Tab."""
    width, height = session.image.size
    size, groups = max(width, height) / 30, []  # of letters
    # Large boxes first: a small one inside can be pointed at.
    for i in np.argsort(-areas(found.boxes), kind="stable") if found else ():
        x0, y0, x1, y1 = found.boxes[i]
        rgb = class_colour(int(found.class_ids[i]))
        colour = "rgb({},{},{})".format(*rgb)
        caption = f"{text(found.labels[i])} {found.scores[i]:.2f}"
        frame = f'x="0" y="0" width="{width}" height="{height}"'
        mask = found.masks and f'<image {frame} href="{mask_url(found.masks[i], rgb)}"/>'
        top = y0 - 0.3 * size if y0 > 1.3 * size else y0 + 1.1 * size  # above the box, or inside it
        groups.append(
            f'<g class="box" tabindex="0" role="img" aria-label="{caption}">{mask or ""}'
            f'<rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"'
            f' stroke="{colour}"/>'
            f'<text x="{x0 + 0.2 * size:.2f}" y="{top:.2f}"'
            f' style="font-size: calc({size:.2f}px * var(--letters, 1))">{caption}</text></g>'
        )
    return (
        f'<svg class="drawing" viewBox="0 0 {width} {height}" role="group" aria-label="{text(session.name)}">'
        f'<image href="{session.view["url"]}" width="{width}" height="{height}"/>{"".join(groups)}</svg>'
    )


def table(found: Detections) -> str:
    rows = "".join(
        f'<tr><th scope="row"><i style="background:rgb{class_colour(int(c))}"></i>{text(label)}</th>'
        f"<td>{score:.2f}</td><td>{' '.join(f'{x:.0f}' for x in box)}</td></tr>"
        for (label, score, box), c in zip(found, found.class_ids)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("class", "score", "x0 y0 x1 y1"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def json_link(session: Session, found: Detections) -> str:
    """The file that detect.py --json writes, to download."""
    records = [make_record(Path(session.name), session.image, found, tokens=False)]
    url = data_url(json.dumps(records, indent=2).encode() + b"\n", "application/json")
    return f'<a class="json" download="{text(Path(session.name).stem)}.json" href="{url}">Download JSON</a>'


def answer(session: Session | None, selection: Selection, names: list[str]) -> str:
    """All that is shown of a session: the picture, and what of the last answer passes the filters."""
    if session is None:
        return '<p class="empty">Choose a scene or drop a picture.</p>'
    found = session.raw and session.raw.select(selection, names)
    parts = [drawing(session, found)]
    if session.seconds:
        times = " · ".join(f"{name.lower()} {seconds:.2f} s" for name, seconds in session.seconds.items())
        parts.append(f'<p class="times">{times}</p>')
    if session.text is not None:
        parts.append(f'<p class="words">{text(session.text) or "(no words)"}</p>')
    if found is not None:
        nothing = '<p class="empty">Nothing passes the filters.</p>'
        parts += [table(found) if len(found) else nothing, json_link(session, found)]
    return "".join(parts)


def explanation(html: str) -> str:
    """A page of explain.py inside this one, its scripts kept apart; and the same as a file."""
    url = data_url(html.encode(), "text/html")
    return (
        '<iframe class="inside" sandbox="allow-scripts" title="Look inside"'
        f' srcdoc="{escape(html)}"></iframe>'
        f'<a download="explain.html" href="{url}">Download this page</a>'
    )

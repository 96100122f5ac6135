"""The demo: what it keeps of an answer and how it shows it, without a browser; and the page in a real one."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
from base64 import b64decode
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import ENVIRONMENT, ROOT, CannedAnswers, call, complaint, edit_json, load, picture
from PIL import Image

from infer import demo, detect
from infer.live import asking
from infer.live.asking import CLOSED_SET, OPEN_SET, SEGMENT, WORDS, Asker, RawAnswer, Session, open_upload
from infer.live.overlay import answer, explanation, problem
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.decoding.masks import from_rle

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=alert(1)>"
SOME = Selection(0.02, 0.3)
A, B = "<loc0000><loc0000><loc0511><loc0511>", "<loc0256><loc0256><loc0767><loc0767>"
SEGS = "".join(f"<seg{k:03}>" for k in range(16))


@pytest.fixture(scope="module")
def tiny(model):
    return load(model)


@pytest.fixture
def session(tmp_path):
    return open_upload(picture(tmp_path / "noise.png", 90, 60, seed=14))


def no_codec():
    raise ValueError("no codec here")


@pytest.fixture
def canned(tiny, tokenizer, codec):
    """An asker that knows two answers in words by heart."""
    asker = Asker(tiny, lambda: codec)
    asker.prompter = CannedAnswers(
        tokenizer, {"detect cat ; dog": f"{A} cat ; {B} dog", "segment cat": f"{A}{SEGS} cat"}
    )
    asker.prompter.model = tiny
    return asker


def boxes_of(html: str) -> list[tuple]:
    """label, x0, y0, x1, y1 of each box that is drawn."""
    found = re.findall(
        r'aria-label="([^"]*) [\d.]+">[^"]*<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)" stroke',
        html,
    )
    return sorted(
        (unescape(name), *np.round([x, y, x + w, y + h], 1))
        for name, *numbers in found
        for x, y, w, h in [map(float, numbers)]
    )


def record_of(html: str) -> dict:
    [record] = json.loads(b64decode(re.search(r'href="data:application/json;base64,(.*?)"', html)[1]))
    return record


@pytest.mark.parametrize("form", ["sequence", "parallel"])
def test_filters_need_no_new_run(tiny, session, form, monkeypatch):
    """What they leave is what a detector with these thresholds finds, though the model is not asked again."""
    asked = Asker(tiny, no_codec).ask(session, CLOSED_SET, form=form)
    everything = asked.raw.select(Selection())
    some = Selection(float(np.sort(everything.scores)[-2]), 0.3)
    [wanted] = ClosedSetDetector(closed_set_decoder(tiny, form), some)([session.image])
    monkeypatch.setattr(type(tiny), "encode", None)
    found = asked.raw.select(some)
    assert 0 < len(found) < len(everything) and not len(asked.raw.select(Selection(1.0)))
    assert found.labels == wanted.labels and np.array_equal(found.boxes, wanted.boxes)
    name = found.labels[-1]
    only = asked.raw.select(some, [name])
    where = [i for i, label in enumerate(found.labels) if label == name]
    assert np.array_equal(only.boxes, found.boxes[where]) and set(only.labels) == {name}
    assert set(found.labels) <= set(asked.raw.names())


def test_times_of_both_forms_stay(tiny, session):
    asker = Asker(tiny, no_codec)
    first = asker.ask(session, CLOSED_SET, form="sequence")
    both = asker.ask(first, CLOSED_SET, form="parallel")
    html = answer(both, SOME, [])
    assert re.search(r"sequence \d+\.\d\d s · parallel \d+\.\d\d s", html) and not session.seconds


def test_json_is_that_of_detect(tiny, session, model, here, monkeypatch, capsys):
    """To the byte what detect.py writes, and the drawing shows the same boxes."""
    argv = "--image", "noise.png", "--model", model, "--json", "found.json", "--score-threshold", 0.02
    code, *_ = call(monkeypatch, capsys, detect, *argv, "--nms-iou", 0.3, "--dtype", "float32")
    html = answer(Asker(tiny, no_codec).ask(session, CLOSED_SET, form=tiny.config.answers), SOME, [])
    record = record_of(html)
    assert code == 0 and [record] == json.loads(Path("found.json").read_text()) and record["detections"]
    wanted = sorted((d["label"], *np.round(d["box"], 1)) for d in record["detections"])
    assert len(boxes_of(html)) == len(wanted)
    for shown, true in zip(boxes_of(html), wanted, strict=True):
        assert shown[0] == true[0] and np.abs(np.array(shown[1:]) - true[1:]).max() < 0.11


def test_named_classes(canned, session):
    found = canned.ask(session, OPEN_SET, "cat ; dog")
    assert found.prompts == ("detect cat ; dog",) and found.form is None
    html = answer(found, Selection(0.5), ["dog"])
    assert boxes_of(html) == [("dog", 22.5, 15.0, 67.4, 44.9)]
    assert {d["label"] for d in record_of(answer(found, Selection(0.5), []))["detections"]} == {"cat", "dog"}


def test_masks(canned, session):
    """Each lies over the picture in its box, and in the JSON file in run-length encoding."""
    html = answer(canned.ask(session, SEGMENT, "cat"), Selection(0.5), [])
    [only] = record_of(html)["detections"]
    [url] = re.findall(r'<image [^>]*href="data:image/png;base64,(.*?)"', html)
    opacity = np.asarray(Image.open(io.BytesIO(b64decode(url))).getchannel("A"))
    mask = from_rle(only["segmentation"])
    assert np.array_equal(opacity > 0, mask) and mask[:30, :45].any() and not mask[31:, 46:].any()


def test_words(tiny, session):
    said = Asker(tiny, no_codec).ask(session, WORDS, " caption en ")
    assert said.raw is None and said.text == tiny.generate(session.image, "caption en", 200)
    html = answer(said, SOME, [])
    assert "application/json" not in html and 'class="words"' in html


@pytest.mark.parametrize(
    ("mode", "text", "word"),
    [
        (OPEN_SET, "", "names no class"),
        (OPEN_SET, "unicorn", "unicorn"),
        (WORDS, " ", "caption en"),
        (WORDS, "detect unicorn", "unicorn"),
        (SEGMENT, "cat", "no codec here"),
    ],
)
def test_what_cannot_be_asked(tiny, session, mode, text, word):
    assert word in complaint(Asker(tiny, no_codec).ask, session, mode, text)


def test_look_inside(tiny, session, monkeypatch):
    """The page is about this answer: its prompt, form and filters."""
    monkeypatch.setattr("infer.inside.closed_set.is_cheap", lambda model: False)
    monkeypatch.setattr("infer.inside.words.is_cheap", lambda model: False)
    monkeypatch.setattr(asking, "MAX_ANSWER_TOKENS", 5)
    asker = Asker(tiny, no_codec)
    assert "no answer" in complaint(asker.look_inside, session, SOME)
    for mode, text, wanted in (
        (CLOSED_SET, "", {"form": "sequence", "threshold": 0.02}),
        (WORDS, "caption en", {"form": "words", "prompt": "caption en"}),
    ):
        asked = asker.ask(session, mode, text, "sequence")
        html = asker.look_inside(asked, SOME)
        data = json.loads(
            re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', html, re.S)[1]
        )
        assert wanted.items() <= data.items() and data["picture"]["name"] == "noise.png"
        assert unescape(re.search(r'srcdoc="(.*?)"', explanation(html), re.S)[1]) == html


def test_uploads(tmp_path, monkeypatch):
    """A complaint is one line without a folder of the server."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    message = complaint(open_upload, broken)
    assert message.startswith("broken.png: ") and str(tmp_path) not in message
    monkeypatch.setattr(asking, "MAX_PIXELS", 90 * 60 - 1)
    assert "5,399" in complaint(open_upload, picture(tmp_path / "large.png", 90, 60))


def test_names_are_shown_as_text():
    raw = RawAnswer(
        (90, 60), [HOSTILE], np.array([[0, 0, 511, 511]]), np.array([0.9]), np.array([0]), np.array([0]),
        np.ones((1, 64, 64), np.float32),
    )  # fmt: skip
    session = Session.of(f'{HOSTILE}".png', Image.new("RGB", (90, 60)))
    session = asking.replace(session, raw=raw, text=HOSTILE, prompts=(HOSTILE,))
    for html in (answer(session, SOME, []), problem(HOSTILE)):
        assert "<img" not in html and "&lt;img" in html


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    code, out, err = call(monkeypatch, capsys, demo)
    assert code == 1 and err.count("\n") == 1 and 'pip install -e ".[demo]"' in err


def test_a_port_that_does_not_exist(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, demo, "--port", 65536)
    assert code == 1 and err == "demo.py: --port 65536: the last one is 65535\n"


# The page ---------------------------------------------------------------------------------------------------


def demo_of(folder: Path, port: int) -> subprocess.Popen:
    argv = "infer/demo.py", "--model", folder, "--port", port, "--score-threshold", 0, "--nms-iou", 1
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=ENVIRONMENT, **pipes)


@pytest.mark.skipif(find_spec("gradio") is None, reason='gradio is not installed (pip install -e ".[demo]")')
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
def test_in_a_browser(model, tmp_path):
    """Upload, detect, read the boxes, move the threshold, upload what is no picture; nothing leaves for a
    network, and no name of a class is taken for HTML."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    hostile = tmp_path / "hostile"
    shutil.copytree(model, hostile)
    edit_json(
        hostile / "config.json",
        lambda config: config["detection"].update(classes=[f"{HOSTILE} ${{value}} {c}" for c in range(80)]),
    )
    broken, complaints = tmp_path / "broken.png", []
    broken.write_bytes(b"no picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = demo_of(hostile, port)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}/\n", server.stdout.read()
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.set_default_timeout(120_000)  # a busy machine takes ten times as long
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            own = rf"(http|ws)://127\.0\.0\.1:{port}/|data:|blob:"
            tab.on("request", lambda request: re.match(own, request.url) or complaints.append(request.url))
            tab.goto(f"http://127.0.0.1:{port}/")
            tab.locator("#drop input").set_input_files(picture(tmp_path / "noise.png", 90, 60, seed=14))
            tab.wait_for_selector(".drawing")
            assert tab.locator("#warning").count() == 0  # it is not nano
            tab.locator("#run").click()
            tab.wait_for_selector("#view tbody tr")
            boxes = tab.locator(".drawing .box")
            record = record_of(tab.locator("#view").inner_html())
            labels = [d["label"] for d in record["detections"]]
            assert record["image"] == "noise.png" and len(labels) == boxes.count() > 0
            assert all(HOSTILE in label for label in labels)
            shown = boxes.evaluate_all(
                "all => all.map(x => x.getAttribute('aria-label').replace(/ \\S+$/, ''))"
            )
            assert sorted(shown) == sorted(labels)
            tab.locator("#threshold input[type=number]").fill("1")
            tab.wait_for_function("!document.querySelector('.drawing .box')")
            tab.locator("#drop input").set_input_files(broken)
            tab.wait_for_selector("#message .problem")
            assert tab.locator("#message").inner_text().strip().startswith("broken.png: ")
            assert tab.locator(".drawing").count() == 1  # the last picture stays
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
    assert complaints == [] and server.returncode == 143

"""The page of explain.py in a real browser: what pointing, clicking and typing do, and what never happens."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import edit_json, load, picture, unpack
from PIL import Image

from infer.inside.look import look_inside
from infer.inside.page import page as html_of
from model.decoding.detections import Selection

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")

HOSTILE = "<img src=x onerror=alert(1)>"
CLASS = "</script><script>alert(2)</script>"
FORMS = {
    "sequence": dict(groups=4),
    "parallel": dict(branches=6),
    "words": dict(prompt="caption en", max_tokens=5),
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        # Root may not use the sandbox; the pages are our own.
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(model, tmp_path_factory):
    """Of each form: the file, and what is in it. Each class, and the picture, is called something hostile."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = folder / "hostile"
    shutil.copytree(model, hostile)

    def rename(config):
        config["detection"]["classes"] = [f"{CLASS} {c}" for c in range(80)]

    edit_json(hostile / "config.json", rename)
    image = Image.open(picture(folder / "noise.png", 90, 60, seed=14))
    network = load(hostile)
    found = {}
    for form, options in FORMS.items():
        if form != "words":
            options = options | dict(decode=form, selection=Selection(0.01, 0.3))
        data = look_inside(network, image, HOSTILE, **options)
        file = folder / f"{form}.html"
        file.write_text(html_of(data), encoding="utf-8")
        found[form] = file, json.loads(json.dumps(data))
    return found


@pytest.fixture
def visit(browser, pages):
    """Open a page. In the end nothing may have been asked of a network, complained of, or come up."""
    complaints, opened = [], []

    def visit(form: str, width: int = 1200, scheme: str = "light"):
        tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        opened.append(tab)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        tab.on(
            "request", lambda request: re.match("file:|data:", request.url) or complaints.append(request.url)
        )
        tab.goto(pages[form][0].as_uri())
        tab.wait_for_selector("body[data-ready]")
        return tab, pages[form][1]

    yield visit
    for tab in opened:
        tab.close()
    assert complaints == []


def text(tab, name: str) -> str:
    return tab.locator(f"#{name}").inner_text()


def opacities(tab) -> np.ndarray:
    return np.array(tab.eval_on_selector_all(".patch", "all => all.map(x => +x.style.fillOpacity)"))


def attention(data) -> np.ndarray:
    return (unpack(data["maps"]) / 255) ** 2  # [L, N, T, S]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_it_fits_and_shows_names_as_text(visit, form, width, scheme):
    tab, data = visit(form, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert text(tab, "title") == HOSTILE and HOSTILE in tab.title()
    assert tab.locator("img, [onerror]").count() == 0 and tab.locator("script").count() == 2
    nameless = """[...document.querySelectorAll("button, input, select, canvas, svg[role]")].filter(x =>
        !x.getAttribute("aria-label") && !x.textContent.trim() && !x.labels?.length).map(x => x.outerHTML)"""
    assert tab.evaluate(nameless) == []
    if form != "words":
        assert CLASS in text(tab, "distributions") and CLASS in text(tab, "score-list")
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 600) == (scheme == "light")


def test_point_at_a_token(visit):
    """The patches light up as it reads them, in mean and in each layer and head."""
    tab, data = visit("sequence")
    maps = attention(data)
    best = max((box for box in data["boxes"] if box["fate"] == "stays"), key=lambda box: box["score"])
    row = best["tokens"][2]["row"]
    tab.locator("#tokens .row").nth(1).locator(".chip").nth(2).hover()

    def same(expected):
        return np.abs(opacities(tab) - 0.85 * expected / expected.max()).max() < 2e-3

    assert same(maps[:, :, row, :16].mean((0, 1)))
    assert "To write y1 of" in text(tab, "reading")
    on_image = 100 * maps[:, :, row, :16].mean((0, 1)).sum()
    assert abs(float(re.search(r"picture with ([\d.]+)%", text(tab, "reading"))[1]) - on_image) < 0.51
    assert tab.locator("#strip > *").count() <= row + 1
    tab.locator("#tokens .row").nth(1).locator(".chip").nth(2).click()  # stays as the sliders are moved
    tab.locator("#layer").fill("1")
    assert same(maps[:, :, row, :16].mean(1).max(0)) and "maximum" in text(tab, "layer-name")
    tab.locator("#layer").fill("3")
    tab.locator("#head").fill("2")
    assert same(maps[1, 0, row, :16]) and "layer 1" in text(tab, "layer-name")


def test_point_at_a_patch(visit):
    tab, data = visit("parallel")
    tab.locator(".patch").nth(5).hover()
    assert text(tab, "reading").startswith("The patch in row 2, column 2 is read most for")
    mean = attention(data)[..., 5].mean((0, 1))  # [T]
    shown = tab.eval_on_selector_all(
        "#tokens .chip", "all => all.map(x => parseInt(/accent\\S* (\\d+)%/.exec(x.style.background)[1]))"
    )
    prompt, order = data["prompt_tokens"], sorted(data["boxes"], key=lambda box: -box["score"])
    order.sort(key=lambda box: box["fate"] != "stays")
    rows = [*range(prompt), *(token["row"] for box in order for token in box["tokens"])]
    assert np.abs(np.array(shown) - 60 * mean[rows] / mean[rows].max()).max() <= 0.51
    tab.mouse.move(5, 5)
    assert text(tab, "reading").startswith("To write")


def test_keys(visit):
    tab, data = visit("sequence")
    tab.locator("#tokens .chip[tabindex='0']").focus()
    tab.keyboard.press("ArrowLeft")
    assert "To write x1 of" in text(tab, "reading")
    tab.keyboard.press("ArrowUp")
    assert text(tab, "layer-name") == "maximum of all"
    tab.keyboard.press("ArrowUp")
    assert text(tab, "layer-name") == "layer 0, local: window 16"
    tab.keyboard.press("Shift+ArrowUp")
    assert text(tab, "head-name") == "maximum of all"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert text(tab, "layer-name") == "mean of all" and "To write the class of" in text(tab, "reading")
    tab.locator("#patches").focus()
    tab.keyboard.press("ArrowDown")
    assert "row 2, column 1" in text(tab, "reading")
    tab.locator("#cells").focus()
    tab.keyboard.press("ArrowRight")
    assert "column patch in row 1, column 2" in text(tab, "cell") and "closed, too far back" in text(
        tab, "cell"
    )


def test_choose_a_box(visit):
    """In the list, by the menu, in the picture of branches: all panels follow."""
    tab, data = visit("parallel")
    tab.locator("#score-list button").nth(3).click()
    k = int(tab.locator("#score-list .at").get_attribute("data-box"))
    assert tab.locator("#box").input_value() == str(k)
    assert tab.locator(".branch.at").get_attribute("data-box") == str(k)
    assert tab.locator(".branch").count() == 6 and tab.locator("#curves .curve").count() == 4
    tab.select_option("#box", "0")
    assert tab.locator(".branch.at").get_attribute("data-box") == "0"
    tab.locator(".hit").nth(2).dispatch_event("pointerenter")
    assert tab.locator("#box").input_value() == "2"
    assert tab.locator("#tokens .chip.at").get_attribute("aria-label").startswith("class")
    tab.select_option("#box", "0")
    classes = (unpack(data["classes"])[0] / 65535) ** 2
    # The four curves are highest where they should be, each along its own edge; the picture is 1000 x 667.
    paths = tab.eval_on_selector_all("#curves .curve", "all => all.map(x => x.getAttribute('d'))")
    points = [np.array(re.findall(r"-?[\d.]+", path), float).reshape(-1, 2) for path in paths]
    tops = (
        points[0][:, 0].argmin(),
        points[1][:, 1].argmin(),
        points[2][:, 0].argmax(),
        points[3][:, 1].argmax(),
    )
    lengths, axes = (1000 * 60 / 90, 1000) * 2, (1, 0) * 2
    for slot, (p, top) in enumerate(zip(points, tops)):
        likeliest = unpack(data["coordinates"])[0, slot].argmax()
        assert abs(p[top, axes[slot]] - (likeliest + 0.5) / 1024 * lengths[slot]) < 0.06
    first = tab.locator("#classes > div").first.inner_text().split("\n")
    assert first[0].strip() == data["names"][classes.argmax()]
    assert abs(float(first[-1].rstrip("%")) - 100 * classes.max()) < 0.51
    assert 10 <= tab.locator("#classes > div").count() <= 11


def test_threshold(visit):
    tab, data = visit("parallel")
    staying = sorted((box["score"] for box in data["boxes"] if box["fate"] == "stays"), reverse=True)
    assert (
        text(tab, "scores-count")
        == f"6 branches, {len(staying)} after NMS, {sum(s >= 0.01 for s in staying)} above the threshold."
    )
    tab.locator("#threshold").fill("1")
    assert "0 above the threshold" in text(tab, "scores-count") and "nothing found" in text(tab, "answer")


def test_noise(visit):
    tab, data = visit("sequence")
    shown = tab.eval_on_selector_all("#score-list .noise", "all => all.map(x => parseFloat(x.style.width))")
    assert np.abs(np.array(shown) - [100 * box["noise"] for box in data["boxes"]]).max() < 0.1
    assert not tab.locator("#branches").is_visible()


def test_lens(visit):
    """Clicking a class draws other maps."""
    tab, data = visit("sequence")
    canvas = tab.locator("#lens-maps canvas").last
    before = canvas.evaluate("x => x.toDataURL()")
    tab.locator("#lens-classes button").last.click()
    assert tab.locator("#lens-maps canvas").count() == 3 and canvas.evaluate("x => x.toDataURL()") != before
    lens = (unpack(data["lens"]["values"]) / 255) ** 2
    highest = float(re.search(r"up to ([\d.]+)%", tab.locator("#lens-maps figcaption").last.inner_text())[1])
    assert "noise" in text(tab, "lens-text") and abs(highest - 100 * lens[-1, -1].max()) < 0.51


def test_mask(visit):
    tab, data = visit("parallel")
    cells, size = unpack(data["mask"]["cells"]), data["maps"]["shape"][-1]
    for kind, t, s in [(0, size - 1, 20), (1, size - 1, 0), (1, 3, 3), (0, size - 1, size - 5)]:
        tab.locator("#mask-layers button").nth(kind).click()
        pixel = tab.locator("#cells").bounding_box()["width"] / size
        tab.locator("#cells").hover(position=dict(x=(s + 0.5) * pixel, y=(t + 0.5) * pixel))
        may, why = data["mask"]["reasons"][cells[kind, t, s]]
        assert text(tab, "cell").endswith(f": {'open' if may else 'closed'}, {why}.")


def test_what_if(visit):
    tab, data = visit("parallel")
    assert tab.locator("#changes td button").count() == 12 == len(data["what_if"])
    for i, change in enumerate(data["what_if"]):
        tab.locator("#changes td button").nth(i).hover()
        gone = [
            k for k, left in change["left"].items() if (left or 0) < 0.01 <= data["boxes"][int(k)]["score"]
        ]
        assert (("no box vanishes" in text(tab, "change")) == (not gone)) and "Without" in text(tab, "change")
        assert tab.locator("#changes td button").nth(i).inner_text() == (f"−{len(gone)}" if gone else "·")


def test_words(visit):
    tab, data = visit("words")
    assert data["text"].split()[0] in text(tab, "answer")
    tab.locator("#tokens .row").nth(1).locator(".chip").nth(1).click()
    assert tab.locator("#best > div").count() == 10
    assert tab.locator("#best .at").inner_text().split("\n")[0].strip() == data["words"][1]["text"].strip()
    for hidden in ("distributions", "branches", "scores"):
        assert not tab.locator(f"#{hidden}").is_visible()

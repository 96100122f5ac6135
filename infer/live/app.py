"""The demo's page: what can be chosen, and what happens then. Gradio is imported when it is built."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import torch
from PIL import Image

from infer.live.asking import CLOSED_SET, MODES, SEGMENT, WORDS, Asker, Session, open_upload
from infer.live.overlay import answer, explanation, problem
from model.config import FORMS
from model.decoding.detections import Selection
from model.decoding.photographs import photograph_warning

MAX_UPLOAD = 20 * 2**20  # bytes
MAX_TEXT = 500  # characters of a prompt
WAITING = 20  # requests in the queue; more are refused
TITLE = "PaliGemma 2, a detector"
WARNING = (
    "Nano has seen drawings and nothing else: do not expect it to find anything in a photograph. "
    "For photographs, start the demo with an official checkpoint."
)
CSS = (Path(__file__).parent / "demo.css").read_text("utf-8")
FAULTS = ValueError, OSError, MemoryError, torch.OutOfMemoryError  # that the programs report in a line


def build(asker: Asker, scenes: Sequence[tuple[str, Image.Image]], selection: Selection, drawings_only: bool):
    """The page, a gradio.Blocks. scenes: pictures to choose from and their names; selection: what is kept at
    first; drawings_only: the model is nano."""
    import gradio as gr

    def attempt(work: Callable[[], Session], session: Session | None, filters) -> list:
        """New contents of [session, view, message, names, inside] after work that may fail."""
        try:
            session = work()
        except FAULTS as error:  # the last answer stays
            message = problem(error)
            return [session, gr.skip(), message, gr.skip(), gr.skip()]
        names = session.raw.names() if session.raw else []
        message = problem(photograph_warning([session.name], 1)) if session.photograph else ""
        return [session, answer(session, Selection(*filters), []), message, gr.Dropdown(names, value=[]), ""]

    def upload(file, session, *filters):
        return [None, *attempt(lambda: open_upload(Path(file)), session, filters)]

    def choose(event: gr.SelectData, session, *filters):
        return attempt(lambda: Session.of(*scenes[event.index]), session, filters)

    def ask(session, mode, text, form, *filters):
        def work():
            if session is None:
                raise ValueError("there is no picture yet: choose a scene or drop one")
            return asker.ask(session, mode, text or "", form)  # a hidden box has no text

        return attempt(work, session, filters)

    def refilter(session, names, *filters):
        return answer(session, Selection(*filters), names)

    def look(session, *filters):
        try:
            if session is None:
                raise ValueError("there is no answer yet to look into")
            return explanation(asker.look_inside(session, Selection(*filters))), ""
        except FAULTS as error:
            return "", problem(error)

    def follow(mode):
        hints = {SEGMENT: ("Classes", "kite ; person"), WORDS: ("Prompt", "caption en")}
        label, hint = hints.get(mode, ("Classes", "wine glass ; kite"))
        closed = mode == CLOSED_SET
        return gr.Textbox(visible=not closed, label=label, placeholder=hint), gr.Radio(visible=closed)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        session = gr.State(time_to_live=3600)
        gr.HTML(f"<h1>{TITLE}</h1>")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                drop = gr.File(label="A picture", file_types=["image"], height=140, elem_id="drop")
                if drawings_only:
                    gr.HTML(f'<p class="note">{WARNING}</p>', elem_id="warning")
                if scenes:
                    gallery = gr.Gallery(
                        [image for _, image in scenes], show_label=False, columns=4, height="auto",
                        allow_preview=False, interactive=False, buttons=[], elem_id="scenes",
                    )  # fmt: skip
                mode = gr.Radio(MODES, value=CLOSED_SET, label="Look for", elem_id="mode")
                text = gr.Textbox(visible=False, max_length=MAX_TEXT, elem_id="text")
                form = gr.Radio(FORMS, value=asker.model.config.answers, label="Decode", elem_id="form")
                go = gr.Button("Run", variant="primary", elem_id="run")
                threshold = gr.Slider(0, 1, selection.score_threshold, step=0.01, label="Lowest score",
                    elem_id="threshold")  # fmt: skip
                overlap = gr.Slider(
                    0, 1, selection.nms_iou, step=0.05, label="NMS: highest IoU", elem_id="nms"
                )
                names = gr.Dropdown([], multiselect=True, label="Only these classes", elem_id="names")
            with gr.Column(scale=3, min_width=300):
                message = gr.HTML(elem_id="message")
                view = gr.HTML(answer(None, selection, []), elem_id="view")
                inside_button = gr.Button("Look inside this answer", elem_id="look")
        inside = gr.HTML(elem_id="inside")

        filters, changed = [threshold, overlap], [session, view, message, names, inside]
        private = dict(api_visibility="private")
        one_model = private | dict(concurrency_id="model", concurrency_limit=1)
        drop.upload(upload, [drop, session, *filters], [drop, *changed], **private)
        if scenes:
            gallery.select(choose, [session, *filters], changed, **private)
        mode.change(follow, mode, [text, form], **private)
        gr.on([go.click, text.submit], ask, [session, mode, text, form, *filters], changed, **one_model)
        quick = private | dict(show_progress="hidden", trigger_mode="always_last")
        moved = [threshold.change, overlap.change, names.input]
        gr.on(moved, refilter, [session, names, *filters], view, **quick)
        inside_button.click(look, [session, *filters], [inside, message], **one_model)
    return page.queue(max_size=WAITING)


def launch(page, host: str, port: int | None) -> None:
    """Serve it until the program is stopped, and send nothing anywhere else."""
    import gradio as gr

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, inline=False, ssr_mode=False, run_history=False,
        max_file_size=MAX_UPLOAD, state_session_capacity=WAITING, footer_links=[], theme=theme, css=CSS,
        quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(url, flush=True)
    try:
        Event().wait()  # for a signal
    finally:
        page.close(verbose=False)

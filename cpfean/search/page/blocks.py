"""The page itself: Gradio's parts around what `answers` says.

Gradio is an extra (`demo`), and is imported when a page is made and not before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpfean.errors import ConfigError
from cpfean.search.page.answers import LARGEST_UPLOAD, Answer, Answers, Asked
from cpfean.search.page.guard import LARGEST_QUESTION
from cpfean.search.page.markup import escaped

_HERE = Path(__file__).parent
_FONT = ["system-ui", "sans-serif"]
_WAITING = 20  # questions in the queue
_FORGOTTEN = 3600  # seconds after which a visitor's last answer is


def load_gradio() -> Any:
    """The library, which is told to report nothing to anybody.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ConfigError(
            "the search page needs Gradio, which is not installed: pip install -c constraints.txt "
            "-e '.[demo]'. Without a page, cpfean.search.searcher.Searcher finds the same."
        ) from None
    return gradio


def build_page(answers: Answers, *, title: str, about: str, why_no_upload: str | None) -> Any:
    """The page as Gradio's blocks.

    Args:
        answers: what it asks.
        title: of the window.
        about: a line on models and gallery.
        why_no_upload: why no photograph of one's own can be dropped in; None if it can.
    """
    gr = load_gradio()
    clicks, pairs, drop = ((_HERE / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)

    def ask(sentence: str | None) -> tuple[str, Asked | None, str]:
        return shown(answers.images(sentence or ""))

    def look(asked: Asked | None, event: Any) -> str:
        return answers.chosen(asked, event._data)

    def look_and_name(asked: Asked | None, event: Any) -> tuple[str, str]:
        # The image that is looked at is at hand for a search for its captions.
        pair = answers.chosen(asked, event._data)
        try:
            return pair, answers.name_of(asked, event._data) or ""
        except ConfigError:
            return pair, ""

    def captions(name: str | None) -> tuple[str, Asked | None, str]:
        return shown(answers.captions_of(name or ""))

    def any_captions() -> tuple[str, str, Asked | None, str]:
        name = answers.random_image()
        return name, *captions(name)

    def dropped(event: Any) -> tuple[str, Asked | None, str]:
        return shown(answers.captions_for(event._data))

    for each in (look, look_and_name, dropped):
        each.__annotations__["event"] = gr.EventData  # which tells Gradio to hand it on
    plain: dict[str, Any] = {"apply_default_css": False}
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<h1>CPFEAN search</h1><p class='told'>{escaped(about)}</p>", js_on_load=None)
        with gr.Tab("Find images"):
            asked = gr.State(None, time_to_live=_FORGOTTEN)
            with gr.Row(elem_classes="question"):
                sentence = gr.Textbox(
                    label="A sentence",
                    placeholder="a dog in the snow",
                    scale=5,
                    max_lines=3,
                    autofocus=True,
                )
                find = gr.Button("Find", variant="primary", scale=1, min_width=90)
            found = gr.HTML(js_on_load=clicks, **plain)
            pair = gr.HTML(js_on_load=pairs, **plain)
        if answers.has_captions:
            with gr.Tab("Find captions"):
                asked_captions = gr.State(None, time_to_live=_FORGOTTEN)
                with gr.Row(elem_classes="question"):
                    name = gr.Textbox(
                        label="Name of an image; the one that was looked at last stands here",
                        placeholder=answers.searchers[0].split.image_ids[0],
                        scale=4,
                        max_lines=1,
                    )
                    find_captions = gr.Button("Find", variant="primary", scale=1, min_width=90)
                    any_image = gr.Button("Any image", scale=1, min_width=110)
                upload = gr.HTML(drop_zone(why_no_upload), js_on_load=drop, **plain)
                found_captions = gr.HTML(js_on_load=clicks, **plain)
                pair_of_caption = gr.HTML(js_on_load=pairs, **plain)

        to_images = [found, asked, pair]
        for trigger in (find.click, sentence.submit):
            trigger(ask, sentence, to_images, **_EVENT)
        if not answers.has_captions:
            found.select(look, asked, pair, **_EVENT)
        else:
            found.select(look_and_name, asked, [pair, name], **_EVENT)
            to_captions = [found_captions, asked_captions, pair_of_caption]
            for trigger in (find_captions.click, name.submit):
                trigger(captions, name, to_captions, **_EVENT)
            any_image.click(any_captions, None, [name, *to_captions], **_EVENT)
            found_captions.select(look, asked_captions, pair_of_caption, **_EVENT)
            if why_no_upload is None:
                upload.upload(dropped, None, to_captions, **_EVENT)
    page.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def shown(answer: Answer) -> tuple[str, Asked | None, str]:
    """What goes to the list, to the visitor's memory, and to the pair, which is none yet."""
    return answer.told + answer.found, answer.asked, ""


def largest_request(why_no_upload: str | None) -> int:
    """Bytes of the largest question: with a photograph, in base64, where one can be dropped in."""
    return LARGEST_QUESTION + (4 * LARGEST_UPLOAD // 3 if why_no_upload is None else 0)


def drop_zone(why_not: str | None) -> str:
    """A place to drop a photograph in, or why there is none."""
    if why_not is not None:
        told = f"Your own photographs cannot find captions here: {escaped(why_not)}"
        return f'<p class="told">{told}</p>'
    return (
        f'<div class="drop" data-most="{LARGEST_UPLOAD}"><label>Or drop a photograph of your own '
        'here: <input type="file" accept="image/*"></label> <span class="drop-note" '
        'role="status"></span></div>'
    )


def mounted(page: Any) -> Any:
    """The page as an ASGI application."""
    gr = load_gradio()
    from fastapi import FastAPI

    outside = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        outside,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=_FONT, font_mono=["ui-monospace", "monospace"]
        ),
        css=(_HERE / "style.css").read_text(encoding="utf-8"),
    )


_SCRIPTS = ("clicks", "pairs", "drop")
# No function of the page can be called by name.
_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}

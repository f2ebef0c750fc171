"""The page: ask one model about pictures, or two side by side. `eyespot serve` mounts it, a Space launches it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL.Image import Image

from eyespot.inference import MAX_NEW_TOKENS, Assistant, load
from eyespot.processing.prompt import Message
from eyespot.serving.drawing import Trace, trace_of
from eyespot.serving.turns import Talk, answered, merged, next_turn, shown

try:
    import gradio as gr
    from gradio.processing_utils import save_pil_to_cache
    from gradio_client.utils import is_http_url_like
except ImportError as error:
    raise ImportError('the page needs gradio; pip install "eyespot[serve]"') from error
from eyespot.serving import page_style

if TYPE_CHECKING:
    from fastapi import FastAPI

TITLE = "eyespot"
MOST_NEW_TOKENS = 1024
MAX_UPLOAD = "20mb"
HOUR_S, DAY_S = 3_600, 86_400
NOBODY = ""  # of all names the one that no model has


def talk_of(assistant: Assistant) -> Talk:
    """A model of this process, for pages without a server behind them."""

    def talk(
        pictures: Sequence[str], messages: Sequence[Message], *, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        return assistant.stream_conversation((pictures, messages), max_new_tokens=max_new_tokens, **sampling)

    return talk


class _Pane(NamedTuple):
    """One model's side of the page."""

    name: gr.Dropdown
    chat: gr.Chatbot
    turns: gr.State


def build_page(
    talks: Mapping[str, Talk],
    *,
    traces: Mapping[str, Trace] | None = None,
    examples: Sequence[tuple[str | Path, str]] = (),
    title: str = TITLE,
    most_tokens: int = MOST_NEW_TOKENS,
) -> gr.Blocks:
    """The page over models by name; two of them can be compared. `mount` and `launch` show it.

    Args:
        talks: the first is asked unless another is chosen.
        traces: by the same names, of models that can be looked into.
        examples: pictures with questions.
        most_tokens: that an answer may be asked to have.

    Raises:
        ValueError: no model, or traces of unknown ones.
    """
    traces = traces or {}
    if not talks or set(traces) - set(talks):
        raise ValueError(
            f"the page has models {list(talks)} and traces {list(traces)}; give a model, and traces only of models"
        )
    question = gr.Textbox(
        show_label=False, placeholder="Ask about the picture", submit_btn=True, max_lines=6, autofocus=True,
        container=False, elem_id="question", render=False,
    )  # fmt: skip
    page = gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(HOUR_S, DAY_S))
    with page:
        gr.HTML(f"<h1>{escape(title)}</h1><p>Give a picture and ask about it.</p>", padding=False, elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"],
                    buttons=["fullscreen"], elem_id="picture",
                )  # fmt: skip
                _take_uploads_only(picture)
                if examples:
                    rows = [[str(path), text] for path, text in examples]
                    gr.Examples(rows, [picture, question], elem_id="examples", visible_columns=[0])
            with gr.Column(scale=3, min_width=300):
                panes = _panes(list(talks))
                question.render()
                with gr.Row(elem_id="foot"):
                    traced = gr.Checkbox(
                        label="Trace answers to the picture", visible=bool(traces), container=False, elem_id="traced"
                    )
                    fresh = gr.Button("New chat", size="sm", min_width=90, elem_id="fresh")
                settings = _settings(most_tokens)
        _listen(talks, traces, panes, question, picture, [*settings, traced], fresh)
    return page


def _take_uploads_only(picture: gr.Image) -> None:
    """Refuse addresses, which gradio would fetch for anybody who asks. (A subclass would make it write a .pyi file.)"""
    move = picture.async_move_resource_to_block_cache

    async def move_file(place: str | Path | None) -> str | None:
        if is_http_url_like(str(place)):
            raise gr.Error("a picture was given by its address; upload it", print_exception=False)
        return await move(place)

    picture.async_move_resource_to_block_cache = move_file  # type: ignore[assignment,method-assign]


def _settings(most_tokens: int) -> list[Any]:
    """Longest answer, temperature, top-p."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        return [
            gr.Slider(
                1, most_tokens, min(MAX_NEW_TOKENS, most_tokens), step=1, label="Longest answer", info="in tokens"
            ),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest token"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="share of the likeliest tokens that is drawn from"),
        ]


def _panes(names: Sequence[str]) -> list[_Pane]:
    """The model that is asked, and the one that it is compared with."""
    several = len(names) > 1
    with gr.Row(visible=several):
        first = gr.Dropdown(list(names), value=names[0], label="Model", min_width=140)
        second = gr.Dropdown([("no other", NOBODY), *names], value=NOBODY, label="Compare with", min_width=140)
    with gr.Row(elem_classes=["several"] if several else []):
        return [_Pane(name, _chat(name.value, visible=name.value != NOBODY), gr.State([])) for name in (first, second)]


def _chat(name: str, visible: bool) -> gr.Chatbot:
    # what a model writes is shown as it is, so that nobody takes Markdown's changes for the model's
    return gr.Chatbot(
        label=name, visible=visible, render_markdown=False, buttons=["copy"], allow_file_downloads=False,
        elem_classes="chat", min_width=260, placeholder="Answers appear here.",
    )  # fmt: skip


def _listen(
    talks: Mapping[str, Talk],
    traces: Mapping[str, Trace],
    panes: Sequence[_Pane],
    question: gr.Textbox,
    picture: gr.Image,
    settings: Sequence[Any],
    fresh: gr.Button,
) -> None:
    """What happens when somebody asks, stops, begins anew, or chooses another model."""
    idle: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    busy: dict[str, Any] = {"submit_btn": False, "stop_btn": True}

    def save(figure: Image) -> str:
        return str(save_pil_to_cache(figure, picture.GRADIO_CACHE, format="png"))

    def ask(given: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        tokens, temperature, top_p, traced = (given[setting] for setting in settings)
        asked = {pane: given[pane.name] for pane in panes if given[pane.name] != NOBODY}
        streams = [
            answered(
                [*given[pane.turns], next_turn(given[pane.turns], given[question].strip(), given[picture])],
                talks[name], save, traces.get(name) if traced else None,
                max_new_tokens=tokens, temperature=temperature, top_p=top_p,
            )
            for pane, name in asked.items()
        ]  # fmt: skip
        yield {question: gr.update(value="", **busy)}
        for number, turns in merged(streams):
            pane = list(asked)[number]
            yield {pane.chat: shown(turns), pane.turns: turns}
        yield {question: gr.update(**idle)}

    def begin(given: dict[Any, Any]) -> dict[Any, Any]:
        """Every model starts from the same point."""
        cleared: dict[Any, Any] = {question: gr.update(**idle)}
        for pane in panes:
            name = given[pane.name]
            cleared[pane.chat] = gr.update(value=[], label=name, visible=name != NOBODY)
            cleared[pane.turns] = []
        return cleared

    names, chats, turns = zip(*panes, strict=True)
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    asking = question.submit(ask, {question, picture, *settings, *names, *turns}, [question, *chats, *turns], **hidden)
    question.stop(lambda: gr.update(**idle), None, question, cancels=asking, **hidden)
    gr.on(
        [fresh.click, *(chat.clear for chat in chats), *(name.change for name in names)],
        begin, set(names), [question, *chats, *turns], cancels=asking, **hidden,
    )  # fmt: skip


def mount(
    app: FastAPI, page: gr.Blocks, path: str = "/", max_file_size: str | int = MAX_UPLOAD, **options: Any
) -> FastAPI:
    """Put the page into an application, behind the routes that this has already.

    max_file_size: of a picture, in bytes or as "20mb".
    options: further ones of gradio.mount_gradio_app, for instance auth or auth_dependency.
    """
    page.queue(default_concurrency_limit=None)  # the application has its own queue
    gr.mount_gradio_app(app, page, path=path, max_file_size=max_file_size, **_served(), **options)
    return app


def launch(
    models: str | Path | Mapping[str, str | Path],
    *,
    device: str = "auto",
    dtype: str = "auto",
    examples: Sequence[tuple[str | Path, str]] = (),
    title: str = TITLE,
    share: bool = False,
    **options: Any,
) -> None:
    """Load models into this process and show the page of them until it is stopped; what a Space calls.

    Args:
        models: a folder, or folders by the name that the page shows.
        device, dtype: as `eyespot.load` takes them.
        share: whether gradio makes a public address through its own servers.
        options: further ones of gradio.Blocks.launch, for instance server_name and server_port.
    """
    folders = models if isinstance(models, Mapping) else {Path(models).name: models}
    assistants = {name: load(folder, device, dtype) for name, folder in folders.items()}
    page = build_page(
        {name: talk_of(assistant) for name, assistant in assistants.items()},
        traces={name: trace_of(assistant) for name, assistant in assistants.items()},
        examples=examples,
        title=title,
    )
    page.queue(default_concurrency_limit=1)  # models of one process share its processors
    page.launch(share=share, max_file_size=MAX_UPLOAD, **_served(), **options)


def _served() -> dict[str, Any]:
    """What is served beside the components: our looks, and none of gradio's own pages and records."""
    return {
        "theme": page_style.theme(), "css": page_style.CSS, "footer_links": [],
        "run_history": False, "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False,
    }  # fmt: skip

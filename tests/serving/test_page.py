"""The page in a real browser: a picture, streamed answers, a second turn, boxes, maps, two models, phones, no outside.

Needs gradio, playwright and a Chromium (``EYESPOT_CHROMIUM`` names one; else it is looked for on the path).
"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import string
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.inference import Assistant
from eyespot.processing.images import open_image
from eyespot.serving.turns import NO_PICTURE, NO_QUESTION

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that we do not write
    gr = pytest.importorskip("gradio")
    browsers = pytest.importorskip("playwright.sync_api")
    import fastapi
    import uvicorn

    from eyespot.serving.page import build_page, launch, mount, talk_of, trace_of

CHROMIUM = os.environ.get("EYESPOT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.usefixtures("left_behind"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WAIT_MS = 60_000
FRAME = (214, 39, 40)  # the first colour of eyespot.data.boxes.draw_boxes
GREY = (90, 90, 90)
CHARACTERS = f"char:{string.ascii_letters}{string.punctuation} \n"


@dataclass
class Models:
    """Made-up models, and what they were asked. Half an answer is held back while `gate` is not set."""

    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[Any] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def counts(self, pictures: Sequence[str], messages: Sequence[Any], **options: Any) -> Iterator[str]:
        self.asked.append(([open_image(picture) for picture in pictures], messages, options))
        try:
            yield f"{len(pictures)} pictures, "
            while not self.gate.wait(0.02):
                yield "."
            yield f"{len(messages)} messages"
        finally:
            self.closed.set()

    def boxes(self, pictures: Sequence[str], messages: Sequence[Any], **options: Any) -> Iterator[str]:
        yield from ("<b>here</b> ", "10 20 ", "50 60")

    def broken(self, pictures: Sequence[str], messages: Sequence[Any], **options: Any) -> Iterator[str]:
        raise ValueError("the queue is full; try again in a minute")
        yield

    def trace(self, images: Sequence[Image.Image], messages: Sequence[Any]) -> Image.Image:
        return Image.new("RGB", images[-1].size, GREY)


def serve(app: fastapi.FastAPI) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "blue.png"
    Image.new("RGB", (200, 100), "blue").save(file)
    return file


@pytest.fixture(scope="module")
def address(models: Models, picture: Path) -> Iterator[str]:
    talks = {"counts": models.counts, "boxes": models.boxes, "broken": models.broken}
    app = fastapi.FastAPI()
    app.get("/health")(lambda: "fine")
    page = build_page(talks, traces={"boxes": models.trace}, examples=[(picture, "Which example?")], title="A <page>")
    yield from serve(mount(app, page))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a window of its own, and every address that it asked for."""

    def __init__(self, chromium: Any, address: str, size: dict[str, int] = DESKTOP, **options: Any) -> None:
        self.context = chromium.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.question = self.page.locator("#question textarea")
        self.question.wait_for()
        self.page.locator(".chat:visible").first.wait_for()  # which may come a moment later

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def give(self, picture: Path) -> None:
        self.page.locator("#picture input[type=file]").set_input_files(picture)
        self.page.locator("#picture img").wait_for()

    def choose(self, label: str, name: str) -> None:
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=name).click()

    def ask(self, question: str) -> None:
        """Returns when the answer is whole."""
        count = "document.querySelectorAll('[data-testid=bot]').length"
        before = self.page.evaluate(count)
        self.send(question)
        self.page.wait_for_function(f"{count} > {before}")
        self.page.locator("#question .submit-button").wait_for()

    def send(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")

    def chat(self, number: int = 0) -> Any:
        return self.page.locator(".chat").nth(number)

    def says(self, text: str, number: int = 0) -> None:
        self.chat(number).get_by_text(text).first.wait_for()

    def shade(self) -> int:
        """Of the ground behind the chat, 0 black to 255 white."""
        colour = self.page.evaluate("getComputedStyle(document.querySelector('.chat')).backgroundColor")
        return max(map(int, re.findall(r"\d+", colour)[:3]))

    def figure(self, title: str) -> Image.Image:
        """The picture below a title in the chat, as the server sends it."""
        panel = self.chat().locator(".message", has_text=title).last
        source = panel.locator("img").get_attribute("src")
        return Image.open(io.BytesIO(self.page.request.get(source).body())).convert("RGB")


@needs_browser
def test_a_picture_two_questions_and_nothing_from_outside(
    models: Models, chromium: Any, address: str, picture: Path
) -> None:
    models.gate.clear()
    with Tab(chromium, address) as tab:
        assert tab.page.title() == tab.page.locator("#head h1").inner_text() == "A <page>"
        tab.give(picture)
        tab.send("What is it?")
        tab.says("1 pictures, .")
        assert "messages" not in tab.chat().inner_text(), "the answer came in one piece"
        models.gate.set()
        tab.says("1 messages")
        tab.page.locator("#question .submit-button").wait_for()
        tab.ask("And its colour?")
        tab.says("3 messages")
        (images, messages, options), (more_images, more, _) = models.asked[-2:]
        assert [image.size for image in images] == [image.size for image in more_images] == [(200, 100)]
        assert more[:1] == messages and more[2]["content"] == [{"type": "text", "text": "And its colour?"}]
        assert more[1]["role"] == "assistant" and more[1]["content"][0]["text"].endswith("1 messages")
        assert options == {"max_new_tokens": 128, "temperature": 0, "top_p": 1}
        assert (
            tab.requests and {url for url in tab.requests if not url.startswith((address, "data:", "blob:"))} == set()
        )
        for name in ("Upload file", "Paste from clipboard", "Capture from camera"):
            assert tab.page.get_by_label(name).count() == 1, name
        tab.page.get_by_role("button", name="New chat").click()
        tab.chat().get_by_text("Answers appear here").wait_for()
        tab.ask("Once more?")
        assert len(models.asked[-1][1]) == 1 and len(models.asked[-1][0]) == 1


@needs_browser
def test_boxes_and_maps_are_drawn(chromium: Any, address: str, picture: Path) -> None:
    with Tab(chromium, address) as tab:
        tab.choose("Model", "boxes")
        tab.give(picture)
        tab.ask("Where is it?")
        tab.says("<b>here</b> 10 20 50 60")
        boxes = tab.figure("The boxes of the answer")
        across, down = boxes.size
        assert boxes.getpixel((round(across * 10 / 99), round(down * 40 / 99))) == FRAME
        assert boxes.getpixel((across // 4, down // 3)) == (0, 0, 255)
        assert "depended" not in tab.chat().inner_text()
        tab.page.locator("#traced input").check()
        tab.ask("Why?")
        assert tab.figure("What the answer depended on").getpixel((0, 0)) == GREY


@needs_browser
def test_two_models_side_by_side_and_a_failure_in_words(
    models: Models, chromium: Any, address: str, picture: Path
) -> None:
    models.gate.set()
    with Tab(chromium, address) as tab:
        assert tab.page.locator(".chat:visible").count() == 1
        tab.choose("Compare with", "broken")
        tab.page.locator(".chat:visible").nth(1).wait_for()
        tab.give(picture)
        tab.ask("What is it?")
        tab.says("1 pictures, 1 messages")
        tab.says("the queue is full; try again in a minute", 1)
        left, right = (tab.chat(number).bounding_box() for number in (0, 1))
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        assert tab.shade() > 192


@needs_browser
def test_words_alone_stopping_and_examples(models: Models, chromium: Any, address: str) -> None:
    with Tab(chromium, address) as tab:
        tab.ask("")
        tab.says(NO_QUESTION)
        models.gate.clear()
        models.closed.clear()
        tab.send("Hello?")
        tab.says("0 pictures")
        tab.page.locator("#question .stop-button").click()
        assert models.closed.wait(20), "the model went on"
        tab.page.locator("#question .submit-button").wait_for()
        models.gate.set()
        tab.ask("Still there?")
        tab.says("3 messages")
        tab.says(NO_PICTURE)
        tab.page.locator("#examples img").click()
        tab.page.locator("#picture img").wait_for()
        assert tab.question.input_value() == "Which example?"


@needs_browser
def test_a_phone_needs_no_scrolling_to_the_side(models: Models, chromium: Any, address: str, picture: Path) -> None:
    models.gate.set()
    with Tab(chromium, address, PHONE, is_mobile=True, has_touch=True, color_scheme="dark") as tab:
        tab.choose("Compare with", "boxes")
        tab.give(picture)
        tab.ask("What is it? " + "Tell me in all detail. " * 5)
        tab.says("10 20 50 60", 1)
        tab.ask("And now?")
        chat, last = tab.chat(1), tab.chat(1).get_by_text("10 20 50 60").last
        tab.page.wait_for_timeout(500)  # it scrolls smoothly
        assert (
            chat.bounding_box()["y"] <= last.bounding_box()["y"] <= sum(chat.bounding_box()[k] for k in ("y", "height"))
        )
        tab.page.get_by_role("button", name="Settings").click()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert tab.shade() < 64


@needs_browser
def test_a_real_model_says_on_the_page_what_it_says_elsewhere(
    chromium: Any, assistant: Assistant, picture: Path
) -> None:
    app = mount(fastapi.FastAPI(), build_page({"m": talk_of(assistant)}, traces={"m": trace_of(assistant)}))
    served = serve(app)
    with Tab(chromium, next(served)) as tab:
        tab.page.get_by_role("button", name="Settings").click()
        longest = tab.page.get_by_label("number input for Longest answer")
        for _ in range(20):  # what is typed while the page still comes to life is lost
            longest.fill("12")
            longest.press("Tab")
            tab.page.wait_for_timeout(200)
            if tab.page.get_by_label("range slider for Longest answer").input_value() == "12":
                break
        tab.page.locator("#traced input").check()
        tab.give(picture)
        tab.ask("What is it?")
        expected = assistant.ask(picture.read_bytes(), "What is it?", max_new_tokens=12)
        said = tab.chat().locator("[data-testid=bot] .chatbot").first.inner_text()
        assert expected and said.split() == expected.split()
        assert max(tab.figure("What the answer depended on").size) >= 480
    assert next(served, None) is None


# --- without a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 512, **sizes}, "tokenizer": CHARACTERS},
    )
    return Assistant(model, processor, "cpu")


def test_what_is_served_names_nothing_outside_and_leaves_other_routes_alone(address: str) -> None:
    import httpx

    found = httpx.get(address).text
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["']([^"']+)""", found)
    assert loaded and not [url for url in loaded if re.match("(https?:)?//", url) and not url.startswith(address)]
    style = httpx.get(f"{address}/theme.css").text
    assert "--primary-600" in style and not re.findall(r"""@import|@font-face|url\((?!["']?data:)""", style)
    assert httpx.get(f"{address}/health").json() == "fine"
    assert httpx.get(f"{address}/gradio_api/info").json()["named_endpoints"] == {}


def test_a_picture_is_uploaded_and_never_fetched(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio would fetch an address for anybody who sends one, of any size."""
    import httpx
    from gradio import processing_utils

    asked = []

    async def fetched(url: str, **_: Any) -> str:
        asked.append(url)
        return url

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetched)
    components = httpx.get(f"{address}/config").json()
    (number,) = (one["id"] for one in components["components"] if one["props"].get("elem_id") == "picture")
    for call in components["dependencies"]:
        given = [
            {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}} if place == number else None
            for place in call["inputs"]
        ]
        if any(given):
            body = {"data": given, "fn_index": call["id"], "session_hash": "s"}
            httpx.post(f"{address}/gradio_api/queue/join", json=body)
            with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=s", timeout=20) as stream:
                said = next(line for line in stream.iter_lines() if "process_completed" in line)
            assert "was given by its address; upload it" in said
            break
    else:
        raise AssertionError("nothing takes a picture")
    assert not asked


def test_an_upload_has_the_limit_of_the_server(models: Models) -> None:
    page = build_page({"a": models.boxes})
    mount(fastapi.FastAPI(), page, max_file_size=1_000)
    assert page.max_file_size == 1_000


def test_the_slider_ends_where_the_server_does(models: Models) -> None:
    for most, default in ((16, 16), (500, 128)):
        page = build_page({"a": models.boxes}, most_tokens=most)
        (slider,) = (block for block in page.blocks.values() if getattr(block, "label", "") == "Longest answer")
        assert (slider.maximum, slider.value) == (most, default)


def test_a_page_needs_a_model_and_knows_its_traces(models: Models) -> None:
    with pytest.raises(ValueError, match="give a model"):
        build_page({})
    with pytest.raises(ValueError, match=r"traces \['b'\]"):
        build_page({"a": models.boxes}, traces={"b": models.trace})


def test_a_space_is_not_shared_and_sends_nothing_home(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eyespot.save(assistant.model, assistant.processor, tmp_path / "mine")
    seen: list[Any] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: seen.append((page, options)))
    launch(tmp_path / "mine", device="cpu", server_port=9)
    ((page, options),) = seen
    assert options["share"] is False and options["server_port"] == 9 and page.analytics_enabled is False
    launch({"a": tmp_path / "mine", "b": tmp_path / "mine"}, device="cpu", share=True)
    first, second = (block for block in seen[1][0].blocks.values() if isinstance(block, gr.Dropdown))
    assert seen[1][1]["share"] is True and [name for _, name in first.choices] == ["a", "b"] and second.value == ""

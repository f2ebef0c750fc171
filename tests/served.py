"""A tiny model behind a real server on a free port, for tests of serving."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import queue
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import uvicorn
from PIL import Image

import eyespot
from eyespot.inference import Assistant, Conversation, user_turn
from eyespot.serving.engine import End, Engine, Piece, Wish
from eyespot.serving.limits import Limits
from eyespot.serving.metrics import Metrics
from eyespot.serving.refusals import Refusal
from eyespot.serving.server import Server, make_app

NAME = "tiny"
POSITIONS = 256
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                                  "num_attention_heads": 2}, "train": "full"}  # fmt: skip
LANGUAGE = {
    "name": "gpt",
    "args": {"max_position_embeddings": POSITIONS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tokenizer": f"char:{string.ascii_letters}{string.punctuation} é\n",
    "train": "full",
}


def tiny_assistant(**language: Any) -> Assistant:
    """Random weights, large enough that other pictures and words get other answers."""
    torch.manual_seed(0)
    model, processor = eyespot.build(VISION, {"name": "mlp"}, {**LANGUAGE, **language})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.35)
    return Assistant(model, processor, "cpu")


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(words: str, *colors: str) -> Conversation:
    """A question about pictures, as an Assistant takes it."""
    return [png(color) for color in colors], user_turn(colors, words)


def content(words: str, *urls: str) -> list[dict[str, Any]]:
    """The same as the API takes it."""
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": words}]


def conversations() -> list[Conversation]:
    """Of many lengths, with no, one and two pictures."""
    colors = ("red", "blue", "green", "white")
    return [asked("what" * (i % 5) + "?!"[i % 2], *colors[i % 4 : i % 4 + i % 3]) for i in range(12)]


def submit(engine: Engine, conversation: Conversation, wish: Wish) -> queue.SimpleQueue[Any]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.submit(engine.prepare(*conversation), wish, events.put)
    return events


def collect(events: queue.SimpleQueue[Any]) -> tuple[list[Piece], End]:
    """All pieces of an answer and its end."""
    pieces = []
    while not isinstance(event := events.get(timeout=60), End):
        if isinstance(event, Refusal):
            raise event
        pieces.append(event)
    return pieces, event


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


class Served:
    """A running server. Limits are small, so that tests reach them."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a question; a body of bytes is sent as it is."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data)
        return self.send(request, {"Content-Type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send(urllib.request.Request(self.url + path), headers)

    def send(self, request: urllib.request.Request, headers: dict[str, str]) -> tuple[int, Any]:
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read())

    def ask(self, messages: Any, **settings: Any) -> tuple[int, Any]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.post({"model": NAME, "messages": messages, "max_tokens": 8, **settings})

    def is_alive(self) -> bool:
        """Whether it still answers a plain question."""
        status, answer = self.ask("a?")
        return status == 200 and bool(answer["choices"])

    def count(self, name: str) -> float:
        """A counter of /metrics, summed over its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def wait_until(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 30
        while self.count(name) < value:
            assert time.monotonic() < deadline, f"{name} is {self.count(name)}, not {value}"
            time.sleep(0.05)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


@contextlib.contextmanager
def serving(assistant: Assistant, limits: Limits, **options: Any) -> Iterator[Served]:
    """Start a server, and stop it as a signal would."""
    metrics = Metrics()
    with Engine(assistant, NAME, limits, metrics) as engine:
        app = make_app([engine], limits, metrics, **{"page": False, **options})
        server = Server(uvicorn.Config(app, port=0, log_level="critical"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield Served(f"http://127.0.0.1:{port}", engine)
        finally:
            server.should_exit = True
            thread.join()

"""The server as clients meet it: OpenAI's own, and curl."""

from __future__ import annotations

import asyncio
import gc
import http.client
import importlib.util
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

import eyespot
from eyespot.cli import main
from eyespot.inference import Assistant
from eyespot.serving import gate
from eyespot.serving.api import build_app
from eyespot.serving.engine import Engine
from eyespot.serving.exchange import talk_with, trace_with
from eyespot.serving.limits import Limits, Seats
from eyespot.serving.metrics import Metrics
from eyespot.serving.refusals import Refusal
from eyespot.serving.rows import Rows
from eyespot.serving.server import make_app, serve
from served import NAME, Served, asked, content, conversations, data_url, png, serving

KEY = "a key of its own"
RED, BLUE = data_url(png("red")), data_url(png("blue"))


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(client: OpenAI, messages: Any, **settings: Any) -> str:
    answer = client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 12, **settings})
    return str(answer.choices[0].message.content)


def user(words: str, *urls: str) -> dict[str, Any]:
    return {"role": "user", "content": content(words, *urls)}


# --- the official client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colors", [(), ("red",), ("red", "blue"), ("blue", "red", "red")])
def test_words_and_pictures(client: OpenAI, assistant: Assistant, colors: tuple[str, ...]) -> None:
    messages = [user("what?", *(data_url(png(color)) for color in colors))]
    expected = assistant.generate_text([asked("what?", *colors)], max_new_tokens=12)[0]
    assert said(client, messages) == expected


def test_plain_text_is_a_content_too(client: OpenAI, assistant: Assistant) -> None:
    assert said(client, [{"role": "user", "content": "what?"}]) == assistant.ask([], "what?", max_new_tokens=12)


def test_a_second_turn_sees_the_first(client: OpenAI, assistant: Assistant) -> None:
    first = said(client, [user("what?", RED)])
    turns = [user("what?", RED), {"role": "assistant", "content": first}, user("and now?", BLUE)]
    (red,), one = asked("what?", "red")
    (blue,), two = asked("and now?", "blue")
    whole = [*one, {"role": "assistant", "content": first}, *two]
    expected = assistant.generate_text([([red, blue], whole)], max_new_tokens=12)[0]
    assert said(client, turns) == expected
    assert said(client, [turns[0], {"role": "assistant", "content": "other"}, turns[2]]) != expected
    system = [{"role": "system", "content": "be brief"}, *turns]
    told = [{"role": "system", "content": "be brief"}, *whole]
    assert said(client, system) == assistant.generate_text([([red, blue], told)], max_new_tokens=12)[0] != expected


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=[user("what?", RED)], max_tokens=5)  # type: ignore[list-item]
    assert said(client, [user("what?", RED), answer.choices[0].message, user("and?")])


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    question: dict[str, Any] = {"model": NAME, "messages": [user("what?", RED)], "max_tokens": 20}
    whole = client.chat.completions.create(**question)
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert deltas[0].role == "assistant" and len(deltas) > 10
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    for usage in (chunks[-1].usage, whole.usage):
        assert usage.completion_tokens == 20 and usage.total_tokens == usage.prompt_tokens + 20
    assert len({chunk.id for chunk in chunks}) == 1 and whole.id not in {chunk.id for chunk in chunks}
    assert client.chat.completions.create(**question).usage.prompt_tokens_details.cached_tokens > 0  # type: ignore


def test_settings_are_honoured(client: OpenAI) -> None:
    greedy = said(client, [user("what?", RED)])
    warm = {"temperature": 1.5, "seed": 3}
    assert said(client, [user("what?", RED)], **warm) == said(client, [user("what?", RED)], **warm) != greedy
    assert said(client, [user("what?", RED)], **warm, top_p=1e-9) == greedy
    assert said(client, [user("what?", RED)], stop=greedy[4]) == greedy[: greedy.index(greedy[4])].rstrip()
    assert said(client, [user("what?", RED)], stop=["never", greedy[4:6]]) != greedy
    assert said(client, [user("what?", RED)], max_completion_tokens=12) == greedy
    assert len(said(client, [user("what?", RED)], max_tokens=3)) <= 3
    penalised = said(client, [user("what?", RED)], presence_penalty=2, frequency_penalty=2, max_tokens=40)
    assert penalised != said(client, [user("what?", RED)], max_tokens=40)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: OpenAI, stream: bool) -> None:
    settings: dict[str, Any] = {"model": NAME, "messages": [user("what?", RED)], "max_tokens": 4}
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    scores = [score for choice in choices if choice.logprobs for score in choice.logprobs.content]
    assert len(scores) == 4
    for score in scores:
        assert score.logprob < 0 and len(score.top_logprobs) == 2 and score.top_logprobs[0].token == score.token
        assert bytes(score.bytes).decode() == score.token
    plain = client.chat.completions.create(**settings)
    assert plain.choices[0].logprobs is None


def test_errors_are_those_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here; models: tiny"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "?"}])
    for settings, sentence in (
        ({"n": 2}, "n: Input should be 1"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not a setting of this server; leave it out"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"max_tokens": 65}, "max_tokens is 65, the limit is 64"),
        ({"max_completion_tokens": 3}, "max_tokens is 12 and max_completion_tokens 3; give one"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence) as raised:
            said(client, [{"role": "user", "content": "?"}], **settings)
        assert raised.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_models(client: OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert served.get("/health") == (200, {"status": "ok"})


# --- curl and the rest -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(served: Served, stream: bool) -> None:
    body = {"model": NAME, "messages": [user("what?", RED)], "max_tokens": 6, "stream": stream}
    command = [
        "curl",
        "-sS",
        "-N",
        f"{served.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        "@-",
    ]
    output = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True).stdout
    expected = served.post({**body, "stream": False})[1]["choices"][0]["message"]["content"]
    if stream:
        *events, last, end = output.split("\n\n")
        assert last == "data: [DONE]" and end == ""
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == expected
    else:
        assert json.loads(output)["choices"][0]["message"]["content"] == expected


def test_metrics_count(served: Served) -> None:
    before = served.count("eyespot_answer_tokens_total")
    served.ask("what?", max_tokens=5)
    assert served.count("eyespot_answer_tokens_total") == before + 5
    text = served.get("/metrics")[1]
    for name in ("http_requests_total", "waiting", "running", "batch_rows_bucket", "queue_seconds_bucket",
                 "first_token_seconds_bucket", "answer_seconds_bucket", "prompt_tokens_total"):  # fmt: skip
        assert f"eyespot_{name}{{" in text


def test_the_schema_describes_what_is_there(served: Served) -> None:
    status, schema = served.get("/openapi.json")
    assert status == 200 and set(schema["paths"]) == {
        "/health", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions"
    }  # fmt: skip
    question = schema["components"]["schemas"]["ChatRequest"]
    assert question["additionalProperties"] is False and question["required"] == ["model", "messages"]
    chat = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(chat)
    assert served.get("/docs")[0] == served.get("/nothing")[0] == 404


def test_many_at_once_say_what_each_says_alone(served: Served, assistant: Assistant) -> None:
    """With pictures and without, streamed and not, more than rows."""
    questions = [(c, 4 + i) for i, c in enumerate(conversations())]
    expected = [assistant.generate_text([c], max_new_tokens=new)[0] for c, new in questions]

    def ask(i: int) -> str:
        (pictures, messages), new = questions[i % 12]
        words = messages[0]["content"][-1]["text"]
        told = [user(words, *map(data_url, pictures))]
        status, answer = served.ask(told, max_tokens=new, stream=i % 2 == 1)
        assert status == 200
        if i % 2 == 0:
            return str(answer["choices"][0]["message"]["content"])
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(36))) == expected * 3
    assert served.count("eyespot_running") == served.count("eyespot_waiting") == 0


# --- servers of their own --------------------------------------------------------------------------------------------


RIGHT = {"Authorization": f"Bearer {KEY}"}
LONG = {"model": NAME, "messages": [user("what?")], "max_tokens": 100}


class Held(Served):
    """A server whose engine takes a step only while it may."""

    def __init__(self, running: Served, patch: pytest.MonkeyPatch) -> None:
        super().__init__(running.url, running.engine)
        self.may_go = threading.Event()
        step = running.engine.rows.step

        def held(tokens: Any) -> Any:
            self.may_go.wait(60)
            return step(tokens)

        patch.setattr(running.engine.rows, "step", held)

    def let_go(self) -> None:
        """Until nothing runs."""
        self.may_go.set()
        deadline = time.monotonic() + 30
        while self.engine.call(lambda: self.engine.running or self.engine.waiting):  # between steps: nobody is joining
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.may_go.clear()


@contextmanager
def holding(assistant: Assistant, timeout_s: float) -> Iterator[Held]:
    """One row and a seat more; a key is needed."""
    limits = Limits(max_batch=1, queue=1, timeout_s=timeout_s)
    with serving(assistant, limits, api_key=KEY) as running, pytest.MonkeyPatch.context() as patch:
        server = Held(running, patch)
        yield server
        server.may_go.set()


@pytest.fixture(scope="module")
def held(assistant: Assistant) -> Iterator[Held]:
    with holding(assistant, 60) as server:
        yield server


def test_a_client_that_stops_reading_loses_its_seat(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the application and a connection whose other end takes nothing any more."""
    monkeypatch.setattr(gate, "SEND_TIMEOUT_S", 0.2)
    seats, metrics, limits = Seats(1), Metrics(), Limits()
    body = json.dumps({"model": NAME, "messages": [user("what?")], "max_tokens": 200, "stream": True}).encode()
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
             "method": "POST", "path": gate.CHAT, "raw_path": gate.CHAT.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json")]}  # fmt: skip
    sent: list[str] = []
    step = Rows.step

    def slow_step(rows: Rows, tokens: Any) -> Any:
        time.sleep(0.05)
        return step(rows, tokens)

    monkeypatch.setattr(Rows, "step", slow_step)

    async def ask(app: Any) -> None:
        asked = asyncio.Queue[Any]()
        asked.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 2:
                await asyncio.Event().wait()

        await app(dict(scope), asked.get, send)

    with Engine(assistant, NAME, limits, metrics) as engine:
        app = build_app([engine], limits, metrics, seats)
        asyncio.run(asyncio.wait_for(ask(app), 30))
        with seats.taken():
            assert sent == ["http.response.start", "http.response.body", "http.response.body"]
    assert 'reason="cancelled"} 1.0' in metrics.text().decode()


def test_routes_that_are_not_there(served: Served, client: OpenAI) -> None:
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is nothing at /v1/embeddings"):
        client.embeddings.create(model=NAME, input="x")
    assert served.get("/v1/chat/completions")[0] == 405


def test_an_answer_without_words_can_be_sent_back(served: Served) -> None:
    turns = [user("what?", RED), {"role": "assistant", "content": ""}, user("and now?")]
    status, answer = served.ask(turns)
    assert status == 200 and answer != served.ask(turns[2:])[1]


def test_an_error_nobody_expected_is_counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    before = served.count('eyespot_http_requests_total{path="/v1/chat/completions",status="500"}')
    monkeypatch.setattr(served.engine, "prepare", fail)
    status, answer = served.ask("what?")
    assert status == 500 and "the server failed" in answer["error"]["message"]
    assert served.count('eyespot_http_requests_total{path="/v1/chat/completions",status="500"}') == before + 1


def test_a_key_opens(held: Held) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic bm8="},
        {"Authorization": "Basic a"},
    ):
        status, answer = held.post(LONG, **headers)
        assert status == 401 and "needs its API key" in answer["error"]["message"]
    assert held.get("/metrics")[0] == 401 and held.get("/health")[0] == 200
    with OpenAI(base_url=f"{held.url}/v1", api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    basic = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    basic.add_password(None, held.url, "anybody", KEY)  # as a browser does for the page
    browser = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(basic))
    with browser.open(f"{held.url}/v1/models") as response:
        assert response.status == 200
    assert held.get("/v1/models", **RIGHT)[0] == 200


def test_a_full_server_says_so(held: Held) -> None:
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(held.post, {**LONG, "max_tokens": 4}, **RIGHT) for _ in range(6)]
        early = [future.result() for future in itertools.islice(as_completed(waiting), 4)]
        assert {status for status, _ in early} == {429}
        assert "2 requests are waiting or being answered" in early[0][1]["error"]["message"]
        with OpenAI(base_url=f"{held.url}/v1", api_key=KEY, max_retries=0) as client:
            large = [user("what?", data_url(bytes(3_000_000)))]  # is told too, though it has much to send
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(model=NAME, messages=large)  # type: ignore[arg-type]
        assert int(refused.value.response.headers["Retry-After"]) > 0
        held.may_go.set()
        assert sorted(future.result()[0] for future in waiting) == [200, 200, 429, 429, 429, 429]
        held.let_go()


def test_an_answer_that_takes_too_long(assistant: Assistant) -> None:
    with holding(assistant, 2) as held:
        status, answer = held.post(LONG, **RIGHT)
        assert status == 504 and "more than 2 seconds" in answer["error"]["message"]
        held.let_go()
        status, late = held.post({**LONG, "stream": True}, **RIGHT)  # the first piece has come in time
        assert status == 200 and "more than 2 seconds" in late.splitlines()[-2] and "[DONE]" not in late
        with pytest.raises(Refusal, match="more than 2 seconds") as late_call:
            held.engine.call(print)
        assert late_call.value.status == 504
        held.let_go()
        assert 'reason="cancelled"} 2.0' in held.engine.metrics.text().decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_not_answered(held: Held, stream: bool) -> None:
    connection = http.client.HTTPConnection(held.url.removeprefix("http://"), timeout=30)
    headers = {**RIGHT, "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": stream}), headers)
    deadline = time.monotonic() + 30
    while not held.engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (job,) = held.engine.running
    connection.close()
    while not job.cancelled:
        assert time.monotonic() < deadline, "nobody has noticed"
        time.sleep(0.01)
    held.let_go()
    assert job.ended and len(job.tokens) < 5


def test_the_page_asks_the_same_engine(served: Served, assistant: Assistant) -> None:
    pictures, messages = asked("what?", "red")
    talk = talk_with(served.engine, Seats(1))
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0}
    pieces = list(talk(pictures, messages, **how))
    assert "".join(pieces) == assistant.generate_text([(pictures, messages)], max_new_tokens=12)[0] and len(pieces) > 3
    with closing(talk(pictures, messages, **how)) as first, pytest.raises(ValueError, match="try again in a moment"):  # type: ignore[type-var]
        next(first)
        next(talk(pictures, messages, **how))
    with pytest.raises(ValueError, match="prompt has 2 <image> but 1 image"):
        next(talk(pictures, asked("?", "red", "red")[1], **how))
    with pytest.raises(ValueError, match="the request has 4 pictures, the limit is 3"):
        next(talk(pictures * 4, asked("?", *["red"] * 4)[1], **how))


def test_an_answer_is_traced_in_a_seat_and_alone_with_the_words(served: Served) -> None:
    seats, picture = Seats(1), Image.new("RGB", (4, 4))

    def trace(images: Any, messages: Any) -> Image.Image:
        assert served.engine.words.locked() and threading.current_thread().name == f"eyespot-{NAME}"
        with pytest.raises(Refusal, match="1 requests are waiting"), seats.taken():
            pass
        return picture

    traced = trace_with(served.engine, seats, trace)
    assert traced([picture], []) is picture
    with seats.taken(), pytest.raises(ValueError, match="try again in a moment"):
        traced([picture], [])


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="there is no gradio")
def test_the_page_stands_beside_the_api(assistant: Assistant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that we do not write
        with serving(assistant, Limits(), page=True, api_key=KEY) as running:
            status, page = running.get("/", **RIGHT)
            assert status == 200 and "gradio" in page
            assert running.get("/")[0] == running.get("/config")[0] == 401
            assert running.get("/v1/models", **RIGHT)[1]["data"][0]["id"] == NAME
            assert running.get("/health")[0] == 200
            assert running.post({**LONG, "max_tokens": 2}, **RIGHT)[0] == 200
            tab = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=60)
            tab.request("GET", "/gradio_api/heartbeat/one", headers=RIGHT)  # which has no end of its own
            assert tab.getresponse().status == 200
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 60, "the server waited for an open tab"
        tab.close()
        gc.collect()  # those packages leave a socket open


def test_without_gradio_there_is_no_page(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    app = make_app([served.engine], Limits(), Metrics())
    assert capsys.readouterr().err == (
        'no page at /: gradio is not installed; pip install "eyespot[serve]", or --no-page\n'
    )
    assert "/v1/models" in {getattr(route, "path", None) for route in app.routes}


def test_the_command_finishes_what_runs_when_it_is_told_to_stop(assistant: Assistant, tmp_path: Path) -> None:
    folder = tmp_path / "colours" / "model"
    eyespot.save(assistant.model, assistant.processor, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "eyespot", "serve", str(folder), "--port", str(port), "--no-page", "--queue", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == (
            f"serving colours at http://127.0.0.1:{port} (API below /v1; Ctrl+C stops)\n"
        )
        running = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        question: Any = {"model": "colours", "messages": [user("what?", RED)], "max_tokens": 200, "stream": True}
        with running, running.chat.completions.create(**question) as stream:
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert process.wait(60) == -signal.SIGTERM
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == assistant.generate_text([asked("what?", "red")], max_new_tokens=200)[0]


def test_what_cannot_be_served_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["nowhere"], "'nowhere' is neither a model folder nor a readable Hub name"),
        (["nowhere", "--max-batch", "0"], "--max-batch is 0; it must be above 0"),
        (["nowhere", "--name", "a", "--name", "b"], "2 names for 1 models"),
    ):
        assert main(["serve", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("eyespot serve: ") and sentence in line


def test_names() -> None:
    with pytest.raises(ValueError, match="2 names for 1 models; give --name once for each model"):
        serve(["runs/a/model"], names=["a", "b"])
    with pytest.raises(ValueError, match=r"two models have the same name \(a\)"):
        serve(["runs/a/model", "elsewhere/a"])
    with pytest.raises(ValueError, match="--adapter is for one model, 2 were given"):
        serve(["runs/a/model", "runs/b/model"], adapter="x")
    with pytest.raises(ValueError, match="the API key is empty, so everybody would have it"):
        serve(["runs/a/model"], api_key="")
    with pytest.raises(ValueError, match=r"'nothing\.png'"):
        serve(["runs/a/model"], examples=[("nothing.png", "What is it?")])

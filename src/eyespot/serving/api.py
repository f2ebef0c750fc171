"""The application: OpenAI's API over one or several engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

import eyespot
from eyespot.inference import MAX_NEW_TOKENS
from eyespot.processing.prompt import Message
from eyespot.serving import wire
from eyespot.serving.engine import End, Engine, Piece, Wish
from eyespot.serving.exchange import events, whole
from eyespot.serving.gate import CHAT, Gate
from eyespot.serving.limits import Limits, Seats
from eyespot.serving.metrics import Metrics
from eyespot.serving.pictures_in import picture_files
from eyespot.serving.refusals import Refusal
from eyespot.serving.reply import Reply, event_of
from eyespot.serving.rows import Prompt
from eyespot.serving.sampling import Sampling

# Documented for every route that asks a model; 401 for all.
REFUSALS = {
    400: "what was sent cannot be answered",
    401: "no or a wrong API key",
    404: "no such model",
    408: "the request came too slowly",
    413: "too large",
    429: "too many requests are waiting; try again after Retry-After",
    500: "the model failed",
    503: "the server is shutting down",
    504: "the answer took too long",
}
STREAMED = {
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
    "description": "the answer, or its chunks",
}
T = TypeVar("T")
PREPARED_AT_ONCE = 4  # requests whose pictures are open at the same time
FETCHED_AT_ONCE = 16  # requests whose pictures are on their way; threads of their own, as a web server may be slow


def build_app(
    engines: Sequence[Engine],
    limits: Limits,
    metrics: Metrics,
    seats: Seats,
    *,
    api_key: str | None = None,
    allow_urls: bool = False,
) -> FastAPI:
    """The API without a page.

    Args:
        engines: running, with different names.
        limits, metrics, seats: the same that the engines and the page use.
        api_key: asked for everywhere but at /health; None for no key.
        allow_urls: fetch pictures from public web addresses.
    """
    app = FastAPI(title="eyespot", version=eyespot.__version__, docs_url=None, redoc_url=None)  # those need a CDN
    app.add_middleware(Gate, seats=seats, limits=limits, metrics=metrics, api_key=api_key)
    _handle_errors(app)
    by_name = {engine.name: engine for engine in engines}
    started = int(time.time())
    preparing = asyncio.Semaphore(PREPARED_AT_ONCE)
    fetching = CapacityLimiter(FETCHED_AT_ONCE)

    @app.get("/health", responses=_documented(503))
    async def health() -> wire.Health:
        """Whether requests are taken."""
        if not all(engine.is_well for engine in engines):
            raise Refusal("the server is shutting down", 503, code="shutting_down")
        return wire.Health()

    @app.get("/metrics", response_class=PlainTextResponse, responses=_documented(401))
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_documented(401))
    async def models() -> wire.Models:
        """The models that can be asked."""
        return wire.Models(data=[wire.Model(id=name, created=started) for name in by_name])

    @app.get("/v1/models/{name:path}", responses=_documented(401, 404))
    async def model(name: str) -> wire.Model:
        """One of them."""
        return wire.Model(id=_find(by_name, name).name, created=started)

    @app.post(CHAT, response_model=wire.Completion, responses={200: STREAMED, **_documented(*REFUSALS)})
    async def chat(request: Request, question: wire.ChatRequest) -> Response:
        """The next turn of a conversation about pictures."""
        deadline = time.monotonic() + limits.timeout_s
        engine = _find(by_name, question.model)
        wish = _wish(question, limits)
        urls: list[str] = []
        messages = [_message(message, urls) for message in question.messages]
        pictures = await to_thread.run_sync(picture_files, urls, limits, allow_urls, limiter=fetching)
        async with preparing:
            prompt = await run_in_threadpool(_prepare, engine, pictures, messages)
        reply = Reply(engine.name, question)
        if question.stream:
            return await _streamed(request, reply, events(engine, prompt, wish, deadline))
        pieces, end = await _unless_gone(request, whole(engine, prompt, wish, deadline))
        return JSONResponse(reply.completion(pieces, end).model_dump())

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(request: Request) -> Response:
        """Else the page, which knows nothing of OpenAI's errors, would answer."""
        path = request.url.path
        if path in (CHAT, "/v1/models"):
            raise HTTPException(405)
        raise Refusal(f"there is nothing at {path[:80]}; the API is {CHAT} and /v1/models", 404)

    return app


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": wire.Error, "description": REFUSALS[status]} for status in statuses}


# --- what was asked --------------------------------------------------------------------------------------------------


def _find(engines: Mapping[str, Engine], name: str) -> Engine:
    if name not in engines:
        raise Refusal(
            f"there is no model {name[:80]!r} here; models: {', '.join(engines)}",
            404,
            param="model",
            code="model_not_found",
        )
    return engines[name]


def _wish(question: wire.ChatRequest, limits: Limits) -> Wish:
    default = min(MAX_NEW_TOKENS, limits.max_tokens)
    sampling = Sampling(
        question.temperature, question.top_p, question.presence_penalty, question.frequency_penalty, question.seed
    )
    top = (question.top_logprobs or 0) if question.logprobs else None
    wanted = question.max_completion_tokens or question.max_tokens or default
    return Wish(wanted, sampling, question.stops, top)


def _prepare(engine: Engine, pictures: Sequence[bytes], messages: Sequence[Message]) -> Prompt:
    """``Engine.prepare``; what is wrong with a request is told to who sent it."""
    try:
        return engine.prepare(pictures, messages)
    except ValueError as error:
        raise Refusal(" ".join(str(error).split()), param="messages") from error


def _message(message: Any, urls: list[str]) -> Message:
    """A message in transformers' chat format; the addresses of its pictures go into the list."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    urls += [part.image_url.url for part in message.content if part.type == "image_url"]
    parts = [{"type": "text", "text": p.text} if p.type == "text" else {"type": "image"} for p in message.content]
    return {"role": role, "content": parts}


# --- how it is answered ----------------------------------------------------------------------------------------------


async def _streamed(request: Request, reply: Reply, found: AsyncGenerator[Piece | End, None]) -> Response:
    """The status is sent with the first piece, so that whatever goes wrong before it has its own status."""
    first = await _unless_gone(request, anext(found))

    async def stream() -> AsyncIterator[str]:
        async with aclosing(found):
            try:
                yield reply.opening() + reply.chunk(first)
                async for event in found:
                    yield reply.chunk(event)
            except Refusal as refusal:
                yield event_of(refusal.body())
                return
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What is awaited; it is cancelled when the client goes away."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal("the client went away", 400)
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- what goes wrong -------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    """Everything that goes wrong is told in OpenAI's shape."""

    def answer(refusal: Refusal) -> Response:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(_invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(Refusal(str(error.detail), error.status_code, headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(Refusal("the server failed; its log says why", 500))


def _invalid(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """What is wrong with a request, without what was sent: that may be long, or no JSON (NaN).

    Of what may be text or list, both are errors; the deepest one is about the kind that was sent.
    """
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    place = ".".join(str(step)[:80] for step in error["loc"] if step != "body")
    if error["type"] == "json_invalid":
        return Refusal(f"the request is not JSON ({error['ctx']['error']}); check it", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return Refusal(f"{place} is not a setting of this server; leave it out", param=place, code="unknown_parameter")
    sentence = str(error["msg"]).removeprefix("Value error, ")
    return Refusal(f"{place or 'the request'}: {sentence}", param=place or None)

"""What happens to a request before anything of it is understood: who asks, is there room, how much is it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from eyespot.serving.limits import Limits, Seats
from eyespot.serving.metrics import Metrics
from eyespot.serving.refusals import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT = "/v1/chat/completions"
OPEN = ("/health",)  # without the key
BODY_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0  # for a client to take a piece of its answer
DISCARDED_BODIES = 10  # so many times the limit of a body is read and thrown away
COUNTED = (CHAT, "/v1/models", "/health", "/metrics", "/openapi.json")


class Gate:
    """Middleware: the key, a seat for each question, the size of its body; and a count of all requests.

    A body is read here, whole, so that a slow or a large one costs a seat and a few seconds and no more.
    """

    def __init__(self, app: App, seats: Seats, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self.app, self.seats, self.limits, self.metrics, self.api_key = app, seats, limits, metrics, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["type"] == "http" and scope["path"] == CHAT and scope["method"] == "POST":
                with self.seats.taken():
                    body = await self._body(scope, receive)
                    await self.app(scope, _replayed(body, receive), self._counted(scope, _hurried(send)))
            else:
                await self.app(scope, receive, self._counted(scope, send))
        except Refusal as refusal:
            if scope["type"] == "http" and refusal.status != 408:
                await self._discard(receive)
            await refuse(scope, receive, self._counted(scope, send), refusal)
        except ClientDisconnect:
            pass  # the answer has ended with it
        except Exception:  # which is answered further out
            self._count(scope, 500)
            raise

    def _check_key(self, scope: Scope) -> None:
        """``Bearer KEY``, or what a browser sends when it is asked: any name with the key as password."""
        if self.api_key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value).partition(b":")[2]
            except binascii.Error:
                value = b""
        if not hmac.compare_digest(value.strip(), self.api_key.encode()):
            raise Refusal(
                "this server needs its API key; send it as 'Authorization: Bearer KEY'",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="eyespot"'},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit():
            self._check_size(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal("the request broke off", 400)
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                f"the request took more than {BODY_TIMEOUT_S:g} seconds to arrive; send it again", 408
            ) from None

    async def _discard(self, receive: Receive) -> None:
        """Read what is still to come: a client that cannot send all of it does not listen to the answer."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while size < DISCARDED_BODIES * self.limits.max_body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _check_size(self, size: int) -> None:
        if size > self.limits.max_body_bytes:
            raise Refusal(
                f"the request has {size} bytes or more, the limit is {self.limits.max_body_bytes}; make it smaller",
                413,
                code="request_too_large",
            )

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        return counted

    def _count(self, scope: Scope, status: int) -> None:
        self.metrics.requests.labels(scope["path"] if scope["path"] in COUNTED else "page", status).inc()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, and then whatever comes after it."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _hurried(send: Send) -> Send:
    """A client that stops reading is one that went away: it must not keep its seat."""

    async def hurried(message: MutableMapping[str, Any]) -> None:
        try:
            await asyncio.wait_for(send(message), SEND_TIMEOUT_S)
        except TimeoutError:
            raise ClientDisconnect from None

    return hurried


async def refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answer with an error."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        return
    response = JSONResponse(refusal.body(), refusal.status, refusal.headers)
    await response(scope, receive, send)

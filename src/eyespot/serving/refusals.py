"""A request that is not answered: a status of HTTP and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """What a client is told instead of an answer.

    Args:
        message: one sentence with value, limit and cure.
        status: of HTTP. param: the setting that is wrong. code: for programs. headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = _encodable(message)  # it may hold what a client sent
        self.param = None if param is None else _encodable(param)
        self.status, self.code = status, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's ``type``. Source: https://platform.openai.com/docs/guides/error-codes"""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def timed_out(limit_s: float) -> Refusal:
    """What is said at a deadline."""
    return Refusal(
        f"the answer took more than {limit_s:g} seconds, the limit of this server; ask for fewer tokens, or later",
        504,
        code="timeout",
    )


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()

"""An answer in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from eyespot.serving import wire
from eyespot.serving.engine import End, Piece, TokenScore

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


class Reply:
    """What one client is sent; all of it under one id."""

    def __init__(self, model: str, question: wire.ChatRequest) -> None:
        self.common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self.with_scores = question.logprobs
        self.with_usage = question.stream_options is not None and question.stream_options.include_usage

    def completion(self, pieces: Sequence[Piece], end: End) -> wire.Completion:
        text = "".join(piece.text for piece in pieces)
        scores = self._logprobs([score for piece in pieces for score in piece.scores])
        choice = wire.Choice(message=wire.Answer(content=text), logprobs=scores, finish_reason=end.reason)
        return wire.Completion(**self.common, choices=[choice], usage=_usage(end))

    def opening(self) -> str:
        return self._event([wire.ChunkChoice(delta=wire.Delta(role="assistant", content=""))])

    def chunk(self, event: Piece | End) -> str:
        """One or, at the end, up to two events of a stream."""
        if isinstance(event, Piece):
            delta, scores = wire.Delta(content=event.text), self._logprobs(event.scores)
            return self._event([wire.ChunkChoice(delta=delta, logprobs=scores)])
        last = self._event([wire.ChunkChoice(delta=wire.Delta(), finish_reason=event.reason)])
        return last + (self._event([], _usage(event)) if self.with_usage else "")

    def _event(self, choices: list[wire.ChunkChoice], usage: wire.Usage | None = None) -> str:
        chunk = wire.Chunk(**self.common, choices=choices, usage=usage)
        absent: Any = {"usage": True} if not self.with_usage else {}
        data = chunk.model_dump(exclude=absent)
        for choice in data["choices"]:
            choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
        return event_of(data)

    def _logprobs(self, scores: Sequence[TokenScore]) -> wire.Logprobs | None:
        if not self.with_scores:
            return None
        return wire.Logprobs(
            content=[
                wire.TokenLogprob(**_logprob(s.text, s.log_prob), top_logprobs=[_top(*likely) for likely in s.top])
                for s in scores
            ]
        )


def event_of(data: Any) -> str:
    """JSON as one server-sent event. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _logprob(text: str, log_prob: float) -> dict[str, Any]:
    whole_characters = "\ufffd" not in text
    return {
        "token": text,
        "logprob": max(log_prob, LEAST_LOGPROB),
        "bytes": list(text.encode()) if whole_characters else None,
    }


def _top(text: str, log_prob: float) -> wire.TopLogprob:
    return wire.TopLogprob(**_logprob(text, log_prob))


def _usage(end: End) -> wire.Usage:
    return wire.Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.answer_tokens,
        total_tokens=end.prompt_tokens + end.answer_tokens,
        prompt_tokens_details=wire.PromptDetails(cached_tokens=end.kept_tokens),
    )

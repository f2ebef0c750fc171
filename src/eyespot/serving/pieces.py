"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character (yet)


class Pieces:
    """Tokens to pieces of text that never change again; together they are the answer without outer space.

    Args:
        decode: tokens to text without specials, inner and outer space as it is.
        stops: texts that end the answer and do not belong to it.

    Attributes:
        stopped: one of them has come.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.stopped = False
        self._tokens: list[int] = []
        self._first = self._read = 0  # where the context of the next piece begins, and where the piece itself does
        self._held = ""  # outer space, and what may be the beginning of a stop
        self._started = False

    def add(self, token: int) -> str:
        """What is certain after one more token; often nothing."""
        self._tokens.append(token)
        return self._hand_out(self._new_text(at_end=False), at_end=False)

    def end(self) -> str:
        """What was held back."""
        return self._hand_out(self._new_text(at_end=True), at_end=True)

    def _new_text(self, *, at_end: bool) -> str:
        """The text of the tokens that were not read yet, once their characters are complete.

        It is decoded behind the tokens of the piece before, because some decoders drop the space of a first word.
        """
        known = self.decode(self._tokens[self._first : self._read])
        text = self.decode(self._tokens[self._first :])
        if len(text) <= len(known) or (text.endswith(UNKNOWN) and not at_end):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _hand_out(self, text: str, *, at_end: bool) -> str:
        self._held += text
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        self.stopped = self.stopped or bool(found)
        if found:
            self._held = self._held[: min(found)]
        certain = len(self._held) if at_end or found else len(self._held) - self._beginning_of_stop()
        ready = self._held[:certain].rstrip()
        self._held = "" if at_end or found else self._held[len(ready) :]
        if not self._started:
            ready = ready.lstrip()
        self._started = self._started or bool(ready)
        return ready

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the held text with which a stop begins."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)

"""How much a server takes from strangers before it says no; the command line makes an option of each."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eyespot.serving.refusals import Refusal

RECENT = 0.1  # share of the newest in the mean time that a seat is taken
LONGEST_RETRY_S = 30


def _limit(default: float, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """Every number is positive but ``queue``, which may be 0."""

    max_batch: int = _limit(32, "answers that grow at the same time")
    queue: int = _limit(64, "requests that may wait beside them; more are refused with 429")
    timeout_s: float = _limit(120.0, "seconds from a request's last byte to the end of its answer")
    max_prompt_tokens: int = _limit(4096, "tokens of a prompt, those of its pictures included")
    max_tokens: int = _limit(1024, "tokens that an answer may be asked to have")
    max_images: int = _limit(8, "pictures of a request")
    max_image_mb: float = _limit(10.0, "megabytes of a picture's file")
    max_megapixels: float = _limit(32.0, "width x height of a picture, in millions")
    max_body_mb: float = _limit(32.0, "megabytes of a request")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "queue" else 1e-9
            if not value >= least:
                raise ValueError(f"--{field.name.replace('_', '-')} is {value}; it must be above 0")

    def check_images(self, number: int) -> None:
        """Raise a Refusal for more pictures than a request may have."""
        if number > self.max_images:
            raise Refusal(f"the request has {number} pictures, the limit is {self.max_images}", param="messages")

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * 1e6)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


class Seats:
    """How many requests may be inside at the same time, waiting or running."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = threading.BoundedSemaphore(number)
        self._taken_s = 0.0

    @property
    def retry_after_s(self) -> int:
        """Until about all who are inside now are answered: who comes back sooner is mostly sent away again."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._taken_s)))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """One seat, for as long as the block lasts.

        Raises:
            Refusal: 429, all are taken.
        """
        if not self._free.acquire(blocking=False):
            raise Refusal(
                f"{self.number} requests are waiting or being answered, which is all this server takes; try again in a "
                "moment",
                429,
                code="queue_full",
                headers={"Retry-After": str(self.retry_after_s)},
            )
        start = time.monotonic()
        try:
            yield
        finally:
            self._taken_s += RECENT * (time.monotonic() - start - self._taken_s)
            self._free.release()

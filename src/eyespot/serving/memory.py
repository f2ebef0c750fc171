"""What was computed lately and may be wanted again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Memory(Generic[V]):
    """Values under keys, up to so many bytes in all; what was used longest ago goes first. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[Hashable, tuple[V, int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> V | None:
        """What was put there, unless it had to go."""
        if (found := self._kept.pop(key, None)) is None:
            return None
        self._kept[key] = found
        return found[0]

    def put(self, key: Hashable, value: V, num_bytes: int) -> None:
        """Keep a value, which may be one that is larger than all room: then it is the only one."""
        self.num_bytes += num_bytes - self._kept.pop(key, (None, 0))[1]
        self._kept[key] = (value, num_bytes)
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.pop(next(iter(self._kept)))[1]

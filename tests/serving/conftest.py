from __future__ import annotations

from collections.abc import Iterator

import pytest

from eyespot.inference import Assistant
from eyespot.serving.limits import Limits
from served import Served, serving, tiny_assistant

LIMITS = Limits(
    max_batch=6, queue=50, timeout_s=60, max_prompt_tokens=200, max_tokens=64, max_images=3, max_image_mb=0.2,
    max_megapixels=1, max_body_mb=1,
)  # fmt: skip


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    return tiny_assistant()


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    with serving(tiny_assistant(), LIMITS) as running:
        yield running

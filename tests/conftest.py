"""Fixtures that many tests share. The tiny parts themselves are in tiny.py, beside this file."""

from __future__ import annotations

import pytest
from tiny import LANGUAGES, make_vlm

from eyespot.models.vlm import VLM


@pytest.fixture(scope="session", params=list(LANGUAGES))
def vlm(request: pytest.FixtureRequest) -> VLM:
    """A tiny VLM around each kind of language model; tests read it and never change it."""
    return make_vlm(request.param)

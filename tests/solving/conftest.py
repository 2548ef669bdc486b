"""Fixtures of the tests of solving."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the compiled kernels, and with the reference."""
    monkeypatch.setenv("AWQ_EXT_BACKEND", request.param)

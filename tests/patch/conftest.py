"""The models here are tiny on purpose; what they test is the fused path, so nothing is too small for it."""

from __future__ import annotations

import pytest

from vlmops.patch import base


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(base, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(base, "SMALL_NORM", 0)

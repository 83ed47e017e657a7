"""Every test runs on seeded random numbers, with tuning off unless it asks, in a cache folder of its own run."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLMOPS_TUNING", "off")
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # read when a kernel is defined, so it must stand before the first import


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tuning_cache(monkeypatch, tmp_path):
    """A fresh tuning cache with measuring on."""
    from vlmops.backends import choice

    monkeypatch.setenv("VLMOPS_TUNING", "on")
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()

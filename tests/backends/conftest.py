"""What several tests of the CUDA executors start from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmops.backends import cuda_build, cuda_cupy, cuda_library, cuda_runtime, cuda_simt, ranges


@pytest.fixture
def stream(monkeypatch):
    """A GPU's current stream, as far as launches look at it."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index=None: SimpleNamespace(cuda_stream=77))


@pytest.fixture
def fresh_cuda(tmp_path, monkeypatch):
    """An empty cache, and executors that remember nothing."""
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (
        cuda_library.ready_libraries, cuda_library._kernel, cuda_library._can_build, cuda_build.toolkit, cuda_simt._entry,
        cuda_cupy._kernel, cuda_cupy._cupy, cuda_runtime._choose, ranges.installed,
    )  # fmt: skip
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache"
    for function in remembered:
        function.cache_clear()

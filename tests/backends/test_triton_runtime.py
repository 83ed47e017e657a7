"""Launching: what can run and why not, the recorder, configurations, an absent or old Triton."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import vlmops
from vlmops.backends import BackendError, triton_runtime
from vlmops.backends.triton_runtime import TARGETS, Config
from vlmops.ops import rotary


def arguments(device="cpu", dtype=torch.float32):
    x = torch.randn(6, 2, 8, dtype=dtype, device=device)
    table = torch.randn(6, 8, device=device)
    return x, table, table


def run_without_triton(code: str, **env: str) -> subprocess.CompletedProcess:
    """A process in which triton cannot be found."""
    hide = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )


def test_everything_works_without_triton():
    done = run_without_triton(
        "import torch, vlmops\nfrom vlmops.ops import rotary\nx = torch.randn(6, 2, 8); t = torch.randn(6, 8)\n"
        "rotary(x, t, t)\n"
        "try:\n    with vlmops.use_backend('triton'): rotary(x, t, t)\n"
        "except vlmops.backends.BackendError as err: print(err)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed: pip install 'triton>=3.4'" in done.stdout


def test_an_old_triton_is_named(monkeypatch):
    triton_runtime.installed.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.0")
    try:
        assert triton_runtime.installed() == "triton 3.1.0 is too old: pip install 'triton>=3.4'"
    finally:
        triton_runtime.installed.cache_clear()


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    importlib.import_module("vlmops.ops.rotary.triton")  # a kernel is interpreted or not from its definition on
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with vlmops.use_backend("triton"), pytest.raises(BackendError, match="set TRITON_INTERPRET=1"):
        rotary(*arguments())


def test_the_interpreter_as_it_comes_is_not_trusted_with_bfloat16(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_runtime, "INTERPRETED", {torch.float32})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with (
        vlmops.use_backend("triton"),
        pytest.raises(BackendError, match="bfloat16, which Triton's interpreter computes"),
    ):
        rotary(*arguments(dtype=torch.bfloat16))


def test_other_dtypes_are_refused():
    pytest.importorskip("triton")
    with vlmops.use_backend("triton"), pytest.raises(BackendError, match=r"float64 \(only float32"):
        rotary(*arguments(dtype=torch.float64))


def test_auto_never_picks_the_interpreter():
    from vlmops.ops.rotary import OP

    assert OP.resolve((arguments()[0], None, *arguments()[1:], False)) != "triton"


def test_recorder_sees_launches_and_runs_nothing():
    pytest.importorskip("triton")
    from vlmops.ops.rotary import triton as kernels

    x, cos, sin = arguments("meta")
    with triton_runtime.record(TARGETS["sm_90"]) as launches:
        out, _ = kernels.forward(x, None, cos, sin, False)
        assert triton_runtime.capability(x) == 90 and triton_runtime.processors(x) == 132
    assert out.device.type == "meta" and len(launches) == 1
    assert launches[0].constants["DIM"] == 8 and launches[0].grid[0] >= 1
    assert triton_runtime.capability(torch.empty(1)) == triton_runtime.INTERPRETER.arch


def test_empty_grid_launches_nothing():
    triton_runtime.launch(None, (0, 3), torch.empty(0))


def test_config():
    config = Config.of(BM=64, BN=32, warps=8, stages=3)
    assert config["BM"] == 64 and config.name == "BM64 BN32 w8 s3"
    assert triton_runtime.pick("op", "key", [config], lambda c: None, torch.device("cpu")) is config

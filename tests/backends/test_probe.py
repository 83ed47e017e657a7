"""What the probe says about backends and the machine, without building or importing anything for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmops.backends import BACKENDS, build, native, probe, triton_runtime

REPO = Path(__file__).resolve().parents[2]


def by_name(**kwargs):
    return {info.name: info for info in probe.backends(**kwargs)}


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """An empty cache folder, and no library in the package."""
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VLMOPS_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(native, "ahead_of_time", lambda: None)
    return tmp_path / "cache"


def test_every_backend_is_there_with_a_reason():
    found = probe.backends()
    assert [info.name for info in found] == list(BACKENDS)
    assert all(info.detail for info in found)
    assert by_name()["reference"].available and by_name()["torch"].available


def test_nothing_is_built_by_looking(untouched):
    info = by_name()["cpu"]
    assert ("not built yet" in info.detail) is info.available
    assert not untouched.exists()


def test_a_missing_compiler_is_what_the_cpu_backend_misses(untouched, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    info = by_name()["cpu"]
    assert not info.available
    assert "no C++ compiler" in info.detail


def test_missing_sources_are_what_the_cpu_backend_misses(untouched, monkeypatch):
    def gone():
        raise build.BuildError("the C++ sources (csrc/cpu) are not in this installation")

    monkeypatch.setattr(build, "csrc_dir", gone)
    info = by_name()["cpu"]
    assert not info.available
    assert "sources" in info.detail


def test_native_turned_off_is_said(untouched, monkeypatch):
    monkeypatch.setenv("VLMOPS_DISABLE_NATIVE", "1")
    assert by_name()["cpu"] == probe.BackendInfo("cpu", False, "VLMOPS_DISABLE_NATIVE is set")


@pytest.mark.parametrize("installed", [True, False])
def test_triton_is_looked_for(monkeypatch, installed):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (object() if installed else None) if name == "triton" else find(name, *a),
    )
    triton_runtime.installed.cache_clear()
    try:
        assert ("not installed" in by_name()["triton"].detail) is not installed
    finally:
        triton_runtime.installed.cache_clear()


def test_the_probe_does_not_import_triton(tmp_path):
    """A triton that raises when imported stands in the path; in a process of its own, because torch may have it loaded."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('triton was imported')")
    code = "from vlmops.backends import probe; probe.report(); import sys; assert 'triton' not in sys.modules; print('fine')"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}", "VLMOPS_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr


def test_the_report_is_plain_data_with_the_machine_in_it(untouched):
    (untouched / "native" / "key").mkdir(parents=True)
    (untouched / "native" / "key" / build.LIBRARY).write_bytes(b"x" * 1000)
    (untouched / "tuning-v1.json").write_text("{}")
    data = json.loads(json.dumps(probe.report()))
    assert data["cpu"] and data["cores"] >= 1 and data["memory_gib"] > 0
    assert data["cache"] == {"folder": str(untouched), "bytes": {"native": 1000, "tuning-v1.json": 2}}
    assert {"c++", "nvcc", "ninja", "used"} <= set(data["compilers"])
    assert [row["name"] for row in data["backends"]] == list(BACKENDS)


def test_no_home_folder_is_said(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(probe, "cache_dir", homeless)
    assert "home" in probe.report()["cache"]["folder"]


def test_a_cache_folder_that_vanishes_meanwhile(untouched, monkeypatch):
    """A build in another process renames its work folder away between the listing and the look inside."""
    (untouched / "native" / "key").mkdir(parents=True)
    (untouched / "native" / "key" / "library.so").write_bytes(bytes(10))
    (untouched / "native" / ".key-1").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith(".key-1"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert probe.report()["cache"]["bytes"] == {"native": 10}

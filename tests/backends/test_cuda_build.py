"""Building kernels and finding nvcc: once, whole, in a cache that may be read-only."""

from __future__ import annotations

import dataclasses
import logging
import os
import runpy
import shutil
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.cuda_executors import GPU, needs_compiler
from vlmops.backends import build, cuda_build, cuda_library, cuda_simt, native
from vlmops.backends.cuda_errors import NoDevice
from vlmops.backends.cuda_runtime import Plan
from vlmops.ops.norms import cuda as norms


def small() -> Plan:
    return norms.sum_plan(torch.randn(3, 4), torch.empty(4))


@needs_compiler
def test_a_kernel_is_built_once(fresh_cuda):
    recipe = cuda_simt.unit(small())
    first = native.in_cache(recipe, "simt")
    assert {p.name for p in first.parent.iterdir()} == {"unit.so", build.STAMP}
    stamp = first.stat().st_mtime_ns
    assert native.in_cache(cuda_simt.unit(small()), "simt").stat().st_mtime_ns == stamp
    assert cuda_simt.unit(dataclasses.replace(small(), block=64)).key != recipe.key


@needs_compiler
def test_the_key_follows_the_sources(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(build.csrc_dir(), csrc)
    first = cuda_simt.unit(small(), csrc).key
    assert first == cuda_simt.unit(small()).key, "it does not depend on the folder"
    header = csrc / "cuda" / "ptx" / "warp.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    assert cuda_simt.unit(small(), csrc).key != first
    other = cuda_simt.unit(small(), csrc).key
    (csrc / "cuda" / "rotary.cu").write_text("// another kernel's file\n")
    assert cuda_simt.unit(small(), csrc).key == other


@needs_compiler
def test_a_cache_that_cannot_be_written_moves_to_a_private_folder(fresh_cuda, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "file" / "cache"))  # holds for root too, unlike a mode
    path = native.in_cache(cuda_simt.unit(small()), "simt")
    folder = tmp_path / "tmp" / f"vlmops-{os.getuid()}"
    assert folder in path.parents and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "cannot be written" in caplog.text


@needs_compiler
def test_a_ready_read_only_cache_is_only_read(fresh_cuda, monkeypatch):
    path = native.in_cache(cuda_simt.unit(small()), "simt")

    def refuse(*_args, **_kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(build, "file_lock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert native.in_cache(cuda_simt.unit(small()), "simt") == path


@needs_compiler
def test_a_kernel_that_does_not_compile_says_why(fresh_cuda, tmp_path, monkeypatch):
    csrc = tmp_path / "csrc"
    shutil.copytree(build.csrc_dir(), csrc)
    (csrc / "cuda" / "norms.cu").write_text("#error broken on purpose\n")
    with pytest.raises(build.BuildError, match="compiling norms_column_sum_float_t512 failed") as caught:
        native.in_cache(cuda_simt.unit(small(), csrc), "simt")
    assert "broken on purpose" in str(caught.value)


def fake_toolkit(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "lib").mkdir()
    (root / "lib" / "libcudart_static.a").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *dryrun*) echo "#\\$ TOP={root}/bin/.." >&2;; *) echo "Cuda, release 13.7, V13.7.1";; esac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME", "wheels"])
def test_nvcc_is_found(fresh_cuda, tmp_path, monkeypatch, where):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "site" / "nvidia" / "cu13" if where == "wheels" else tmp_path / "toolkit"
    nvcc = fake_toolkit(root)
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if where != "PATH" else f"{nvcc.parent}:/usr/bin:/bin")
    if where == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(root))
    elif where == "wheels":
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
        monkeypatch.setattr(cuda_build.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    found = cuda_build.toolkit()
    assert found == cuda_build.Toolkit(str(nvcc), "13.7.1", str(root / "include"), str(root / "lib"))


def test_no_nvcc_says_what_to_install(fresh_cuda, monkeypatch):
    monkeypatch.setattr(cuda_build, "_roots", lambda: [])
    monkeypatch.setattr(cuda_build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"nvcc not found .*pip install nvidia-cuda-nvcc"):
        cuda_build.toolkit()


@pytest.mark.slow
def test_a_library_is_built_found_and_opened(fresh_cuda, caplog):
    """Built by nvcc, opened through both loaders. Without a GPU a launch says so; with one it has been launched."""
    try:
        cuda_build.toolkit()
    except build.BuildError as err:
        pytest.skip(str(err))
    plan = small()
    path = cuda_library.build_default([plan], ["sm_80", "compute_80"])
    for kind in (cuda_library.Library, cuda_library._loader()):
        library = kind(str(path))
        assert library.kernels() == [plan.name] and library.find("nothing") == 0
        assert "driver" in library.error_text(35)
    assert cuda_library._loader() is not cuda_library.Library, caplog.text
    assert [x.kernels() for x in cuda_library.ready_libraries()] == [[plan.name]]
    if torch.cuda.is_available():
        x, out = torch.randn(3, 4, device="cuda"), torch.empty(4, device="cuda")
        cuda_library.launch(norms.sum_plan(x, out), x.device)
        torch.testing.assert_close(out, x.sum(0))
        return
    assert "driver" in str(cuda_library.why_not(GPU)) or "device" in str(cuda_library.why_not(GPU))
    with pytest.raises(NoDevice):
        cuda_library._kernel(plan.kernel, plan.name, 0, 0)
    caplog.set_level(logging.WARNING)
    path.write_bytes(path.read_bytes()[:3000])
    cuda_library.ready_libraries.cache_clear()
    assert cuda_library.ready_libraries() == () and "is damaged" in caplog.text


@pytest.mark.slow
def test_setup_builds_the_library_ahead_of_time(fresh_cuda, tmp_path, monkeypatch):
    """setup.py's own step, on one kernel and one architecture: stamped, found, opened."""
    try:
        cuda_build.toolkit()
    except build.BuildError as err:
        pytest.skip(str(err))
    monkeypatch.setenv("VLMOPS_BUILD_CUDA", "1")
    monkeypatch.setenv("VLMOPS_CUDA_ARCHS", "sm_80")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"))
    assert setup["NativeDistribution"]().has_ext_modules(), "a wheel with kernels in it belongs to one platform"
    plan = small()
    monkeypatch.setattr("vlmops.ops._shared.cuda_kernels.default_plans", lambda: [plan])
    setup["BuildPy"].build_cuda(None, tmp_path / "vlmops")
    path = tmp_path / "vlmops" / "_cuda" / cuda_build.LIBRARY
    monkeypatch.setattr(cuda_library, "packaged", lambda: path)
    assert [x.kernels() for x in cuda_library.ready_libraries()] == [[plan.name]]


def test_a_name_that_is_no_architecture(tmp_path):
    with pytest.raises(build.BuildError, match="'80' is no architecture"):
        cuda_build.ahead_of_time([small()], tmp_path, build.csrc_dir(), archs=["80"])

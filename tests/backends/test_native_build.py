"""Building and loading the native library: once, whole, and never fatal. A tiny stand-in csrc keeps it fast."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from vlmops.backends import build, native

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="needs Linux and a C++ compiler"
)

HEADER = "#define ANSWER 42\n"
KERNEL = """
#include "../tiny.h"
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
int CAT(answer_, VLMOPS_ISA)() { return ANSWER; }
"""
BINDINGS = """
#include "tiny.h"
int answer_generic();
extern "C" __attribute__((visibility("default"))) int answer() { return answer_generic(); }
"""
CHILD = """
import sys
from pathlib import Path
from vlmops.backends import build, native
build.csrc_dir = lambda: Path(sys.argv[1])
print(native.load(), native.reason())
"""


@pytest.fixture
def csrc(tmp_path):
    """A stand-in for csrc; the space and the dollar have to survive ninja and its shell."""
    folder = tmp_path / "a $HOME" / "csrc"
    (folder / "cpu" / "kernels").mkdir(parents=True)
    (folder / "cpu" / "tiny.h").write_text(HEADER)
    (folder / "cpu" / "kernels" / "tiny.cpp").write_text(KERNEL)
    (folder / "cpu" / "bindings.cpp").write_text(BINDINGS)
    return folder


@pytest.fixture
def fresh(csrc, tmp_path, monkeypatch):
    """`native` as in a new process that has the stand-in and an empty cache; the cache's folder of builds."""
    monkeypatch.setattr(build, "csrc_dir", lambda: csrc)
    monkeypatch.setattr(native, "_state", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("VLMOPS_DISABLE_NATIVE", "VLMOPS_NATIVE_SANITIZE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A compiler that writes each command to ``spy.log`` and, while ``block`` exists, stops at the first kernel."""
    script, block = tmp_path / "spy", tmp_path / "block"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/spy.log\n'
        f'case "$*" in *tiny.cpp*) while [ -e {block} ]; do sleep 0.1; done;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def outputs(spy: Path) -> list[str]:
    """What the spy compiler was asked to make, without the probes and version questions."""
    lines = (spy.parent / "spy.log").read_text().splitlines()
    return sorted(x.rsplit("-o ", 1)[1] for x in lines if "-o " in x and os.devnull not in x)


def child(csrc: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(csrc)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def warnings(caplog) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "not available" in r.getMessage()
    ]


# -- the real library ------------------------------------------------------------------------------------------


def test_the_real_library_loads_and_uses_torchs_threads():
    assert native.load(), native.reason()
    assert native.available() and native.reason() is None
    assert native.isa() in build.targets(build.compiler())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.ops.vlmops_cpu.num_threads() == 2, "at::parallel_for ran on one thread: built without -fopenmp?"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cap", ["", "avx3"])
def test_an_instruction_set_that_is_none_is_said(monkeypatch, caplog, cap):
    assert native.load(), native.reason()
    monkeypatch.setenv("VLMOPS_CPU_ISA", cap)
    monkeypatch.setattr(native, "_state", None)
    monkeypatch.setattr(native, "_load", lambda: None)
    assert native.load()
    assert ("VLMOPS_CPU_ISA=avx3" in caplog.text) == bool(cap)


def test_a_schema_is_defined_once():
    native.define("isa() -> str")
    native.define("num_threads() -> int")
    assert native.lib() is native.lib()


# -- building once, whole --------------------------------------------------------------------------------------


def test_first_use_builds_and_the_next_one_does_not(csrc, fresh, spy):
    plan, steps = build.plan(), []
    library = build.build(plan, fresh, lambda done, total: steps.append((done, total)))
    assert answer(library) == 42
    assert steps[-1] == (plan.steps, plan.steps)
    assert outputs(spy) == sorted([*(f"tiny.{isa}.o" for isa in plan.isas), "bindings.o", build.LIBRARY])
    assert {p.name for p in library.parent.iterdir()} == {build.LIBRARY, build.STAMP}
    count = len(outputs(spy))
    assert build.build(build.plan(), fresh) == library
    assert len(outputs(spy)) == count


def test_four_processes_build_once(csrc, fresh, spy):
    said = [process.communicate(timeout=300)[0] for process in [child(csrc) for _ in range(4)]]
    assert all("True None" in text for text in said), said
    assert len(outputs(spy)) == build.plan(csrc).steps, outputs(spy)
    assert sum("building the CPU kernels" in text for text in said) == 1, said


def test_a_killed_build_leaves_nothing_broken(csrc, fresh, spy):
    block = spy.parent / "block"
    block.touch()
    process = child(csrc)
    try:
        deadline = time.monotonic() + 120
        while not any(fresh.glob(".*-*/build.ninja")) or "tiny.cpp" not in (spy.parent / "spy.log").read_text():
            assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)  # its ninja and compilers live on, in the folder of the dead build
        process.wait()
    finally:
        block.unlink()
        process.kill()
    assert not build.intact(fresh / build.plan(csrc).key)
    assert native.load(), native.reason()
    assert answer(fresh / build.plan().key / build.LIBRARY) == 42
    assert not any(fresh.glob(".*")), "the dead build's folder is still there"


def test_an_interrupted_build_leaves_nothing_behind(csrc, fresh):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build(build.plan(), fresh, interrupt)
    assert {p.suffix for p in fresh.iterdir()} == {".lock"}
    assert answer(build.build(build.plan(), fresh)) == 42, "the lock was not given back"


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "missing", "no stamp", "bad stamp"])
def test_a_corrupt_library_is_built_again(csrc, fresh, damage):
    library = build.build(build.plan(), fresh)
    whole = library.read_bytes()
    stamp = library.parent / build.STAMP
    if damage in ("truncated", "empty"):  # a library cut in half loads with SIGBUS, so it must be seen before
        library.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    elif damage == "changed":
        library.write_bytes(whole[:5000] + b"\xff" * 64 + whole[5064:])
    else:
        {"missing": library.unlink, "no stamp": stamp.unlink, "bad stamp": lambda: stamp.write_text("[]")}[damage]()
    assert native.load(), native.reason()
    assert build.intact(library.parent)
    assert library.stat().st_size == len(whole)


# -- where it cannot be written, built or loaded ---------------------------------------------------------------


def test_a_cache_that_cannot_be_written_moves_to_a_private_folder(fresh, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "file" / "cache"))  # holds for root too, unlike a mode
    assert native.load(), native.reason()
    assert "cannot be written" in caplog.text
    folder = tmp_path / "tmp" / f"vlmops-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert answer(folder / build.plan().key / build.LIBRARY) == 42


def test_a_prepared_temporary_folder_is_not_trusted(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tmp" / f"vlmops-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert not native.load()
    assert "only this user can write" in native.reason()


def test_a_ready_read_only_cache_is_only_read(fresh, monkeypatch):
    library = build.build(build.plan(), fresh)

    def refuse(*_args, **_kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(build, "file_lock", refuse)
    monkeypatch.setattr(build, "ninja", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert native.cached() == library


def test_no_home_folder_is_no_error(fresh, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native, "cache_dir", homeless)
    assert native.load(), native.reason()


def test_a_failed_build_warns_once_and_falls_back(csrc, fresh, caplog):
    (csrc / "cpu" / "kernels" / "tiny.cpp").write_text("int x = 1;\n#error broken on purpose\n")
    assert not native.load()
    assert not native.available()
    assert native.isa() == ""
    assert "broken on purpose" in native.reason() and "-DVLMOPS_ISA" not in native.reason()
    log = fresh / f"{build.plan().key}.log"
    assert str(log) in native.reason() and "-DVLMOPS_ISA" in log.read_text()
    assert len(warnings(caplog)) == 1
    (csrc / "cpu" / "kernels" / "tiny.cpp").write_text(KERNEL)
    native._state = None
    assert native.load(), "mended sources build"


def test_a_library_that_does_not_load_says_why(csrc, fresh, caplog):
    (csrc / "cpu" / "kernels" / "tiny.cpp").write_text(
        KERNEL.replace("return ANSWER", "extern int gone(); return gone()")
    )
    assert not native.load()
    assert "undefined symbol" in native.reason() and "delete" in native.reason()
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("missing", "message"), [("compiler", "no C++ compiler"), ("ninja", "ninja not found"), ("version", "--version")]
)
def test_a_missing_tool_is_named(fresh, tmp_path, monkeypatch, caplog, missing, message):
    if missing == "ninja":
        monkeypatch.setitem(sys.modules, "ninja", None)
        monkeypatch.setattr(
            shutil, "which", lambda name, _which=shutil.which: None if name == "ninja" else _which(name)
        )
    elif missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "broken").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    assert not native.load()
    assert message in native.reason()
    assert len(warnings(caplog)) == 1


def test_it_can_be_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("VLMOPS_DISABLE_NATIVE", "1")
    assert not native.load()
    assert native.reason() == "VLMOPS_DISABLE_NATIVE is set"
    assert not warnings(caplog), "a user who asked for it needs no warning"
    assert not fresh.exists()


def test_a_sanitized_library_is_not_loaded_without_its_runtime(fresh, monkeypatch):
    monkeypatch.setenv("VLMOPS_NATIVE_SANITIZE", "address,undefined")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert not native.load()
    assert "LD_PRELOAD" in native.reason()


# -- the key, and the library built ahead of time --------------------------------------------------------------


def test_the_key_changes_with_all_that_matters(csrc, fresh, monkeypatch):
    def key():
        return build.plan().key

    first = key()
    seen = {first}

    def changed(what):
        assert key() not in seen, f"{what} does not change the key"
        seen.add(key())

    (csrc / "cpu" / "kernels" / "tiny.cpp").write_text(KERNEL + "//\n")
    changed("a kernel")
    (csrc / "cpu" / "tiny.h").write_text(HEADER + "//\n")
    changed("a header")
    (csrc / "cpu" / "kernels" / "more.cpp").write_text("")
    changed("one more file")
    with monkeypatch.context() as patch:
        patch.setenv("VLMOPS_NATIVE_SANITIZE", "undefined")
        changed("a sanitizer")
    with monkeypatch.context() as patch:
        patch.setattr(build, "compiler_version", lambda cxx: "c++ 99")
        changed("the compiler")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        changed("torch")
    with monkeypatch.context() as patch:
        patch.setattr(build, "targets", lambda cxx: {"generic": ()})
        changed("the instruction sets")


def test_the_key_does_not_change_with_what_does_not_matter(csrc, fresh, tmp_path, monkeypatch):
    first = build.plan().key
    (csrc / "cpu" / "README.md").write_text("prose")
    moved = shutil.copytree(csrc, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert build.plan(moved).key == build.plan().key == first


def test_a_library_built_ahead_of_time_is_used_where_it_fits(fresh, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "vlmops"
    monkeypatch.setattr(native, "__file__", str(package / "backends" / "native.py"))
    assert native.ahead_of_time() is None
    plan = build.plan()
    library = build.build(plan, tmp_path / "wheel")
    ready = Path(shutil.copytree(library.parent, package / "_native")) / build.LIBRARY
    assert native.ahead_of_time() == ready
    assert native.load() and not fresh.exists(), "nothing is built"
    facts = json.loads((package / "_native" / build.STAMP).read_text())
    (package / "_native" / build.STAMP).write_text(json.dumps({**facts, "torch": "2.0.0"}))
    assert native.ahead_of_time() is None, "another torch's library"
    shutil.copy2(library.parent / build.STAMP, package / "_native")
    half = ready.read_bytes()[:4096]
    ready.unlink()  # a new file: this process has the old one mapped, and cutting that would kill it
    ready.write_bytes(half)
    assert native.ahead_of_time() is None, "a damaged library"
    native._state = None
    assert native.load() and fresh.exists(), "built into the cache instead"

"""Compiling csrc/cpu with ninja: which instruction sets, which flags, which key. Knows no operation.

A build is a folder ``<cache>/native/<key>`` that appears whole, by one rename, so a killed build leaves nothing that
could be taken for one. The key covers everything the result depends on: sources, flags, compiler and torch; not Python.
Beside the library lies a stamp with its checksum, because loading a truncated library kills the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Protocol

__all__ = [
    "BuildError",
    "Plan",
    "Recipe",
    "build",
    "compiler",
    "csrc_dir",
    "intact",
    "key_of",
    "ninja",
    "plan",
    "stamp",
    "targets",
]

LIBRARY = "vlmops_cpu.so"
STAMP = "build.json"
KEEP_LINES = 20

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
#: Flags of every instruction set, by processor family. ``generic`` has none and is always there.
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")},
    "aarch64": {"neon": ()},
}


class BuildError(RuntimeError):
    """The native library cannot be built; the message says what is missing or what the compiler said."""


def csrc_dir() -> Path:
    """The C++ sources: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "cpu" / "bindings.cpp").is_file():
            return folder
    raise BuildError("the C++ sources (csrc/cpu) are not in this installation")


def compiler() -> str:
    """Path of the C++ compiler: $CXX, else c++, g++ or clang++ on the PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError(
        "no C++ compiler found (looked for $CXX, c++, g++, clang++): install one, e.g. the Debian package g++"
    )


def ninja() -> str:
    """Path of ninja: the PyPI package's executable, else the one on the PATH."""
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        candidate = Path(BIN_DIR) / "ninja"
        if candidate.exists():
            return str(candidate)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja not found: pip install ninja")
    return found


def _environment() -> dict[str, str]:
    """For compilers and ninja: a preloaded sanitizer is meant for the tests, under it a compile takes minutes."""
    env = dict(os.environ)
    if sanitizers():
        env.pop("LD_PRELOAD", None)
    return env


@lru_cache(maxsize=4)
def compiler_version(cxx: str) -> str:
    """First line of ``--version``."""
    try:
        run = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True, env=_environment())
        return run.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as err:
        raise BuildError(f"{cxx} --version does not work: {err}") from err


@lru_cache(maxsize=4)
def targets(cxx: str) -> dict[str, tuple[str, ...]]:
    """Instruction sets this compiler can target here: name -> flags, ``generic`` first."""
    found: dict[str, tuple[str, ...]] = {"generic": ()}
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    for isa, flags in ISA_FLAGS.get(machine, {}).items():
        probe = subprocess.run(
            [cxx, *flags, "-x", "c++", "-c", "-", "-o", os.devnull],
            input="int f() { return 0; }",
            text=True,
            capture_output=True,
            env=_environment(),
        )
        if probe.returncode == 0:
            found[isa] = flags
    return found


def sanitizers() -> str:
    """``VLMOPS_NATIVE_SANITIZE``, e.g. "address,undefined"; empty for a normal build."""
    return os.environ.get("VLMOPS_NATIVE_SANITIZE", "")


class Recipe(Protocol):
    """Anything ``build`` can build: into which file, under which key, by which ``build.ninja``.

    ``what`` is its name in messages, ``torch_version`` that of the torch it is built against.
    """

    key: str
    library: str
    what: str
    torch_version: str

    def write(self, folder: Path) -> None:
        """``build.ninja`` and generated sources into ``folder``; the default target is ``library``."""


@dataclass
class Plan:
    """One build: the compile commands as ninja will run them, and the key of the result."""

    cxx: str
    common: list[str]
    isas: dict[str, tuple[str, ...]]
    kernels: list[Path]
    bindings: Path
    include: list[str]
    link: list[str]
    torch_version: str
    key: str = ""
    library: str = LIBRARY
    what: str = "the CPU kernels"

    def write(self, folder: Path) -> None:
        """``build.ninja`` into ``folder``."""
        write_ninja(self, folder)

    @property
    def steps(self) -> int:
        """Commands ninja will run: a compile per kernel and set, the bindings, the link."""
        return len(self.kernels) * len(self.isas) + 2


def plan(csrc: Path | None = None) -> Plan:
    """What to compile from ``csrc`` (default: the package's own) and the key that names the result."""
    import torch

    csrc = csrc or csrc_dir()
    cxx = compiler()
    isas = targets(cxx)
    sanitize = sanitizers()
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fopenmp", "-Wall"]
    if "clang" not in compiler_version(cxx):
        common.append("-Wno-maybe-uninitialized")  # GCC 12 warns thousands of times in its own avx512fintrin.h
    common += ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"] if sanitize else ["-O3"]
    common += [f"-DVLMOPS_HAVE_{isa}=1" for isa in isas if isa != "generic"]
    # torch.utils.cpp_extension knows these folders too, but it imports setuptools, which a user may not have.
    home = Path(torch.__file__).parent
    headers = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    found = Plan(
        cxx=cxx,
        common=common,
        isas=isas,
        kernels=sorted((csrc / "cpu" / "kernels").glob("*.cpp")),
        bindings=csrc / "cpu" / "bindings.cpp",
        include=[*(f"-isystem{path}" for path in headers), abi],
        link=["-shared", *common, f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"],
        torch_version=torch.__version__,
    )
    digest = hashlib.sha256()
    flags = [flag for isa in isas.items() for flag in (isa[0], *isa[1])]
    for part in (compiler_version(cxx), torch.__version__, platform.machine(), abi, *common, *flags):
        digest.update(part.encode() + b"\0")
    for path in sorted(p for p in (csrc / "cpu").rglob("*") if p.suffix in (".h", ".cpp")):
        digest.update(str(path.relative_to(csrc)).encode() + b"\0" + path.read_bytes() + b"\0")
    found.key = digest.hexdigest()[:20]
    return found


def _quote(text: str) -> str:
    """A path or flag as ninja syntax wants it."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(words: list[str] | tuple[str, ...]) -> str:
    # ninja hands the command to a shell: quote for it, then for ninja
    return " ".join(shlex.quote(w).replace("$", "$$") for w in words)


def write_ninja(found: Plan, folder: Path) -> None:
    """``build.ninja`` in ``folder``: objects and the library land there too."""
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_words([found.cxx])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {_words(found.link)} -o $out",
    ]
    objects = []
    for source in found.kernels:
        for isa, flags in found.isas.items():
            out = f"{source.stem}.{isa}.o"
            objects.append(out)
            lines += [
                f"build {out}: compile {_quote(str(source))}",
                f"  flags = {_words([*found.common, *flags, f'-DVLMOPS_ISA={isa}'])}",
            ]
    objects.append("bindings.o")
    lines += [
        f"build bindings.o: compile {_quote(str(found.bindings))}",
        f"  flags = {_words([*found.common, *found.include])}",
    ]
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """An exclusive lock between processes. The system drops it when its holder dies, so it cannot go stale."""
    if sys.platform == "win32":  # no native build there
        yield
        return
    import fcntl

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def stamp(found: Recipe, folder: Path) -> None:
    """Record in ``folder`` what its library is: checksum, torch version, key."""
    checksum = hashlib.sha256((folder / found.library).read_bytes()).hexdigest()
    facts = {"sha256": checksum, "torch": found.torch_version, "key": found.key}
    (folder / STAMP).write_text(json.dumps(facts, indent=1) + "\n")


def intact(folder: Path, torch_version: str | None = None, library: str = LIBRARY) -> bool:
    """Whether ``folder`` holds a library as it was built (and for ``torch_version``, if given)."""
    try:
        facts = json.loads((folder / STAMP).read_text())
        checksum = hashlib.sha256((folder / library).read_bytes()).hexdigest()
        return facts["sha256"] == checksum and torch_version in (None, facts["torch"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def key_of(folder: Path) -> str:
    """The key that ``stamp`` recorded in ``folder``."""
    return str(json.loads((folder / STAMP).read_text())["key"])


def build(found: Recipe, root: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The built library, compiled now unless ``root/<key>`` has it.

    Args:
        found: what to build.
        root: folder of all builds (created).
        progress: called with (steps done, steps in all) while compiling.

    Raises:
        BuildError: the compiler failed; the message has its last lines and the log's path.
        OSError: the folder cannot be written.
    """
    target = root / found.key
    library = target / found.library
    if intact(target, library=found.library):
        return library
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(root / f"{found.key}.lock"):
        if intact(target, library=found.library):  # another process built it while this one waited
            return library
        for stale in root.glob(f".{found.key}-*"):  # builds killed before the rename; the lock says nobody is at work
            shutil.rmtree(stale, ignore_errors=True)
        work = root / f".{found.key}-{os.getpid()}"  # no mkdtemp: its mode 700 would shut others out of a shared cache
        work.mkdir()
        try:
            found.write(work)
            _run_ninja(work, found.what, root / f"{found.key}.log", progress)
            for leftover in work.iterdir():
                if leftover.name != found.library:
                    leftover.unlink()
            stamp(found, work)
            if target.exists():  # damaged, or half deleted by somebody
                shutil.rmtree(target)
            os.replace(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return library


def _run_ninja(work: Path, what: str, log_path: Path, progress: Callable[[int, int], None] | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    process = subprocess.Popen(
        [ninja(), "-C", str(work), "-j", os.environ.get("MAX_JOBS") or str(cores), "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**_environment(), "NINJA_STATUS": "[%f/%t] "},
    )
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and progress is not None:
                progress(int(step[1]), int(step[2]))
        code = process.wait()
    except BaseException:
        process.terminate()  # not kill: ninja takes its compilers with it
        process.wait()
        raise
    if code == 0:
        log_path.unlink(missing_ok=True)
        return
    log_path.write_text("".join(lines))
    raise BuildError(f"compiling {what} failed (log: {log_path}):\n{_what_failed(lines)}")


def _what_failed(lines: list[str]) -> str:
    """What the first failed command said, from its first error on; ninja's last lines if no command failed."""
    start = next((i for i, x in enumerate(lines) if x.startswith("FAILED:")), None)
    if start is None:
        return "".join(lines[-KEEP_LINES:]).rstrip()
    said = list(takewhile(lambda x: not x.startswith(("[", "FAILED:", "ninja:")), lines[start + 2 :]))  # + the command
    first = next((i for i, x in enumerate(said) if re.search(r"\berror\b|undefined reference", x)), 0)
    return "".join(said[first : first + KEEP_LINES]).rstrip()

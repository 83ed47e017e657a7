"""Compiling csrc/cuda: finding nvcc, which architectures, and the recipes of the kernel library and its loader.

``build.build`` and ``native.in_cache`` do the building, as for the CPU kernels: keyed folders that appear whole, a file lock, a
progress line, a temporary folder where the cache cannot be written.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmops.backends import build
from vlmops.backends.build import BuildError
from vlmops.backends.cuda_plan import Plan

__all__ = ["ARCHS", "LIBRARY", "Recipe", "Toolkit", "ahead_of_time", "library", "loader", "source_digest", "toolkit"]

LIBRARY = "vlmops_cuda.so"
LOADER = "vlmops_cuda_loader"
STANDARD = "-std=c++17"
#: What a library for any machine holds: machine code runs on every newer GPU of its major number (sm_80 on 86, 87 and 89;
#: sm_90; sm_100 on 103; sm_120 on 121), the PTX on what comes after.
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80")
#: PyPI's CUDA compiler and what it needs, of the version the budgets were made with; `make` installs it where there is none.
WHEELS = tuple(f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime"))
INSTALL = f"pip install {' '.join(WHEELS)}"


# -- nvcc --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler: path of nvcc, its version ("13.0.88"), and the folders of its headers and libraries."""

    nvcc: str
    version: str
    include: str
    lib: str


def _roots() -> list[Path]:
    """Folders that may hold bin/nvcc: $CUDA_HOME, $CUDA_PATH, PyPI's wheels, the usual place."""
    found = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        found += sorted(Path(folder).glob("cu[0-9]*"), reverse=True)
    return [*found, Path("/usr/local/cuda")]


def _root_of(nvcc: str) -> Path | None:
    """The toolkit an nvcc belongs to, as it says itself: the one on the PATH may be a script."""
    try:
        run = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


@functools.lru_cache(maxsize=1)
def toolkit() -> Toolkit:
    """The nvcc to use: on the PATH, under $CUDA_HOME, or from PyPI's wheels. Remembered for the process.

    Raises:
        BuildError: there is none, or it does not work.
    """
    candidates = [shutil.which("nvcc"), *(str(root / "bin" / "nvcc") for root in _roots())]
    for nvcc in candidates:
        if not nvcc or not os.access(nvcc, os.X_OK):
            continue
        root = _root_of(nvcc)
        if root is None:
            continue
        run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        version = re.search(r"V(\d+\.\d+\.\d+)", run.stdout)
        include = next(
            (p for p in (root / "include", root / "targets" / "x86_64-linux" / "include") if p.is_dir()), None
        )
        lib = next((p for p in (root / "lib64", root / "lib") if (p / "libcudart_static.a").exists()), None)
        if version and include and lib:
            return Toolkit(nvcc, version[1], str(include), str(lib))
    raise BuildError(f"nvcc not found (looked on the PATH, in $CUDA_HOME and among PyPI's wheels): {INSTALL}")


# -- recipes -----------------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """One build: the commands in order of dependence, as (output, inputs, command words)."""

    library: str
    what: str
    commands: list[tuple[str, list[str], list[str]]]
    files: dict[str, str] = field(default_factory=dict)
    torch_version: str = ""
    key: str = ""

    def write(self, folder: Path) -> None:
        """``build.ninja`` and the generated files into ``folder``."""
        for name, text in self.files.items():
            (folder / name).write_text(text)
        lines = ["ninja_required_version = 1.5"]
        for i, (output, inputs, words) in enumerate(self.commands):
            wanted = " ".join(build._quote(x) for x in inputs)
            lines += [f"rule r{i}", f"  command = {build._words(words)}", f"build {output}: r{i} {wanted}"]
        lines += [f"default {self.library}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))


def digest(*parts: str) -> str:
    """A key of 20 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.lru_cache(maxsize=64)
def _contents(folder: Path, suffixes: tuple[str, ...], _stamp: tuple[tuple[str, int, int], ...]) -> str:
    return digest(*(f"{p.relative_to(folder)}\0{p.read_text()}" for p in _files(folder, suffixes)))


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes)


def folder_digest(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Key of the contents of a folder's files; read again only when a file's time or size changes."""
    facts = tuple((str(p), (s := p.stat()).st_mtime_ns, s.st_size) for p in _files(folder, suffixes))
    return _contents(folder, suffixes, facts)


def source_digest(csrc: Path, source: str) -> str:
    """Key of what one kernel file compiles to: itself and every device header."""
    return digest(folder_digest(csrc / "cuda", (".cuh",)), (csrc / "cuda" / source).read_text())


def sass(arch: str) -> list[str]:
    """nvcc's options for one architecture: "sm_80" machine code, "compute_80" PTX."""
    number = arch.split("_")[1]
    return ["-gencode", f"arch=compute_{number},code={arch}"]


def flags(plan: Plan, archs: Sequence[str]) -> list[str]:
    """nvcc's options for a kernel: a plan for one architecture alone ("sm90a") is compiled for that."""
    if plan.arch != "sm80":
        archs = [plan.arch.replace("sm", "sm_")]
    chosen = [word for arch in archs for word in sass(arch)]
    return [STANDARD, "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *chosen, *plan.macros]


TABLE = """// The kernels of this library by name, sorted.
#include "launch/library.h"
{declarations}
const vlmops::Kernel vlmops::kernels[] = {{{entries}}};
const int vlmops::num_kernels = {count};
"""


def library(plans: Sequence[Plan], archs: Sequence[str] = ARCHS, csrc: Path | None = None) -> Recipe:
    """The shared library of these plans' kernels: C ABI of csrc/launch/library.cpp, CUDA's runtime linked statically.

    Raises:
        BuildError: no nvcc.
        ValueError: two different kernels of one name.
    """
    csrc = csrc or build.csrc_dir()
    tools = toolkit()
    kernels: dict[str, Plan] = {}
    for plan in plans:
        if kernels.setdefault(plan.name, plan).kernel != plan.kernel:
            raise ValueError(f"two kernels are called {plan.name}")
    names = sorted(kernels)
    commands, objects = [], []
    for name in names:
        source = str(csrc / "cuda" / kernels[name].source)
        words = [tools.nvcc, *flags(kernels[name], archs), f"-I{csrc / 'cuda'}", "-c", source, "-o", f"{name}.o"]
        commands.append((f"{name}.o", [source], words))
        objects.append(f"{name}.o")
    table = TABLE.format(
        declarations="\n".join(f'extern "C" void {name}();' for name in names),
        entries=", ".join(f'{{"{name}", reinterpret_cast<const void*>(&{name})}}' for name in names),
        count=len(names),
    )
    for stem, source in (("library", str(csrc / "launch" / "library.cpp")), ("table", "table.cpp")):
        words = [build.compiler(), STANDARD, "-O2", "-fPIC", "-fvisibility=hidden", f"-I{csrc}", f"-I{tools.include}"]
        commands.append((f"{stem}.o", [source], [*words, "-c", source, "-o", f"{stem}.o"]))
        objects.append(f"{stem}.o")
    link = [tools.nvcc, "-shared", "-cudart", "static", f"-L{tools.lib}", *objects, "-o", LIBRARY]
    commands.append((LIBRARY, objects, link))
    sources = sorted({p.source for p in kernels.values()})
    key = digest(
        tools.version, build.compiler_version(build.compiler()), *archs,
        *(f"{n} {' '.join(flags(kernels[n], archs))}" for n in names), *(source_digest(csrc, s) for s in sources),
        folder_digest(csrc / "launch", (".h", ".cpp")),
    )  # fmt: skip
    what = "the CUDA kernels" if len(names) > 1 else f"the CUDA kernel {names[0]}"
    return Recipe(LIBRARY, what, commands, {"table.cpp": table}, key=key)


def loader(csrc: Path | None = None) -> Recipe:
    """The pybind11 module over the library's C ABI, with the headers torch bundles; one for each Python version."""
    import torch

    csrc = csrc or build.csrc_dir()
    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").is_file():
        raise BuildError(f"Python's headers are not installed ({python}/Python.h)")
    name = LOADER + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    source = str(csrc / "launch" / "module.cpp")
    words = [build.compiler(), STANDARD, "-O2", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{csrc}"]
    words += [f"-isystem{Path(torch.__file__).parent / 'include'}", f"-isystem{python}", source, "-o", name, "-ldl"]
    facts = (build.compiler_version(build.compiler()), torch.__version__, sys.version, name)
    key = digest(*facts, folder_digest(csrc / "launch", (".h", ".cpp")))
    return Recipe(name, "the CUDA loader", [(name, [source], words)], torch_version=torch.__version__, key=key)


def ahead_of_time(
    plans: Sequence[Plan],
    folder: Path,
    csrc: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    archs: Sequence[str] = ARCHS,
) -> Path:
    """Build the library of these kernels and lay it into ``folder`` with its stamp: what setup.py calls.

    Args:
        plans: whose kernels.
        folder: made if missing.
        csrc: the sources.
        progress: told (compiled, all).
        archs: for which GPUs, e.g. "sm_80" (machine code), "compute_80" (PTX).

    Raises:
        BuildError: no nvcc, an architecture of an unknown form, or nvcc failed.
    """
    import tempfile

    for arch in archs:
        if not re.fullmatch(r"(sm|compute)_\d+a?", arch):
            raise BuildError(f"{arch!r} is no architecture: expected one like sm_80 or compute_80")
    recipe = library(plans, archs, csrc)
    with tempfile.TemporaryDirectory() as work:
        built = build.build(recipe, Path(work), progress)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, folder)
    build.stamp(recipe, folder)
    return folder / LIBRARY

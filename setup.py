"""What pyproject.toml cannot say: csrc travels in the wheel, and kernels are built ahead of time where possible or wanted.

`pip install .` builds in an isolated environment without torch: the result is a pure-Python wheel that carries
`vlmops/_csrc` and builds at first use. `pip install --no-build-isolation .` sees torch and, with a compiler and ninja,
puts the built library into `vlmops/_native` (a platform wheel). VLMOPS_BUILD_NATIVE=0 or 1 forces either.

VLMOPS_BUILD_CUDA=1 with --no-build-isolation also compiles every declared CUDA kernel by nvcc into `vlmops/_cuda`, for all
architectures or those of VLMOPS_CUDA_ARCHS ("sm_80,sm_90"): minutes on many cores. Without it a machine with nvcc compiles the
kernels it uses, each at first use.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("VLMOPS_BUILD_NATIVE", "auto")
CUDA_WANTED = os.environ.get("VLMOPS_BUILD_CUDA", "0") == "1"


def native_wanted() -> bool:
    """Whether to build the library now."""
    if WANTED in ("0", "1"):
        return WANTED == "1"
    here = sys.platform == "linux" and importlib.util.find_spec("torch") is not None
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    ninja = importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None
    return here and compiler is not None and ninja


class BuildPy(build_py):
    """build_py, then csrc and (where wanted) the built library."""

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout reads ../csrc and builds into the user's cache
            return
        package = Path(self.build_lib) / "vlmops"
        shutil.rmtree(package / "_csrc", ignore_errors=True)
        shutil.copytree(HERE / "csrc", package / "_csrc")
        if native_wanted():
            self.build_native(package)
        if CUDA_WANTED:
            self.build_cuda(package)

    def build_native(self, package: Path) -> None:
        sys.path.insert(0, str(HERE))
        from vlmops.backends import build

        target = package / "_native"
        shutil.rmtree(target, ignore_errors=True)
        try:
            plan = build.plan(HERE / "csrc")
            with tempfile.TemporaryDirectory() as work:
                built = build.build(plan, Path(work), lambda done, total: print(f"vlmops: compiled {done}/{total}"))
                target.mkdir(parents=True)
                shutil.copy2(built, target)
            build.stamp(plan, target)
        except build.BuildError as err:
            if WANTED == "1":
                raise
            print(f"vlmops: the CPU kernels are left to first use: {err}", file=sys.stderr)

    def build_cuda(self, package: Path) -> None:
        sys.path.insert(0, str(HERE))
        from vlmops.backends import cuda_build
        from vlmops.ops._shared import cuda_kernels

        target = package / "_cuda"
        shutil.rmtree(target, ignore_errors=True)
        archs = os.environ.get("VLMOPS_CUDA_ARCHS", "").replace(",", " ").split() or cuda_build.ARCHS
        cuda_build.ahead_of_time(
            cuda_kernels.default_plans(),
            target,
            HERE / "csrc",
            lambda done, total: print(f"vlmops: compiled {done}/{total} CUDA kernels"),
            archs=archs,
        )


class NativeDistribution(Distribution):
    """A wheel with a compiled library in it belongs to one platform."""

    def has_ext_modules(self):
        return native_wanted() or CUDA_WANTED


setup(cmdclass={"build_py": BuildPy}, distclass=NativeDistribution)

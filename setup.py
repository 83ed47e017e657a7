"""What pyproject.toml cannot say: csrc travels in the wheel, and the CPU kernels are built ahead of time where possible.

`pip install .` builds in an isolated environment without torch: the result is a pure-Python wheel that carries
`vlmops/_csrc` and builds at first use. `pip install --no-build-isolation .` sees torch and, with a compiler and ninja,
puts the built library into `vlmops/_native` (a platform wheel). VLMOPS_BUILD_NATIVE=0 or 1 forces either.
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


class NativeDistribution(Distribution):
    """A wheel with a compiled library in it belongs to one platform."""

    def has_ext_modules(self):
        return native_wanted()


setup(cmdclass={"build_py": BuildPy}, distclass=NativeDistribution)

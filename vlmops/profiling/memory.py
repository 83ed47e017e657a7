"""Peak memory of a tower's forward: growth of the resident set, each case in a process of its own.

What an allocator reports misses the scratch memory of oneDNN and of the C++ kernels; the resident set misses nothing. A
helper process imports everything once, computes nothing, and forks one child a case, so every case starts from the same
untouched heap. The peak counter is reset after the model is built (Linux: /proc/self/clear_refs).

    python -m vlmops.profiling.memory '[{"tower": "clip_l_336", "dtype": "bf16", "patched": true, "layers": 4}]'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["measure", "settle", "status"]

MARK = "vlmops-memory:"


def measure(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each job in a fresh process.

    Args:
        jobs: {"tower", "dtype", "patched", "layers", optionally "patches", "threads"} each.

    Returns:
        For each job {"growth": bytes that the forward added to the resident set at its peak, packed weights included,
        "packed": bytes of packed weights}, or {"error": why not}.
    """
    if not jobs:
        return []
    if not sys.platform.startswith("linux"):
        return [{"error": f"peak memory is read from /proc, which {sys.platform} has not"} for _ in jobs]
    from vlmops.backends import choice

    choice.save()  # so that the children choose as this process did, without measuring
    ran = subprocess.run(
        [sys.executable, "-m", "vlmops.profiling.memory", json.dumps(list(jobs))],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    found = [json.loads(line[len(MARK) :]) for line in ran.stdout.splitlines() if line.startswith(MARK)]
    missing = {"error": f"the measuring process ended early: {ran.stderr.strip()[-200:]}"}
    return found + [missing] * (len(jobs) - len(found))


def status(field: str) -> int:
    """A size of this process from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def settle() -> int:
    """Give free memory back, start the peak counter again, and return the resident set now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    import vlmops
    from vlmops.profiling import bars, towers

    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    tower = towers.build(job["tower"], bars.DTYPES[job["dtype"]], layers=job.get("layers"), patches=job.get("patches"))
    warm = torch.randn(256, 256, dtype=torch.float32)
    torch.nn.functional.linear(warm, warm)  # thread pools and libraries are there before counting starts
    module = vlmops.patch_model(tower.module) if job["patched"] else tower.module
    before = settle()
    for _ in range(2):
        tower.run(module)
    return {"growth": status("VmHWM") - before, "packed": vlmops.packed_bytes(module)}


def _serve(jobs: Sequence[dict[str, Any]]) -> None:
    import transformers.models.clip.modeling_clip
    import transformers.models.pixtral.modeling_pixtral
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401

    import vlmops  # noqa: F401
    from vlmops.backends import native

    native.load()
    for job in jobs:
        sys.stdout.flush()
        child = os.fork()  # before any thread pool of this process has started
        if child == 0:
            try:
                result = _run(job)
            except Exception as err:  # the parent reports it in the row
                result = {"error": f"{type(err).__name__}: {err}"}
            print(MARK + json.dumps(result), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(MARK + json.dumps({"error": f"the process was ended by signal {status & 127}"}), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))

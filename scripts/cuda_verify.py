#!/usr/bin/env python
"""A second opinion on races: SentryWard, a static verifier of PTX, on the CUDA kernels at fixed shapes.

    python scripts/cuda_verify.py                  # every op; writes benchmarks/budgets/cuda_races.json
    python scripts/cuda_verify.py --op norms --print

The SIMT machine sees the accesses of the runs it was given; the verifier proves every order of events at one launch
configuration. It follows branches on sizes, not on data: a kernel that walks cu_seqlens or a mask is "unsupported", and so listed
as unverified with what stood in the way. Advisory: only a finding (a potential race, barriers that do not match, a use after
free) is a failure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "budgets" / "cuda_races.json"
ARCH, PTX = "sm_100a", "compute_100"  # what the verifier reads
ROWS = 8
SECONDS, MEBIBYTES = 120, 6000  # for one kernel
FINDINGS = ("potential_race", "not_wellsynced", "invalid_lifecycle")
SCALARS = {"i4x": ("u32", 1 << 32), "q": ("u64", 1 << 64), "f4x": ("f32", 0)}  # PTX type, modulus of an integer


def configuration(plan: Any) -> dict[str, Any]:
    """The verifier's description of a launch: sizes and scalars are known, the contents of tensors are not."""
    from vlmops.backends.cuda_plan import Scalar

    arguments = []
    for number, arg in enumerate(plan.args):
        if isinstance(arg, Scalar):
            kind, modulus = SCALARS[arg.code]
            value = arg.value % modulus if modulus else arg.value
            arguments.append({"parameter": number, "type": kind, "value": value})
        elif arg is None:
            arguments.append({"parameter": number, "type": "pointer", "value": None})
    launch = {"grid_dim": list(plan.grid), "block_dim": [plan.block, 1, 1], "cluster_dim": [1, 1, 1]}
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {**launch, "dynamic_shared_bytes": plan.shared},
        "arguments": arguments,
    }


def compile_ptx(plan: Any, into: Path, csrc: Path | None = None) -> None:
    """The kernel's PTX by nvcc.

    Raises:
        RuntimeError: what nvcc said.
    """
    from vlmops.backends import build, cuda_build

    csrc = csrc or build.csrc_dir()
    words = [cuda_build.toolkit().nvcc, cuda_build.STANDARD, "-O3", f"-arch={PTX}", *plan.macros, f"-I{csrc / 'cuda'}"]
    done = subprocess.run(
        [*words, "-ptx", "-o", str(into), str(csrc / "cuda" / plan.source)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-600:])


def verify(plan: Any, csrc: Path | None = None) -> dict[str, Any]:
    """The verdict on one launch: {"result", "why" unless it is race_free, "seconds"}."""
    import sentryward

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ptx, config = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        compile_ptx(plan, ptx, csrc)
        config.write_text(json.dumps(configuration(plan)))
        found = sentryward.verify(ptx, input=config, timeout_seconds=SECONDS, memory_limit_mib=MEBIBYTES)
    row: dict[str, Any] = {"result": found["result"]}
    if found["result"] != "race_free":
        said = [f"{d.get('code')}: {d.get('message', '')}" for d in found.get("diagnostics", [])]
        row["why"] = re.sub(r"\S*/kernel\.ptx", "kernel.ptx", " / ".join(said))[:300]
    row["seconds"] = round(time.monotonic() - begin, 1)
    return row


def small_plans(op: str) -> dict[str, Any]:
    """Launches of an op that the verifier can follow, by kernel: tiny products, or the op's cases on a few rows."""
    from vlmops.backends import cuda_runtime
    from vlmops.ops._shared.cuda_kernels import cases

    with cuda_runtime.record(cuda_runtime.TARGETS[ARCH]) as recorded:
        if op in PRODUCTS:
            PRODUCTS[op]()
        else:
            for _, run in cases(op):
                run("meta", ROWS)
    return {p.name: p for p in recorded if p.arch in ("sm80", "sm100a")}


def _meta(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")


def _linear() -> None:
    from vlmops.ops.linear import cuda

    for rows, columns, k in ((72, 80, 96), (16, 64, 64), (2, 40, 64), (70, 66, 70)):
        for dtype in ("bfloat16", "float32"):
            x, weight, bias = (_meta(*s, dtype=dtype) for s in ((rows, k), (columns, k), (columns,)))
            cuda.forward(x, weight, bias, "gelu", None, None, None, True)


def _mlp() -> None:
    from vlmops.ops.mlp import cuda

    for rows in (72, 2):
        for gate in (None, _meta(80, 64)):
            x, w1, w2 = _meta(rows, 64), _meta(80, 64), _meta(48, 80)
            none = [None] * 2
            cuda.forward(
                x, w1, None, w2, None, gate, None, "silu", None, "", *none, 0.0, "", *none, 0.0, None, "", 0, 0, True
            )


def _patchify() -> None:
    from vlmops.ops.patchify import cuda

    for dtype in ("uint8", "bfloat16"):
        images, weight = _meta(1, 1, 3, 64, 64, dtype=dtype), _meta(64, 3, 16, 16)
        cuda.forward(images, None, weight, None, None, [], [], 16, 1, "raster", False, 16, True)


def _quantized_linear() -> None:
    from vlmops.ops.quantized_linear import cuda

    for rows in (2, 72):
        x, data, scale = _meta(rows, 64), _meta(64, 64, dtype="int8"), _meta(1, 64, dtype="float32")
        cuda.forward(x, data, scale, None, "int8", 0, 64, None, "", None, None, None, False)


#: Products of tiles are followed instruction by instruction: the cases' own sizes take hours.
PRODUCTS = {"linear": _linear, "mlp": _mlp, "patchify": _patchify, "quantized_linear": _quantized_linear}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--print", action="store_true", dest="show", help="print the verdicts, write nothing")
    parser.add_argument("--jobs", type=int, default=2, help="kernels at a time")
    options = parser.parse_args()
    from vlmops.ops._shared.cuda_kernels import ops_with_kernels

    ops = options.op or ops_with_kernels()
    todo = {f"{op} | {name}": plan for op in ops for name, plan in small_plans(op).items()}
    found: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(verify, plan): key for key, plan in todo.items()}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            key = waiting[future]
            found[key] = future.result()
            print(
                f"{done}/{len(todo)} {found[key]['result']:14} {found[key]['seconds']:6} s  {key}",
                file=sys.stderr,
                flush=True,
            )
    counts = {
        r: sum(row["result"] == r for row in found.values()) for r in sorted({row["result"] for row in found.values()})
    }
    print(", ".join(f"{n} {r}" for r, n in counts.items()))
    if options.show:
        print(json.dumps(found, indent=1))
    else:
        stored = json.loads(FILE.read_text()) if FILE.exists() else {}
        kept = {k: v for k, v in stored.items() if k.split(" | ")[0] not in ops}
        rows = {k: {f: x for f, x in v.items() if f != "seconds"} for k, v in found.items()}
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((kept | rows).items()))
        FILE.write_text("{\n" + lines + "\n}\n")
        print(f"wrote {FILE.relative_to(ROOT)}")
    return int(any(row["result"] in FINDINGS for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())

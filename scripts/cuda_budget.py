"""Compile every CUDA kernel the ops declare for GPUs that need not be there, run it on the SIMT machine, keep or compare.

    python scripts/cuda_budget.py                      # all ops: write benchmarks/budgets/cuda.json
    python scripts/cuda_budget.py --check --op rotary  # compare with the file; exit 1 on any difference
    python scripts/cuda_budget.py --op rotary --print  # look at one op, write nothing
    python scripts/cuda_budget.py --nvrtc              # compile every specialisation with NVRTC, as CuPy does; keep nothing

An op's ``cuda_budget.py`` yields (label, run); ``run(device, rows)`` calls the op's own launch code. On meta tensors the plans
are recorded and compiled by nvcc, warnings and spills being errors; on a few rows on the CPU the SIMT machine counts. Figures
of compiled kernels are kept by nvcc's version, the machine's counters depend on no compiler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "budgets" / "cuda.json"
FORMAT = 1
ROWS = 24  # on the machine
#: Most warps an SM holds, and its shared memory.
WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
COUNTERS = (
    "launches", "global_load_sectors", "global_load_sectors_least", "global_store_sectors", "global_store_sectors_least",
    "global_load_unique_bytes", "global_store_unique_bytes", "shared_wavefronts", "shared_wavefronts_least", "mma_flops",
    "barriers",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def triton_budget() -> Any:
    """scripts/triton_budget.py, whose reading of SASS and comparing of budgets serve here too."""
    interpret = os.environ.get("TRITON_INTERPRET")
    spec = importlib.util.spec_from_file_location("triton_budget", ROOT / "scripts" / "triton_budget.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # it turns Triton's interpreter off for its own process
    os.environ.pop("TRITON_INTERPRET", None) if interpret is None else os.environ.update(TRITON_INTERPRET=interpret)
    return module


# -- compiling ---------------------------------------------------------------------------------------------------------


def compile_plan(plan: Any, arch: str) -> dict[str, Any]:
    """Compile one kernel by nvcc, warnings and spills being errors, and read the result."""
    from vlmops.backends import build, cuda_build, cuda_runtime

    csrc, target = build.csrc_dir(), cuda_runtime.TARGETS[arch]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        words = [cuda_build.toolkit().nvcc, *cuda_build.flags(plan, [arch]), f"-I{csrc / 'cuda'}", "-cubin"]
        words += ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-Werror", "-o", str(cubin)]
        done = subprocess.run([*words, str(csrc / "cuda" / plan.source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" / ".join((done.stdout + done.stderr).strip().splitlines()[-4:])[:600])
        row: dict[str, Any] = triton_budget().read_cubin(cubin.read_bytes())
    static = re.search(r"(\d+) bytes smem", done.stderr)
    row["shared"] = plan.shared + (int(static[1]) if static else 0)  # dynamic and static
    row["warps"] = plan.block // 32
    if row["shared"] > target.shared:
        raise ValueError(f"needs {row['shared']} bytes of shared memory of {target.shared}")
    row["occupancy"] = occupancy(row, target)
    return row


def occupancy(row: dict[str, Any], target: Any) -> float:
    """Resident warps over the most an SM can hold, from registers and shared memory."""
    most, per_warp = WARPS[target.capability], -(-row["registers"] * 32 // 256) * 256
    blocks = min(
        most // row["warps"], 65536 // (per_warp * row["warps"]), 32, (target.shared + 1024) // (row["shared"] + 1024)
    )
    return round(blocks * row["warps"] / most, 3)


def compile_with_nvrtc(plan: Any, arch: str) -> str | None:
    """Compile one kernel by NVRTC with the executor's own code and options; what it says if it fails."""
    from cuda.bindings import nvrtc

    from vlmops.backends import cuda_cupy

    error, program = nvrtc.nvrtcCreateProgram(cuda_cupy.code(plan).encode(), b"kernel.cu", 0, [], [])
    assert int(error) == 0, error
    options = [f"--gpu-architecture={arch}".encode(), *(o.encode() for o in cuda_cupy.options(plan))]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error) == 0:
        return None
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    return f"{plan.name} for {arch}: {log.decode(errors='replace').strip()[:600]}"


# -- running on the machine --------------------------------------------------------------------------------------------


def count(run: Callable[[str, int], Any]) -> dict[str, int]:
    """The SIMT machine's counters of a case on a few rows."""
    from vlmops.backends import cuda_simt

    os.environ["VLMOPS_CUDA_EXECUTOR"] = "simt"
    with cuda_simt.count() as seen:
        run("cpu", ROWS)
    return {name: seen[name] for name in COUNTERS}


# -- keeping -----------------------------------------------------------------------------------------------------------


def compiled(op: str, only: str | None, quick: bool) -> list[tuple[str, str, Any]]:
    """(key, architecture, plan) of what is compiled for an op.

    Quick: each kernel for the first architecture that has it, which is sm_80 for nearly all, and for one other, so that each of
    those gets its share.
    """
    from vlmops.backends import cuda_runtime
    from vlmops.ops._shared.cuda_kernels import plans

    every = [(f"{op} | {p.name}", arch, p) for arch in cuda_runtime.TARGETS for p in plans(op, arch, only)]
    if not quick:
        return every
    archs: dict[str, list[str]] = {}
    for key, arch, _ in every:
        archs.setdefault(key, []).append(arch)

    def chosen(key: str, arch: str) -> bool:
        first, *others = archs[key]
        return arch == first or (arch in others and arch == others[zlib.crc32(key.encode()) % len(others)])

    return [(key, arch, plan) for key, arch, plan in every if chosen(key, arch)]


def collect(ops: list[str], only: str | None, jobs: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(kernels: name -> architecture -> row, counters: case -> row)."""
    from vlmops.backends import cuda_runtime
    from vlmops.ops._shared.cuda_kernels import cases

    kernels: dict[str, Any] = {}
    counters: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:  # the work is nvcc's
        waiting = {
            pool.submit(compile_plan, plan, arch): (key, arch)
            for op in ops for key, arch, plan in compiled(op, only, quick)
        }  # fmt: skip
        for op in ops:
            counters |= {f"{op} | {label}": count(run) for label, run in cases(op) if not only or only in label}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            key, arch = waiting[future]
            try:
                row = future.result()
            except (RuntimeError, ValueError) as err:
                row = {"error": str(err)}
            kernels.setdefault(key, {})[arch] = row
            if sys.stderr.isatty():
                print(f"\r{done}/{len(waiting)} {key:60.60}", end="", file=sys.stderr, flush=True)
    order = list(cuda_runtime.TARGETS)
    return {k: {a: kernels[k][a] for a in order if a in kernels[k]} for k in sorted(kernels)}, dict(
        sorted(counters.items())
    )


def in_lines(data: Any) -> str:
    """JSON with one row a line."""
    text = json.dumps(data, indent=1)
    return re.sub(
        r'\{\n\s+("(?:registers|launches|error)"[^{}]*?(?:\{[^{}]*\})?[^{}]*?)\n\s+\}',
        lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}",
        text,
    )


def check_nvrtc(ops: list[str]) -> list[str]:
    """What NVRTC refuses of the ops' specialisations, each for the first architecture that has it."""
    first: dict[str, tuple[Any, str]] = {}
    for op in ops:
        for key, arch, plan in compiled(op, None, False):
            first.setdefault(key, (plan, arch))
    found = [compile_with_nvrtc(plan, arch) for plan, arch in first.values()]
    print(f"{len(found)} specialisations compiled by NVRTC")
    return [line for line in found if line is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--case", help="only cases whose label contains this (with --print)")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument(
        "--quick", action="store_true", help="with --check: each kernel for two architectures of the five"
    )
    parser.add_argument("--print", action="store_true", dest="show", help="print rows, write nothing")
    parser.add_argument("--nvrtc", action="store_true", help="compile with NVRTC instead")
    parser.add_argument("--file", type=Path, default=FILE, help="where the budget is kept")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    if options.quick and not options.check:
        parser.error("--quick goes with --check: a budget is written of all architectures")
    from vlmops.backends import cuda_build
    from vlmops.ops._shared.cuda_kernels import ops_with_kernels

    ops = options.op or ops_with_kernels()
    if options.nvrtc:
        problems = check_nvrtc(ops)
        for line in problems:
            print(line, file=sys.stderr)
        return 1 if problems else 0
    begin, version = time.monotonic(), cuda_build.toolkit().version
    kernels, counters = collect(ops, options.case, options.jobs, options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps({"nvcc": version, "kernels": kernels, "counters": counters}) + "\n")
    if options.show:
        print(in_lines({"kernels": kernels, "counters": counters}))
    print(f"{len(kernels)} kernels, {sum(map(len, kernels.values()))} compiled in {time.monotonic() - begin:.0f} s")
    tools = triton_budget()
    problems = tools.faults(kernels)
    empty: dict[str, Any] = {"format": FORMAT, "nvcc": {}, "counters": {}}
    stored = json.loads(options.file.read_text()) if options.file.exists() else empty
    if options.check:
        if version in stored["nvcc"]:
            want = stored["nvcc"][version]
            if options.quick:
                want = {k: {a: row for a, row in v.items() if a in kernels.get(k, v)} for k, v in want.items()}
            problems += tools.compare(kernels, want, ops)
        else:
            print(
                f"the budget is for nvcc {', '.join(stored['nvcc'])}, this is {version}: compiled, nothing to compare"
            )
        problems += [
            f"{key}: was {json.dumps(stored['counters'].get(key))}, is {json.dumps(row)}"
            for key, row in counters.items() if stored["counters"].get(key) != row
        ]  # fmt: skip
    elif not options.show:
        for kept, new in ((stored["nvcc"].setdefault(version, {}), kernels), (stored["counters"], counters)):
            for key in [k for k in kept if k.split(" | ")[0] in ops]:
                del kept[key]
            merged = dict(sorted((kept | new).items()))
            kept.clear()
            kept.update(merged)
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(in_lines(stored) + "\n")
        print(f"wrote {options.file}")
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

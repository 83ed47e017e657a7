"""Compile every Triton kernel the ops declare for GPUs that need not be there, and keep or compare what came out.

    python scripts/triton_budget.py                      # all ops: write benchmarks/budgets/triton.json (make budgets)
    python scripts/triton_budget.py --check --op rotary  # compare with the file; exit 1 on any difference
    python scripts/triton_budget.py --op rotary --print  # look at one op, write nothing

An op's ``triton_budget.py`` yields (label, thunk). The thunk calls the op's own launch code on meta tensors; what it
launches is compiled with the constants, alignment and warps it would have had. Per kernel and target: registers, spills,
shared memory, theoretical occupancy, tensor-core instructions, 16-byte loads.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # an interpreting process cannot compile

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "budgets" / "triton.json"
FORMAT = 1
DTYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "int32": "i32", "int64": "i64", "int8": "i8",
    "uint8": "u8", "int16": "i16", "bool": "i1", "float8_e4m3fn": "fp8e4nv",
}  # fmt: skip


def ops_with_budgets() -> list[str]:
    """Names of the ops that have a triton_budget module."""
    import vlmops.ops

    return sorted(
        m.name for m in pkgutil.iter_modules(vlmops.ops.__path__)
        if m.ispkg and importlib.util.find_spec(f"vlmops.ops.{m.name}.triton_budget") is not None
    )  # fmt: skip


# -- compiling ---------------------------------------------------------------------------------------------------------


def source(launch: Any) -> Any:
    """The launch as Triton's compiler takes it: types, constants, alignment."""
    import torch
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = dict(zip(names, launch.args, strict=False)) | launch.constants
    missing = [n for n in names if n not in given]
    if missing:
        raise ValueError(f"{launch.kernel.__name__}: launched without {', '.join(missing)}")
    for i, name in enumerate(names):
        value = given[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[str(value.dtype)[6:]]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            sizes = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{DTYPES[str(value.base.dtype)[6:]]}[{sizes}]>"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{launch.kernel.__name__}: argument {name} is a {type(value).__name__}")
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


#: What this process has compiled: small kernels (schedules, row sums) come back in most cases of an op.
_compiled: dict[str, dict[str, Any]] = {}


def compile_launch(launch: Any, target: Any) -> dict[str, Any]:
    """Compile one recorded launch and measure the result."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **launch.options}
    what = source(launch)
    key = repr((launch.kernel.__name__, what.signature, what.constants, what.attrs, options, target))
    if key not in _compiled:
        _compiled[key] = _compile(launch, what, target, options)
    return dict(_compiled[key])


def _compile(launch: Any, what: Any, target: Any, options: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(what, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    cuda = target.backend == "cuda"
    row = read_cubin(kernel.asm["cubin"]) if cuda else read_amdgcn(kernel.asm["amdgcn"])
    row["shared"] = kernel.metadata.shared
    row["warps"] = launch.warps
    if row["shared"] > target.shared:
        raise ValueError(f"needs {row['shared']} bytes of shared memory of {target.shared}")
    row["occupancy"] = occupancy(row, target)
    return row


def tool(name: str) -> str:
    """One of the CUDA binary tools that Triton's wheel carries."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers from the resource table; spills, tensor-core and 16-byte instructions from the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    for done in (usage, sass):
        if done.returncode:
            raise RuntimeError(f"{done.args[0]} failed: {done.stderr[:300]}")
    registers = re.findall(r"REG:(\d+)", usage.stdout)
    seen: collections.Counter[str] = collections.Counter()
    for line in sass.stdout.splitlines():
        match = re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if match:
            seen[match.group(1)] += 1

    def number(pattern: str) -> int:
        return sum(n for name, n in seen.items() if re.match(pattern, name))

    return {
        "registers": max(int(r) for r in registers),
        "spills": number(r"LDL") + number(r"STL"),
        "mma": {k: n for k in ("HMMA", "HGMMA", "QGMMA", "IMMA", "UTC*MMA") if (n := number(k.replace("*", ".*")))},
        "load16": number(r"LDG\..*128") + number(r"LDGSTS.*128"),
        "load": number(r"LDG\.") + number(r"LDGSTS"),
        "tma": number(r"UTMALDG"),
        "instructions": sum(seen.values()),
    }  # fmt: skip


def read_amdgcn(text: str) -> dict[str, Any]:
    """The same from AMD's assembly."""

    def value(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    wide = len(re.findall(r"(?:buffer|global)_load_dwordx4", text))
    return {
        "registers": value("vgpr_count") + value("agpr_count") * ("accum_offset" not in text),
        "spills": value("vgpr_spill_count"),
        "mma": {"MFMA": n} if (n := len(re.findall(r"v_mfma_", text))) else {},
        "load16": wide,
        "load": len(re.findall(r"(?:buffer|global)_load_", text)),
        "tma": 0,
        "instructions": len(re.findall(r"^\t[a-z]\w+ ", text, re.MULTILINE)),
    }


def occupancy(row: dict[str, Any], target: Any) -> float:
    """Resident warps over the most an SM (CU) can hold, from registers and shared memory."""
    warps = row["warps"]
    if target.backend == "hip":  # 4 SIMDs of 8 waves and 512 registers, 64 KiB LDS
        waves = min(8, 512 // max(1, -(-row["registers"] // 8) * 8)) * 4
        blocks = min(waves // warps, (64 << 10) // max(1, row["shared"]), 32)
        return round(min(1.0, blocks * warps / 32), 3)
    per_warp = -(-row["registers"] * 32 // 256) * 256
    limits = [64 // warps, 65536 // (per_warp * warps), 32]
    limits.append((target.shared + 1024) // (row["shared"] + 1024))
    return round(min(limits) * warps / 64, 3)


# -- running -----------------------------------------------------------------------------------------------------------


def in_short(err: BaseException) -> str:
    """The innermost cause with the source lines before the marker that Triton draws."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line for line in (str(err).strip() or repr(err)).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' / '.join(line.strip() for line in lines[-4:])[:600]}"


def run_case(op: str, label: str) -> dict[str, dict[str, Any]]:
    """Record one case for each target and compile what it launches: kernel name -> target -> row."""
    from vlmops.backends import triton_runtime

    cases = dict(importlib.import_module(f"vlmops.ops.{op}.triton_budget").cases())
    found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, target in triton_runtime.TARGETS.items():
        with triton_runtime.record(target) as launches:
            cases[label]()
        if not launches:
            raise RuntimeError(f"{op} {label}: nothing was launched for {name}")
        times: collections.Counter[str] = collections.Counter()
        seen = set()
        for launch in launches:
            key = (launch.kernel.__name__, str(sorted(launch.constants.items())), tuple(type(a) for a in launch.args))
            if key in seen:
                continue
            seen.add(key)
            times[launch.kernel.__name__] += 1
            n = times[launch.kernel.__name__]
            kernel = launch.kernel.__name__ + (f" #{n}" if n > 1 else "")
            try:
                found[f"{op} | {label} | {kernel}"][name] = compile_launch(launch, target)
            except Exception as err:
                found[f"{op} | {label} | {kernel}"][name] = {"error": in_short(err)}
    return dict(found)


def compare(have: dict[str, Any], want: dict[str, Any], ops: list[str]) -> list[str]:
    """Differences in words."""
    want = {k: v for k, v in want.items() if k.split(" | ")[0] in ops}
    lines = [f"not in the budget: {k}" for k in have if k not in want] + [f"gone: {k}" for k in want if k not in have]
    for key in sorted(set(have) & set(want)):
        for target in sorted(set(have[key]) | set(want[key])):
            a, b = want[key].get(target), have[key].get(target)
            if a != b:
                lines.append(f"{key} on {target}: was {json.dumps(a)}, is {json.dumps(b)}")
    return lines


def faults(have: dict[str, Any]) -> list[str]:
    """What no budget may hold: errors, spills."""
    return [
        f"{key} on {target}: {row.get('error') or str(row['spills']) + ' spills'}"
        for key, rows in have.items()
        for target, row in rows.items()
        if "error" in row or row["spills"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--case", help="only cases whose label contains this (with --print)")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--print", action="store_true", dest="show", help="print rows, write nothing")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    import triton

    ops = options.op or ops_with_budgets()
    begin = time.monotonic()
    work = [
        (op, label) for op in ops for label, _ in importlib.import_module(f"vlmops.ops.{op}.triton_budget").cases()
        if not options.case or options.case in label
    ]  # fmt: skip
    rows: dict[str, Any] = {}
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(run_case, *item): item for item in work}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            rows |= future.result()
            if sys.stderr.isatty():
                print(f"\r{done}/{len(work)} {' '.join(waiting[future]):60.60}", end="", file=sys.stderr, flush=True)
    rows = dict(sorted(rows.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}) + "\n")
    if options.show:
        for key, targets in rows.items():
            print(key)
            for target, row in targets.items():
                print(f"    {target:7} {json.dumps(row)}")
    print(f"{len(rows)} kernels, {sum(map(len, rows.values()))} compiled in {time.monotonic() - begin:.0f} s")
    problems = faults(rows)
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"kernels": {}}
    if options.check:
        if stored.get("triton") != triton.__version__:
            print(f"the budget is for Triton {stored.get('triton')}, this is {triton.__version__}: nothing to compare")
            return 0 if not problems else 1
        problems += compare(rows, stored["kernels"], ops)
    elif not options.show:
        kept = {} if not options.op else {k: v for k, v in stored["kernels"].items() if k.split(" | ")[0] not in ops}
        FILE.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "triton": triton.__version__, "kernels": dict(sorted((kept | rows).items()))}
        text = json.dumps(data, indent=1)
        text = re.sub(
            r'\{\n\s+("registers"[^{}]*?(?:\{[^{}]*\})?[^{}]*?)\n\s+\}',
            lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}",
            text,
        )
        FILE.write_text(text + "\n")
        print(f"wrote {FILE.relative_to(ROOT)}")
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

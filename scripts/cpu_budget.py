"""Count the instructions of one call of every CPU kernel under callgrind, and keep or compare what came out.

    python scripts/cpu_budget.py                     # all ops: write benchmarks/budgets/cpu.json
    python scripts/cpu_budget.py --check --op norms  # compare with the file; exit 1 on any difference, 2 without valgrind
    python scripts/cpu_budget.py --op norms --print  # look at one op, write nothing

csrc/budget/<op>.cpp calls the kernels of csrc/cpu/kernels/<op>.cpp, compiled with the flags of the native build, on fixed numbers
and one thread; so a count is the same in every run, whatever else the machine does. It belongs to one compiler and is kept by its
version. Counted are the instruction sets that valgrind knows and this machine has: ``generic`` and ``avx2`` (not AVX-512) on
x86-64, ``generic`` and ``neon`` on Arm.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "budgets" / "cpu.json"
CSRC = ROOT / "csrc"
FORMAT = 1
TOLERANCE = 0.02
ISAS = ("generic", "avx2", "neon")
INSTALL = "valgrind is not installed: nothing can be counted (Debian package valgrind)"
#: Declared like kernels, and none: they say how much scratch a kernel needs.
NO_KERNELS = {"varlen_attention_packed_bytes", "varlen_attention_scratch_bytes"}
ENTRY = "vlmops_measured"  # csrc/budget/driver.h
Counts = dict[str, dict[str, int]]  # "op | case | kernel" -> instruction set -> instructions


class CountError(RuntimeError):
    """A kernel that cannot be compiled, run or counted."""


def valgrind() -> str | None:
    """Its path; None where it is not installed."""
    return shutil.which("valgrind")


def runs_here(isa: str) -> bool:
    """Whether this processor has an instruction set of ``ISAS`` that its compiler knows."""
    if isa != "avx2":
        return True  # neon belongs to every 64-bit Arm
    info = Path("/proc/cpuinfo")
    return info.exists() and {"avx2", "fma", "f16c"} <= set(info.read_text(errors="replace").split())


def ops(csrc: Path = CSRC) -> list[str]:
    """Ops whose kernels have cases."""
    return sorted(path.stem for path in (csrc / "budget").glob("*.cpp"))


def kernels(csrc: Path = CSRC) -> dict[str, str]:
    """Kernel -> op (its header) of everything that csrc/cpu declares for every instruction set."""
    found = {}
    for header in sorted((csrc / "cpu").glob("*.h")):
        if header.name != "isa.h":
            names = re.findall(r"^VLMOPS_DECLARE\([^,]+, (\w+),", header.read_text(), re.MULTILINE)
            found |= {name: header.stem for name in names if name not in NO_KERNELS}
    return found


def compiler(version: str) -> str:
    """A compiler's version without the name it was called by: ``c++`` and ``g++`` are one."""
    return re.sub(r"^(?:c|g)\+\+\S* ", "GCC ", version)


# -- counting ----------------------------------------------------------------------------------------------------------


def run(words: Sequence[str], what: str) -> str:
    """What a command prints.

    Raises:
        CountError: it fails; the message has its last lines.
    """
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-8:]
        raise CountError("\n".join([f"{what} failed with {done.returncode}:", *said]))
    return done.stdout


def count(op: str, isa: str, plan: Any, csrc: Path, folder: Path) -> dict[str, int]:
    """Instructions of one call of each case of an op: "op | case | kernel" -> count.

    Args:
        op: a file of csrc/budget and of csrc/cpu/kernels.
        isa: an instruction set of ``plan``.
        plan: of the native build, whose compiler and flags are used.
        csrc: where both files are.
        folder: for what is made on the way.
    """
    kernel, program, out = (folder / f"{op}.{isa}{suffix}" for suffix in (".o", "", ".out"))
    flags = [*plan.common, f"-DVLMOPS_ISA={isa}"]
    source = csrc / "cpu" / "kernels" / f"{op}.cpp"
    run([plan.cxx, *flags, *plan.isas[isa], "-c", str(source), "-o", str(kernel)], f"compiling {source.name}")
    driver = csrc / "budget" / f"{op}.cpp"
    # no lazy binding: the first call of memcpy would pay for looking it up
    run(
        [plan.cxx, *flags, "-O1", str(driver), str(kernel), "-Wl,-z,now", "-o", str(program)],
        f"compiling budget/{driver.name}",
    )
    tool = valgrind()
    if tool is None:
        raise CountError(INSTALL)
    words = [tool, "--tool=callgrind", f"--toggle-collect={ENTRY}", f"--dump-after={ENTRY}", "--combine-dumps=yes"]
    printed = run(
        [*words, "--dump-line=no", f"--callgrind-out-file={out}", str(program)], f"counting {op} by {isa} under callgrind"
    )  # fmt: skip
    labels, counts = printed.splitlines(), parts(out.read_text())
    if len(labels) != len(counts) or len(set(labels)) != len(labels):
        raise CountError(f"{op} by {isa}: {len(set(labels))} cases, {len(counts)} calls counted")
    return {f"{op} | {label}": n for label, n in zip(labels, counts, strict=True)}


def parts(text: str) -> list[int]:
    """Instructions of each call in a callgrind file, which has a part for each and one for the program's end."""
    found = []
    for part in re.split(r"^part: ", text, flags=re.MULTILINE)[1:]:
        total = re.search(r"^totals: (\d+)", part, re.MULTILINE)
        if f"Trigger: --dump-after={ENTRY}" in part and total is not None:
            found.append(int(total[1]))
    return found


def collect(
    chosen: Sequence[str], isas: Sequence[str], plan: Any, csrc: Path = CSRC, jobs: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> Counts:  # fmt: skip
    """The counts of these ops by these instruction sets."""
    rows: Counts = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(count, op, isa, plan, csrc, Path(folder)): (op, isa) for op in chosen for isa in isas
        }  # fmt: skip
        for future in concurrent.futures.as_completed(waiting):
            op, isa = waiting[future]
            for key, n in future.result().items():
                rows.setdefault(key, {})[isa] = n
            progress(f"{op} {isa}")
    return {key: {isa: rows[key][isa] for isa in isas if isa in rows[key]} for key in sorted(rows)}


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """A case that is not as budgeted: ``was`` None for a new one, ``now`` None for one that is gone."""

    key: str
    isa: str
    was: int | None
    now: int | None

    def __str__(self) -> str:
        where = f"{self.key} by {self.isa}"
        if self.was is None:
            return f"not in the budget: {where}, {self.now} instructions"
        if self.now is None:
            return f"gone: {where}, was {self.was} instructions"
        return f"{where}: was {self.was}, is {self.now} instructions, {self.now / self.was - 1:+.1%}"


def compare(
    have: Counts, want: Counts, chosen: Sequence[str], isas: Sequence[str], tolerance: float = TOLERANCE
) -> list[Difference]:
    """Cases of these ops and sets whose count is off by more than the tolerance, either way, or which only one side has."""
    found = []
    for key in sorted(set(have) | set(want)):
        for isa in isas:
            was, now = want.get(key, {}).get(isa), have.get(key, {}).get(isa)
            if key.split(" | ")[0] not in chosen or (was is None and now is None):
                continue
            if was is None or now is None or abs(now - was) > tolerance * was:
                found.append(Difference(key, isa, was, now))
    return found


def uncounted(rows: Counts, chosen: Sequence[str], csrc: Path = CSRC) -> list[str]:
    """Kernels of these ops that no case calls."""
    called = {key.rsplit(" | ", 1)[1] for key in rows}
    return [
        f"csrc/cpu/{op}.h declares {name}, and no case of csrc/budget calls it"
        for name, op in kernels(csrc).items() if op in chosen and name not in called
    ]  # fmt: skip


def without_cases(csrc: Path = CSRC) -> list[str]:
    """Ops that have kernels and no file in csrc/budget."""
    missing = sorted(set(kernels(csrc).values()) - set(ops(csrc)))
    return [f"csrc/cpu/{op}.h has kernels, and there is no csrc/budget/{op}.cpp" for op in missing]


def read(path: Path) -> dict[str, Any]:
    """The budget file; an empty one where there is none."""
    if not path.exists():
        return {"format": FORMAT, "compilers": {}}
    data: dict[str, Any] = json.loads(path.read_text())
    if data.get("format") != FORMAT:
        raise CountError(f"{path}: format {data.get('format')}, expected {FORMAT}")
    return data


def in_lines(data: Any) -> str:
    """JSON with one row a line."""
    return re.sub(
        r"\{\s*((?:\"\w+\": \d+,?\s*)+)\}",
        lambda m: "{" + " ".join(m[1].split()) + "}",
        json.dumps(data, indent=1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op (may be repeated)", choices=ops())
    parser.add_argument("--isa", action="append", help="only this instruction set (may be repeated)", choices=ISAS)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--print", action="store_true", dest="show", help="print counts, write nothing")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a count may differ")
    parser.add_argument("--file", type=Path, default=FILE, help="where the budget is kept")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    options = parser.parse_args(argv)
    if valgrind() is None:
        print(INSTALL, file=sys.stderr)
        return 2
    from vlmops.backends import build

    plan, begin = build.plan(CSRC), time.monotonic()
    if build.sanitizers():
        parser.error("VLMOPS_NATIVE_SANITIZE is set: its build is not the one to count")
    wanted = [isa for isa in options.isa or ISAS if isa in plan.isas]
    isas = [isa for isa in wanted if runs_here(isa)]
    for isa in sorted({*wanted} - {*isas}):
        print(f"{isa} is left out: this processor does not have it")
    chosen, version = options.op or ops(), compiler(build.compiler_version(plan.cxx))

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{line:40.40}", end="", file=sys.stderr, flush=True)

    try:
        rows = collect(chosen, isas, plan, CSRC, options.jobs, progress)
        stored = read(options.file)
    except CountError as err:
        print(err, file=sys.stderr)
        return 1
    if options.show:
        for key, row in rows.items():
            print(f"{key:80} " + "  ".join(f"{isa} {n:>10}" for isa, n in row.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"compiler": version, "kernels": rows}) + "\n")
    print(f"{len(rows)} cases, {sum(map(len, rows.values()))} counted in {time.monotonic() - begin:.0f} s, {version}")
    problems = uncounted(rows, chosen) + ([] if options.op else without_cases())
    if options.check and version in stored["compilers"]:
        found = compare(rows, stored["compilers"][version], chosen, isas, options.tolerance)
        problems += [str(difference) for difference in found]
    elif options.check:
        known = ", ".join(stored["compilers"]) or "no compiler"
        print(f"the budget is for {known}, this is {version}: counted, nothing to compare")
    elif not options.show:
        kept = stored["compilers"].setdefault(version, {})
        for key in [k for k in kept if k.split(" | ")[0] in chosen]:
            others = {isa: n for isa, n in kept.pop(key).items() if isa not in isas}
            if others and key in rows:
                rows[key] = others | rows[key]
        stored["compilers"][version] = dict(sorted((kept | rows).items()))
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(in_lines(stored) + "\n")
        print(f"wrote {options.file}")
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

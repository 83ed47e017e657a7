"""Do all guards that need no clock hold? One table of what was counted, beside its budget.

    python scripts/budgets_check.py                       # everything (make budgets-check): minutes
    python scripts/budgets_check.py --only cpu --op norms # one guard, one op
    python scripts/budgets_check.py --all                 # every figure, not those alone that differ

| guard | what it holds |
|---|---|
| cpu | instructions of the CPU kernels under callgrind (scripts/cpu_budget.py) |
| triton | registers, spills, shared memory, instructions of the Triton kernels as compiled (scripts/triton_budget.py) |
| cuda | the same of the CUDA kernels, and the SIMT machine's counters (scripts/cuda_budget.py) |
| counters | bytes and FLOPs in Triton's interpreter and on the SIMT machine against each op's cost (tests named traffic) |

Exits with 1 if a guard is broken, with 2 if none is and one could not be checked here (no valgrind, another compiler).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "benchmarks" / "budgets"
GUARDS = ("cpu", "triton", "cuda", "counters")
HOLDS, BROKEN, UNCHECKED = "holds", "BROKEN", "NOT ALL CHECKED"
TESTS = ("tests/simt/test_counters.py", "tests/ops")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a kernel: ``budget`` None for a new one, ``now`` None for one that is gone."""

    kernel: str
    figure: str
    budget: float | None
    now: float | None
    tolerance: float = 0.0

    @property
    def change(self) -> float | None:
        """Relative; None where one of the two is missing or the budget is 0."""
        return None if self.budget is None or self.now is None or not self.budget else self.now / self.budget - 1

    @property
    def differs(self) -> bool:
        """Whether it is off by more than the tolerance."""
        if self.budget is None or self.now is None:
            return True
        return abs(self.now - self.budget) > self.tolerance * abs(self.budget)


@dataclasses.dataclass
class Outcome:
    """What a guard found.

    Args:
        guard: of ``GUARDS``.
        status: ``HOLDS``, ``BROKEN`` or ``UNCHECKED``.
        counted: how much was looked at, in words.
        figures: everything that has a budget or is new.
        lines: what its program said that no figure shows.
        seconds: it took.
    """

    guard: str
    status: str
    counted: str
    figures: list[Figure] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def leaves(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a budget row, nested ones by a dotted name."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


def figures(
    have: Mapping[str, Any], want: Mapping[str, Any], ops: Sequence[str], tolerance: float = 0.0, whole: bool = True
) -> list[Figure]:
    """Each number of the kernels of some ops beside its budget.

    Args:
        have, want: kernel -> row, or kernel -> target -> row.
        ops: whose kernels.
        tolerance: relative.
        whole: whether ``have`` is all there is of these ops; else a row that only ``want`` has was not looked at.
    """
    found = []
    for key in sorted(k for k in {*have, *want} if k.split(" | ")[0] in ops):
        now, budget = dict(leaves(have.get(key, {}))), dict(leaves(want.get(key, {})))
        names = dict.fromkeys([*budget, *now]) if whole else dict.fromkeys(now)
        found += [Figure(key, name, budget.get(name), now.get(name), tolerance) for name in names]
    return found


# -- the guards --------------------------------------------------------------------------------------------------------


def _load(name: str) -> dict[str, Any]:
    path = BUDGETS / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return data


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(words, capture_output=True, text=True, errors="replace", cwd=ROOT, env=env)


def _script(name: str, options: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    """scripts/<name>_budget.py --check, and the rows it counted; None if it did not come so far."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        script = str(ROOT / "scripts" / f"{name}_budget.py")
        done = _run([sys.executable, script, "--check", "--json", str(path), *options])
        rows = None
        with contextlib.suppress(OSError, ValueError):
            rows = json.loads(path.read_text())
    return done, rows


def _said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines of its errors but for the differences, which the table shows."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("gone: ", "not in the budget: ")) and ": was " not in line]


def _by_script(
    name: str, ops: Sequence[str], options: Sequence[str], compare: Callable[[dict[str, Any]], list[Figure] | None]
) -> Outcome:
    done, rows = _script(name, [*options, *(word for op in ops for word in ("--op", op))])
    if rows is None:
        return Outcome(name, UNCHECKED, "could not run", lines=_said(done)[-3:] or [f"exit code {done.returncode}"])
    counted = next(
        (line for line in reversed(done.stdout.splitlines()) if " counted in " in line or " compiled in " in line), ""
    )
    found = compare(rows)
    told = [line for line in done.stdout.splitlines() if line.startswith("the budget is for")]
    if found is None and not told:
        told = ["no budget for this compiler"]
    status = BROKEN if done.returncode else UNCHECKED if told else HOLDS
    return Outcome(name, status, counted, found or [], [*told, *_said(done)])


def cpu(ops: Sequence[str], jobs: int, quick: bool) -> Outcome:
    """Instructions under callgrind."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from cpu_budget import TOLERANCE

    def compare(rows: dict[str, Any]) -> list[Figure] | None:
        want = _load("cpu").get("compilers", {}).get(rows["compiler"])
        if want is None:
            return None
        isas = {isa for row in rows["kernels"].values() for isa in row}
        want = {key: {isa: n for isa, n in row.items() if isa in isas} for key, row in want.items()}
        return figures(rows["kernels"], want, ops, TOLERANCE)

    return _by_script("cpu", ops, ["--jobs", str(jobs)], compare)


def triton(ops: Sequence[str], jobs: int, quick: bool) -> Outcome:
    """What Triton's compiler made."""

    def compare(rows: dict[str, Any]) -> list[Figure] | None:
        stored = _load("triton")
        same = stored.get("triton") == rows["triton"]
        return figures(rows["kernels"], stored["kernels"], ops) if same else None

    return _by_script("triton", ops, ["--jobs", str(jobs)], compare)


def cuda(ops: Sequence[str], jobs: int, quick: bool) -> Outcome:
    """What nvcc made, and the SIMT machine counted. The machine's counters depend on no compiler."""

    def compare(rows: dict[str, Any]) -> list[Figure] | None:
        stored = _load("cuda")
        counted = figures(rows["counters"], stored.get("counters", {}), ops)
        compiled = stored.get("nvcc", {}).get(rows["nvcc"])
        return counted + (figures(rows["kernels"], compiled, ops, whole=not quick) if compiled is not None else [])

    return _by_script("cuda", ops, ["--jobs", str(jobs), *(["--quick"] if quick else [])], compare)


def counters(ops: Sequence[str], jobs: int, quick: bool) -> Outcome:
    """Tests of the counters themselves, and of each op's traffic against its cost."""
    names = " or ".join(f"test_{op}" for op in ops)
    chosen = f"test_counters or (traffic and ({names}))" if ops else "test_counters or traffic"
    done = _run([sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *TESTS, "-k", chosen])
    last = done.stdout.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode not in (0, 1):
        return Outcome("counters", UNCHECKED, last[0], lines=[line for line in done.stderr.splitlines() if line][-3:])
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return Outcome("counters", BROKEN if done.returncode else HOLDS, last[0].strip("= "), lines=failed)


def known_ops(guard: str) -> list[str]:
    """Ops that a guard has something of."""
    if guard == "cpu":
        return sorted(path.stem for path in (ROOT / "csrc" / "budget").glob("*.cpp"))
    file = "triton.py" if guard == "triton" else "cuda.py" if guard == "cuda" else "__init__.py"
    return sorted(
        p.parent.name for p in (ROOT / "vlmops" / "ops").glob(f"*/{file}") if not p.parent.name.startswith("_")
    )


# -- telling -----------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.10g}"


def _largest(found: Sequence[Figure]) -> str:
    """The largest change, of kernels that both sides have."""
    known = [f for f in found if f.change is not None]
    if not known:
        return ""
    worst = max(known, key=lambda f: abs(f.change or 0.0))
    return f"{worst.change:+.1%} {worst.kernel} {worst.figure}" if worst.change else "none"


def show(outcomes: Sequence[Outcome], console: Console, everything: bool = False) -> None:
    """Print the guards, then the figures that differ (or all), then what else was said."""
    table = Table(
        "guard",
        "state",
        "kernels",
        "figures",
        "off",
        "largest change",
        "what was looked at",
        title="guards without clocks",
    )
    for o in outcomes:
        style = {HOLDS: "green", BROKEN: "bold red", UNCHECKED: "yellow"}[o.status]
        kernels, off = len({f.kernel for f in o.figures}), sum(f.differs for f in o.figures)
        numbers = (str(kernels), str(len(o.figures)), str(off)) if o.figures else ("", "", "")
        counted = f"{o.counted}{f' [{o.seconds:.0f} s]' if o.seconds else ''}"
        table.add_row(Text(o.guard), Text(o.status, style=style), *numbers, Text(_largest(o.figures)), Text(counted))
    console.print(table)
    shown = [(o, f) for o in outcomes for f in o.figures if everything or f.differs]
    if shown:
        table = Table("guard", "kernel", "figure", title="every figure" if everything else "what is not as budgeted")
        for name in ("budget", "now", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        for o, f in shown:
            change = "" if f.change is None else f"{f.change:+.1%}"
            change = "new" if f.budget is None else "gone" if f.now is None else change
            style = "red" if f.differs else ""
            table.add_row(
                o.guard, Text(f.kernel), Text(f.figure), _number(f.budget), _number(f.now), Text(change, style=style)
            )
        console.print(table)
    for o in outcomes:
        for line in o.lines:
            console.print(f"{o.guard}: {line}", markup=False, soft_wrap=True)


def code(outcomes: Sequence[Outcome]) -> int:
    """Exit code: 1 broken, 2 not all checked, 0 all hold."""
    states = {o.status for o in outcomes}
    return 1 if BROKEN in states else 2 if UNCHECKED in states else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=GUARDS, help="only this guard (may be repeated)")
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="CUDA kernels for two architectures of the five")
    parser.add_argument("--all", action="store_true", dest="everything", help="print every figure")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args(argv)
    known = sorted({op for guard in GUARDS for op in known_ops(guard)})
    for op in options.op or ():
        if op not in known:
            parser.error(f"--op: {op!r} is none of {', '.join(known)}")
    outcomes = []
    for guard in options.only or GUARDS:
        ops = [op for op in known_ops(guard) if not options.op or op in options.op]
        if not ops:
            continue
        if sys.stderr.isatty():
            print(f"{guard} ...", file=sys.stderr)
        begin = time.monotonic()
        run = {"cpu": cpu, "triton": triton, "cuda": cuda, "counters": counters}[guard]
        outcome = run(ops if guard != "counters" or options.op else [], options.jobs, options.quick)
        outcomes.append(dataclasses.replace(outcome, seconds=time.monotonic() - begin))
    if not outcomes:
        parser.error(f"no guard of {', '.join(options.only)} knows {', '.join(options.op)}")
    console = Console(highlight=False)
    show(outcomes, console if console.is_terminal else Console(highlight=False, width=180), options.everything)
    return code(outcomes)


if __name__ == "__main__":
    sys.exit(main())

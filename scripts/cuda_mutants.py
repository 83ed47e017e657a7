#!/usr/bin/env python
"""Deletes every barrier, wait and bounds check of csrc/cuda in turn and sees whether the tests notice.

    python scripts/cuda_mutants.py                     # all of them: hours on two cores
    python scripts/cuda_mutants.py --source norms.cu   # one file
    python scripts/cuda_mutants.py --list              # what would be changed
    python scripts/cuda_mutants.py --sample 5          # a few, chosen by --seed

A mutant is one place: a barrier or a cp.async commit or wait is removed; a comparison that guards an access is made to let
everything pass, a clamp is left out. It is caught where a test of an op that compiles the file fails: by a wrong answer, or by a
report of the SIMT machine. Mutants that change nothing (a guard that another one implies) survive rightly: the reason for each
stands in benchmarks/budgets/cuda_mutants.json and is kept when the file is written again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import random
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
CUDA = ROOT / "csrc" / "cuda"
FILE = ROOT / "benchmarks" / "budgets" / "cuda_mutants.json"
LIMIT = 600  # seconds for a mutant and a test file
FAR = "1073741824"  # no index reaches it
#: Kernel files whose tests have another name.
SHARED = {
    "attention_combine": "perceiver_attention",
    "attention_stats": "attention_backward",
    "varlen_attention_backward": "attention_backward",
}
FOLDERS = ("", "tile", "epilogue")  # ptx and mma are the instructions themselves: tests/simt checks those

STATEMENT = re.compile(
    r"\b(__syncthreads|__syncwarp|fence_device|cp_async_commit|cp_async_wait_group<[^;]*>|named_barrier\w*|mbarrier_wait\w*)"
    r"\([^;{}]*\);"
)
COMPARISON = re.compile(r"(?<=[\w)\]]) (<|<=|>|>=) (?=[\w(])")
CLAMP = re.compile(r"\b(min_of|max_of)\(")
LEAVES = re.compile(r"\)\s*(return|continue|break)\b")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: in ``file``, the text from ``begin`` to ``end`` becomes ``text``."""

    file: str
    line: int
    kind: str  # "barrier", "wait", "guard", "clamp"
    begin: int
    end: int
    text: str
    code: str  # the line it is in
    number: int  # which of the same kind in that line, counted over the file's equal lines

    @property
    def key(self) -> str:
        """A name that outlives changes elsewhere in the file."""
        return f"{self.file} | {self.kind} {self.number} | {self.code}"


# -- finding -----------------------------------------------------------------------------------------------------------


def mutants(file: Path, name: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    source = file.read_text()
    found: list[Mutant] = []
    seen: dict[tuple[str, str], int] = {}
    begin = 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        code = line.split("//")[0].rstrip()
        stripped = code.strip()
        for kind, first, last, text in _changes(code):
            count = seen[kind, stripped] = seen.get((kind, stripped), 0) + 1
            found.append(Mutant(name, number, kind, begin + first, begin + last, text, stripped, count))
        begin += len(line)
    return found


def _changes(code: str) -> list[tuple[str, int, int, str]]:
    """(kind, begin, end, replacement) in a line without its comment."""
    if re.match(r"\s*(#|static_assert|template\b|constexpr|static constexpr|for\b|using\b|VLMOPS_KERNEL)", code):
        return []
    if "if constexpr" in code or "static constexpr" in code or code.lstrip().startswith("VLMOPS_DEVICE_MEMBER"):
        return []
    found = [
        ("wait" if m[1].startswith(("cp_async", "mbarrier")) else "barrier", m.start(), m.end(), ";")
        for m in STATEMENT.finditer(code)
    ]
    leaves = LEAVES.search(code) is not None  # the guard is for leaving: deleted, nobody leaves
    for m in COMPARISON.finditer(code):
        passes = m[1].startswith("<") != leaves
        found.append(("guard", m.end(), m.end(), f"{FAR} + " if passes else f"-{FAR} + "))
    for m in CLAMP.finditer(code):
        inner = _arguments(code, m.end())
        if inner is not None and "kWarp" not in code[m.end() : inner[1]]:
            found.append(("clamp", m.start(), inner[1] + 1, f"({code[m.end() : inner[0]]})"))
    return sorted(found, key=lambda c: c[1:])


def _arguments(code: str, begin: int) -> tuple[int, int] | None:
    """Where the first argument of a call and the call end, if both are in this line."""
    depth, comma = 0, -1
    for i in range(begin, len(code)):
        if code[i] in "([{":
            depth += 1
        elif code[i] in ")]}":
            if depth == 0:
                return (comma, i) if comma >= 0 else None
            depth -= 1
        elif code[i] == "," and depth == 0 and comma < 0:
            comma = i
    return None


@functools.lru_cache(maxsize=1)
def includes() -> dict[str, set[str]]:
    """For each kernel file, the files it is compiled from."""

    def of(name: str, seen: set[str]) -> set[str]:
        if name in seen or not (CUDA / name).is_file():
            return seen
        seen.add(name)
        for found in re.findall(r'#include "([^"]+)"', (CUDA / name).read_text()):
            here = (CUDA / name).parent / found
            of(str((here if here.is_file() else CUDA / found).resolve().relative_to(CUDA)), seen)
        return seen

    return {p.name: of(p.name, set()) for p in sorted(CUDA.glob("*.cu"))}


def all_mutants(*only: str) -> list[Mutant]:
    """The mutants of every kernel file and of the headers the kernels share, or of some of them."""
    files = [p for folder in FOLDERS for p in sorted((CUDA / folder).glob("*.cu*"))]
    names = [(p, str(p.relative_to(CUDA))) for p in files]
    return [m for path, name in names if not only or name in only for m in mutants(path, name)]


def tests_of(file: str) -> list[str]:
    """The test files that compile it, those of fewer kernels first."""
    sources = [source for source, parts in includes().items() if file in parts]
    found: list[Path] = []
    for source in sorted(sources, key=lambda s: (s != file, (CUDA / s).stat().st_size)):
        stem = source.removesuffix(".cu")
        stem = SHARED.get(stem, stem)
        name = f"test_{stem}.py" if stem.endswith("_sm90") else f"test_{stem}_cuda*.py"
        found += sorted((ROOT / "tests" / "ops").glob(name))
    return [str(p.relative_to(ROOT)) for p in dict.fromkeys(found)]


# -- running -----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, pathlib
from vlmops.backends import build
build.csrc_dir = lambda: pathlib.Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=short", *sys.argv[2:]]))
"""


def run(mutant: Mutant | None, tests: Sequence[str], cache: str) -> dict[str, Any]:
    """Runs the tests on a copy of csrc with the change; None: without one.

    Args:
        mutant: the change.
        tests: test files.
        cache: folder for what is compiled. One for all mutants: its keys are the sources' contents.

    Returns:
        outcome "caught", "survived" or "invalid" (it does not compile), seconds, and what the tests said.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlmops-mutant-") as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        if mutant is not None:
            path = csrc / "cuda" / mutant.file
            source = path.read_text()
            path.write_text(source[: mutant.begin] + mutant.text + source[mutant.end :])
        environment = os.environ | {
            "VLMOPS_CACHE_DIR": cache, "VLMOPS_CUDA_EXECUTOR": "simt", "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis",
        }  # fmt: skip
        words, limit = [sys.executable, "-c", CHILD, str(csrc), *tests], LIMIT * len(tests)
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"outcome": "caught", "seconds": limit, "said": "it did not end"}
    said = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR", "E  "))]
    if done.returncode == 0:
        outcome = "survived"
    elif done.returncode != 1:  # 1: a test failed
        outcome, said = ("caught", ["the process died"]) if done.returncode < 0 else ("invalid", [done.stdout[-600:]])
    else:
        outcome = "invalid" if "BuildError" in done.stdout else "caught"
    return {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1), "said": " / ".join(said)[:300]}


def run_all(
    chosen: Sequence[Mutant], jobs: int, keep: Callable[[str, dict[str, Any]], None] = lambda key, row: None
) -> dict[str, dict[str, Any]]:
    """The outcome of each mutant by its key, with a line on stderr as each comes in.

    Args:
        chosen: the mutants.
        jobs: how many at a time.
        keep: called with each outcome as it comes in, so that a break loses nothing.

    Raises:
        RuntimeError: a test fails without any change.
    """
    found: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="vlmops-mutants-") as cache,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        files = sorted({test for m in chosen for test in tests_of(m.file)})
        for test, row in zip(files, pool.map(lambda t: run(None, [t], cache), files), strict=True):
            if row["outcome"] != "survived":
                raise RuntimeError(f"{test} fails without any change: {row['said']}")
        waiting = {pool.submit(run, m, tests_of(m.file), cache): m for m in chosen}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            mutant, row = waiting[future], future.result()
            found[mutant.key] = row
            keep(mutant.key, row)
            print(
                f"{done}/{len(chosen)} {row['outcome']:9}{row['seconds']:6} s  {mutant.key}",
                file=sys.stderr,
                flush=True,
            )
    return found


# -- keeping -----------------------------------------------------------------------------------------------------------


def summary(outcomes: dict[str, str]) -> str:
    """One line: how many of the mutants that compile were caught."""
    caught, survived = (sum(o == what for o in outcomes.values()) for what in ("caught", "survived"))
    share = 100 * caught / max(1, caught + survived)
    return f"{caught} of {caught + survived} mutants caught ({share:.1f}%), {survived} survived"


def write(stored: dict[str, Any]) -> None:
    """Writes the outcomes, and the reasons of those that survived."""
    outcomes = dict(sorted(stored["outcomes"].items()))
    reasons = {k: v for k, v in sorted(stored["reasons"].items()) if outcomes.get(k) == "survived"}
    FILE.write_text(json.dumps({"outcomes": outcomes, "reasons": reasons}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source",
        action="append",
        help="only this file of csrc/cuda, e.g. norms.cu or tile/gemm.cuh (may be repeated)",
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--sample", type=int, help="only so many, chosen at random; nothing is written")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--survivors", action="store_true", help="only those that survived last time")
    parser.add_argument(
        "--missing", action="store_true", help="only those the file has no outcome of: go on after a break"
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the outcomes as JSON")
    options = parser.parse_args()
    chosen = all_mutants(*options.source or ())
    stored: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"outcomes": {}, "reasons": {}}
    current = {m.key for m in all_mutants()}
    stored["outcomes"] = {k: v for k, v in stored["outcomes"].items() if k in current}
    if options.survivors:
        chosen = [m for m in chosen if stored["outcomes"].get(m.key) == "survived"]
    if options.missing:
        chosen = [m for m in chosen if m.key not in stored["outcomes"]]
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    if options.list:
        for m in chosen:
            print(f"{m.file}:{m.line} {m.kind} {m.number}: {m.code}")
        print(f"{len(chosen)} mutants")
        return 0

    def keep(key: str, row: dict[str, Any]) -> None:
        stored["outcomes"][key] = row["outcome"]
        if not options.sample:
            write(stored)

    found = run_all(chosen, options.jobs, keep)
    if options.as_json:
        print(json.dumps(found, indent=1))
    for key, row in found.items():
        if row["outcome"] != "caught" and key not in stored["reasons"]:
            print(f"{row['outcome']}: {key}\n    {row['said']}", file=sys.stderr)
    print(summary({key: row["outcome"] for key, row in found.items()}))
    if not options.sample:
        print(f"all so far: {summary(stored['outcomes'])}; wrote {FILE.relative_to(ROOT)}")
    return int(any(r["outcome"] == "survived" and k not in stored["reasons"] for k, r in found.items()))


if __name__ == "__main__":
    sys.exit(main())

"""Recorded runs read back: JSON of `vlmops bench`, of `pytest --benchmark --report`, of pytest-benchmark.

Every format becomes figures under one kind of key, so that what compares them knows no format. A figure is a ratio to a peer, or
a share of the peak, of one run; seconds stand in only where a run holds nothing else of a row.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["KNOWN", "Figure", "Recorded", "RunFileError", "read"]

KNOWN = (
    "vlmops bench --json FILE",
    "pytest --benchmark --report DIR (its report.json)",
    "pytest-benchmark's --benchmark-json FILE",
)
MAX_BYTES = 256 << 20
#: Facts in which two runs have to agree for their figures to be comparable, in the order in which they are told.
FACTS = (
    "machine", "cores", "native", "device", "threads", "dtypes", "quick", "full", "backend", "python", "torch", "transformers",
)  # fmt: skip


class RunFileError(ValueError):
    """A file that is no recorded run. The message names the file, what is wrong, and what can be read.

    Args:
        path: the file.
        reason: what is wrong.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Figure:
    """What a row of a run is compared by.

    Args:
        group: op or model, case and dtype.
        what: "vs torch", "share of G", ...; with the candidate in front where that is not plain ``vlmops``.
        value: the figure.
        higher: whether more is faster.
        low, high: the interval that the run recorded.
        numerator, denominator: one value a round, value = scale * median(numerator) / median(denominator).
        scale: constant factor.
        bound: "compute", "memory" or "" where the run does not say.
        raw: whether it holds the machine's speed: seconds, and not against anything of its run.
    """

    group: str
    what: str
    value: float
    higher: bool = True
    low: float | None = None
    high: float | None = None
    numerator: tuple[float, ...] = ()
    denominator: tuple[float, ...] = ()
    scale: float = 1.0
    bound: str = ""
    raw: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same row in another run."""
        return self.group, self.what


@dataclass
class Recorded:
    """A run.

    Args:
        path: its file.
        kind: of ``KNOWN``, in short.
        figures: by key, in the file's order.
        facts: machine, versions, options, as far as the file tells.
        commit: of the checkout; "" where the file does not tell.
        wrong: group (and candidate) -> what was wrong with an output.
        notes: what a reader has to know.
    """

    path: Path
    kind: str
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    wrong: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Keep a figure; the second of one name is left out, and said."""
        if figure.key in self.figures:
            self.notes.append(f"{figure.group}, {figure.what}: twice in the file, the first counts")
        else:
            self.figures[figure.key] = figure


def read(path: Path | str) -> Recorded:
    """A run from its file.

    Raises:
        RunFileError: not there, too large, no JSON, truncated, of another kind, or without a figure.
    """
    path = Path(path)
    data = _json(path)
    if isinstance(data, dict):
        if isinstance(data.get("benchmarks"), list):
            found = _of_pytest(path, data)
        elif isinstance(data.get("rows"), list) and "peak_gflops" in data:
            found = _of_bench(path, data)
        elif isinstance(data.get("rows"), list) and any(isinstance(r, dict) and "candidate" in r for r in data["rows"]):
            found = _of_report(path, data)
        else:
            raise RunFileError(path, f"no recorded run: expected the JSON of {', '.join(KNOWN)}")
        if not found.figures and not found.wrong:
            raise RunFileError(path, "a run without a single figure")
        return found
    raise RunFileError(path, f"no recorded run, but a JSON {type(data).__name__}: expected that of {', '.join(KNOWN)}")


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RunFileError(path, f"more than {MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise RunFileError(path, f"cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise RunFileError(path, "no text, let alone JSON") from err
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        end = "; the file ends in the middle" if text.strip() and err.pos >= len(text.rstrip()) - 1 else ""
        raise RunFileError(path, f"no JSON: {err.msg} in line {err.lineno}, column {err.colno}{end}") from err
    except ValueError as err:  # a number of thousands of digits
        raise RunFileError(path, f"no recorded run: {err}") from err
    except RecursionError as err:
        raise RunFileError(path, "no recorded run: nested too deeply") from err


# -- the values in a file ----------------------------------------------------------------------------------------------


class _Row:
    """A row of a file, whose values are checked when they are asked for."""

    def __init__(self, path: Path, where: str, values: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise RunFileError(path, f"{where}: expected an object, got {type(values).__name__}")
        self.values: Mapping[str, Any] = values

    def fail(self, name: str, expected: str) -> RunFileError:
        """What is wrong with a value."""
        return RunFileError(
            self.path, f"{self.where}: {name}: expected {expected}, got {_short(self.values.get(name))}"
        )

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        found = self.values.get(name, default)
        if found is None and default is not None:
            return default
        if not isinstance(found, str):
            raise self.fail(name, "a string")
        return _clean(found)

    def number(self, name: str) -> float | None:
        """A finite number; None where there is none."""
        found = self.values.get(name)
        if found is None:
            return None
        if not _finite(found):
            raise self.fail(name, "a finite number")
        return float(found)

    def numbers(self, name: str, positive: bool = False) -> tuple[float, ...]:
        """A list of finite numbers; empty where there is none."""
        found = self.values.get(name)
        if found is None:
            return ()
        if not isinstance(found, list) or not all(_finite(x) and (x > 0 or not positive) for x in found):
            raise self.fail(name, f"finite{', positive' if positive else ''} numbers")
        return tuple(map(float, found))

    def items(self, name: str) -> list[Any]:
        """A list; empty where there is none."""
        found = self.values.get(name) or []
        if not isinstance(found, list):
            raise self.fail(name, "a list")
        return found

    def part(self, name: str) -> _Row:
        """An object inside; an empty one where there is none."""
        return _Row(self.path, f"{self.where}, {name}", self.values.get(name) or {})


def _clean(text: str) -> str:
    """A name from a file, safe to print."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _finite(x: Any) -> bool:
    if isinstance(x, int):
        return not isinstance(x, bool) and abs(x) < 1 << 1000
    return isinstance(x, float) and math.isfinite(x)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _facts(**known: Any) -> dict[str, str]:
    """Facts in words; what is unknown is left out."""
    return {name: _clean(str(value)) for name, value in known.items() if value not in (None, "", [])}


def _names(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else ""


# -- vlmops bench ------------------------------------------------------------------------------------------------------


def _of_bench(path: Path, data: Mapping[str, Any]) -> Recorded:
    whole = _Row(path, "the file", data)
    machine, settings = whole.part("machine").values, whole.part("settings").values
    found = Recorded(path, "vlmops bench", commit=whole.text("commit", ""))
    found.facts = _facts(
        machine=machine.get("cpu"), cores=machine.get("cores"), native=data.get("native"), threads=data.get("threads"),
        dtypes=_names(settings.get("dtypes")), quick=settings.get("quick"), full=settings.get("full"),
        python=machine.get("python"), torch=machine.get("torch"), transformers=machine.get("transformers"),
        vlmops=machine.get("vlmops"),
    )  # fmt: skip
    for i, values in enumerate(data["rows"]):
        row = _Row(path, f"rows[{i}]", values)
        group = _group(row.text("group"), row.text("case"), row.text("dtype", ""))
        value = row.number("measured")
        if row.values.get("wrong"):
            found.wrong[group] = row.text("note", "")
        elif value is not None:
            metric = row.text("metric")
            bound = row.text("bound", "") or ("compute" if row.number("gflops") else "")
            found.add(
                Figure(
                    group, metric, value, bool(row.values.get("higher", True)), row.number("low"), row.number("high"),
                    row.numbers("numerator"), row.numbers("denominator"), row.number("scale") or 1.0, bound,
                    metric.startswith("us"),
                )
            )  # fmt: skip
    return found


def _group(what: str, case: str, dtype: str) -> str:
    return f"{what}: {case}{', ' if dtype else ''}{dtype}"


# -- the suites of pytest --benchmark ----------------------------------------------------------------------------------


def _of_report(path: Path, data: Mapping[str, Any]) -> Recorded:
    whole = _Row(path, "the file", data)
    machine, settings, versions = (whole.part(name).values for name in ("machine", "settings", "versions"))
    found = Recorded(path, "report.json of pytest --benchmark", commit=whole.text("commit", ""))
    found.facts = _facts(
        machine=machine.get("cpu"), cores=machine.get("cores"), native=data.get("native"), device=settings.get("device"),
        threads=settings.get("threads"), dtypes=_names(settings.get("dtypes")), quick=settings.get("quick"),
        backend=settings.get("backend"), python=machine.get("python"),
    ) | _facts(**{name: version for name, version in versions.items() if name != "pytest-benchmark"})  # fmt: skip
    rows = [_Row(path, f"rows[{i}]", values) for i, values in enumerate(data["rows"])]
    _suite(found, [(row, row.text("group"), row.numbers("seconds", positive=True)) for row in rows])
    for i, values in enumerate(whole.items("failed")):
        row = _Row(path, f"failed[{i}]", values)
        found.wrong[f"{row.text('group')}, {row.text('candidate', '')}"] = row.text("reason", "")
    return found


def _of_pytest(path: Path, data: Mapping[str, Any]) -> Recorded:
    whole = _Row(path, "the file", data)
    info, commit = whole.part("machine_info").values, whole.part("commit_info").values
    cpu = info.get("cpu") if isinstance(info.get("cpu"), dict) else {}
    dirty = "-dirty" if commit.get("dirty") else ""
    found = Recorded(
        path, "pytest-benchmark", commit=f"{commit['id'][:12]}{dirty}" if isinstance(commit.get("id"), str) else ""
    )
    found.facts = _facts(
        machine=cpu.get("brand_raw") or info.get("machine"), cores=cpu.get("count"), python=info.get("python_version")
    )
    rows = []
    for i, values in enumerate(data["benchmarks"]):
        benchmark = _Row(path, f"benchmarks[{i}]", values)
        extra, stats = benchmark.part("extra_info"), benchmark.part("stats")
        seconds = stats.numbers("data", positive=True)
        if not seconds:  # saved without --benchmark-save-data
            median = stats.number("median")
            if median is None or median <= 0:
                raise RunFileError(path, f"benchmarks[{i}], stats: neither data nor a median above 0")
            seconds = (median,)
        name = benchmark.text("name")
        if isinstance(extra.values.get("candidate"), str):
            rows.append((extra, extra.text("group"), seconds))
        else:  # somebody else's suite: each test is a row of its own
            rows.append((benchmark, benchmark.text("fullname", name), seconds))
    found.facts |= _facts(dtypes=_names(list({row.text("dtype") for row, _, _ in rows if "dtype" in row.values})))
    _suite(found, rows)
    return found


def _suite(found: Recorded, rows: Sequence[tuple[_Row, str, tuple[float, ...]]]) -> None:
    """Figures of candidates that were timed in the rounds of their group: ours against each peer."""
    groups: dict[str, dict[str, tuple[_Row, tuple[float, ...]]]] = {}
    for row, group, seconds in rows:
        groups.setdefault(group, {}).setdefault(row.text("candidate", "seconds"), (row, seconds))
    for group, candidates in groups.items():
        ours = [name for name in candidates if name == "vlmops" or name.startswith("vlmops.")] or list(candidates)
        for name in ours:
            row, seconds = candidates[name]
            prefix = "" if name in ("vlmops", "seconds") else f"{name} "
            bound = row.text("bound", "")
            peers = row.part("peers").values if row.values.get("peers") else {}
            for peer in peers:
                ratio = _Row(row.path, f"{row.where}, peers, {peer}", peers[peer])
                value = ratio.number("ratio")
                if value is None:
                    raise ratio.fail("ratio", "a number")
                theirs = candidates[peer][1] if peer in candidates else ()
                paired = len(theirs) == len(seconds) > 1
                found.add(
                    Figure(
                        group, f"{prefix}vs {_clean(peer)}", value, True, ratio.number("low"), ratio.number("high"),
                        theirs if paired else (), seconds if paired else (), bound=bound,
                    )
                )  # fmt: skip
            if peers or not seconds:
                continue
            share = row.number("share_of_peak")
            if share:
                found.add(Figure(group, f"{prefix}share of the peak", share, bound=bound))
                continue
            found.add(
                Figure(
                    group,
                    f"{prefix}seconds",
                    statistics.median(seconds),
                    False,
                    numerator=seconds,
                    denominator=(1.0,) * len(seconds),
                    bound=bound,
                    raw=True,
                )
            )

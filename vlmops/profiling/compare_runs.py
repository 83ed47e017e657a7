"""Two recorded runs against each other: which rows are slower, which only look so.

A row's change is that of its ratio (to a peer, or to the peak) from one run to the other: what the machine did to both sides of a
ratio cancels inside its run. Where both files hold rounds, a change is that of the median of the rounds' own ratios, so that a
drift from round to round cancels too, and its interval a bootstrap over the rounds of both runs; else the recorded intervals are
joined.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vlmops.profiling.run_files import FACTS, Figure, Recorded

__all__ = ["REPEATABLE", "Change", "Comparison", "as_dict", "compare", "repeatability", "show"]

TOLERANCE = 0.05
RESAMPLES = 4000
LEAST_ROUNDS = 5  # of a bootstrap
#: Two runs of one commit: medians of this share of the compute-bound rows differ by at most this much.
REPEATABLE, REPEAT_WITHIN = 0.90, 0.10
VERDICTS = ("slower", "faster", "unclear", "same")
STYLES = {"slower": "bold red", "faster": "green", "unclear": "yellow", "same": ""}


@dataclass(frozen=True)
class Change:
    """One row in both runs.

    Args:
        group, what, bound: of the figure.
        a, b: the figure in each run.
        speed: how many times as fast B is, by this figure: below 1 is slower; None where a figure is not above 0.
        low, high: its 95% interval; None without one.
        basis: what the interval is from: "rounds", "intervals" or "nothing".
        verdict: "slower", "faster", "same" or "unclear".
        note: what else there is to say.
    """

    group: str
    what: str
    bound: str
    a: float
    b: float
    speed: float | None
    low: float | None
    high: float | None
    basis: str
    verdict: str
    note: str = ""

    @property
    def differs_by(self) -> float:
        """The change either way, 0.1 for 10%."""
        return math.inf if self.speed is None else max(self.speed, 1 / self.speed) - 1


@dataclass
class Comparison:
    """Two runs.

    Args:
        a, b: the runs, the older first.
        tolerance: a change within it does not matter, 0.05 for 5%.
        rows: in both, in A's order.
        only_a, only_b: (group, what) of rows that only one has.
        different: fact -> its value in A and in B, where they differ.
        newly_wrong: group (and candidate) -> what is wrong with an output in B and was not in A.
    """

    a: Recorded
    b: Recorded
    tolerance: float
    rows: list[Change] = field(default_factory=list)
    only_a: list[tuple[str, str]] = field(default_factory=list)
    only_b: list[tuple[str, str]] = field(default_factory=list)
    different: dict[str, tuple[str, str]] = field(default_factory=dict)
    newly_wrong: dict[str, str] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """Rows of a verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def regressed(self) -> bool:
        """Whether a row is slower, or an output became wrong."""
        return bool(self.count("slower") or self.newly_wrong)


def compare(a: Recorded, b: Recorded, tolerance: float = TOLERANCE) -> Comparison:
    """Every row of two runs.

    Args:
        a, b: the runs, the older first.
        tolerance: a change within it does not matter. A row is slower if its whole interval lies beyond it, the same if its
            whole interval lies within, else unclear.

    Raises:
        ValueError: a tolerance that is no share.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a share from 0 to below 1, got {tolerance}")
    found = Comparison(a, b, tolerance, different=_different(a, b))
    elsewhere = "machine" in found.different or "threads" in found.different
    for key, figure in a.figures.items():
        if key in b.figures:
            found.rows.append(_change(figure, b.figures[key], tolerance, elsewhere))
        else:
            found.only_a.append(key)
    found.only_b = [key for key in b.figures if key not in a.figures]
    found.newly_wrong = {group: why for group, why in b.wrong.items() if group not in a.wrong}
    return found


def _different(a: Recorded, b: Recorded) -> dict[str, tuple[str, str]]:
    names = [name for name in (*FACTS, *sorted({*a.facts} - {*FACTS})) if name in a.facts and name in b.facts]
    return {name: (a.facts[name], b.facts[name]) for name in names if a.facts[name] != b.facts[name]}


# -- one row -----------------------------------------------------------------------------------------------------------


def _change(a: Figure, b: Figure, tolerance: float, elsewhere: bool) -> Change:
    notes = []
    if a.raw:
        notes.append("seconds, not against anything of the same run: how fast the machine was is in it")
    if a.value <= 0 or b.value <= 0:
        notes.append("a figure that is not above 0 has no ratio")
        return Change(
            a.group, a.what, a.bound, a.value, b.value, None, None, None, "nothing", "unclear", "; ".join(notes)
        )
    sign = 1 if a.higher else -1
    basis, logs, middle = _interval(a, b)
    speed = math.exp(sign * middle)
    if logs is None:
        notes.append("one figure of each run, no interval")
        low = high = None
        same = abs(math.log(speed)) <= math.log1p(tolerance)
        verdict = "same" if same else "unclear"
    else:
        low, high = sorted(math.exp(sign * x) for x in logs)
        verdict = _verdict(low, high, tolerance)
        if verdict == "unclear" and (high < 1 or low > 1):
            notes.append(f"{'slower' if high < 1 else 'faster'}, by less or by more than the tolerance")
    if a.raw and elsewhere and verdict != "unclear":
        verdict = "unclear"
        notes.append("another machine")
    return Change(
        a.group, a.what, a.bound or b.bound, a.value, b.value, speed, low, high, basis, verdict, "; ".join(notes)
    )  # fmt: skip


def _verdict(low: float, high: float, tolerance: float) -> str:
    if high < 1 / (1 + tolerance):
        return "slower"
    if low > 1 + tolerance:
        return "faster"
    return "same" if 1 / (1 + tolerance) <= low and high <= 1 + tolerance else "unclear"


def _interval(a: Figure, b: Figure) -> tuple[str, tuple[float, float] | None, float]:
    """What the change b / a is known from, the logarithms of its interval's ends, and its own."""
    if _has_rounds(a) and _has_rounds(b):
        both = _resampled(b, seed=2) - _resampled(a, seed=1)
        low, high = (float(x) for x in np.quantile(both, (0.025, 0.975)))
        scale = math.log(b.scale / a.scale)
        middle = scale + float(np.median(_ratios(b)) - np.median(_ratios(a)))
        return "rounds", (min(scale + low, middle), max(scale + high, middle)), middle
    middle = math.log(b.value / a.value)
    spread_a, spread_b = _distances(a), _distances(b)
    if spread_a is None or spread_b is None:
        return "nothing", None, middle
    # MOVER (Zou and Donner, 2008): distances of independent estimates to the ends of their intervals add up as squares.
    low, high = math.hypot(spread_b[0], spread_a[1]), math.hypot(spread_b[1], spread_a[0])
    return "intervals", (middle - low, middle + high), middle


def _has_rounds(figure: Figure) -> bool:
    rounds = len(figure.numerator)
    if rounds < LEAST_ROUNDS or rounds != len(figure.denominator) or figure.scale <= 0:
        return False
    return min(*figure.numerator, *figure.denominator) > 0


def _ratios(figure: Figure) -> np.ndarray:
    """Logarithm of each round's ratio, without the scale."""
    return np.log(figure.numerator) - np.log(figure.denominator)


def _resampled(figure: Figure, seed: int) -> np.ndarray:
    """Their median in resampled runs."""
    ratios = _ratios(figure)
    pick = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    return np.median(ratios[pick], axis=1)


def _distances(figure: Figure) -> tuple[float, float] | None:
    """From the logarithm of a figure to those of its interval's ends: as recorded, or from its rounds."""
    if figure.low is not None and figure.high is not None and 0 < figure.low <= figure.value <= figure.high:
        return math.log(figure.value / figure.low), math.log(figure.high / figure.value)
    if not _has_rounds(figure):
        return None
    low, middle, high = (float(x) for x in np.quantile(_resampled(figure, seed=1), (0.025, 0.5, 0.975)))
    return middle - low, high - middle


# -- repeatability -----------------------------------------------------------------------------------------------------


def repeatability(found: Comparison) -> dict[str, Any]:
    """How far two runs of the same code agree.

    Returns:
        ``rows``: compute-bound rows; ``within``: the share of them whose figures differ by at most ``REPEAT_WITHIN``; ``bar``,
        ``met`` (None without such a row), ``beyond``: the others; ``not_compute``: memory-bound rows and those of unknown kind.
    """
    rows = [row for row in found.rows if row.bound == "compute"]
    beyond = [row for row in rows if not row.differs_by <= REPEAT_WITHIN]
    share = 1 - len(beyond) / len(rows) if rows else None
    return {
        "rows": len(rows), "within": share, "limit": REPEAT_WITHIN, "bar": REPEATABLE,
        "met": None if share is None else share >= REPEATABLE,
        "median_difference": statistics.median(row.differs_by for row in rows) if rows else None,
        "beyond": [dataclasses.asdict(row) for row in beyond],
        "not_compute": [dataclasses.asdict(row) for row in found.rows if row.bound != "compute"],
    }  # fmt: skip


# -- telling -----------------------------------------------------------------------------------------------------------


def _run(run: Recorded) -> dict[str, Any]:
    return {"path": str(run.path), "kind": run.kind, "commit": run.commit, "facts": run.facts, "notes": run.notes}


def as_dict(found: Comparison, repeat: bool = False) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    pairs = {name: [list(key) for key in keys] for name, keys in (("only_a", found.only_a), ("only_b", found.only_b))}
    return {
        "kind": "vlmops bench compare", "a": _run(found.a), "b": _run(found.b), "tolerance": found.tolerance,
        "different": {name: list(values) for name, values in found.different.items()},
        "rows": [dataclasses.asdict(row) for row in found.rows], **pairs, "newly_wrong": found.newly_wrong,
        **{verdict: found.count(verdict) for verdict in VERDICTS},
        **({"repeatability": repeatability(found)} if repeat else {}),
    }  # fmt: skip


def _percent(speed: float) -> str:
    return f"{speed - 1:+.1%}"


def _interval_text(row: Change) -> str:
    return "" if row.low is None or row.high is None else f"[{_percent(row.low)}, {_percent(row.high)}]"


def _table(title: str, rows: Sequence[Change]) -> Table:
    table = Table(title=title)
    for name in ("row", "by", "bound"):
        table.add_column(name, overflow="fold")
    for name in ("A", "B", "speed", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        speed = "" if row.speed is None else _percent(row.speed)
        cells = (row.group, row.what, row.bound, f"{row.a:.4g}", f"{row.b:.4g}", speed, _interval_text(row))
        table.add_row(*map(Text, cells), Text(row.verdict, style=STYLES[row.verdict]), Text(row.note))
    return table


def show(found: Comparison, console: Console, repeat: bool = False) -> None:
    """Print what was compared, what differs, the rows, those of one run only, and the count."""
    for name, run in (("A", found.a), ("B", found.b)):
        commit = f", commit {run.commit}" if run.commit else ""
        console.print(f"{name}: {run.path} ({run.kind}{commit})", markup=False, soft_wrap=True)
    different = dict(found.different)
    if repeat and found.a.commit != found.b.commit:
        different["commit"] = (found.a.commit or "not told", found.b.commit or "not told")
    if different:
        lines = [f"{name}: {a}  |  {b}" for name, (a, b) in different.items()]
        told = "THESE RUNS ARE NOT OF THE SAME CONDITIONS (A | B). What follows may come from that.\n"
        console.print(Panel(Text(told + "\n".join(lines)), style="bold red"))
    order = sorted(found.rows, key=lambda row: VERDICTS.index(row.verdict))
    if found.rows:
        console.print(_table(f"B against A, changes within {found.tolerance:.0%} do not matter", order))
    for name, keys in (("A", found.only_a), ("B", found.only_b)):
        for group, what in keys:
            console.print(f"only in {name}: {group}, {what}", markup=False, soft_wrap=True)
    for group, why in found.newly_wrong.items():
        console.print(f"WRONG OUTPUT in B: {group}: {why}", style="bold red", markup=False, soft_wrap=True)
    for run in (found.a, found.b):
        for note in run.notes:
            console.print(f"{run.path.name}: {note}", markup=False, soft_wrap=True)
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)
    console.print(
        f"rows in both: {len(found.rows)}, {counts}; {len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )
    if repeat:
        _show_repeatability(found, console)


def _show_repeatability(found: Comparison, console: Console) -> None:
    data = repeatability(found)
    others = [row for row in found.rows if row.bound != "compute"]
    if others:
        console.print(_table("not compute-bound: no bar, the interval says what they are worth", others))
    if data["within"] is None:
        console.print("repeatability: no compute-bound row in both runs")
        return
    beyond = {(row["group"], row["what"]) for row in data["beyond"]}
    for row in found.rows:
        if (row.group, row.what) in beyond:
            console.print(f"differs by {row.differs_by:.0%}: {row.group}, {row.what}", markup=False, soft_wrap=True)
    console.print(
        f"repeatability: {data['within']:.0%} of {data['rows']} compute-bound rows differ by at most "
        f"{data['limit']:.0%} (bar {data['bar']:.0%}): {'met' if data['met'] else 'MISSED'}; "
        f"median difference {data['median_difference']:.1%}"
    )

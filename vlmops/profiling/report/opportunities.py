"""What could be faster, in words: each from a figure of the profile, ordered by the time at stake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmops.profiling.report.data import Profile, Row, Run, grouped, pattern

__all__ = ["MOST", "Opportunity", "find"]

MOST = 10
LEAST = 0.01  # share of a step below which nothing is said
ROOF = 0.5  # share of the roofline below which an op is called far from it
MOVES = ("aten::copy_", "aten::cat")  # in which contiguous, clone, to, reshape, stack and repeat end
MOVING = (*MOVES, "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy", "aten::reshape", "aten::flatten",
          "aten::stack", "aten::repeat")  # fmt: skip
#: Stage -> what makes it shorter, whichever op it spends its time in.
ADVICE = {
    "preprocess": "vlmops.images makes patches straight from uint8 pixels; or prepare images in a worker process",
    "vision": "smaller images or fewer tiles give fewer tokens (this changes the model's input)",
    "connector": "check that patch_report lists it as patched",
    "prefill": "fewer image tokens shorten the prompt (this changes the model's input); a prefix cache helps repeated prompts",
    "decode": "a step reads every weight once: 16-bit or quantised weights, or more sequences a batch, lower its cost a token",
}


@dataclass(frozen=True)
class Opportunity:
    """One finding.

    Attributes:
        kind: "roofline", "not patched", "slower", "python", "copies", "op", "stage", "idle", "memory".
        what: the fact, with its figure.
        todo: what to do about it.
        seconds: a step at most to be won; 0 where it is not about time.
    """

    kind: str
    what: str
    todo: str
    seconds: float = 0.0


def milliseconds(seconds: float) -> str:
    """ "12.3 ms"."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def find(profile: Profile) -> list[Opportunity]:
    """At most ``MOST`` findings about the patched run (the stock one where there is no other), by time at stake."""
    run = profile.last
    found = [
        *_roofline(profile, run), *_unpatched(profile, run), *_slower(profile), *_python(run), *_copies(run),
        *_plain_ops(profile, run), *_idle(run),
    ]  # fmt: skip
    found = [o for o in found if o.seconds >= LEAST * run.seconds]
    found.sort(key=lambda o: -o.seconds)
    context = [*_stage(profile, run), *_memory(run)]
    return [*found[: MOST - len(context)], *context]


def _part(seconds: float, run: Run) -> str:
    return f"{milliseconds(seconds)} a step ({seconds / run.seconds:.1%})"


def _roofline(profile: Profile, run: Run) -> Iterator[Opportunity]:
    """vlmops ops far from the roof."""
    for dot in run.dots:
        share, took = dot.share(profile.peaks), dot.calls * dot.seconds
        if dot.kind != "op" or share >= ROOF:
            continue
        bound = "memory" if dot.bytes / profile.peaks.bandwidth > dot.flops / profile.peaks.flops else "arithmetic"
        op, _, backend = dot.name.partition(" ")
        yield Opportunity(
            "roofline",
            f"{op} on backend {backend} ({dot.detail}) runs at {share:.0%} of the {bound} roof: {_part(took, run)}, "
            f"{milliseconds(dot.calls * dot.least(profile.peaks))} at the measured peak",
            f"compare backends on this shape (`vlmops tune`, `vlmops bench --op {op}`); on a loaded machine repeat first",
            took * (1 - share),
        )  # fmt: skip


def _unpatched(profile: Profile, run: Run) -> Iterator[Opportunity]:
    """Modules that patching left alone, with its reason."""
    times = {row.name: row.seconds for row in run.modules}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in profile.patch:
        if row["status"] != "patched" and row["why"]:
            groups.setdefault((row["cls"], row["operation"], row["why"]), []).append(row["module"])
    for (cls, operation, why), paths in groups.items():
        seconds = sum(times.get(path, 0.0) for path in paths)
        where = ", ".join(sorted({pattern(path) or "the model itself" for path in paths})[:3])
        many = f"{len(paths)} modules of class {cls}" if len(paths) > 1 else f"one {cls}"
        yield Opportunity(
            "not patched",
            f"{many} ({where}) ran unpatched for {_part(seconds, run)}; {operation or 'an op'} would replace it, but: {why}",
            "remove the reason if you can; patch_report(model) lists every module",
            seconds,
        )  # fmt: skip


def _slower(profile: Profile) -> Iterator[Opportunity]:
    """Modules that got slower by patching."""
    if len(profile.runs) < 2:
        return
    stock, patched = profile.runs.values()
    before = {row.name: row for row in grouped(stock.modules)}
    replaced = {pattern(row["module"]): row for row in profile.patch if row["status"] == "patched"}
    for row in grouped(patched.modules):
        was = before.get(row.name)
        if row.name in replaced and was is not None and row.seconds > 1.1 * was.seconds:
            yield Opportunity(
                "slower",
                f"{row.name} took {milliseconds(row.seconds)} a step patched and {milliseconds(was.seconds)} stock",
                f"repeat on a quiet machine; if it stays, `vlmops tune`, or leave {replaced[row.name]['operation']} out of ops=",
                row.seconds - was.seconds,
            )  # fmt: skip


def _python(run: Run) -> Iterator[Opportunity]:
    """Python between ops: by the kind of module, and outside all."""
    rows = grouped(Row("python", p.name, seconds=p.seconds) for p in run.pieces if p.kind == "python")
    for row in rows:
        yield Opportunity(
            "python",
            f"Python between the ops of {row.name} takes {_part(row.seconds, run)}, the profiler's own cost included",
            "torch.compile the module, capture a CUDA graph, or give it more work a call",
            row.seconds,
        )  # fmt: skip
    for stage in dict.fromkeys(p.stage for p in run.pieces):
        seconds = sum(p.seconds for p in run.pieces if p.kind == "unnamed" and p.stage == stage)
        todo = ADVICE.get(stage) if stage == "preprocess" else None
        yield Opportunity(
            "python",
            f"{_part(seconds, run)} of stage {stage} lie outside any op and module: the caller's Python, generate's loop, hooks",
            todo or "see the gaps in the trace file; more work a call makes them matter less",
            seconds,
        )  # fmt: skip


def _copies(run: Run) -> Iterator[Opportunity]:
    """Data that is only moved, by whichever op."""
    rows = [row for row in run.inner if row.name in MOVES]
    seconds = sum(row.own for row in rows)
    if rows:
        counts = ", ".join(f"{sum(r.calls for r in rows if r.name == n):.0f} {n}" for n in MOVES)
        homes: dict[str, float] = {}
        for row in rows:
            home = row.detail or "no module"
            homes[home] = homes.get(home, 0.0) + row.own
        top = sorted(homes.items(), key=lambda item: -item[1])[:2]
        where = " and ".join(f"{home} ({milliseconds(took)})" for home, took in top)
        yield Opportunity(
            "copies",
            f"copies, casts and concatenations ({counts} a step) take {_part(seconds, run)}, most in {where}",
            "keep tensors contiguous and in one dtype; the trace file shows who asks for each copy",
            seconds,
        )  # fmt: skip


def _plain_ops(profile: Profile, run: Run) -> Iterator[Opportunity]:
    """PyTorch ops that no vlmops op covers, by the kind of module they run in; those of ``_unpatched`` are said there."""
    said = {pattern(row["module"]) for row in profile.patch if row["status"] != "patched" and row["why"]}
    places: dict[tuple[str, str], float] = {}
    for piece in run.pieces:
        if piece.kind == "stock" and piece.name not in MOVING and pattern(piece.module) not in said:
            key = (piece.name, pattern(piece.module))
            places[key] = places.get(key, 0.0) + piece.seconds
    patched = {pattern(row["module"]) for row in profile.patch if row["status"] == "patched"}
    for (name, module), seconds in places.items():
        if run.name == "stock":
            todo = "profile with patching: vlmops.patch_model(model) may replace it"
        elif module in patched:
            todo = "its module is patched, and its original forward was chosen here: `vlmops tune` measures again"
        else:
            todo = "no vlmops op covers it: torch.compile may fuse it with its neighbours"
        yield Opportunity(
            "op",
            f"{name} in {module or 'no module'} is plain PyTorch and takes {_part(seconds, run)}",
            todo,
            seconds,
        )


def _idle(run: Run) -> Iterator[Opportunity]:
    """A GPU that waits."""
    if run.kernels and run.kernels < run.seconds:
        idle = run.seconds - run.kernels
        yield Opportunity(
            "idle",
            f"the GPU's kernels take {milliseconds(run.kernels)} of a step of {milliseconds(run.seconds)}",
            "the processor cannot launch fast enough, or waits: CUDA graphs, torch.compile, fewer device-to-host copies",
            idle,
        )  # fmt: skip


def _stage(profile: Profile, run: Run) -> Iterator[Opportunity]:
    """The stage that rules, against stock where that ran."""
    if not run.stages:
        return
    top = max(run.stages, key=lambda row: row.own)
    text = f"stage {top.name} is {top.own / run.seconds:.0%} of a step: {milliseconds(top.own)}"
    if run.name != "stock":
        was = sum(row.own for row in profile.runs["stock"].stages if row.name == top.name)
        text += f", {milliseconds(was)} in the stock model"
    yield Opportunity("stage", text, ADVICE.get(top.name, "its rows in the tables above say where it goes"))


def _memory(run: Run) -> Iterator[Opportunity]:
    """Where allocated memory is highest."""
    if run.memory.peak:
        yield Opportunity(
            "memory",
            f"allocated memory grows by {run.memory.peak / 2**20:.1f} MiB within a step, highest in {run.memory.where}",
            "fewer images or tokens a call, or that op's work in parts, lowers the peak",
        )  # fmt: skip

"""What was patched, with which kernel, what was not, and why."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict, dataclass, field

from torch import nn

from vlmops.ops._shared.packing import packed_bytes
from vlmops.patch.base import KEY, Record
from vlmops.patch.classes import original_class

__all__ = ["PatchReport", "PatchRow", "patch_report", "remember"]


@dataclass
class PatchRow:
    """One module.

    Attributes:
        module: path in the model.
        cls: its class.
        operation: the op that runs in its place.
        backend: forced backend, or "auto" and what was chosen so far.
        status: "patched", "skipped", "would patch" (dry run) or "undone".
        why: the reason, where it is not patched.
        error: largest relative difference seen by ``verify``.
    """

    module: str
    cls: str
    operation: str
    backend: str
    status: str
    why: str = ""
    error: float | None = None


@dataclass
class PatchReport:
    """All rows of a model, and notes about the whole."""

    rows: list[PatchRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    packed_bytes: int = 0

    def to_json(self) -> str:
        """Everything, for scripts."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            key = (row.cls, row.operation, row.backend, row.status, row.why)
            groups[key] = groups.get(key, 0) + 1
        table = [("modules", "class", "operation", "backend", "status")]
        table += [
            (str(n), cls, op, backend, f"{status}: {why}" if why else status)
            for (cls, op, backend, status, why), n in groups.items()
        ]
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]).rstrip()
            for line in table
        ]
        if len(table) == 1:
            lines = ["nothing to patch was found"] if not self.notes else []
        if self.packed_bytes:
            lines.append(f"packed weights: {self.packed_bytes / 2**20:.1f} MiB")
        return "\n".join([*lines, *self.notes])


_kept: weakref.WeakKeyDictionary[nn.Module, PatchReport] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: PatchReport) -> None:
    """Keep what ``patch_model`` found, for ``patch_report``."""
    _kept[model] = report


def chosen(record: Record) -> str:
    """Backends that measuring has picked for this module so far, e.g. "cpu" or "cpu, original"."""
    return ", ".join(sorted(set(record.chosen.values())))


def patch_report(model: nn.Module) -> PatchReport:
    """What ``patch_model`` did to this model; ``str()`` is a table, ``.rows`` one entry a module.

    The backend column shows what measuring has picked so far: run the model once to fill it.
    """
    kept = _kept.get(model)
    if kept is None:
        kept = PatchReport(notes=["this model was not patched"])
        for path, module in model.named_modules():  # a deepcopy or an unpickled one
            if original_class(module) is not None:
                record = module.__dict__[KEY]
                kept.rows.append(PatchRow(path, type(module).__name__, record.operation, record.backend, "patched"))
        if kept.rows:
            kept.notes = []
            _kept[model] = kept
    modules = dict(model.named_modules())
    for row in kept.rows:
        module = modules.get(row.module)
        record = module.__dict__.get(KEY) if module is not None else None
        if record is None:
            if row.status == "patched":  # a part of the model was unpatched or replaced on its own
                row.status, row.why = "skipped", "unpatched or replaced since"
            continue
        row.error = record.error
        if record.status != "patched":
            row.status, row.why = "undone", record.status.removeprefix("undone: ")
        picked = chosen(record) if record.backend == "auto" else ""
        row.backend = f"auto ({picked})" if picked else record.backend
    kept.packed_bytes = packed_bytes(model)
    return kept

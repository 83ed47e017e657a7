"""patch_model, unpatch_model, patched: the calls a user makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from vlmops.backends import BACKENDS
from vlmops.ops._shared.packing import repack
from vlmops.patch import attention, layers, towers
from vlmops.patch.base import KEY, least_elements
from vlmops.patch.classes import MIXINS, original_class, patched_class
from vlmops.patch.find import KIND_TO_OP, OPERATIONS, Candidate, find
from vlmops.patch.progress import progress
from vlmops.patch.report import PatchReport, PatchRow, patch_report, remember

__all__ = ["patch_model", "patched", "unpatch_model"]

MIXINS.update({**layers.KINDS, **attention.KINDS})

Model = TypeVar("Model", bound=nn.Module)
SUPPORTED = ((5, 19), (6, 0))


def check_transformers() -> None:
    """RuntimeError unless transformers is of a supported version."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        low, high = (".".join(map(str, v)) for v in SUPPORTED)
        raise RuntimeError(f"vlmops patches transformers >= {low}, < {high}; this is {transformers.__version__}")


def check_module(model: object) -> None:
    """TypeError unless a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def wanted_ops(ops: str | Iterable[str]) -> set[str]:
    """The operations to patch; ValueError for a name that is none."""
    if ops == "all":
        return set(OPERATIONS)
    names = {ops} if isinstance(ops, str) else set(ops)
    unknown = names - set(OPERATIONS)
    if unknown:
        raise ValueError(f"ops: expected 'all' or some of {', '.join(OPERATIONS)}, got {', '.join(sorted(unknown))}")
    return names


def patch_model(
    model: Model,
    *,
    ops: str | Iterable[str] = "all",
    backend: str = "auto",
    verify: bool | Mapping[str, Any] = False,
    dry_run: bool = False,
    skip_unused_layers: bool = False,
) -> Model:
    """Make a model's slow parts run on vlmops' kernels, in place. Patching twice is patching once.

    Args:
        model: any ``nn.Module``; Hugging Face VLMs gain most.
        ops: "all", or which of "linear", "mlp", "norms", "patchify", "varlen_attention".
        backend: "auto" measures and picks; or force one for every replaced module.
        verify: a dict runs ``model(**verify)`` now and compares each replacement with the original on the real
            activations; True does so at the first call. A replacement out of tolerance is undone and reported.
        dry_run: change nothing, only fill ``patch_report``.
        skip_unused_layers: do not run the last layers of a LLaVA tower that its ``vision_feature_layer`` never
            reads. The answers stay; the tower's own last hidden state does not. Off by default for that.

    Returns:
        The same model object.

    Raises:
        TypeError: not a module. ValueError: unknown op or backend. RuntimeError: unsupported transformers version.

    With ``VLMOPS_DISABLE=1`` nothing is changed and the report says so.
    """
    check_module(model)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    names = wanted_ops(ops)
    known = [row for row in patch_report(model).rows if row.status in ("patched", "undone")]
    if os.environ.get("VLMOPS_DISABLE", "") not in ("", "0"):  # before the version check: a way out of its error
        remember(model, PatchReport(rows=known, notes=["VLMOPS_DISABLE is set: nothing was changed"]))
        return model
    check_transformers()
    undone = {row.module for row in known if row.status == "undone"}  # and stays so until unpatch_model
    if not dry_run:
        _ask_again(model, names, backend, bool(verify))
    rows = [
        _replace(found, backend, bool(verify), dry_run)
        for found in progress("looking for slow parts", lambda: list(find(model, names)))
        if found.path not in undone
    ]
    if skip_unused_layers:
        rows += _skip_layers(model, dry_run)
    if not dry_run:
        towers.give_private_config(model)
    remember(model, PatchReport(rows=known + rows))
    if isinstance(verify, Mapping) and not dry_run:
        with torch.no_grad():
            progress(f"comparing {len(known + rows)} modules with their originals", model, **verify)
        _undo_failed(model)
    return model


def _ask_again(model: nn.Module, names: set[str], backend: str, verify: bool) -> None:
    """What a second ``patch_model`` asks of the modules that the first one replaced."""
    for module in model.modules():
        record = module.__dict__.get(KEY)
        if record is not None and record.operation in names and original_class(module) is not None:
            record.backend, record.verify = backend, verify and record.status == "patched"


def _replace(found: Candidate, backend: str, verify: bool, dry_run: bool) -> PatchRow:
    """Replace one module, unless there is a reason not to."""
    row = PatchRow(found.path, type(found.module).__name__, KIND_TO_OP[found.kind], backend, "patched")
    if found.why_not:
        row.status, row.why = "skipped", found.why_not
    elif dry_run:
        row.status = "would patch"
    else:
        found.record.backend, found.record.verify = backend, verify
        found.record.least = least_elements(found.module, found.record)
        found.module.__dict__[KEY] = found.record
        found.module.__class__ = patched_class(found.kind, type(found.module))
    return row


def _skip_layers(model: nn.Module, dry_run: bool) -> list[PatchRow]:
    rows = []
    for path, layer in towers.unused_layers(model):
        if original_class(layer) is not None:
            continue
        rows.append(
            PatchRow(path, type(layer).__name__, "skip_unused_layers", "-", "would patch" if dry_run else "patched")
        )
        if not dry_run:
            layer.__dict__[KEY] = towers.skip_record()
            layer.__class__ = patched_class("skip", type(layer))
    return rows


def _restore(module: nn.Module) -> None:
    cls = original_class(module)
    if cls is not None:
        module.__class__ = cls
        module.__dict__.pop(KEY, None)


def _undo_failed(model: nn.Module) -> None:
    """Give modules that ``verify`` found out of tolerance their own class back; the report keeps the reason."""
    report = patch_report(model)
    modules = dict(model.named_modules())
    for row in report.rows:
        if row.status == "undone":
            _restore(modules[row.module])
    towers.take_back_config(model)


def unpatch_model(model: Model) -> Model:
    """Give every module its own class back: outputs are bit-identical to before ``patch_model``.

    A module whose class was changed again after patching (FSDP2, a parametrization) is left as it is: undo that first.

    Returns:
        The same model object.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    towers.restore_config(model)
    left = []
    for path, module in model.named_modules():
        if original_class(module) is not None:
            _restore(module)
        elif KEY in module.__dict__:
            left.append(path)
    repack(model)  # nobody uses its packed weights any more
    notes = ["this model was unpatched"]
    if left:
        notes.append(f"left alone, their class was changed after patching: {', '.join(left)}")
    remember(model, PatchReport(notes=notes))
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """``patch_model`` on entry, ``unpatch_model`` on exit; the options are those of ``patch_model``."""
    patch_model(model, **options)
    try:
        yield model
    finally:
        unpatch_model(model)

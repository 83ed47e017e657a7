"""What every patched module has in common: its record, and the choice between fused and original forward."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.backends import use_backend

__all__ = ["KEY", "Patched", "Record", "is_plain", "plain_norm", "too_small"]

#: Multiply-adds under which a module's own forward runs: there the call costs more than the arithmetic (one token through
#: a 512 x 512 linear is 0.26 million). For norms, elements.
SMALL_PRODUCT = 1 << 20
SMALL_NORM = 1 << 15

#: Name of the record in a patched module's ``__dict__``: not a parameter, buffer or submodule, so not in any state.
KEY = "_vlmops"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Record:
    """What patching knows of one module; travels with deepcopy and pickle.

    Attributes:
        operation: the op it runs, e.g. "mlp".
        backend: "auto" or a forced one.
        children: attribute paths of the linears whose plainness every call checks.
        covered: paths of the submodules its fused forward runs for: they are not patched on their own.
        facts: what the mixin computed once (activation name, heads, ...).
        verify: compare with the original at the next call.
        status: "patched", or why the original runs again.
        error: largest relative difference seen by verify.
    """

    operation: str
    backend: str = "auto"
    children: tuple[str, ...] = ()
    covered: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    verify: bool = False
    status: str = "patched"
    error: float | None = None


def is_plain(module: nn.Module | None) -> bool:
    """An ``nn.Linear`` nobody touched: exact class, no hooks, no instance forward (accelerate), so no LoRA or quantisation."""
    if type(module) is not nn.Linear:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or "forward" in state
    )  # fmt: skip


def plain_norm(module: nn.Module) -> bool:
    """No hooks and no instance forward on any module."""
    state = module.__dict__
    return not any(state[name] for name in _HOOKS) and "forward" not in state


class Patched:
    """Mixin in front of the original class. Subclasses bring ``fused`` and, where needed, ``ready``."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call can run fused."""
        return True

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        record: Record = self.__dict__[KEY]
        if record.status != "patched" or not self.ready(args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if record.verify:
            return self._verified(record, args, kwargs)
        if record.backend == "auto":
            return self.fused(*args, **kwargs)
        with use_backend(record.backend):
            return self.fused(*args, **kwargs)

    def _verified(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from vlmops.patch.verify import relative_error, tolerance

        record.verify = False
        want = super().forward(*args, **kwargs)  # type: ignore[misc]
        with use_backend(record.backend) if record.backend != "auto" else contextlib.nullcontext():
            got = self.fused(*args, **kwargs)
        record.error = relative_error(got, want)
        if not record.error <= tolerance(want):
            record.status = f"undone: differs from the original by {record.error:.1e}"
            return want
        return got


def too_small(x: Tensor, width: int) -> bool:
    """Whether rows x times a weight this wide are too little work to be worth another call."""
    return x.numel() * width < SMALL_PRODUCT


def needs_grad(module: nn.Module, *tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient through this module: then the original runs (it is what was trained with)."""
    return torch.is_grad_enabled() and (
        any(t.requires_grad for t in tensors) or next(iter(module.parameters())).requires_grad
    )

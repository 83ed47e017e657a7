"""What every patched module has in common: its record, and the choice between fused and original forward."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vlmops.backends import choice, forced_backend, use_backend
from vlmops.ops._shared.registry import OPS, TRACED_BACKEND, bucket

__all__ = ["KEY", "PLAIN", "Patched", "Record", "is_plain", "least_elements", "plain_call", "plain_parts", "unhooked"]

#: Multiply-adds under which a module's own forward runs: there the call costs more than the arithmetic (one token
#: through a 512 x 512 linear is 0.26 million). For norms, elements.
SMALL_PRODUCT = 1 << 20
SMALL_NORM = 1 << 15

#: Name of the record in a patched module's ``__dict__``: not a parameter, buffer or submodule, so not in any state.
KEY = "_vlmops"
#: Classes of an ``nn.Linear`` that computes what ``nn.Linear`` does: itself and, once made, our own subclass of it.
PLAIN: set[type] = {nn.Linear}
_TENSORS = (Tensor, nn.Parameter)
REMEMBERED = 1024  # input shapes a module remembers a choice for
LONG_S = 2e-3  # seconds of a call from which on a module's own Python (some 10 us an op) does not show
#: What a fused call must win, measured alone: in place it brings a second GEMM library and a second copy of the weights
#: into caches that the rest of the model uses, which costs some 50 us (measured in a 6 MiB model, which all but fits).
LEAST_GAIN_S = 50e-6


@dataclass
class Record:
    """What patching knows of one module; travels with deepcopy and pickle.

    Attributes:
        operation: the op it runs, e.g. "mlp".
        backend: "auto" or a forced one.
        children: names of the linears in its fused forward, in the order the mixin wants them.
        others: name -> class of the other children the fused forward runs for (activation, norm).
        covered: paths of the submodules its fused forward runs for: they are not patched on their own.
        dropout: names of attributes and children that may drop values in training.
        facts: what the mixin computed once (activation name, head_dim, ...).
        verify: compare with the original at the next call.
        status: "patched", or why the original runs again.
        error: largest relative difference seen by verify.
        least: elements of the input under which the original runs: there a call costs more than the arithmetic.
        chosen: (shape, dtype, threads) -> backend that measuring picked, or "original"; of this machine, so not copied.
    """

    operation: str
    backend: str = "auto"
    children: tuple[str, ...] = ()
    others: dict[str, type] = field(default_factory=dict)
    covered: tuple[str, ...] = ()
    dropout: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    verify: bool = False
    status: str = "patched"
    error: float | None = None
    least: int = 0
    chosen: dict[Any, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "chosen": {}}


def unhooked(module: nn.Module) -> bool:
    """No hooks and no instance forward (accelerate sets one)."""
    state = module.__dict__
    return not (
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
        or state["_backward_pre_hooks"] or "forward" in state
    )  # fmt: skip


def is_plain(module: nn.Module | None) -> bool:
    """An ``nn.Linear`` nobody touched: exact class (or ours), no hooks, no instance forward; so no LoRA either."""
    return type(module) in PLAIN and unhooked(module)  # type: ignore[arg-type]


def plain_call(x: Any, weight: Tensor) -> bool:
    """A call that can be fused: a tensor of the weight's dtype, no autocast, no gradient, no functorch transform.

    A weight of another class (quantised, sharded) computes something only its own class knows.
    """
    if not (type(x) in _TENSORS and type(weight) in _TENSORS and x.dtype is weight.dtype):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def least_elements(module: nn.Module, record: Record) -> int:
    """Elements of an input from which on fusing may pay; under them the original runs, without another look."""
    if record.operation == "norms":
        return SMALL_NORM
    inner: Any = record.facts.get("inner", record)
    owner = module._modules.get("mlp") or module if inner is not record else module
    layer = owner._modules[inner.children[0]] if inner.children else module
    return SMALL_PRODUCT // max(1, layer._parameters["weight"].shape[0])  # type: ignore[union-attr]


def plain_parts(module: Any, record: Record) -> bool:
    """Whether every child that the fused forward bypasses is what it was at patching, and dropout does nothing."""
    if _has_any_global_hook():
        return False
    modules = module._modules
    for name in record.children:
        if not is_plain(modules[name]):
            return False
    for name, cls in record.others.items():
        child = modules[name]
        if type(child) is not cls or not unhooked(child):
            return False
    return not record.dropout or not active_dropout(module, record.dropout)


def active_dropout(module: Any, names: tuple[str, ...]) -> bool:
    """Whether a dropout child is in training with p > 0, or the module is and has a dropout rate."""
    for name in names:
        child = module._modules.get(name)
        if child is not None:
            if child.training and child.p > 0:
                return True
        elif module.training and float(getattr(module, name)) > 0.0:
            return True
    return False


class Patched:
    """Mixin in front of the original class. Subclasses bring ``fused`` and ``ready``.

    Attributes:
        op: name of the op whose measured choice stands for the module.
        declines: the original's forward is what the op's "torch" backend computes: where measuring picks that one, the
            original runs, without the cost of the op's checks.
        compares: whether a short call is timed against the original's forward as well, before one of them is chosen.
    """

    op = ""
    declines = False
    compares = True

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call can run fused."""
        raise NotImplementedError

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # None: a slice of a patched nn.Sequential, which makes it by its own class
        record: Record | None = self.__dict__.get(KEY)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if record is None or record.status != "patched":
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        key = None
        # The cheap questions first: a call left to the original should cost no more than they do.
        if type(x) in _TENSORS and x.numel() < record.least:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if type(x) in _TENSORS and not torch.compiler.is_compiling():
            key = (x.shape, x.dtype, torch.get_num_threads())
            if record.chosen.get(key) == "original" and forced_backend() is None:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not self.ready(record, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            TRACED_BACKEND[0] = record.backend  # a context variable cannot be read inside a compiled function
            out = self.fused(*args, **kwargs)
            TRACED_BACKEND[0] = "auto"
            return out
        if record.verify:
            return self._verified(record, args, kwargs)
        if record.backend != "auto":
            with use_backend(record.backend):
                return self.fused(*args, **kwargs)
        if x is None or key is None or key in record.chosen or forced_backend() is not None:
            return self.fused(*args, **kwargs)
        if len(record.chosen) >= REMEMBERED:
            record.chosen.clear()
        out, record.chosen[key] = self._first(x, args, kwargs)
        return out

    def _first(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """The output for a shape not seen before, and who computes it from now on.

        The op has measured its backends. A short call also costs what the module does around its ops, which only the
        original's own time can be compared with.
        """
        out = self.fused(*args, **kwargs)
        picked = OPS[self.op].last
        if self.declines and picked == "torch":
            return out, "original"
        if not self.compares or x.device.type != "cpu":
            return out, picked
        begin = time.perf_counter()
        self.fused(*args, **kwargs)
        if time.perf_counter() - begin > LONG_S:
            return out, picked
        calls = {
            "fused": lambda: self.fused(*args, **kwargs),
            "torch": lambda: super(Patched, self).forward(*args, **kwargs),  # type: ignore[misc]
        }
        weights = [tuple(p.shape) for p in self.parameters()]  # type: ignore[attr-defined]
        rows = bucket(x.numel() // max(1, x.shape[-1]))
        key = f"{type(self).__qualname__} {weights} rows={rows} {str(x.dtype)[6:]}"
        name = choice.decide("module", key, calls, ("fused", "torch"), x.device, cold=True, least_gain=LEAST_GAIN_S)
        return out, picked if name == "fused" else "original"

    def _verified(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from vlmops.patch.verify import relative_error, tolerance

        record.verify = False
        with use_backend("reference"):  # Pixtral's original runs on an op of ours, too
            want = super().forward(*args, **kwargs)  # type: ignore[misc]
        with use_backend(record.backend) if record.backend != "auto" else contextlib.nullcontext():
            got = self.fused(*args, **kwargs)
        record.error = relative_error(got, want)
        if not record.error <= tolerance(want):
            record.status = f"undone: differs from the original by {record.error:.1e}"
            return want
        return got

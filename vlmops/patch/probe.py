"""Does the fused forward compute what this module's own forward computes? Tried on a few rows before replacing it.

Structure tells what a module looks like. A residual, a scale or a mask inside its forward shows only when it runs. So
the original and the fused forward (plain PyTorch backend) run once on small made-up activations; what differs is left
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.backends import use_backend
from vlmops.patch.base import KEY
from vlmops.patch.classes import patched_class
from vlmops.patch.structure import Candidate
from vlmops.patch.verify import relative_error, tolerance

__all__ = ["Prober"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _rows(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Values between -1 and 1 without touching a random generator."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64) * 1.7 + 0.3).view(shape).to(like.device, like.dtype)


def _linear(found: Candidate) -> Any:
    return found.module._modules[found.record.children[0]]


def _one_input(found: Candidate) -> Call:
    if found.kind == "rms_norm":
        weight: Any = found.module._parameters["weight"]
        return (_rows((3, weight.shape[0]), weight),), {}
    if found.kind == "merger":
        weight = found.module._modules[found.record.facts["norm_name"]]._parameters["weight"]  # type: ignore[union-attr]
        return (_rows((8, weight.shape[0]), weight),), {}
    layer = _linear(found)
    return (_rows((3, layer.in_features), layer.weight),), {}


def _attention_input(found: Candidate) -> Call:
    layer, size = _linear(found), found.record.facts["head_dim"]
    weight, width = layer.weight, layer.in_features
    borders = torch.tensor([0, 3, 7], dtype=torch.int32, device=weight.device)
    angles = _rows((7, size // 2), weight.float()).repeat(1, 2)
    tables = (torch.cos(angles), torch.sin(angles))
    if found.kind == "dense_attention":
        return (_rows((2, 5, width), weight), None), {}
    if found.kind == "packed_attention":
        return (_rows((7, width), weight), borders), {"position_embeddings": tables}
    tables = tuple(t.to(weight.dtype) for t in tables)  # type: ignore[assignment]
    one = borders[[0, 2]].contiguous()
    options = {"position_embeddings": tables, "cu_seq_lens_q": one, "cu_seq_lens_k": one}
    return (_rows((1, 7, width), weight), None), {**options, "max_length_q": 7, "max_length_k": 7}


INPUTS: dict[str, Callable[[Candidate], Call]] = {
    "mlp": _one_input, "merger": _one_input, "rms_norm": _one_input, "dense_attention": _attention_input,
    "packed_attention": _attention_input, "pixtral_attention": _attention_input,
}  # fmt: skip


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off; the flags of every submodule as they were afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = False
        yield
    finally:
        for m, flag in flags:
            m.training = flag


class Prober:
    """Tries one module of every kind, class, size and setting found in a model."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, tuple[str, ...]]] = {}

    def why_not(self, found: Candidate) -> str:
        """Why the fused forward does not fit this module; empty if it does."""
        if found.kind not in INPUTS:
            return ""
        settings = sorted(
            (name, value)
            for name, value in found.module.__dict__.items()
            if isinstance(value, (int, float, str)) and name not in ("training", "layer_idx")
        )
        shapes = tuple((name, p.shape, p.dtype) for name, p in found.module.named_parameters())
        key = (found.kind, type(found.module), tuple(settings), shapes)
        if key not in self._known:
            self._known[key] = self._try_orders(found)
        why, found.record.children = self._known[key]
        return why

    def _try_orders(self, found: Candidate) -> tuple[str, tuple[str, ...]]:
        """The reason of the first order of children, unless one fits."""
        first = ""
        for order in found.orders or [found.record.children]:
            found.record.children = order
            why = self._try(found)
            if not why:
                return "", order
            first = first or why
        return first, found.record.children

    def _try(self, found: Candidate) -> str:
        module, own = found.module, type(found.module)
        device = next(module.parameters()).device.type
        try:
            args, kwargs = INPUTS[found.kind](found)
            replacement = patched_class(found.kind, own)
            with torch.no_grad(), _evaluating(module), torch.autocast(device, enabled=False):
                want = own.forward(module, *args, **kwargs)
                module.__dict__[KEY], module.__class__ = found.record, replacement
                with use_backend("torch"):
                    got = module.fused(*args, **kwargs)  # type: ignore[operator]
            error = relative_error(got, want)
        except Exception as err:  # another signature, sharded weights, a missing kernel: not ours to replace
            return f"could not be tried: {type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
        finally:
            module.__class__ = own
            module.__dict__.pop(KEY, None)
        return "" if error <= tolerance(want) else f"its forward computes something else (differs by {error:.1e})"

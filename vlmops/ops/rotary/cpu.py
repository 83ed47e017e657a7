"""One native pass: read, rotate in float, round, write (csrc/cpu/kernels/rotary.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import native

native.define("rotary(Tensor x, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{str(x.dtype)[6:]} (float32, bfloat16 and float16 only)"
    return None if native.available() else native.reason()


def _table(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def forward(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[T, H, D] in x's dtype, of x and of k (empty without one)."""
    native.load()
    out: tuple[Tensor, Tensor] = torch.ops.vlmops_cpu.rotary.default(x, k, _table(cos), _table(sin), interleaved, False)
    return out


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and k: the transpose of the rotation, again one pass."""
    _, _, cos, sin, interleaved = args
    wanted = [i for i, grad in enumerate(grads) if needs[i] and grad is not None]
    found: list[Tensor | None] = [None, None]
    if wanted:
        native.load()
        pair = [grads[i] for i in wanted] + [None]
        turned = torch.ops.vlmops_cpu.rotary.default(pair[0], pair[1], _table(cos), _table(sin), interleaved, True)
        for i, grad in zip(wanted, turned, strict=False):
            found[i] = grad
    return found

"""Argument checks of the public faces: every message names the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "check_cu_seqlens",
    "check_dtype",
    "check_floating",
    "check_heads",
    "check_key_cu_seqlens",
    "check_same_device",
    "check_shape",
    "check_tensor",
]


def describe(x: object) -> str:
    """Shape and dtype of a tensor, type of anything else."""
    return f"{str(x.dtype)[6:]} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_tensor(name: str, x: object, *, dim: int | None = None, layout: str = "") -> None:
    """TypeError unless a tensor, ValueError unless of this rank. ``layout`` is the expected shape in words."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions {layout}, got {describe(x)}")


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless float32, bfloat16, float16 or float64."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {describe(x)}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype, other: str) -> None:
    """TypeError unless x has the dtype of ``other``."""
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {str(dtype)[6:]} like {other}, got {describe(x)}")


def check_same_device(name: str, x: Tensor, device: torch.device, other: str) -> None:
    """ValueError unless on the same device as ``other``."""
    if x.device != device:
        raise ValueError(f"{name}: expected on {device} like {other}, got {x.device}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None], layout: str = "") -> None:
    """ValueError unless x has this shape (None: any size)."""
    if x.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
    ):
        words = layout or str([("?" if s is None else s) for s in shape])
        raise ValueError(f"{name}: expected shape {words}, got {describe(x)}")


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, *, key: str = "k", value: str = "v", queries: str = "Tq", keys: str = "Tk"
) -> None:
    """The q, k and v of every packed attention: [Tq, Hq, D] and twice [Tk, Hkv, D], D >= 1, Hq a multiple of Hkv.

    Args:
        q, k, v: the arguments.
        key, value: what the op calls k and v.
        queries, keys: what it calls their numbers of tokens.
    """
    layout = f"[{keys}, Hkv, D]"
    check_tensor("q", q, dim=3, layout=f"[{queries}, Hq, D]")
    check_tensor(key, k, dim=3, layout=layout)
    check_tensor(value, v, dim=3, layout=layout)
    check_floating("q", q)
    (_, heads, d), (tokens, kv_heads, _) = q.shape, k.shape
    if d == 0:
        raise ValueError(f"q: expected head_dim >= 1, got {describe(q)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{key}: expected a number of heads that divides q's {heads}, got {describe(k)}")
    check_shape(key, k, (tokens, kv_heads, d), f"[{keys}, Hkv, {d}] with q's head_dim")
    check_shape(value, v, (tokens, kv_heads, d), f"{list(k.shape)} like {key}")
    for name, x in ((key, k), (value, v)):
        check_dtype(name, x, q.dtype, "q")
        check_same_device(name, x, q.device, "q")


def check_key_cu_seqlens(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """The cu_seqlens of the keys, checked against that of the queries, which None stands for; both are checked."""
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"cu_seqlens_k: needed where k has {k.shape[0]} tokens and q {q.shape[0]}")
        return cu_seqlens_q
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, f"{list(cu_seqlens_q.shape)} like cu_seqlens_q")
    return cu_seqlens_k


def check_cu_seqlens(name: str, cu: Tensor, device: torch.device) -> None:
    """Shape, dtype and device of a cu_seqlens (its values are checked by the CPU backends, clamped on a GPU)."""
    check_tensor(name, cu, dim=1, layout="[n + 1]")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 [n + 1], got {describe(cu)}")
    if cu.shape[0] < 1:
        raise ValueError(f"{name}: expected [n + 1] with a leading 0, got an empty tensor")
    check_same_device(name, cu, device, "q")


def cu_seqlens_list(name: str, cu: Tensor, total: int) -> list[int]:
    """The values of a CPU cu_seqlens, checked: starts at 0, never falls, ends at ``total``.

    Raises:
        ValueError: any of that does not hold.
    """
    values: list[int] = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(f"{name}: expected to be monotone, got {values[i - 1]} then {values[i]} at position {i}")
    if values[-1] != total:
        raise ValueError(f"{name}: expected to end at the number of tokens {total}, got {values[-1]}")
    return values

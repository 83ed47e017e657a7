"""Triton's interpreter, repaired and with eyes: right bfloat16, bounds checks, write-race checks, counters.

What Triton 3.9.0 does with ``TRITON_INTERPRET=1``, and what ``install()`` changes:

- bfloat16 is kept as its bit pattern in uint16, and arithmetic, comparisons, products and sums run on those integers: silently
  wrong. Here they run in float32 and are rounded to nearest even.
- float32 to bfloat16 truncates. Here it rounds to nearest even, as the hardware does. So do conversions to e4m3.
- An address is dereferenced whatever it is. Here every active lane must lie inside one of the launch's tensors.
- Nothing says when two programs write one address without an atomic. Here that is an error.
- Nothing is counted. Here are bytes by active lane, and FLOPs of ``tl.dot``, padding included.
- Programs run in the order of their numbers. ``order`` runs them in another, to show what depends on it.

The project uses neither libdevice nor ``@triton.autotune``, which the interpreter does not run without a GPU either.
tests/backends/test_triton_interpreter.py fails when upstream's behaviour changes: then this file can shrink.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Counters", "count", "install", "order"]

os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass
class Counters:
    """What the kernels of a block did: bytes by active lanes, FLOPs of tl.dot (tiles as padded), programs."""

    read: int = 0
    written: int = 0
    flops: int = 0
    programs: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


_counters: list[Counters] = []
_ranges: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.uint64), np.empty(0, np.uint64))
_writes: dict[tuple[int, int, int], list[np.ndarray]] = {}
_order: tuple[str, int] | None = None
_installed = False


@contextlib.contextmanager
def count() -> Iterator[Counters]:
    """Counters of the kernels that run inside the block."""
    mine = Counters()
    _counters.append(mine)
    try:
        yield mine
    finally:
        _counters.remove(mine)


@contextlib.contextmanager
def order(kind: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of every launch inside the block in another order: "reverse", or "shuffled" by a seed.

    A GPU promises no order. Programs that only write what no other one reads cannot notice.
    """
    global _order
    if kind not in ("reverse", "shuffled"):
        raise ValueError(f'kind: expected "reverse" or "shuffled", got {kind!r}')
    before, _order = _order, (kind, seed)
    try:
        yield
    finally:
        _order = before


@functools.lru_cache(maxsize=64)
def _permutation(kind: str, seed: int, programs: int) -> np.ndarray:
    return np.arange(programs)[::-1] if kind == "reverse" else np.random.default_rng(seed).permutation(programs)


def _reordered(grid: tuple[int, ...], sizes: tuple[int, int, int]) -> tuple[int, ...]:
    """The program that runs in this one's place."""
    if _order is None:
        return grid
    turn = np.ravel_multi_index(grid, sizes)
    return tuple(int(n) for n in np.unravel_index(_permutation(*_order, int(np.prod(sizes)))[turn], sizes))


def _add(**what: int) -> None:
    for c in _counters:
        for name, value in what.items():
            setattr(c, name, getattr(c, name) + value)


def to_float(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    u = x.view(np.uint32)
    rounded = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.uint16(0x7FC0) | ((u >> 16) & 0x8000).astype(np.uint16)
    return np.where(np.isnan(x), nan, rounded)


def _check(ptrs: Any, mask: Any, kind: str, program: tuple[int, int, int]) -> None:
    addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel()
    width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    _add(**{kind: addresses.size * width})
    if addresses.size == 0:
        return
    starts, ends = _ranges
    at = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
    bad = (at < 0) | (addresses + np.uint64(width) > ends[np.maximum(at, 0)])
    if bad.any():
        raise IndexError(
            f"{kind} out of bounds: {int(bad.sum())} of {addresses.size} lanes of program {program}, first at "
            f"{int(addresses[bad][0]) - int(starts[max(0, int(at[bad][0]))])} bytes from the start of the tensor before it"
        )
    if kind == "written":
        _writes.setdefault(program, []).append(addresses)


def _check_races() -> None:
    """Two programs of one launch that wrote the same address."""
    if len(_writes) < 2:
        return
    every = np.concatenate([np.unique(np.concatenate(parts)) for parts in _writes.values()])
    _, times = np.unique(every, return_counts=True)
    if (times > 1).any():
        raise RuntimeError(f"write race: {int((times > 1).sum())} addresses written by more than one program")


def install() -> None:
    """Repair the interpreter of this process; once."""
    global _installed
    if _installed:
        return
    _installed = True
    import torch
    import triton.language as tl
    from triton.runtime import interpreter as base

    from vlmops.backends import triton_runtime

    handle, builder = base.TensorHandle, base.InterpreterBuilder

    def is_bf16(h: Any) -> bool:
        return h.dtype.scalar == tl.bfloat16

    def lift(h: Any) -> Any:
        return handle(to_float(h.data), tl.float32) if is_bf16(h) else h

    def lower(h: Any) -> Any:
        return handle(to_bits(h.data), tl.bfloat16) if h.data.dtype.kind == "f" else h

    def in_float32(name: str, operands: int) -> None:
        old = getattr(builder, name)

        def run(self: Any, *args: Any) -> Any:
            first, rest = args[:operands], args[operands:]
            if not any(is_bf16(h) for h in first):
                return old(self, *args)
            return lower(old(self, *[lift(h) for h in first], *rest))

        setattr(builder, name, run)

    for name, operands in (
        ("binary_op", 2),
        ("unary_op", 1),
        ("create_fma", 3),
        ("create_rsqrt", 1),
        ("create_erf", 1),
    ):
        in_float32(name, operands)
    _repair_casts(base, tl, lift)
    _repair_products(base, tl)
    _repair_sums(base, tl)
    _watch_memory(base)
    triton_runtime.INTERPRETED.update((torch.bfloat16, torch.float8_e4m3fn))


def _repair_casts(base: Any, tl: Any, lift: Any) -> None:
    handle, builder = base.TensorHandle, base.InterpreterBuilder
    old_cast, old_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, src: Any, dst: Any) -> Any:
        s, d = src.dtype.scalar, dst.scalar
        if s == tl.bfloat16 and d != tl.bfloat16:
            wide = lift(src)
            return wide if d == tl.float32 else old_cast(self, wide, dst)
        if d == tl.bfloat16 and s != tl.bfloat16:
            return handle(to_bits(src.data.astype(np.float32)), tl.bfloat16)
        return old_cast(self, src, dst)

    def fp_to_fp(self: Any, src: Any, dst: Any, rounding: Any) -> Any:
        s, d = src.dtype.scalar, dst.scalar
        narrow = 8 in (s.primitive_bitwidth, d.primitive_bitwidth)
        if tl.bfloat16 in (s, d) and not narrow:
            return cast(self, src, dst)
        if d == tl.float8e4nv or s == tl.float8e4nv:
            return _float8(handle, tl, lift(src), dst)
        return old_fp(self, src, dst, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp


def _float8(handle: Any, tl: Any, src: Any, dst: Any) -> Any:
    """To or from e4m3 by torch's own conversion (to nearest even, saturating as the hardware does)."""
    import torch

    if src.dtype.scalar == tl.float8e4nv:
        data = torch.from_numpy(np.ascontiguousarray(src.data)).view(torch.float8_e4m3fn).float().numpy()
        if dst.scalar == tl.bfloat16:
            return handle(to_bits(data), tl.bfloat16)
        return handle(data.astype(np.float16 if dst.scalar == tl.float16 else np.float32), dst.scalar)
    wide = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32)).clamp(-448.0, 448.0)
    return handle(wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), dst.scalar)


def _repair_products(base: Any, tl: Any) -> None:
    import torch

    def operand(h: Any) -> np.ndarray:
        if h.dtype.scalar == tl.bfloat16:
            return to_float(h.data)
        if h.dtype.scalar == tl.float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(h.data)).view(torch.float8_e4m3fn).float().numpy()
        return h.data.astype(np.float32) if h.data.dtype == np.float16 else h.data

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        x, y = np.ascontiguousarray(operand(a)), np.ascontiguousarray(operand(b))
        _add(flops=2 * int(np.prod(x.shape)) * y.shape[-1])
        return base.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    base.InterpreterBuilder.create_dot = dot


def _repair_sums(base: Any, tl: Any) -> None:
    """tl.sum and tl.cumsum of bfloat16; maxima are widened by upstream."""

    def repaired(old: Any) -> Any:
        def run(self: Any, given: Any) -> Any:
            if given.dtype.scalar != tl.bfloat16:
                return old(self, given)
            many = old(self, self.to_tensor(to_float(given.handle.data), tl.float32))
            found = many[0] if isinstance(many, list) else many
            bits = to_bits(np.atleast_1d(found.handle.data))
            low = self.to_tensor(bits if len(found.shape) else bits[0], tl.bfloat16)
            return [low] if isinstance(many, list) else low

        return run

    base.ReduceOps.sum = repaired(base.ReduceOps.sum)
    base.ScanOps.cumsum = repaired(base.ScanOps.cumsum)


def _watch_memory(base: Any) -> None:
    builder, executor = base.InterpreterBuilder, base.GridExecutor
    old_load, old_store = builder.create_masked_load, builder.create_masked_store
    old_init, old_call, old_index = executor._init_args_hst, executor.__call__, builder.set_grid_idx

    def load(self: Any, ptrs: Any, mask: Any, *args: Any, **options: Any) -> Any:  # options: of a descriptor's load
        _check(ptrs, mask, "read", self.grid_idx)
        return old_load(self, ptrs, mask, *args, **options)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        _check(ptrs, mask, "written", self.grid_idx)
        return old_store(self, ptrs, value, mask, *args)

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        global _ranges
        found: list[tuple[int, int]] = []

        def add(x: Any) -> None:
            if isinstance(x, tuple):
                for y in x:
                    add(y)
            elif hasattr(x, "base") and hasattr(x, "block_shape"):
                add(x.base)
            elif hasattr(x, "data_ptr") and x.numel():
                last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                found.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))

        host = old_init(self, args, kwargs)
        for x in [*host[0], *host[1].values()]:
            add(x)
        merged: list[tuple[int, int]] = []
        for start, end in sorted(found):  # views of one buffer overlap
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        _ranges = (np.array([a for a, _ in merged], np.uint64), np.array([b for _, b in merged], np.uint64))
        return host

    def index(self: Any, *grid: int) -> None:
        _add(programs=1)
        old_index(self, *_reordered(grid, self.grid_dim))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _writes.clear()
        _add(launches=1)
        result = old_call(self, *args, **kwargs)
        _check_races()
        return result

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.set_grid_idx = index
    executor._init_args_hst, executor.__call__ = init, call

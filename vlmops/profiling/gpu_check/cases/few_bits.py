"""Cases of the accuracy options: weights in few bits, attention in fp8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops import fp8_attention, quantize_weight, quantized_linear
from vlmops.profiling.gpu_check.cases.case import Arguments, Case, Values

__all__ = ["cases"]


def _projected(
    v: Values, kind: str, rows: tuple[int, int] = (3, 129), k: tuple[int, int] = (130, 1153), n: tuple[int, int] = (21, 1100),
    bias: bool = True, gate: str = "", masked: bool = False, residual: bool = False, activation: str | None = None,
    rounded: bool = False, **weight: Any,
) -> Arguments:  # fmt: skip
    count, width, out = v.size(*rows), v.size(*k), v.size(*n)
    options: dict[str, Any] = {"activation": activation, "quantize_activations": rounded}
    if gate:
        options["gate"] = v.random(*(() if gate == "scalar" else (out,)))
    if masked:
        options["row_mask"] = torch.rand(count, generator=v.rng) < 0.5
    if residual:
        options["residual"] = v.random(count, out)
    args = (v.random(count, width), quantize_weight(v.weight(out, width, grad=False), kind, **weight))
    return (*args, v.random(out) if bias else None), options


def _quantized() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("quantized_linear", label, quantized_linear, partial(_projected, **options), core)

    everything: dict[str, Any] = dict(activation="gelu", gate="scalar", masked=True, residual=True)
    yield case("int8", core=True, kind="int8")
    yield case("int8, groups of 32, one row", kind="int8", group_size=32, rows=(1, 1))
    yield case("int8, everything", kind="int8", **everything)
    yield case("int4", core=True, kind="int4")
    yield case("int4, groups of 32, one row", core=True, kind="int4", group_size=32, rows=(1, 1))
    yield case("int4 without zero-points, 16 rows", kind="int4", symmetric=True, rows=(4, 16))
    yield case("int4, a gate a column, no bias", kind="int4", gate="column", activation="silu", bias=False)
    yield case("fp8", core=True, kind="fp8", k=(40, 1280))
    yield case("fp8, rows rounded too", kind="fp8", rounded=True)
    yield case("fp8, rounded, everything", kind="fp8", rounded=True, **everything)
    yield case("no rows", kind="int8", rows=(0, 0))


def _packed(
    v: Values, lengths: tuple[Any, Any] = ((5, 1, 0, 9), (577, 1, 0, 129, 63)), keys: tuple[Any, Any] | None = None,
    heads: int = 2, kv_heads: int = 2, dim: int = 64, known: bool = False, window: tuple[Any, Any] = (None, None),
    **options: Any,
) -> Arguments:  # fmt: skip
    rows, columns = v.size(*lengths), None if keys is None else v.size(*keys)
    args = v.packed(rows, columns, heads=heads, kv_heads=kv_heads, dim=dim)
    if known:
        options.update(max_seqlen_q=max(rows), max_seqlen_k=max(columns or rows))
    args = tuple(x.detach() for x in args)  # it has no gradient
    return args, {"window": v.size(*window), "return_lse": True, **options}


def _fp8() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("fp8_attention", label, fp8_attention, partial(_packed, **options), core)

    yield case("ragged, head 64", core=True)
    yield case("head 80", core=True, dim=80, lengths=((9,), (577, 33)), known=True)
    for dim in (72, 96, 128, 256):
        yield case(f"head {dim}", dim=dim, lengths=((7,), (200, 33)))
    yield case("causal, more keys", causal=True, lengths=((3, 1), (300, 70)), keys=((8, 4), (420, 90)))
    yield case("window", window=((2, 3), (56, 40)))
    yield case("grouped queries, scale", heads=4, kv_heads=2, scale=0.2)
    yield case("no keys", lengths=((3, 2), (70, 65)), keys=((0, 4), (0, 130)))


def cases() -> Iterator[Case]:
    """quantized_linear, fp8_attention."""
    yield from _quantized()
    yield from _fp8()

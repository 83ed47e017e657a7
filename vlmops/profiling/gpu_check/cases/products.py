"""Cases of the matrix products: linear, mlp, linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops import linear, linear_cross_entropy, mlp
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.profiling.gpu_check.cases.case import Arguments, Case, Values

__all__ = ["cases"]


def _projected(
    v: Values, rows: tuple[Any, Any] = (5, 577), k: tuple[int, int] = (24, 1024), n: tuple[int, int] = (20, 1100),
    bias: bool = True, gate: str = "", masked: bool = False, residual: bool = False, grad: bool = True,
    activation: str | None = None,
) -> Arguments:  # fmt: skip
    count, width, out = v.size(*rows), v.size(*k), v.size(*n)
    shape = count if isinstance(count, tuple) else (count,)
    options: dict[str, Any] = {"activation": activation}
    if gate:
        options["gate"] = v.random(*(() if gate == "scalar" else (out,)), grad=grad)
    if masked:
        options["row_mask"] = torch.rand(*shape, generator=v.rng) < 0.5
    if residual:
        options["residual"] = v.random(*shape, out, grad=grad)
    args = (v.random(*shape, width, grad=grad), v.weight(out, width, grad=grad))
    return (*args, v.random(out, grad=grad) if bias else None), options


def _linear() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("linear", label, linear, partial(_projected, **options), core)

    yield case("bias", core=True)
    yield case("no bias", bias=False)
    for name in ACTIVATIONS:
        yield case(name, activation=name)
    yield case("one gate", gate="scalar")
    yield case("a gate a column", gate="column", residual=True)
    yield case("masked rows", masked=True)
    yield case("everything", core=True, activation="gelu", gate="scalar", masked=True, residual=True)
    yield case("one row", core=True, rows=(1, 1), grad=False)
    yield case("16 rows", rows=(4, 16), grad=False, activation="silu")
    yield case("odd sizes", rows=(3, 129), k=(17, 333), n=(13, 517))
    yield case("no rows", rows=(0, 0))
    yield case("three dimensions", rows=((2, 3), (2, 129)), residual=True)


def _norm_of(v: Values, kind: str, width: int) -> tuple[str, Tensor, Tensor | None, float]:
    return kind, v.random(width), v.random(width) if kind == "layer_norm" else None, 1e-5


def _projector(
    v: Values, rows: tuple[Any, Any] = (5, 577), sizes: tuple[Any, Any] = ((16, 24, 20), (1024, 2048, 1100)),
    biases: bool = True, gated: bool = False, residual: bool = False, norm: str = "", mid: str = "", scaled: bool = False,
    gather: Any = None, activation: str = "gelu", grad: bool = True,
) -> Arguments:  # fmt: skip
    count, (width, hidden, out) = v.size(*rows), v.size(*sizes)
    shape = count if isinstance(count, tuple) else (count,)
    merged = width if gather is None else 4 * width
    made = shape if gather is None else (shape[0] // 4,) if gather == "merge2x2" else (shape[0], shape[1] // 4)
    if gather == "pixel_shuffle":
        side = round(shape[1] ** 0.5)
        gather = ("pixel_shuffle", side, side)
    options: dict[str, Any] = {"activation": activation, "gather": gather}
    if gated:
        options.update(
            w_gate=v.weight(hidden, merged, grad=grad), b_gate=v.random(hidden, grad=grad) if biases else None
        )
    if residual:
        options["residual"] = v.random(*made, out, grad=grad)
    if norm:
        options["norm"] = _norm_of(v, norm, width)
    if mid:
        options["mid_norm"] = _norm_of(v, mid, hidden)
    if scaled:
        options["layer_scale"] = v.random(out)
    b1, b2 = (v.random(n, grad=grad) if biases else None for n in (hidden, out))
    return (
        v.random(*shape, width, grad=grad),
        v.weight(hidden, merged, grad=grad),
        b1,
        v.weight(out, hidden, grad=grad),
        b2,
    ), options


def _mlp() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("mlp", label, mlp, partial(_projector, **options), core)

    for name in ACTIVATIONS:
        yield case(name, core=name == "gelu", activation=name)
    yield case("SwiGLU", core=True, gated=True, activation="silu", biases=False)
    yield case("gated, biases", gated=True, activation="gelu_tanh")
    yield case("residual", residual=True)
    yield case("layer_norm before", norm="layer_norm")
    yield case("rms_norm before, gated", norm="rms_norm", gated=True, activation="silu")
    yield case("norm in the middle", mid="layer_norm", gated=True, activation="silu")
    yield case("rms_norm in the middle", mid="rms_norm", scaled=True)
    yield case("LayerScale and residual", scaled=True, residual=True)
    yield case("2x2 merger", core=True, rows=(8, 576), norm="layer_norm", gather="merge2x2")
    yield case("pixel shuffle", rows=((2, 16), (3, 256)), norm="layer_norm", gather="pixel_shuffle")
    yield case("odd sizes", rows=(3, 129), sizes=((17, 13, 11), (333, 517, 259)))
    yield case("one row", rows=(1, 1), gated=True, activation="silu", grad=False)
    yield case("no rows", rows=(0, 0))


def _head(
    v: Values, tokens: tuple[int, int] = (7, 300), words: tuple[int, int] = (29, 5003), width: tuple[int, int] = (16, 640),
    bias: bool = False, ignored: bool = True, grad: bool = True, **options: Any,
) -> Arguments:  # fmt: skip
    count, vocabulary, k = v.size(*tokens), v.size(*words), v.size(*width)
    targets = v.integers(vocabulary, count)
    missing = options.get("ignore_index", -100)
    if ignored and count > 1:
        targets[torch.rand(count, generator=v.rng) < 0.4] = missing
        targets[0] = 1
    if bias:
        options["bias"] = v.random(vocabulary)
    return (v.random(count, k, grad=grad), v.weight(vocabulary, k, grad=grad), targets), options


def _loss() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("linear_cross_entropy", label, linear_cross_entropy, partial(_head, **options), core)

    yield case("mean", core=True)
    yield case("sum", reduction="sum")
    yield case("a loss a token", core=True, reduction="none")
    yield case("bias", bias=True)
    yield case("softcap", softcap=3.0)
    yield case("label smoothing", label_smoothing=0.1)
    yield case("z-loss", z_loss=1e-2)
    yield case("everything", bias=True, softcap=5.0, label_smoothing=0.2, z_loss=1e-3, reduction="none")
    yield case("other ignore_index", ignore_index=3)
    yield case("one token", tokens=(1, 1), reduction="sum")
    yield case("no gradient", grad=False)
    yield case("odd sizes", words=(7, 1031), width=(5, 259), ignored=False)


def cases() -> Iterator[Case]:
    """linear, mlp, linear_cross_entropy."""
    yield from _linear()
    yield from _mlp()
    yield from _loss()

"""Cases of the row operations: norms, rotary, merge_tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops import layer_norm, merge_tokens, rms_norm, rotary
from vlmops.profiling.gpu_check.cases.case import Arguments, Case, Values

__all__ = ["cases"]

TOKEN = 7


def _norm(
    v: Values, shape: tuple[Any, Any] = ((5, 40), (577, 1280)), weight: bool = True, bias: bool = False,
    residual: bool = False, eps: float = 1e-6, **options: Any,
) -> Arguments:  # fmt: skip
    size = v.size(*shape)
    options["eps"] = eps
    if residual:
        options["residual"] = v.random(*size)
    args = [v.random(*size), v.random(size[-1]) if weight else None]
    return (*args, v.random(size[-1])) if bias else tuple(args), options


def _norms() -> Iterator[Case]:
    def rms(label: str, core: bool = False, **options: Any) -> Case:
        return Case("norms", f"rms_norm, {label}", rms_norm, partial(_norm, **options), core)

    def layer(label: str, core: bool = False, **options: Any) -> Case:
        options = {"eps": 1e-5, **options}
        return Case("norms", f"layer_norm, {label}", layer_norm, partial(_norm, **options), core)

    yield rms("plain", core=True)
    yield rms("residual", core=True, residual=True)
    yield rms("Gemma's offset", offset=1.0)
    yield rms("no weight", weight=False)
    yield rms("odd width", shape=((3, 33), (129, 1153)))
    yield rms("long rows", shape=((2, 300), (33, 16384)))
    yield rms("one column", shape=((3, 1), (70, 1)))
    yield rms("no rows", shape=((0, 16), (0, 1280)))
    yield rms("three dimensions", shape=((2, 2, 16), (3, 70, 128)))
    yield layer("bias", core=True, bias=True)
    yield layer("residual and bias", residual=True, bias=True)
    yield layer("no weight", weight=False)
    yield layer("odd width", shape=((3, 33), (129, 1153)), bias=True)


def _turned(
    v: Values, tokens: tuple[int, int] = (5, 577), dim: int = 80, turned: int | None = None, heads: int = 3,
    kv_heads: int | None = None, side_by_side: bool = False, **options: Any,
) -> Arguments:  # fmt: skip
    count = v.size(*tokens)
    x = v.random(count, heads, dim)
    if side_by_side:  # rows of a wider tensor
        x = v.random(count, 2 * heads, dim + 4, grad=False)[:, :heads, :dim].requires_grad_()
    if kv_heads is not None:
        options["k"] = v.random(count, kv_heads, dim)
    return (x, *v.tables(count, turned or dim)), options


def _rotary() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("rotary", label, rotary, partial(_turned, **options), core)

    yield case("q alone", core=True)
    yield case("q and fewer k", core=True, kv_heads=1, dim=128)
    yield case("pairs", interleaved=True, kv_heads=2)
    yield case("part of a head", dim=96, turned=64)
    yield case("part of a head, pairs", dim=10, turned=6, interleaved=True)
    yield case("strided heads", side_by_side=True, dim=64)
    yield case("no tokens", tokens=(0, 0))


def _merged(
    v: Values, batch: int = 2, tokens: tuple[int, int] = (9, 600), width: tuple[int, int] = (24, 1153), share: float = 0.5,
    mask: bool = False,
) -> Arguments:  # fmt: skip
    length, channels = v.size(*tokens), v.size(*width)
    pictured = torch.rand(batch, length, generator=v.rng) < share
    args = (v.random(batch, length, channels), v.random(int(pictured.sum()), channels))
    if mask:
        return (pictured, *args), {}
    ids = v.integers(TOKEN, batch, length).masked_fill(pictured, TOKEN)
    return (ids, *args, TOKEN), {}


def _merge() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("merge_tokens", label, merge_tokens, partial(_merged, **options), core)

    yield case("half pictures", core=True)
    yield case("by mask", mask=True)
    yield case("wide rows", width=(32, 4096), batch=1)
    yield case("no picture", share=-1.0)
    yield case("nothing else", share=2.0)
    yield case("no tokens", tokens=(0, 0))


def cases() -> Iterator[Case]:
    """norms, rotary, merge_tokens."""
    yield from _norms()
    yield from _rotary()
    yield from _merge()

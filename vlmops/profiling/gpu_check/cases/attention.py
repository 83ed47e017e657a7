"""Cases of the attentions: every mask, head size and empty sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops import cross_attention, perceiver_attention, varlen_attention
from vlmops.profiling.gpu_check.cases.case import Arguments, Case, Values, borders

__all__ = ["cases"]

RAGGED = ((5, 1, 0, 9), (577, 1, 0, 129, 63))


def _packed(
    v: Values, lengths: tuple[Any, Any] = RAGGED, keys: tuple[Any, Any] | None = None, heads: int = 2, kv_heads: int = 2,
    dim: int = 16, **options: Any,
) -> Arguments:  # fmt: skip
    args = v.packed(v.size(*lengths), None if keys is None else v.size(*keys), heads=heads, kv_heads=kv_heads, dim=dim)
    options = {name: value(v, *args) if callable(value) else value for name, value in options.items()}
    return args, {"return_lse": True, **options}


def _int32(*tiny_and_gpu: tuple[int, ...]) -> Callable[..., Any]:
    return lambda v, *_: torch.tensor(v.size(*tiny_and_gpu), dtype=torch.int32)


def _window(tiny: tuple[int, int], gpu: tuple[int, int]) -> Callable[..., Any]:
    return lambda v, *_: v.size(tiny, gpu)


def _rope(v: Values, q: Any, *_: Any) -> Any:
    return v.tables(q.shape[0], q.shape[2])


def _rope_k(v: Values, q: Any, k: Any, *_: Any) -> Any:
    return v.tables(k.shape[0], k.shape[2])


def _strided(v: Values) -> Arguments:
    """q, k and v side by side, as one product makes them."""
    lengths = v.size((5, 9), (577, 130))
    fused = v.random(sum(lengths), 3, 2, 24, grad=False)
    q, k, w = (fused[:, i].requires_grad_() for i in range(3))
    return (q, k, w, borders(lengths)), {}


def _varlen() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("varlen_attention", label, varlen_attention, partial(_packed, **options), core)

    more_keys = dict(lengths=((3, 1, 7), (300, 1, 70)), keys=((8, 4, 9), (420, 64, 90)))
    two = ((4, 9), (64, 300))
    yield case("ragged, head 64", core=True, dim=64)
    yield case("head 80", core=True, dim=80, lengths=((9,), (577, 33)))
    yield case("causal", core=True, causal=True, dim=64)
    for dim in (5, 16, 72, 88, 96, 128, 256):
        yield case(f"head {dim}", dim=dim, lengths=((7,), (200, 33)))
    for dim in (72, 128, 256):
        yield case(f"head {dim}, causal", dim=dim, causal=True, lengths=((7,), (200, 33)))
    yield case("causal, more keys", causal=True, **more_keys)
    yield case("causal, more queries", causal=True, lengths=more_keys["keys"], keys=more_keys["lengths"])
    yield case("no keys", lengths=((3, 2), (70, 65)), keys=((0, 4), (0, 130)))
    yield case("window", window=_window((2, 3), (56, 40)), dim=80)
    yield case("left window", window=_window((3, -1), (100, -1)))
    yield case("right window", window=_window((-1, 3), (-1, 100)))
    yield case("causal window", window=_window((3, 1), (100, 30)), causal=True)
    yield case("prefix", causal=True, lengths=two, prefix_lens=_int32((2, 5), (10, 129)))
    yield case("prefix over all", causal=True, lengths=two, prefix_lens=_int32((40, 0), (1000, 0)))
    yield case("prefix and window", lengths=two, window=_window((1, 1), (30, 30)), prefix_lens=_int32((1, 4), (7, 64)))
    yield case("prefix without mask", lengths=two, prefix_lens=_int32((2, 5), (10, 129)))
    yield case("softcap", softcap=2.0)
    yield case("softcap, causal, head 256", softcap=5.0, causal=True, dim=256, lengths=((6,), (150, 30)))
    yield case("grouped queries", core=True, heads=4, kv_heads=2, dim=64)
    yield case("one key head, causal", heads=6, kv_heads=1, causal=True, dim=80)
    yield case(
        "equal windows",
        lengths=((4,) * 3, (64,) * 40),
        dim=80,
        max_seqlen_q=lambda v, *_: v.size(4, 64),
        max_seqlen_k=lambda v, *_: v.size(4, 64),
    )
    many = tuple(tuple((7 * i) % n for i in range(count)) for n, count in ((5, 12), (37, 400)))
    yield case("many short sequences", lengths=many, dim=8, heads=1, kv_heads=1)  # type: ignore[arg-type]
    yield case("scale", scale=0.3, lengths=two)
    yield case("rope", rope=_rope, dim=80)
    yield case("rope in pairs", rope=_rope, rope_interleaved=True, dim=72)
    yield case("rope, own tables for k", rope=_rope, rope_k=_rope_k, **more_keys)
    yield case("without lse", return_lse=False)
    yield case("all empty", lengths=((0, 0), (0, 0)))
    yield case("no sequence", lengths=((), ()))
    yield Case("varlen_attention", "q, k, v side by side", varlen_attention, _strided)


def _media(
    v: Values, dim: int = 64, heads: int = 2, kv_heads: int = 2, kind: str = "index", **options: Any
) -> Arguments:
    """Text over images; "index": one image or none, "range": several or none, "own": sequence i sees segment i."""
    text, images = v.size((7, 3), (300, 129)), v.size((4, 0, 5), (577, 0, 64))
    if kind == "own":
        images = images[: len(text)]
    q, k, w, cu_q, cu_k = v.packed(text, images, heads=heads, kv_heads=kv_heads, dim=dim)
    index = None
    if kind == "index":
        index = v.integers(len(images) + 1, sum(text), dtype=torch.int32) - 1
    elif kind == "range":
        first, second = (v.integers(len(images) + 1, sum(text), dtype=torch.int32) for _ in range(2))
        index = torch.stack((torch.minimum(first, second), torch.maximum(first, second)), dim=1)
    elif kind == "none":
        index = torch.full((sum(text),), -1, dtype=torch.int32)
    return (q, k, w, cu_q, cu_k), {"media_index": index, "return_lse": True, **options}


def _cross() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("cross_attention", label, cross_attention, partial(_media, **options), core)

    yield case("one image a token", core=True)
    yield case("a range of images", core=True, kind="range", dim=128, heads=4, kv_heads=1)
    yield case("own segment", kind="own")
    yield case("no image at all", kind="none")
    for dim in (72, 80, 96):
        yield case(f"head {dim}", dim=dim)
    yield case("head 5, scale", dim=5, scale=0.4)


def _resampler(
    v: Values, contexts: tuple[Any, Any] = ((5, 0, 3), (729, 0, 130)), latents: tuple[int, int] = (3, 64), heads: int = 2,
    kv_heads: int = 2, dim: int = 64, own: bool = True, **options: Any,
) -> Arguments:  # fmt: skip
    lengths, count = v.size(*contexts), v.size(*latents)
    heads = v.size(min(heads, 2), heads)
    rows = len(lengths) * count
    k_latent, v_latent = (v.random(rows, kv_heads, dim) if own else None for _ in range(2))
    k, w = (v.random(sum(lengths), kv_heads, dim) for _ in range(2))
    args = (v.random(rows, heads, dim), k, w, k_latent, v_latent, borders(lengths))
    return args, {"num_latents": count, **options}


def _perceiver() -> Iterator[Case]:
    def case(label: str, core: bool = False, **options: Any) -> Case:
        return Case("perceiver_attention", label, perceiver_attention, partial(_resampler, **options), core)

    yield case("context and latents", core=True)
    yield case("context only", own=False)
    yield case("grouped queries, head 96", core=True, heads=4, kv_heads=1, dim=96)
    yield case("odd latents, head 80, scale", latents=(5, 33), dim=80, scale=0.2)
    yield case("no item", contexts=((), ()))


def cases() -> Iterator[Case]:
    """varlen_attention, cross_attention, perceiver_attention."""
    yield from _varlen()
    yield from _cross()
    yield from _perceiver()

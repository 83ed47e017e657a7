"""The plain expression of each op: what a user writes without vlmops, as a function and as a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlmops.profiling.gpu_check.loads import Load

__all__ = ["Expression", "Plain", "of"]

#: Arguments that change from call to call, by place and by name; the rest are weights, which a compiler may fold. None: all
#: floating tensors.
LIVE: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "linear": ((0,), ("residual",)),
    "linear_cross_entropy": ((0, 2), ()),
    "merge_tokens": ((0, 1, 2), ()),
    "mlp": ((0,), ()),
    "norms": ((0,), ("residual",)),
    "patchify": ((0,), ()),
    "quantized_linear": ((0,), ()),
}


@dataclass(frozen=True)
class Plain:
    """An expression with its arguments.

    Args:
        call: the function.
        args, kwargs: of it.
        live: the tensors among them that change from call to call.
        compared: whether its result has to be the op's; False where it computes in another precision.
        note: what there is to say of it.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    live: tuple[Tensor, ...]
    compared: bool = True
    note: str = ""

    def __call__(self) -> Any:
        return self.call(*self.args, **self.kwargs)


class Expression(nn.Module):
    """A plain expression whose weights are buffers and whose inputs are the live tensors, in their order."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.call = plain.call
        leaves, self.structure = pytree.tree_flatten((plain.args, plain.kwargs))
        places = {id(x): i for i, x in enumerate(plain.live)}
        self.sources: list[tuple[str, Any]] = []
        for i, leaf in enumerate(leaves):
            if id(leaf) in places:
                self.sources.append(("live", places[id(leaf)]))
            elif isinstance(leaf, Tensor):
                self.register_buffer(f"weight_{i}", leaf)
                self.sources.append(("weight", f"weight_{i}"))
            else:
                self.sources.append(("constant", leaf))

    def forward(self, *live: Tensor) -> Any:
        leaves = []
        for kind, value in self.sources:
            leaves.append(live[value] if kind == "live" else getattr(self, value) if kind == "weight" else value)
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.call(*args, **kwargs)


def of(load: Load, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plain:
    """The plain expression of a load on placed arguments. Attention is SDPA, whichever kernel of it torch picks.

    Raises:
        ValueError: a load with rotary tables.
    """
    if "rope" in kwargs:
        raise ValueError(f"{load.name}: no plain expression turns its queries and keys")
    if load.op in ("varlen_attention", "fp8_attention"):
        borders, causal = args[3], bool(kwargs.get("causal", False))
        call = packed(_lengths(borders), causal, _grouped(args))
        if load.op == "fp8_attention":
            return Plain(call, args[:3], {}, args[:3], compared=False, note="in the arguments' own precision")
        return Plain(call, args[:3], {}, args[:3])
    if load.op == "cross_attention":
        call = attend(visible(kwargs["media_index"], args[4]), _grouped(args))
        return Plain(call, args[:3], {}, args[:3])
    if load.op == "perceiver_attention":
        return Plain(resampler(args[5].shape[0] - 1, _grouped(args)), args[:5], {}, args[:5])
    if load.op == "quantized_linear":
        wide = args[1].dequantize(args[0].dtype)
        rounded = bool(kwargs.get("quantize_activations"))
        return Plain(F.linear, (args[0], wide), {}, (args[0],), not rounded, "on the weight dequantised before")
    return Plain(load.peers(args, kwargs)[0].call, args, kwargs, _live(load.op, args, kwargs))


def _live(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    if op not in LIVE:
        leaves = pytree.tree_leaves((args, kwargs))
        return tuple(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
    places, names = LIVE[op]
    return (*(args[i] for i in places), *(kwargs[name] for name in names if kwargs.get(name) is not None))


def _lengths(borders: Tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in borders.diff().tolist())


def _grouped(args: tuple[Any, ...]) -> bool:
    """Whether several query heads share one of keys: a Python value, which a tracer keeps as it is."""
    return int(args[0].shape[1]) != int(args[1].shape[1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, grouped: bool, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """[n, L, H, D] in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def packed(lengths: tuple[int, ...], causal: bool, grouped: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """SDPA on packed sequences [T, H, D]: a batch where all are of one length, else one call a sequence, as transformers does."""

    def batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = (len(lengths), lengths[0])
        return _sdpa(q.unflatten(0, size), k.unflatten(0, size), v.unflatten(0, size), grouped, causal).flatten(0, 1)

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qs, ks, vs = q.split(lengths), k.split(lengths), v.split(lengths)
        parts = [_sdpa(qs[i][None], ks[i][None], vs[i][None], grouped, causal)[0] for i in range(len(lengths))]
        return torch.cat(parts)

    return batch if len(set(lengths)) == 1 else each


def visible(index: Tensor, borders: Tensor) -> Tensor | None:
    """The dense mask [T, keys] of a media index [T]; None for one whose rows see everything, [T, 2]."""
    if index.dim() == 2:
        return None
    segment = torch.repeat_interleave(torch.arange(borders.shape[0] - 1, device=index.device), borders.diff().long())
    return index[:, None] == segment[None]


def attend(mask: Tensor | None, grouped: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """All queries [Tq, H, D] over all keys, under a dense mask that was made before."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q[None], k[None], v[None], grouped, mask=mask)[0]

    return run


def resampler(items: int, grouped: bool) -> Callable[..., Tensor]:
    """SDPA over [context; latents] concatenated, all contexts of one length."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(0, (items, -1))

    def run(q: Tensor, k: Tensor, v: Tensor, k_own: Tensor, v_own: Tensor) -> Tensor:
        keys, values = torch.cat((split(k), split(k_own)), 1), torch.cat((split(v), split(v_own)), 1)
        return _sdpa(split(q), keys, values, grouped).flatten(0, 1)

    return run

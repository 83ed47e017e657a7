"""Who a kernel is timed against: SDPA with each of its kernels, flash-attn, Liger, and what stock models run.

A peer takes the op's own arguments. What is not installed is named, never required.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Peer", "cross", "flash_attn", "liger_layer_norm", "liger_loss", "liger_rms_norm", "liger_rotary", "liger_swiglu", "masked",
    "packed", "resampler",
]  # fmt: skip

#: torch's fused kernels, by the names its documentation uses; each is asked for alone, so that one that cannot run says so.
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Args:
        name: of it.
        call: takes the op's arguments.
        missing: what it lacks here; empty if it can run.
        compared: whether its results have to be the op's; False where it works in another precision.
    """

    name: str
    call: Callable[..., Any]
    missing: str = ""
    compared: bool = True


def _installed(package: str) -> str:
    return "" if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """[n, L, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def _lengths(borders: Tensor) -> list[int]:
    return [int(n) for n in borders.diff().tolist()]


def packed(
    borders: Tensor, causal: bool = False, before: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> list[Peer]:
    """SDPA on packed sequences: one call where all are of one length, else one a sequence, as transformers splits them.

    Args:
        borders: cu_seqlens, read on the host once.
        before: turns q and k first (rotary embedding).
    """
    lengths = _lengths(borders)
    equal = len(set(lengths)) == 1

    def call(kernel: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
            if before is not None:
                q, k = before(q, k, **options)
            with sdpa_kernel(kernel):
                if equal:
                    batch = [x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v)]
                    return _attend(*batch, causal=causal).flatten(0, 1)
                parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
                return torch.cat([_attend(*(x[None] for x in part), causal=causal)[0] for part in parts])

        return run

    return [Peer(name, call(kernel)) for name, kernel in SDPA.items()]


def flash_attn(borders: Tensor, causal: bool = False) -> Peer:
    """flash-attn's packed attention (Dao 2023), where it is installed."""
    longest = max(_lengths(borders))

    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, **_: Any) -> Any:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_q, cu_q if cu_k is None else cu_k, longest, longest, causal=causal)

    return Peer("flash-attn", run, _installed("flash_attn"))


def cross() -> list[Peer]:
    """SDPA of all queries over all keys: what Mllama's rows that see every image compute."""

    def call(kernel: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            with sdpa_kernel(kernel):
                return _attend(q[None], k[None], v[None])[0]

        return run

    return [Peer(name, call(kernel)) for name, kernel in SDPA.items()]


def masked(index: Tensor, borders_k: Tensor) -> list[Peer]:
    """SDPA with the dense [text, keys] mask that Flamingo's and Idefics' code builds; the mask is made before."""
    segment = torch.repeat_interleave(
        torch.arange(borders_k.shape[0] - 1, device=index.device), borders_k.diff().long()
    )
    mask = index[:, None] == segment[None]

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
            return _attend(q[None], k[None], v[None], mask)[0]

    return [Peer("SDPA, dense mask", run)]


def resampler(items: int) -> list[Peer]:
    """SDPA over [context; latents] concatenated, as every resampler's code does; all items' contexts of one length."""

    def call(kernel: SDPBackend) -> Callable[..., Tensor]:
        def run(
            q: Tensor, k: Tensor, v: Tensor, k_own: Tensor | None, v_own: Tensor | None, *_: Any, **__: Any
        ) -> Tensor:
            q, k, v = (x.unflatten(0, (items, -1)) for x in (q, k, v))
            if k_own is not None and v_own is not None:
                k, v = (torch.cat((a, b.unflatten(0, (items, -1))), 1) for a, b in ((k, k_own), (v, v_own)))
            with sdpa_kernel(kernel):
                return _attend(q, k, v).flatten(0, 1)

        return run

    return [Peer(f"concatenate, {name}", call(kernel)) for name, kernel in SDPA.items()]


def _liger(name: str, call: Callable[..., Any]) -> Peer:
    return Peer(f"Liger {name}", call, _installed("liger_kernel"))


def liger_rms_norm() -> Peer:
    """Liger's RMSNorm with Llama's rounding."""

    def run(x: Tensor, weight: Tensor, *, eps: float, **_: Any) -> Any:
        from liger_kernel.transformers.functional import liger_rms_norm as norm

        return norm(x, weight, eps, in_place=False)

    return _liger("rms_norm", run)


def liger_layer_norm() -> Peer:
    """Liger's LayerNorm."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Any:
        from liger_kernel.transformers.functional import liger_layer_norm as norm

        return norm(x, weight, bias, eps)

    return _liger("layer_norm", run)


def liger_rotary() -> Peer:
    """Liger's RoPE, which works on [1, H, T, D] in place: it gets a copy."""

    def run(x: Tensor, cos: Tensor, sin: Tensor, *, k: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_rope

        q, k = (t.transpose(0, 1)[None].clone() for t in (x, k))
        q, k = liger_rope(q, k, cos[None], sin[None])
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return _liger("rope", run)


def liger_swiglu() -> Peer:
    """cuBLAS products around Liger's SiLU-times kernel."""

    def run(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, w_gate: Tensor,
        b_gate: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        from liger_kernel.transformers.functional import liger_swiglu as gated

        return F.linear(gated(F.linear(x, w_gate, b_gate), F.linear(x, w1, b1)), w2, b2)

    return _liger("swiglu", run)


def liger_loss() -> Peer:
    """Liger's fused linear cross entropy."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Any:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

        return loss(hidden, weight, targets)

    return _liger("fused_linear_cross_entropy", run)

"""linear -> activation -> linear, gated or not, with what surrounds it in a VLM.

LLaVA's projector, Qwen's merger, InternVL's pixel-shuffle projector, the MLP of every ViT and SwiGLU are this one op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.activations import check_activation
from vlmops.ops._shared.registry import Op
from vlmops.ops.linear import check_part, no_grad_wanted

__all__ = ["mlp"]

NORMS = ("layer_norm", "rms_norm")
Norm = tuple[str, Tensor | None, Tensor | None, float]


def _fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *args: Any) -> Tensor:
    gather = args[-4]
    rows: tuple[int, ...] = x.shape[:-1]
    if gather == "merge2x2":
        rows = (x.shape[0] // 4,)
    elif gather == "pixel_shuffle":
        rows = (x.shape[0], x.shape[1] // 4)
    return x.new_empty(*rows, w2.shape[0])


OP = Op(
    __name__,
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? b_gate, str activation, "
    "Tensor? residual, str norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str mid_norm, "
    "Tensor? mid_weight, Tensor? mid_bias, float mid_eps, Tensor? layer_scale, str gather, int height, int width, "
    "bool inference) -> Tensor",
    differentiable=["x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "residual", "norm_weight", "norm_bias",
                    "mid_weight", "mid_bias", "layer_scale"],
    fake=_fake,
    autocast=["x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "residual", "norm_weight", "norm_bias", "mid_weight",
              "mid_bias", "layer_scale"],
)  # fmt: skip


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    mid_norm: Norm | None = None,
    layer_scale: Tensor | None = None,
    gather: str | tuple[str, int, int] | None = None,
) -> Tensor:
    """residual + layer_scale * (mid_norm(h) W2^T + b2), h = act(g(norm(x)) W1^T + b1), or act(. Wg^T + bg) * (. W1^T + b1).

    Args:
        x: [..., C] floating point.
        w1: [H, K] with K = C, or 4 C with ``gather``.
        b1: [H] or None.
        w2: [N, H].
        b2: [N] or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".
        w_gate: [H, K]: the activated half of a gated MLP (SwiGLU with "silu").
        b_gate: [H] or None.
        residual: like the result, added last.
        norm: (kind, weight [C] or None, bias [C] or None, eps) before everything, kind "layer_norm" or "rms_norm".
        mid_norm: the same on h (EVA-02's sub-LN), weights [H].
        layer_scale: [N], multiplies the result before the residual (CaiT, DINOv2).
        gather: "merge2x2": x [T, C], each four consecutive rows become one row of 4 C (Qwen2-VL's merger, after the
            norm); ("pixel_shuffle", h, w): x [n, h * w, C], each 2x2 block becomes one row of 4 C (InternVL, Idefics3).

    Returns:
        [..., N] in x's dtype; [T / 4, N] or [n, h * w / 4, N] with ``gather``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: SwiGLU as in Shazeer (2020); sub-LN as in EVA-02 (Fang et al., 2023).
    """
    checks.check_tensor("x", x, layout="[..., C]")
    checks.check_floating("x", x)
    checks.check_tensor("w1", w1, dim=2, layout="[H, K]")
    checks.check_tensor("w2", w2, dim=2, layout="[N, H]")
    activation = check_activation(activation)
    kind, height, width = check_gather(x, gather)
    if x.dim() == 0:
        raise ValueError(f"x: expected [..., C], got {checks.describe(x)}")
    c, (h, k), n = x.shape[-1], w1.shape, w2.shape[0]
    if k != (4 * c if kind else c):
        raise ValueError(f"w1: expected [H, {4 * c if kind else c}] for x {list(x.shape)}, got {checks.describe(w1)}")
    cast = torch.is_autocast_enabled(x.device.type)
    parts = [("w1", w1, (h, k)), ("b1", b1, (h,)), ("w2", w2, (n, h)), ("b2", b2, (n,)), ("w_gate", w_gate, (h, k)),
             ("b_gate", b_gate, (h,)), ("layer_scale", layer_scale, (n,))]  # fmt: skip
    if b_gate is not None and w_gate is None:
        raise ValueError("b_gate: given without w_gate")
    (norm_kind, norm_w, norm_b, norm_eps), (mid_kind, mid_w, mid_b, mid_eps) = (
        check_norm("norm", norm),
        check_norm("mid_norm", mid_norm),
    )
    parts += [
        ("norm weight", norm_w, (c,)),
        ("norm bias", norm_b, (c,)),
        ("mid_norm weight", mid_w, (h,)),
        ("mid_norm bias", mid_b, (h,)),
    ]
    if residual is not None:
        rows = x.shape[:-1] if not kind else (x.shape[0] // 4,) if kind == "merge2x2" else (x.shape[0], x.shape[1] // 4)
        parts.append(("residual", residual, (*rows, n)))
    for name, t, shape in parts:
        check_part(name, t, shape, x, cast)
    inference = no_grad_wanted(x, *(t for _, t, _ in parts))
    return OP(
        x, w1, b1, w2, b2, w_gate, b_gate, activation, residual, norm_kind, norm_w, norm_b, norm_eps,
        mid_kind, mid_w, mid_b, mid_eps, layer_scale, kind, height, width, inference,
    )  # fmt: skip


def check_norm(name: str, norm: Norm | None) -> Norm:
    """The four parts of a norm argument; kind "" for none."""
    if norm is None:
        return "", None, None, 0.0
    if len(norm) != 4 or norm[0] not in NORMS:
        raise ValueError(
            f"{name}: expected (kind, weight, bias, eps) with kind one of {', '.join(NORMS)}, got {norm[:1]}"
        )
    if norm[0] == "rms_norm" and norm[2] is not None:
        raise ValueError(f"{name}: an rms_norm has no bias")
    return norm[0], norm[1], norm[2], float(norm[3])


def check_gather(x: Tensor, gather: str | tuple[str, int, int] | None) -> tuple[str, int, int]:
    """Kind ("" for none), height and width of a gather argument, checked against x."""
    if gather is None:
        return "", 0, 0
    if gather == "merge2x2":
        if x.dim() != 2 or x.shape[0] % 4:
            raise ValueError(f"x: expected [T, C] with T a multiple of 4 for merge2x2, got {checks.describe(x)}")
        return "merge2x2", 0, 0
    if isinstance(gather, tuple) and len(gather) == 3 and gather[0] == "pixel_shuffle":
        _, height, width = gather
        if height % 2 or width % 2 or x.dim() != 3 or x.shape[1] != height * width:
            raise ValueError(
                f"x: expected [n, {height} * {width}, C] with even sides for pixel_shuffle, got {checks.describe(x)}"
            )
        return "pixel_shuffle", int(height), int(width)
    raise ValueError(f'gather: expected "merge2x2", ("pixel_shuffle", h, w) or None, got {gather!r}')

"""Cross-entropy of hidden @ weight^T against targets without the logits matrix: the loss of every training stage.

At T tokens and V words the logits are T * V numbers, often the largest tensor of a training step. Here a bounded piece
of them exists at a time. Where gradients are wanted and the loss is one number, they are made in the same pass (three
matrix products instead of the four of a recomputing backward, the logits never twice), as Liger Kernel does; with
``reduction="none"`` the pieces are computed again in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = hidden.new_empty(hidden.shape[0] if reduction == "none" else (), dtype=work)
    like = (hidden, weight, hidden if bias is None else bias)
    return loss, *(x.new_empty(x.shape if want else 0) for x, want in zip(like, eager_grads, strict=True))


OP = Op(
    __name__,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, str reduction, float softcap, "
    "float label_smoothing, float z_loss, bool[] eager_grads) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiable=["hidden", "weight", "bias"],
    fake=_fake,
    autocast=["hidden", "weight", "bias"],
    saved_outputs=[1, 2, 3],
    tiny=lambda hidden, weight, *_: hidden.shape[0] * weight.shape[0] < 4096,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(hidden @ weight^T + bias, targets), the logits in pieces.

    Args:
        hidden: [T, K]; float32, bfloat16, float16 (float64 on reference and torch).
        weight: [V, K], as ``nn.Linear`` holds an output head.
        targets: int64 (or int32) [T], 0 <= target < V, or ``ignore_index``. On a CPU another number is an error, on a
            GPU it is clamped.
        bias: [V] or None.
        ignore_index: tokens with this target have loss and gradient 0 and do not count in the mean.
        reduction: "mean" over the tokens that count (NaN if none does, as in torch), "sum" or "none".
        softcap: s > 0 replaces a logit x by s * tanh(x / s) (Gemma 2).
        label_smoothing: share of the target spread evenly over all V words, in [0, 1].
        z_loss: factor of lse^2 added to each token's loss (PaLM's auxiliary loss).

    Returns:
        float32 (float64 for float64): a number, or [T] for "none".

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; on a CPU a target out of range.

    Source: ``torch.nn.functional.cross_entropy``; the fused pass of Liger Kernel (Hsu et al. 2024).
    """
    checks.check_tensor("hidden", hidden, dim=2, layout="[T, K]")
    checks.check_tensor("weight", weight, dim=2, layout="[V, K]")
    checks.check_tensor("targets", targets, dim=1, layout="[T]")
    checks.check_floating("hidden", hidden)
    t, k = hidden.shape
    v = weight.shape[0]
    if v == 0 or k == 0:
        raise ValueError(f"weight: expected [V, K] with V, K >= 1, got {checks.describe(weight)}")
    checks.check_shape("weight", weight, (v, k), f"[V, {k}] like hidden's last dimension")
    checks.check_shape("targets", targets, (t,), f"[{t}], one a row of hidden")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 [T], got {checks.describe(targets)}")
    params = [("weight", weight)]
    if bias is not None:
        checks.check_tensor("bias", bias, dim=1, layout="[V]")
        checks.check_shape("bias", bias, (v,), f"[{v}] like weight's rows")
        params.append(("bias", bias))
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, x in params:
        checks.check_floating(name, x)
        checks.check_same_device(name, x, hidden.device, "hidden")
        if not autocast:
            checks.check_dtype(name, x, hidden.dtype, "hidden")
    checks.check_same_device("targets", targets, hidden.device, "hidden")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected within [0, 1], got {label_smoothing}")
    eager = torch.is_grad_enabled() and reduction != "none"
    wants = [eager and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return OP(
        hidden,
        weight,
        bias,
        targets,
        int(ignore_index),
        reduction,
        float(softcap),
        float(label_smoothing),
        float(z_loss),
        wants,
    )[0]

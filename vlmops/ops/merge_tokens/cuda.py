"""CUDA C++: number the image tokens on the device, then copy rows (csrc/cuda/merge_tokens.cu); the gradients are gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, i32, i64, vector
from vlmops.ops._shared.strides import dense_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # rows are copied as they are
IDS = {
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
}
THREADS = 256
IDS_A_BLOCK = THREADS * 16


def supports(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    return cuda_runtime.why_not(inputs_embeds, DTYPES)


def forward(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> Tensor:
    """[T, C], contiguous."""
    plans, taken, _ = number_plans(input_ids, image_features.shape[0], image_token_id)
    out = torch.empty_like(inputs_embeds, memory_format=torch.contiguous_format)
    plans.append(select_plan(taken, dense_rows(image_features), dense_rows(inputs_embeds), out))
    cuda_runtime.run(plans)
    return out


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Image rows of the gradient go to image_features, the others to inputs_embeds."""
    input_ids, _, image_features, image_token_id = args
    (grad,) = grads
    if grad is None:
        return [None, None]
    grad, features = dense_rows(grad), image_features.shape[0]
    plans, taken, places = number_plans(input_ids, features, image_token_id)
    found: list[Tensor | None] = [None, None]
    if needs[0]:
        found[0] = embeds = grad.new_empty(grad.shape)
        plans.append(select_plan(taken, None, grad, embeds))
    if needs[1]:
        found[1] = rows = grad.new_empty(features, grad.shape[1])
        plans.append(select_plan(places, grad, None, rows))
    cuda_runtime.run(plans)
    return found


def number_plans(input_ids: Tensor, features: int, image_token_id: int) -> tuple[list[Plan], Tensor, Tensor]:
    """The launches, int32 [T], the feature row each token takes, and int32 [N], the token of each feature row; -1 for none."""
    tokens = input_ids.shape[0]
    ids = input_ids.contiguous()
    if ids.dtype == torch.bool:
        ids = ids.view(torch.uint8)
    elif ids.dtype not in IDS:
        ids = ids.long()
    if ids.device.type == "cpu":
        found = int((ids == image_token_id).sum())
        if found != features:
            raise ValueError(f"image_features: expected one row for each of {found} image tokens, got {features}")
    taken, places = (torch.empty(n, dtype=torch.int32, device=ids.device) for n in (tokens, features))
    blocks = max(1, -(-tokens // IDS_A_BLOCK))
    defines = (("T", IDS[ids.dtype]), ("VEC", min(4, vector([ids], [tokens]))))
    wanted, counts, plans = i64(image_token_id), None, []
    if blocks > 1:
        counts = torch.empty(blocks, dtype=torch.int32, device=ids.device)
        args = (ids, Out(counts), i64(tokens), wanted)
        plans.append(Plan("merge_tokens.cu", "merge_count", defines, (blocks, 1, 1), THREADS, args))
    number = (ids, counts, Out(taken), Out(places), i64(tokens), i32(features), wanted)
    plans.append(Plan("merge_tokens.cu", "merge_number", defines, (blocks, 1, 1), THREADS, number))
    return plans, taken, places


def select_plan(pick: Tensor, a: Tensor | None, b: Tensor | None, out: Tensor) -> Plan:
    """The launch that copies row pick[r] of a, or row r of b where that is negative (zeros without them), into out."""
    rows, width = out.shape
    vec = vector([a, b, out], [width])
    per_row = width // vec
    lanes = 32 if per_row <= 128 else THREADS
    return Plan(
        "merge_tokens.cu", "merge_select", (("UNIT", vec * out.element_size()), ("LANES", lanes)),
        (-(-rows * lanes // THREADS) if width else 0, 1, 1), THREADS,
        (pick, a, b, Out(out), *(i64(0 if t is None else t.stride(0) // vec) for t in (a, b)), i32(rows), i32(per_row)),
    )  # fmt: skip

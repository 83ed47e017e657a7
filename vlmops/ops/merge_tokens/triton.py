"""Triton: the image tokens are numbered on the device, every row is read and written once; the gradients are gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.merge_tokens.triton_kernels import number_kernel, select_rows_kernel


def supports(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    return triton_runtime.why_not(inputs_embeds)


def _numbers(input_ids: Tensor, features: int, image_token_id: int) -> tuple[Tensor, Tensor]:
    """int32 [T], the feature row each token takes, and int32 [N], the token of each feature row; -1 for none."""
    tokens = input_ids.shape[0]
    ids = input_ids.contiguous()
    if ids.dtype == torch.bool:
        ids = ids.view(torch.uint8)
    if ids.device.type == "cpu":
        found = int((ids == image_token_id).sum())
        if found != features:
            raise ValueError(f"image_features: expected one row for each of {found} image tokens, got {features}")
    taken, places = (torch.empty(n, dtype=torch.int32, device=ids.device) for n in (tokens, features))
    triton_runtime.launch(
        number_kernel, (1,), ids, taken, places, tokens, features, image_token_id, BLOCK=2048, warps=8
    )
    return taken, places


def _select(pick: Tensor, a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    """[len(pick), C]: rows of a by number, rows of b (zeros without it) where that is negative."""
    rows, width = pick.shape[0], like.shape[1]
    out = like.new_empty(rows, width)
    a, b = (None if x is None else dense_rows(x) for x in (a, b))

    def run(config: Config) -> None:
        triton_runtime.launch(
            select_rows_kernel, (cdiv(rows, config["BR"]),), pick, out if a is None else a, out if b is None else b, out,
            rows, width, 0 if a is None else a.stride(0), 0 if b is None else b.stride(0), HAS_A=a is not None,
            HAS_B=b is not None, config=config,
        )  # fmt: skip

    block = min(1024, next_power_of_two(width))
    configs = [Config.of(BR=br, BC=block, warps=4) for br in (2, 1, 4)]
    run(triton_runtime.pick("merge_tokens", f"{like.dtype} {width} {rows.bit_length()}", configs, run, like.device))
    return out


def forward(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> Tensor:
    """[T, C], contiguous."""
    taken, _ = _numbers(input_ids, image_features.shape[0], image_token_id)
    return _select(taken, image_features, inputs_embeds, inputs_embeds)


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Image rows of the gradient go to image_features, the others to inputs_embeds."""
    input_ids, _, image_features, image_token_id = args
    (grad,) = grads
    if grad is None:
        return [None, None]
    taken, places = _numbers(input_ids, image_features.shape[0], image_token_id)
    return [
        _select(taken, None, grad, grad) if needs[0] else None,
        _select(places, grad, None, grad) if needs[1] else None,
    ]

"""Plain PyTorch: an index copy where the places are known on the host (CPU), a gather and a select elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def forward(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> Tensor:
    """[T, C], contiguous."""
    if inputs_embeds.device.type == "cpu":
        places = _places(input_ids, image_token_id, image_features.shape[0])
        out = inputs_embeds.clone(memory_format=torch.contiguous_format)
        return out.index_copy_(0, places, image_features)
    return select(input_ids, inputs_embeds, image_features, image_token_id)


def _places(input_ids: Tensor, image_token_id: int, features: int) -> Tensor:
    """int64 [N]: rows of the image tokens (CPU). ValueError unless there are ``features`` of them."""
    places = (input_ids == image_token_id).nonzero().squeeze(1)
    if places.shape[0] != features:
        raise ValueError(f"image_features: expected one row for each of {places.shape[0]} image tokens, got {features}")
    return places


# -- any device, no host read of a device value ------------------------------------------------------------------------


def _numbered(input_ids: Tensor, image_token_id: int, features: int) -> tuple[Tensor, Tensor]:
    """For each token: whether it takes an image row, and how many image tokens there are up to and with it."""
    mask = input_ids == image_token_id
    count = mask.cumsum(0)
    return mask & (count <= features), count


def select(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> Tensor:
    """Every token looks up the image row of its number; those that take none keep their embedding."""
    features = image_features.shape[0]
    if features == 0:
        return inputs_embeds.clone(memory_format=torch.contiguous_format)
    taken, count = _numbered(input_ids, image_token_id, features)
    rows = image_features[(count - 1).clamp_(0, features - 1)]
    return torch.where(taken[:, None], rows, inputs_embeds)


def select_backward(
    grad: Tensor, input_ids: Tensor, image_token_id: int, features: int, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Row j of the features finds its token by bisection in the running count: a gather, no atomic adds."""
    if features == 0 or grad.shape[0] == 0:
        return [grad if needs[0] else None, grad.new_zeros(features, grad.shape[1]) if needs[1] else None]
    taken, count = _numbered(input_ids, image_token_id, features)
    embeds = grad.masked_fill(taken[:, None], 0.0) if needs[0] else None
    if not needs[1]:
        return [embeds, None]
    number = torch.arange(1, features + 1, device=grad.device)
    at = torch.searchsorted(count, number)  # first token with that many image tokens up to it
    found = grad[at.clamp(max=grad.shape[0] - 1)].masked_fill((number > count[-1])[:, None], 0.0)
    return [embeds, found]


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Image rows of the gradient go to image_features, the others to inputs_embeds."""
    input_ids, _, image_features, image_token_id = args
    (grad,) = grads
    features = image_features.shape[0]
    if grad is None:
        return [None, None]
    if grad.device.type != "cpu":
        return select_backward(grad, input_ids, image_token_id, features, needs)
    places = _places(input_ids, image_token_id, features)
    embeds = grad.clone(memory_format=torch.contiguous_format).index_fill_(0, places, 0.0) if needs[0] else None
    return [embeds, grad.index_select(0, places) if needs[1] else None]

"""Least memory traffic of the merge: every row that ends up in the result once, and the ids."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int) -> Cost:
    """Of the forward: a row of the result is read from one of the two."""
    return Cost(read=nbytes(input_ids) + nbytes(inputs_embeds), written=nbytes(inputs_embeds))

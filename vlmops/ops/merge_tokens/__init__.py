"""Image features into the text embeddings, at the places of the image tokens: where every VLM joins its two halves.

Boolean indexing and ``masked_scatter`` need the number of image tokens on the host; this op does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["merge_tokens"]

OP = Op(
    __name__,
    "(Tensor input_ids, Tensor inputs_embeds, Tensor image_features, int image_token_id) -> Tensor",
    differentiable=["inputs_embeds", "image_features"],
    fake=lambda ids, embeds, features, token: torch.empty_like(embeds, memory_format=torch.contiguous_format),
    tiny=lambda ids, embeds, *_: embeds.numel() < 4096,
)


def merge_tokens(
    input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor, image_token_id: int | None = None
) -> Tensor:
    """inputs_embeds with row j of image_features at the j-th image token.

    Args:
        input_ids: integer [...], the token numbers; or bool [...], True at image tokens.
        inputs_embeds: [..., C], float32, bfloat16, float16 or float64.
        image_features: [N, C] or [..., C] with N rows in all, one for each image token, in order (row-major over the
            batch). Cast to inputs_embeds' dtype.
        image_token_id: the number that marks an image token; None with a bool ``input_ids``.

    Returns:
        [..., C] in inputs_embeds' dtype, a new tensor. The gradient of image rows goes to image_features, the rest to
        inputs_embeds.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit; on a CPU also a number of image tokens other than N. On a GPU, where that
            number is not known without a sync, surplus image tokens keep their embedding and surplus features are
            unused.

    Source: transformers' ``LlavaModel.forward`` (``masked_scatter``).
    """
    checks.check_tensor("input_ids", input_ids, layout="[...]")
    checks.check_tensor("inputs_embeds", inputs_embeds, layout="[..., C]")
    checks.check_tensor("image_features", image_features, layout="[N, C]")
    checks.check_floating("inputs_embeds", inputs_embeds)
    checks.check_floating("image_features", image_features)
    if input_ids.is_floating_point() or input_ids.is_complex():
        raise TypeError(f"input_ids: expected integers or a bool mask, got {checks.describe(input_ids)}")
    masked = input_ids.dtype == torch.bool
    if masked != (image_token_id is None):
        expected = "None with a bool mask" if masked else "an int with token numbers"
        raise TypeError(f"image_token_id: expected {expected}, got {image_token_id!r}")
    shape = inputs_embeds.shape
    if not shape or input_ids.shape != shape[:-1]:
        raise ValueError(
            f"inputs_embeds: expected {[*input_ids.shape, 'C']} for input_ids, got {checks.describe(inputs_embeds)}"
        )
    if image_features.dim() < 2 or image_features.shape[-1] != shape[-1]:
        raise ValueError(f"image_features: expected [N, {shape[-1]}], got {checks.describe(image_features)}")
    for name, x in (("input_ids", input_ids), ("image_features", image_features)):
        checks.check_same_device(name, x, inputs_embeds.device, "inputs_embeds")
    features = image_features.to(inputs_embeds.dtype)
    if features.dim() != 2:
        features = features.flatten(0, -2)
    flat = inputs_embeds if len(shape) == 2 else inputs_embeds.reshape(-1, shape[-1])
    out = OP(input_ids.reshape(-1), flat, features, 1 if image_token_id is None else int(image_token_id))
    return out if len(shape) == 2 else out.view(shape)

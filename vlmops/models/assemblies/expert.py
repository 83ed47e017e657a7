"""Type C, CogVLM's way: image tokens stand in the sequence, and have weights of their own in every block of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmops import ops
from vlmops.images import Prepared
from vlmops.models.config import VLMConfig
from vlmops.models.language.expert import ExpertDecoder, vision_layout
from vlmops.models.vlm import VLM

__all__ = ["CogVLM2"]


class CogVLM2(VLM):
    """CogVLM2 (Hong et al. 2024): EVA02-E, the adapter of ``connectors.glu``, Llama 3 with a visual expert.

    Args:
        config: with a tower and a connector of kind "glu".

    Raises:
        ValueError: a config without them.
    """

    def __init__(self, config: VLMConfig) -> None:
        if config.vision is None or config.connector is None or config.connector.kind != "glu":
            raise ValueError('connector: expected one of kind "glu", and a tower')
        super().__init__(config, ExpertDecoder(config.decoder))

    def read(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        images: Prepared | Sequence[Sequence[Tensor]] | None = None,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the decoder is given.

        Args:
            ids, cu_seqlens: the prompts, packed.
            images: what ``prepare`` made, or lists of [3, H, W] for each prompt, as the authors' code has them; or
            pixel_values: [N, 3, H, W], the images of all prompts in their order.
            token_type_ids: [T], 1 at an image's tokens (begin and end included); None: those are the config's ``image_token``.

        Returns:
            ``inputs_embeds``, ``positions``, and with images ``is_image`` and ``image_tokens``.

        Raises:
            ValueError: images that do not fit the prompts.
        """
        if images is not None and pixel_values is not None:
            raise ValueError("images: expected either them or pixel_values")
        x = self.decoder.embed(ids)
        if images is None and pixel_values is None:
            return {"inputs_embeds": x}
        tiles: Prepared | Tensor | list[Tensor]
        if pixel_values is not None:
            tiles = pixel_values.to(self.dtype)
        elif isinstance(images, Prepared):
            tiles = images
        else:
            tiles = [image.to(self.device, self.dtype) for row in images or () for image in row]
        assert self.tower is not None and self.connector is not None
        seen = self.tower(tiles, layer=self.config.layer, patches_only=True)
        tokens, _ = self.connector(seen.tokens, seen.cu_seqlens, seen.grid_thw)
        lengths = [t * h * w // 4 + 2 for t, h, w in seen.grid_thw.tolist()]
        is_vision = ids == self.config.image_token if token_type_ids is None else token_type_ids == 1
        is_image, positions = vision_layout(is_vision, cu_seqlens, lengths)
        return {
            "inputs_embeds": ops.merge_tokens(is_vision, x, tokens),
            "positions": positions, "is_image": is_image, "image_tokens": sum(lengths) - len(lengths),
        }  # fmt: skip

"""Type C, Flamingo's way: the text stays as it is, and the decoder looks at the images between its blocks.

An image token is a token of the vocabulary whose place says from where on its image is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmops.images import Prepared
from vlmops.models.config import VLMConfig
from vlmops.models.language.cache import sequence_of
from vlmops.models.language.crossed import CrossedDecoder, media_index
from vlmops.models.vlm import VLM, Packed
from vlmops.ops._shared import checks

__all__ = ["FlamingoVLM"]


class FlamingoVLM(VLM):
    """Flamingo (Alayrac et al. 2022), OpenFlamingo (Awadalla et al. 2023), Idefics (Laurencon et al. 2023).

    Args:
        config: with ``cross`` and a tower; without a connector the tower's tokens are looked at.

    Raises:
        ValueError: a config without ``cross``.
    """

    def __init__(self, config: VLMConfig) -> None:
        if config.cross is None or config.vision is None:
            raise ValueError("cross: expected options of the cross-attention, and a tower")
        super().__init__(config, CrossedDecoder(config.decoder, config.cross))

    def read(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        images: Prepared | None = None,
        pixel_values: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the decoder is given.

        Args:
            ids, cu_seqlens: the prompts, packed.
            images: what ``prepare`` made of the images of all prompts in their order; or
            pixel_values: [N, 3, H, W], those images; or [B, n, 3, H, W], each prompt's filled up to n, as Idefics has them.
            image_attention_mask: [T, n], nonzero where a token sees one of its prompt's n images, which must be neighbours;
                with the latter alone. None: each token sees the last image in front of it.

        Returns:
            ``inputs_embeds``, and with images ``media``, ``cu_media`` and ``media_index``.

        Raises:
            ValueError: images that do not fit the prompts.
        """
        found: dict[str, Any] = {"inputs_embeds": self.decoder.embed(ids)}
        if images is not None and pixel_values is not None:
            raise ValueError("images: expected either them or pixel_values")
        if images is None and pixel_values is None:
            return found
        tiles: Prepared | Tensor
        if images is not None:
            tiles, index = images, self.sees(ids, cu_seqlens, len(images), None)
        else:
            assert pixel_values is not None
            padded = pixel_values.dim() == 5
            tiles = (pixel_values.flatten(0, 1) if padded else pixel_values).to(self.dtype)
            index = self.sees(ids, cu_seqlens, pixel_values.shape[0], pixel_values.shape[1] if padded else None)
            if image_attention_mask is not None:
                if not padded:
                    raise ValueError("image_attention_mask: expected pixel_values [B, n, 3, H, W] with it")
                index = _ranges(image_attention_mask, cu_seqlens, pixel_values.shape[1])
        assert self.tower is not None
        seen = self.tower(tiles, layer=self.config.layer, patches_only=not self.config.class_token)
        media, cu_media = seen.tokens, seen.cu_seqlens
        if self.connector is not None:
            media, cu_media = self.connector(media, cu_media, seen.grid_thw)
        return {**found, "media": media, "cu_media": cu_media, "media_index": index}

    def sees(self, ids: Tensor, cu_seqlens: Tensor, count: int, each: int | None) -> Tensor:
        """The number of the image each token sees, int32 [T].

        Args:
            ids, cu_seqlens: the prompts.
            count: images of all prompts together; or, with ``each``, prompts that have so many each.
            each: images of a prompt, the filling included; None: they lie behind each other.
        """
        token, prompts = self.config.image_token, cu_seqlens.shape[0] - 1
        if ids.device.type == "cpu":
            have = [int((part == token).sum()) for part in ids.split(cu_seqlens.diff().tolist())]
            if each is None and sum(have) != count:
                raise ValueError(f"images: expected {sum(have)} for the prompts' image tokens, got {count}")
            if each is not None and (prompts != count or max(have, default=0) > each):
                raise ValueError(f"pixel_values: expected those of {have} images, got {count} prompts of {each}")
        index = media_index(ids, cu_seqlens, token)
        if each is None:
            return index
        which = sequence_of(cu_seqlens, ids.shape[0])
        before = torch.cat([index.new_zeros(1), (ids == token).cumsum(0).int()])[cu_seqlens.long()][which]
        return torch.where(index >= 0, index - before + which.int() * each, -1)

    def _images(self, packed: Packed, images: Mapping[str, Any]) -> dict[str, Any]:
        given = super()._images(packed, images)
        mask = given.get("image_attention_mask")
        if mask is not None:
            checks.check_tensor("image_attention_mask", mask, dim=3, layout="[B, L, n]")
            given["image_attention_mask"] = packed.take(mask.movedim(-1, 0)).movedim(0, -1)
        return given


def _ranges(mask: Tensor, cu_seqlens: Tensor, each: int) -> Tensor:
    """[T, n] of each token's own images -> int32 [T, 2], which of all of them it sees."""
    if mask.shape[1] != each:
        raise ValueError(f"image_attention_mask: expected [B, L, {each}] as pixel_values, got {mask.shape[1]} images")
    mask = mask.bool()
    count, first = mask.sum(1), mask.byte().argmax(1)
    if mask.device.type == "cpu":
        at = torch.arange(each)
        if not torch.equal(mask, (at >= first[:, None]) & (at < (first + count)[:, None])):
            raise ValueError("image_attention_mask: expected that each token sees neighbouring images")
    first = first + sequence_of(cu_seqlens, mask.shape[0]) * each
    return torch.stack([first, first + count], 1).int()

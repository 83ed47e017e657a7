"""A decoder that looks at images between its blocks: Flamingo, Idefics. Its tokens stay text.

decoder = CrossedDecoder(config, cross)
index = media_index(ids, cu_seqlens, image_token)
hidden = decoder(ids, cu_seqlens, media=media, cu_media=cu_media, media_index=index)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.models.config import CrossConfig, DecoderConfig
from vlmops.models.language.block import Block, Packing
from vlmops.models.language.cache import KVCache, sequence_of
from vlmops.models.language.cross import GatedCrossAttention
from vlmops.models.language.decoder import Decoder
from vlmops.ops._shared import checks

__all__ = ["CrossedBlock", "CrossedDecoder", "Media", "MediaCache", "media_index"]


def media_index(ids: Tensor, cu_seqlens: Tensor, image_token: int, end_token: int | None = None) -> Tensor:
    """Which image each token sees: the last one that stands before it in its sequence, its own place included.

    Images are counted over the whole batch, in the order of their tokens. Nothing is read back to the host.

    Args:
        ids: integers [T], the tokens of all sequences.
        cu_seqlens: int32 [n + 1]: where each sequence starts.
        image_token: the token that stands for an image.
        end_token: behind it no image is seen until the next one (Idefics: the end of a text); None: no such token.

    Returns:
        int32 [T]; -1 where no image is seen.

    Source: Flamingo (Alayrac et al. 2022), section 2.3; Idefics' processor in transformers for ``end_token``.
    """
    checks.check_tensor("ids", ids, dim=1, layout="[T]")
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, ids.device)
    images, at = ids == image_token, torch.arange(ids.shape[0], device=ids.device)
    latest = torch.where(images, at, -1).cummax(0).values
    seen = latest >= cu_seqlens.long()[sequence_of(cu_seqlens, ids.shape[0])]
    if end_token is not None:
        ends = torch.where(ids == end_token, at, -1).cummax(0).values
        # Shifted by one: the end itself still sees.
        seen &= torch.cat([ends.new_full((min(1, ids.shape[0]),), -1), ends[:-1]]) <= latest
    return torch.where(seen, images.cumsum(0) - 1, -1).int()


@dataclass(frozen=True)
class Media:
    """The images of a batch as the blocks read them.

    Args:
        cu_seqlens: int32 [m + 1]: where each image's keys start.
        keys_values: layer -> k and v, each [Tm, heads, head_dim], of the blocks that have cross-attention in front.
    """

    cu_seqlens: Tensor
    keys_values: dict[int, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(x.numel() * x.element_size() for pair in self.keys_values.values() for x in pair)


class MediaCache(KVCache):
    """A cache that also keeps the prompts' images, and which of them each sequence's next tokens see.

    Attributes:
        media: None until the first prompt.
        sees: int32 [n], the image of each sequence's last token, or [n, 2], its range of images; None as ``media``.
    """

    media: Media | None = None
    sees: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, images included."""
        return super().nbytes + (0 if self.media is None else self.media.nbytes)

    def look(self, media: Media, media_index: Tensor, cu_seqlens: Tensor) -> None:
        """Keeps the images, and what the last new token of each sequence sees.

        Args:
            media: all images of the batch.
            media_index: int32 [T] or [T, 2], of the new tokens.
            cu_seqlens: integers [n + 1]: where each sequence's new tokens start; one that has none sees what it saw.
        """
        nothing = media_index.new_full((self.sequences, *media_index.shape[1:]), -1 if media_index.dim() == 1 else 0)
        old = nothing if self.sees is None or self.sees.dim() != nothing.dim() else self.sees
        if media_index.shape[0]:
            new = media_index[(cu_seqlens[1:].long() - 1).clamp(min=0)]
            has = cu_seqlens.diff() > 0
            old = torch.where(has if new.dim() == 1 else has[:, None], new, old)
        self.media, self.sees = media, old


@dataclass(frozen=True)
class CrossedPacking(Packing):
    """A ``Packing`` with the images; ``media_index``: int32 [T] or [T, 2], which of them each token sees."""

    media: Media | None = None
    media_index: Tensor | None = None


class CrossedBlock(Block):
    """A block, and in front of some the gated cross-attention."""

    def __init__(self, config: DecoderConfig, layer: int, cross: CrossConfig) -> None:
        super().__init__(config, layer)
        self.cross = GatedCrossAttention(cross) if cross.stands(layer) else None

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] -> the same."""
        if self.cross is not None:
            assert isinstance(packing, CrossedPacking) and packing.media is not None
            assert packing.media_index is not None
            kv, cu_media = packing.media.keys_values[self.layer], packing.media.cu_seqlens
            x = self.cross(x, kv, packing.cu_seqlens, cu_media, packing.media_index)
        return super().forward(x, packing)


class CrossedDecoder(Decoder):
    """A decoder with gated cross-attention in front of each so many blocks.

    Args:
        config: of the decoder.
        cross: of the cross-attention; its ``width`` is the decoder's.

    Raises:
        ValueError: options that do not go together.

    Source: Flamingo (Alayrac et al. 2022).
    """

    def __init__(self, config: DecoderConfig, cross: CrossConfig) -> None:
        if cross.width != config.width:
            raise ValueError(f"cross: expected width {config.width} as the decoder has, got {cross.width}")
        if cross.every < 1 or not 0 <= cross.first < config.layers:
            raise ValueError(f"cross: expected every >= 1 and first in [0, {config.layers}), got {cross}")
        super().__init__(config)
        self.cross = cross
        self.blocks = nn.ModuleList(CrossedBlock(config, i, cross) for i in range(config.layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        media: Tensor | None = None,
        cu_media: Tensor | None = None,
        media_index: Tensor | None = None,
        **packed: Any,
    ) -> Tensor:
        """Tokens to hidden states, as ``Decoder.forward``; besides:

        Args:
            media: [Tm, context_width], the features of all images of the batch; None: those in the cache, or none at all.
            cu_media: int32 [m + 1]: where each image's features start; with ``media``.
            media_index: int32 [T], the number of the image each token sees, -1 for none (exactly 0 comes of the attention
                then), or [T, 2], a half-open range of images. With images it is needed, but for tokens that follow those in
                a cache: they see what their sequence's last token saw.
            packed: ``longest``, ``prefix_lens``.

        Returns:
            [T, width].

        Raises:
            TypeError, ValueError: as ``Decoder.forward``; media without their cu_seqlens or index, or a second time for a cache.
        """
        x = self._input(input_ids, inputs_embeds)
        if cache is not None and not isinstance(cache, MediaCache):
            raise TypeError(f"cache: expected one of new_cache, got {type(cache).__name__}")
        cu = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device) if cu_seqlens is None else cu_seqlens
        seen = self._media(x, media, cu_media, cache)
        index = self._index(x, cu, media_index, media is not None, cache)
        packing = self.pack(x, cu, positions, cache=cache, **packed)
        shared = {field.name: getattr(packing, field.name) for field in fields(packing)}
        hidden = self.run(x, CrossedPacking(**shared, media=seen, media_index=index))
        if cache is not None and (media_index is not None or cache.media is None):
            cache.look(seen, index, cu)
        return hidden

    def new_cache(self, sequences: int, capacity: int = 256) -> MediaCache:
        """An empty cache in the decoder's dtype, on its device."""
        weight = self.embedding
        return MediaCache(self.config, sequences, capacity=capacity, device=weight.device, dtype=weight.dtype)

    def _media(self, x: Tensor, media: Tensor | None, cu_media: Tensor | None, cache: MediaCache | None) -> Media:
        """The keys and values of this forward's images."""
        if (media is None) != (cu_media is None):
            raise ValueError("media: expected together with cu_media")
        if cache is not None and cache.media is not None:
            if media is None:
                return cache.media
            if cache.media.cu_seqlens.shape[0] > 1:
                raise ValueError("media: the cache has its images already")
        width = self.cross.context_width
        if media is None or cu_media is None:
            media, cu_media = x.new_empty(0, width), torch.zeros(1, dtype=torch.int32, device=x.device)
        checks.check_shape("media", media, (None, width), f"[Tm, {width}]")
        checks.check_cu_seqlens("cu_media", cu_media, x.device)
        crosses = ((i, getattr(block, "cross", None)) for i, block in enumerate(self.blocks))
        pairs = {i: cross.keys_values(media) for i, cross in crosses if isinstance(cross, GatedCrossAttention)}
        return Media(cu_media, pairs)

    def _index(
        self, x: Tensor, cu: Tensor, media_index: Tensor | None, given: bool, cache: MediaCache | None
    ) -> Tensor:
        """Which image each token of this forward sees."""
        if media_index is not None:
            return media_index
        if given:
            raise ValueError("media_index: needed with media")
        if cache is not None and cache.sees is not None:
            return cache.sees[sequence_of(cu, x.shape[0])]
        return torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)

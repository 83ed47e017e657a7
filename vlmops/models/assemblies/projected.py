"""Types A and B: the tower's tokens, through a connector, take the places of the image tokens of the prompt.

With a frozen tower this is type A (LLaVA, LLaVA-NeXT), trained as a whole type B: ``VLM.train_only`` is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.images import Prepared
from vlmops.images.modes import anyres
from vlmops.models.assemblies.positions import mrope_positions
from vlmops.models.config import VLMConfig
from vlmops.models.vlm import VLM
from vlmops.ops._shared import checks

__all__ = ["ProjectedVLM"]

Grids = Sequence[tuple[int, int, int]]


class ProjectedVLM(VLM):
    """LLaVA, LLaVA-NeXT, Pixtral, Qwen2-VL, Qwen2.5-VL, PaliGemma, BLIP-2, Qwen-VL.

    Source: LLaVA (Liu et al. 2023) and the papers named with each preset.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.newline = nn.Parameter(torch.empty(config.decoder.width)) if config.newline else None

    def read(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        images: Prepared | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the decoder is given.

        Args:
            ids, cu_seqlens: the prompts, packed.
            images: what ``prepare`` made; or, in transformers' names:
            pixel_values: [n, 3, H, W]; [n, tiles, 3, H, W] (LLaVA-NeXT); flattened rows [N, K] (Qwen2-VL).
            image_sizes: int64 [n, 2]: height and width, original (LLaVA-NeXT) or without padding (Pixtral).
            image_grid_thw: int64 [n, 3], patches of each image (Qwen2-VL).
            pixel_values_videos, video_grid_thw: the same of videos.
            second_per_grid_ts: seconds between two of a video's time steps (Qwen2.5-VL).
            token_type_ids: [T], 0 at tokens that all see each other in front of each prompt (PaliGemma).

        Raises:
            TypeError, ValueError: images that do not fit the model or the prompt.
        """
        if images is not None and pixel_values is not None:
            raise ValueError("images: expected either them or pixel_values")
        config = self.config
        inside = config.image_token >= config.decoder.vocab
        x = self.decoder.embed(ids.masked_fill(ids == config.image_token, 0) if inside else ids)
        shown: list[tuple[Tensor, Grids]] = []
        for pixels, grid, token in (
            (images if images is not None else pixel_values, image_grid_thw, config.image_token),
            (pixel_values_videos, video_grid_thw, config.video_token),
        ):
            if pixels is None:
                continue
            if token is None:
                raise ValueError("pixel_values_videos: this model knows no videos")
            features, grids = self.features(pixels, grid, image_sizes)
            x = ops.merge_tokens(ids, x, features, token)
            shown.append((ids == token, grids))
        found: dict[str, Any] = {"inputs_embeds": x}
        if config.decoder.mrope and shown:
            films = pixel_values_videos is not None
            found["positions"] = self.positions(cu_seqlens, shown, films, second_per_grid_ts)
        if token_type_ids is not None:
            text = torch.cat([token_type_ids.new_zeros(1, dtype=torch.int32), (token_type_ids == 0).int().cumsum(0)])
            found["prefix_lens"] = text[cu_seqlens.long()].diff().int()
        return found

    def features(
        self, pixels: Prepared | Tensor, grid_thw: Tensor | None = None, image_sizes: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Image tokens as the decoder reads them, [N, width] of all images, and each tile's grid after the connector."""
        assert self.tower is not None and self.connector is not None
        config, sizes = self.config, pixels.image_sizes if isinstance(pixels, Prepared) else image_sizes
        tiles = pixels if isinstance(pixels, Prepared) else self.tiles(pixels.to(self.dtype), image_sizes)
        grid = None if grid_thw is None else grid_thw.cpu()
        seen = self.tower(tiles, grid, layer=config.layer, patches_only=not config.class_token)
        tokens, _ = self.connector(seen.tokens, seen.cu_seqlens, seen.grid_thw)
        if self.newline is not None:
            if sizes is None:
                raise ValueError("image_sizes: expected the images' heights and widths")
            tokens = self.arrange(tokens, sizes.tolist())
        merge = self.tower.config.merge_size
        return tokens, [(t, h // merge, w // merge) for t, h, w in seen.grid_thw.tolist()]

    def tiles(self, pixels: Tensor, image_sizes: Tensor | None) -> Tensor | list[Tensor]:
        """``pixel_values`` as the tower takes them: without padding, tiles of all images behind each other."""
        if pixels.dim() == 5 and self.newline is not None:
            checks.check_tensor("image_sizes", image_sizes, dim=2, layout="[n, 2]")
            assert image_sizes is not None
            counts = [self.canvas(h, w)[0] for h, w in image_sizes.tolist()]
            if len(counts) != pixels.shape[0] or max(counts, default=0) > pixels.shape[1]:
                raise ValueError(
                    f"pixel_values: expected {counts} tiles for these image_sizes, got {list(pixels.shape)}"
                )
            return torch.cat([x[:n] for x, n in zip(pixels, counts, strict=True)]) if counts else pixels.flatten(0, 1)
        if pixels.dim() == 4 and image_sizes is not None and self.newline is None:
            sizes = image_sizes.tolist()
            if len(sizes) != pixels.shape[0]:
                raise ValueError(f"image_sizes: expected [{pixels.shape[0]}, 2], got {list(image_sizes.shape)}")
            return [x[:, :h, :w] for x, (h, w) in zip(pixels, sizes, strict=True)]
        return pixels

    def canvas(self, height: int, width: int) -> tuple[int, tuple[int, int], tuple[int, int, int, int]]:
        """Tiles, rows and columns of tiles, and what is kept of the grid's tokens, of an AnyRes image."""
        vision = self.tower.config if self.tower is not None else None
        assert vision is not None and vision.image_size is not None
        plan = anyres(
            height, width, size=vision.image_size, patch_size=vision.patch_size, pinpoints=self.config.pinpoints,
            max_tiles=1 << 20,
        )  # fmt: skip
        grid: Any = plan.facts["grid"]
        kept: Any = plan.facts["unpadded"]
        return 1 + grid[0] * grid[1], grid, kept

    def arrange(self, tokens: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """AnyRes: the overview, then the grid of tiles row by row of the image, its padding left out, each row ended by newline.

        One gather: an index made on the host from the sizes alone. Source: LLaVA-NeXT (Liu et al. 2024).
        """
        assert self.tower is not None and self.tower.config.image_size is not None and self.newline is not None
        side = self.tower.config.image_size // self.tower.config.patch_size
        newline, begin, found = tokens.shape[0], 0, []
        for height, width in sizes:
            tiles, (rows, columns), (top, left, high, wide) = self.canvas(height, width)
            numbers = torch.arange(begin, begin + tiles * side * side)
            overview, grid = numbers[: side * side], numbers[side * side :].view(rows, columns, side, side)
            grid = grid.transpose(1, 2).reshape(rows * side, columns * side)[top : top + high, left : left + wide]
            ends = torch.full((high, 1), newline)
            found += [overview, torch.cat([grid, ends], 1).flatten()]
            begin += tiles * side * side
        if begin != newline:
            raise ValueError(f"image_sizes: their tiles have {begin} tokens, the pixels have {newline}")
        index = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        return torch.cat([tokens, self.newline[None].to(tokens.dtype)])[index.to(tokens.device)]

    def positions(
        self,
        cu_seqlens: Tensor,
        shown: list[tuple[Tensor, Grids]],
        films: bool,
        seconds: Tensor | Sequence[float] | None,
    ) -> Tensor:
        """M-RoPE positions [3, T] of prompts with images, videos (``films``: the last of ``shown``), or both."""
        grids = [grid for _, part in shown for grid in part]
        speed = self.config.tokens_per_second or 1
        intervals = [float(speed)] * len(grids)
        if films and seconds is not None and self.config.tokens_per_second:
            count = len(shown[-1][1])
            if len(seconds) != count:
                raise ValueError(f"second_per_grid_ts: expected one for each of {count} videos, got {len(seconds)}")
            intervals[-count:] = [speed * float(s) for s in seconds]
        is_image = shown[0][0]
        if len(shown) == 2:  # images and videos in the order of the prompts, which the host has to read
            is_image = is_image | shown[1][0]
            order = _order(shown[1][0][is_image].tolist(), [part for _, part in shown])
            grids, intervals = [grids[i] for i in order], [intervals[i] for i in order]
        return mrope_positions(is_image, cu_seqlens, grids, intervals)


def _order(is_film: Sequence[bool], grids: Sequence[Grids]) -> list[int]:
    """Numbers of images and videos (these counted behind those) in the order in which their tokens come."""
    found, done, at = [], [0, 0], 0
    while at < len(is_film):
        kind = int(is_film[at])
        if done[kind] == len(grids[kind]):
            raise ValueError("video_grid_thw: the prompts have more images or videos than there are grids")
        t, h, w = grids[kind][done[kind]]
        found.append(done[kind] + kind * len(grids[0]))
        at, done[kind] = at + t * h * w, done[kind] + 1
    return found

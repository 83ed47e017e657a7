"""Type D: one token sequence and one model. There is no vision tower: images are patches (Fuyu) or tokens (Chameleon).

``FuyuVLM`` projects raw patches where other models look up an embedding. ``ChameleonVLM`` turns images into tokens of its
vocabulary by an image tokenizer, and can say such tokens as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops import ops
from vlmops.images import Prepared
from vlmops.models.config import DecoderConfig, VLMConfig
from vlmops.models.language.decoder import IGNORED, Decoder
from vlmops.models.vision.vq import VqTokenizer
from vlmops.models.vlm import VLM
from vlmops.ops._shared import checks

__all__ = ["ChameleonDecoder", "ChameleonVLM", "FuyuVLM"]


class FuyuVLM(VLM):
    """Any number of patches, row by row with a newline token behind each row, through one linear layer (Bavishi et al. 2023)."""

    def read(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        *,
        images: Prepared | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_patches: Tensor | Sequence[Tensor] | None = None,
        image_patches_indices: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the decoder is given.

        Args:
            ids, cu_seqlens: the prompts, packed.
            images: what ``prepare`` made; or, in transformers' names:
            pixel_values: patches of all images in the order of the prompts, [N, P * P * 3] or [B, N, P * P * 3], or a list with
                [n, P * P * 3] of each: a patch's rows, columns, then colours; normalised.
            image_patches: the same by its older name.
            image_patches_indices: of older processors: which patch each token stands for. They count in order, which the image
                tokens among ``ids`` say as well: not looked at.

        Raises:
            TypeError, ValueError: images that do not fit the model or the prompt.
        """
        given = [x for x in (images, pixel_values, image_patches) if x is not None]
        if len(given) > 1:
            raise ValueError("images: expected one of images, pixel_values and image_patches")
        x = self.decoder.embed(ids)
        if given:
            x = ops.merge_tokens(ids, x, self.features(given[0]), self.config.image_token)
        return {"inputs_embeds": x}

    def features(self, patches: Prepared | Tensor | Sequence[Tensor]) -> Tensor:
        """Patches as ``read`` takes them, or images as ``prepare`` made them -> [N, width]."""
        weight, bias = self.connector.weight, self.connector.bias  # type: ignore[union-attr]
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        side = self.patch_size
        if isinstance(patches, Prepared):
            if len(patches) and (patches.patch_size, patches.order) != (side, "raster"):
                raise ValueError(
                    f"images: expected patches of {side} row by row, got {patches.patch_size}, {patches.order}"
                )
            # Bytes are normalised, cut and projected in one pass, by the same weights as a convolution has them.
            return patches.patchify(weight.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous(), bias)
        rows = patches if isinstance(patches, Tensor) else torch.cat(list(patches)) if patches else weight[:0]
        if rows.shape[-1] != weight.shape[1]:
            raise ValueError(f"pixel_values: expected [N, {weight.shape[1]}], got {checks.describe(rows)}")
        return ops.linear(rows.to(weight).flatten(0, -2), weight, bias)

    @property
    def patch_size(self) -> int:
        """Pixels on a side of a patch."""
        assert self.config.connector is not None
        return math.isqrt(self.config.connector.in_width // 3)


class ChameleonDecoder(Decoder):
    """A decoder some of whose tokens stand for pieces of images: code tokens.

    Args:
        config: of the decoder.
        codes: the token of each entry of the image codebook.

    ``emit_images``: whether it may say code tokens. If not, they have the least score there is and take no part in the loss,
    as in transformers; a model that is to learn to draw is trained with it on.
    """

    def __init__(self, config: DecoderConfig, codes: Sequence[int]) -> None:
        super().__init__(config)
        self.codes, self.emit_images = tuple(codes), False
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """As ``Decoder.logits``; code tokens have the least finite score unless ``emit_images``."""
        x = super().logits(hidden, cu_seqlens)
        return x if self.emit_images else x.index_fill(-1, self.tables(x.device)[0], torch.finfo(x.dtype).min)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """As ``Decoder.cross_entropy``; unless ``emit_images`` among the other tokens alone, and code tokens are not learnt.

        That copies the others' rows of the output projection.
        """
        if self.emit_images:
            return super().cross_entropy(hidden, targets, reduction)
        _, others, number = self.tables(hidden.device)
        targets = torch.where(targets == IGNORED, IGNORED, number[targets.clamp(min=0)])
        return ops.linear_cross_entropy(hidden, self.output[others], targets, ignore_index=IGNORED, reduction=reduction)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """int64: the code tokens in the codebook's order; all other tokens; each token's number among those, -100 without one.

        Made when first asked for, since a model may be built on the meta device.
        """
        if torch.compiler.is_compiling():
            return self._make(device)
        if self._kept is None or self._kept[0].device != device:
            with torch.inference_mode(False):  # an inference tensor could not be used in training later
                self._kept = self._make(device)
        return self._kept

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.tensor(self.codes, dtype=torch.int64, device=device)
        other = torch.ones(self.config.vocab, dtype=torch.bool, device=device).index_fill(0, codes, False)
        return codes, other.nonzero()[:, 0], torch.where(other, other.cumsum(0) - 1, IGNORED)


class ChameleonVLM(VLM):
    """An image is ``config.vq.tokens`` code tokens, of the same vocabulary as text (Chameleon team 2024).

    The published image tokenizer ends at the codes: neither here nor in transformers can those that the model says become pixels.

    Raises:
        ValueError: a config without image tokenizer, or whose ``codes`` are not a token of the vocabulary for each of its codes.
    """

    def __init__(self, config: VLMConfig) -> None:
        wanted, different = 0 if config.vq is None else config.vq.codes, set(config.codes)
        if config.vq is None or len(config.codes) != wanted or len(different) != wanted:
            raise ValueError(f"codes: expected a token for each of {wanted} codes, got {len(different)} tokens")
        if not all(0 <= token < config.decoder.vocab for token in different):
            raise ValueError(f"codes: expected tokens of a vocabulary of {config.decoder.vocab}")
        super().__init__(config, ChameleonDecoder(config.decoder, config.codes))
        self.tower = VqTokenizer(config.vq)  # type: ignore[assignment]

    def read(
        self, ids: Tensor, cu_seqlens: Tensor, *, images: Prepared | None = None, pixel_values: Tensor | None = None
    ) -> dict[str, Any]:
        """What the decoder is given: embeddings of tokens and nothing else.

        Args:
            ids, cu_seqlens: the prompts, packed, with ``config.vq.tokens`` image tokens for each image.
            images: what ``prepare`` made; or, in transformers' name:
            pixel_values: [n, 3, H, W], normalised.

        Raises:
            ValueError: images that do not fit the model or the prompt.
        """
        if images is not None and pixel_values is not None:
            raise ValueError("images: expected either them or pixel_values")
        if images is not None:
            made = images.pixel_values()
            pixel_values = made if isinstance(made, Tensor) else torch.stack(made)
        return {"inputs_embeds": self.decoder.embed(ids if pixel_values is None else self.spell(ids, pixel_values))}

    def spell(self, ids: Tensor, pixel_values: Tensor) -> Tensor:
        """int64 [T]: ids with the images' code tokens in the places of the image tokens; arguments as for ``read``."""
        tokens = self.code_tokens(pixel_values).flatten()
        places = ids == self.config.image_token
        if ids.is_cpu and not torch.compiler.is_compiling() and int(places.sum()) != tokens.shape[0]:
            raise ValueError(
                f"pixel_values: have {tokens.shape[0]} tokens, the prompts {int(places.sum())} image tokens"
            )
        if not tokens.shape[0]:
            return ids.long()
        number = (places.cumsum(0) - 1).clamp(0, tokens.shape[0] - 1)
        return torch.where(places, tokens[number], ids.long())

    @torch.no_grad()
    def code_tokens(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, H, W] -> int64 [n, tokens of an image]; the nearest code has no gradient."""
        assert isinstance(self.tower, VqTokenizer)
        codes: Tensor = self.tower(pixel_values.to(self.tower.codebook))
        return self.drawing.tables(codes.device)[0][codes]

    def image_codes(self, ids: Tensor) -> Tensor:
        """The images among tokens, as entries of the codebook.

        Args:
            ids: integers [L] or [B, L], as ``generate`` gives them. Code tokens that stand together are one image or several.

        Returns:
            int64 [n, config.vq.tokens] on the CPU, in their order.

        Raises:
            ValueError: a run of code tokens that is no whole number of images.
        """
        assert self.config.vq is not None
        entry = {token: code for code, token in enumerate(self.config.codes)}
        size, found = self.config.vq.tokens, []
        for row in (ids if ids.dim() > 1 else ids[None]).tolist():
            run: list[int] = []
            for token in (*row, -1):
                if token in entry:
                    run.append(entry[token])
                    continue
                if len(run) % size:
                    raise ValueError(
                        f"ids: expected images of {size} code tokens each, got {len(run)} of them in a row"
                    )
                found += run
                run = []
        return torch.tensor(found, dtype=torch.int64).view(-1, size)

    def generate(self, *args: Any, emit_images: bool | None = None, **options: Any) -> Tensor:
        """As ``VLM.generate``.

        Args:
            args, options: of ``VLM.generate``.
            emit_images: whether code tokens may be among the answers; None: as ``decoder.emit_images`` says, at first False.
        """
        before = self.drawing.emit_images
        self.drawing.emit_images = before if emit_images is None else emit_images
        try:
            return super().generate(*args, **options)
        finally:
            self.drawing.emit_images = before

    @property
    def drawing(self) -> ChameleonDecoder:
        """The decoder by its own type."""
        assert isinstance(self.decoder, ChameleonDecoder)
        return self.decoder

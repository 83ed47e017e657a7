"""A decoder with a second set of weights for the tokens of images: CogVLM's visual expert.

Attention is one for all tokens, causal; projections and MLP of a token are those of its kind. The two kinds go through the blocks
as two packed tensors, so each product has the rows it needs and no mask.

    expert, positions = vision_layout(is_vision, cu_seqlens, lengths)
    hidden = decoder(None, cu_seqlens, positions, inputs_embeds=x, is_image=expert, image_tokens=count)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import DecoderConfig
from vlmops.models.language.block import Block, Packing
from vlmops.models.language.cache import sequence_of
from vlmops.models.language.decoder import Decoder
from vlmops.ops._shared import checks

__all__ = ["Expert", "ExpertBlock", "ExpertDecoder", "Rows", "vision_layout"]


def vision_layout(is_vision: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens the visual expert takes, and everyone's position.

    An image's tokens stand together; the first is a learned begin, the last a learned end, which is the language model's
    nevertheless. All tokens between the two share one position. Nothing is read back to the host.

    Args:
        is_vision: bool [T], the tokens of images, begin and end included.
        cu_seqlens: int32 [n + 1]: where each sequence starts.
        lengths: tokens of each image, of all sequences in their order (host).

    Returns:
        expert: bool [T], as many as ``sum(lengths) - len(lengths)``; positions: int64 [T].

    Source: CogVLM (Wang et al. 2023) and the code of CogVLM2 (Hong et al. 2024): ``get_expert_mask``, ``build_position_ids``.
    """
    checks.check_tensor("is_vision", is_vision, dim=1, layout="[T]")
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, is_vision.device)
    if any(n < 1 for n in lengths):
        raise ValueError(f"lengths: expected at least one token an image, got {list(lengths)}")
    places = [i for n in lengths for i in range(n)] or [0]
    left = [n - 1 - i for n in lengths for i in range(n)] or [0]
    device, tokens = is_vision.device, is_vision.shape[0]
    behind, ahead = torch.tensor([places, left]).to(device)  # tokens of the same image on either side
    number = (is_vision.cumsum(0) - 1).clamp(0, behind.shape[0] - 1)
    expert = is_vision & (ahead[number] > 0)
    stays = expert & (behind[number] > 1)
    counted = (~stays).cumsum(0)
    start = cu_seqlens.long()[sequence_of(cu_seqlens, tokens)]
    return expert, counted - counted[start.clamp(max=max(0, tokens - 1))]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of each kind stand in the packed order.

    Rows are written to where they belong rather than read from there: so a gradient is a gather, not a sum.

    Args:
        text, image: int64 [T - I] and [I].
        sorted: int64 [T]: each token's place in [text; image].
    """

    text: Tensor
    image: Tensor
    sorted: Tensor

    @classmethod
    def of(cls, is_image: Tensor, count: int) -> Rows:
        """Of a mask with so many True."""
        tokens = is_image.shape[0]
        order = torch.argsort(is_image.byte(), stable=True)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(tokens, device=order.device))
        text, image = order.split([tokens - count, count])
        return cls(text, image, place)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """[T - I, C] and [I, C] -> [T, C]."""
        out = text.new_empty(self.sorted.shape[0], text.shape[1])
        return out.index_copy_(0, self.text, text).index_copy_(0, self.image, image)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, C] -> [T - I, C] and [I, C]."""
        out = x.new_empty(x.shape).index_copy_(0, self.sorted, x)
        text, image = out.split([self.text.shape[0], self.image.shape[0]])
        return text, image


class Expert(nn.Module):
    """The image tokens' own weights of a block, shaped as the block's."""

    def __init__(self, config: DecoderConfig, qkv_bias: bool) -> None:
        super().__init__()
        width, inner, outer = config.width, config.heads * config.dim, config.groups * config.dim
        self.qkv = nn.Parameter(torch.empty(inner + 2 * outer, width))
        self.qkv_bias = nn.Parameter(torch.empty(inner + 2 * outer)) if qkv_bias else None
        self.o = nn.Parameter(torch.empty(width, inner))
        self.w_gate = nn.Parameter(torch.empty(config.mlp_width, width))
        self.w_up = nn.Parameter(torch.empty(config.mlp_width, width))
        self.w_down = nn.Parameter(torch.empty(width, config.mlp_width))


class ExpertBlock(Block):
    """A block whose image tokens have weights of their own; the two norms are common."""

    def __init__(self, config: DecoderConfig, layer: int, qkv_bias: bool) -> None:
        super().__init__(config, layer)
        self.expert = Expert(config, qkv_bias)

    def both(self, text: Tensor, image: Tensor, rows: Rows, packing: Packing) -> tuple[Tensor, Tensor]:
        """text [T - I, width], image [I, width] -> the same."""
        assert self.norm1 is not None and self.norm2 is not None
        own = self.expert
        qkv_text = ops.linear(self.norm1(text), self.qkv, self.qkv_bias)
        qkv_image = ops.linear(self.norm1(image), own.qkv, own.qkv_bias)
        seen_text, seen_image = rows.split(self.mix(rows.join(qkv_text, qkv_image), packing))
        text = ops.linear(seen_text, self.o, residual=text)
        image = ops.linear(seen_image, own.o, residual=image)
        out = ops.mlp(
            image, own.w_up, None, own.w_down, None, activation=self.config.activation, w_gate=own.w_gate,
            norm=self.norm2.spec, residual=image,
        )  # fmt: skip
        return self.feed(text, text), out


class ExpertDecoder(Decoder):
    """A Llama with a visual expert in each block.

    Args:
        config: of the language model.
        expert_bias: whether the experts' query, key and value projections have a bias (CogVLM2: yes; CogVLM: no).

    Raises:
        ValueError: options that do not go together, or that the expert does not have.

    Source: CogVLM (Wang et al. 2023); CogVLM2 (Hong et al. 2024).
    """

    def __init__(self, config: DecoderConfig, expert_bias: bool = True) -> None:
        plain = replace(
            config, gated=True, norm="rms_norm", norm_offset=0.0, sandwich=False, norm_after=False, qk_norm="",
            o_bias=False, mlp_bias=False,
        )  # fmt: skip
        if plain != config:
            raise ValueError(f"config: a visual expert needs a block like Llama's, got {config}")
        super().__init__(config)
        self.blocks = nn.ModuleList(ExpertBlock(config, i, expert_bias) for i in range(config.layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        is_image: Tensor | None = None,
        image_tokens: int | None = None,
        **packed: Any,
    ) -> Tensor:
        """Tokens to hidden states, as ``Decoder.forward``; besides:

        Args:
            is_image: bool [T], the tokens that take the expert (``vision_layout``); None: none of them.
            image_tokens: how many those are, known on the host from the images' sizes; None: counted, which waits for a GPU.
            packed: ``cache``, ``longest``, ``prefix_lens``.

        Returns:
            [T, width].

        Raises:
            TypeError, ValueError: as ``Decoder.forward``; a mask of another length, or (on a CPU) another count.
        """
        x = self._input(input_ids, inputs_embeds)
        packing = self.pack(x, cu_seqlens, positions, **packed)
        count = 0 if is_image is None else self._count(is_image, x.shape[0], image_tokens)
        if is_image is None or count == 0:
            return self.run(x, packing)
        rows = Rows.of(is_image, count)
        text, image = rows.split(self.placed(x, packing))
        for block in self.blocks:
            assert isinstance(block, ExpertBlock)
            text, image = block.both(text, image, rows, packing)
        return self.finish(rows.join(text, image), packing)

    @staticmethod
    def _count(is_image: Tensor, tokens: int, image_tokens: int | None) -> int:
        checks.check_tensor("is_image", is_image)
        checks.check_shape("is_image", is_image, (tokens,), f"[{tokens}], one a token")
        if is_image.dtype != torch.bool:
            raise TypeError(f"is_image: expected bool [{tokens}], got {checks.describe(is_image)}")
        if image_tokens is not None and (is_image.device.type != "cpu" or torch.compiler.is_compiling()):
            return image_tokens
        found = int(is_image.sum())
        if image_tokens not in (None, found):
            raise ValueError(f"image_tokens: expected {found} as is_image has, got {image_tokens}")
        return found

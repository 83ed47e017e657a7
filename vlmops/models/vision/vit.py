"""One vision transformer; ViT, CLIP, SigLIP, EVA-CLIP, DINOv2 and the towers of Qwen2-VL, Qwen2.5-VL and Pixtral are its options.

The tokens of all images lie behind each other, [T, width]: images of any number and size share each product, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.images import Prepared
from vlmops.models.config import VisionConfig
from vlmops.models.norm import Norm
from vlmops.models.vision.check import check
from vlmops.models.vision.plan import Plan, plan
from vlmops.models.vision.positions import learned_positions

__all__ = ["Block", "VisionOutput", "VisionTransformer"]

Images = Tensor | Sequence[Tensor] | Prepared


@dataclass(frozen=True)
class VisionOutput:
    """What a tower says about a batch.

    Args:
        tokens: [T, width] ([T, width * k] of k layers), those of all images behind each other.
        cu_seqlens: int32 [images + 1] on the device: where each image starts.
        grid_thw: int64 [images, 3] on the CPU: patches of each image in time, height and width.
        class_tokens: [images, width], or None in a tower without.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    grid_thw: Tensor
    class_tokens: Tensor | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or the norms behind (``norm_after``)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, inner, hidden = config.width, config.heads * config.dim, config.mlp_width
        self.config = config

        def vector(n: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(n)) if wanted else None

        self.norm1 = Norm(width, config.norm_eps, config.norm)
        self.qkv = nn.Parameter(torch.empty(3 * inner, width))  # queries, keys, values
        self.qkv_bias = vector(3 * inner, "qkv" in config.attention_bias)
        self.q_bias = vector(inner, "qv" in config.attention_bias)
        self.v_bias = vector(inner, "qv" in config.attention_bias)
        self.inner_norm = Norm(inner, config.norm_eps, config.norm) if config.sub_norm else None
        self.proj = nn.Parameter(torch.empty(width, inner))
        self.proj_bias = vector(width, "o" in config.attention_bias)
        self.scale1 = vector(width, config.layer_scale)

        self.norm2 = Norm(width, config.norm_eps, config.norm)
        self.w1, self.b1 = nn.Parameter(torch.empty(hidden, width)), vector(hidden, config.mlp_bias)
        self.w_gate = nn.Parameter(torch.empty(hidden, width)) if config.gated else None
        self.b_gate = vector(hidden, config.gated and config.mlp_bias)
        self.mid_norm = Norm(hidden, config.norm_eps, config.norm) if config.sub_norm else None
        self.w2, self.b2 = nn.Parameter(torch.empty(width, hidden)), vector(width, config.mlp_bias)
        self.scale2 = vector(width, config.layer_scale)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [T, width]; cu_seqlens int32 [n + 1], the longest of its sequences; rope (cos, sin) [T, head_dim] -> [T, width]."""
        after = self.config.norm_after
        seen = self.attend(x if after else self.norm1(x), cu_seqlens, longest, rope)
        if after:
            x = x + self.norm1(ops.linear(seen, self.proj, self.proj_bias))
        elif self.scale1 is not None:
            x = torch.addcmul(x, ops.linear(seen, self.proj, self.proj_bias), self.scale1)
        else:
            x = ops.linear(seen, self.proj, self.proj_bias, residual=x)
        out = ops.mlp(
            x, self.w1, self.b1, self.w2, self.b2, activation=self.config.activation, w_gate=self.w_gate,
            b_gate=self.b_gate, residual=None if after else x, norm=None if after else self.norm2.spec,
            mid_norm=None if self.mid_norm is None else self.mid_norm.spec, layer_scale=self.scale2,
        )  # fmt: skip
        return x + self.norm2(out) if after else out

    def attend(self, x: Tensor, cu_seqlens: Tensor, longest: int, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention inside each sequence, up to its output projection: [T, width] -> [T, heads * head_dim]."""
        bias: Tensor | None = self.qkv_bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = ops.linear(x, self.qkv, bias).view(-1, 3, self.config.heads, self.config.dim).unbind(1)
        out = ops.varlen_attention(
            q, k, v, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, rope=rope,
            rope_interleaved=self.config.rope == "interleaved",
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out.flatten(1) if self.inner_norm is None else self.inner_norm(out.flatten(1))


class VisionTransformer(nn.Module):
    """Patches, positions, blocks, norms.

    Args:
        config: the variant.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        width, patch, frames = config.width, config.patch_size, config.temporal_patch_size
        kernel = (frames, patch, patch) if frames > 1 else (patch, patch)
        self.patch = nn.Parameter(torch.empty(width, 3, *kernel))
        self.patch_bias = nn.Parameter(torch.empty(width)) if config.patch_bias else None
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.registers = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        places = (config.image_size or 0) // patch
        rows = places * places + int(config.class_token)  # the class token's comes first
        self.position = nn.Parameter(torch.empty(rows, width)) if "learned" in config.position else None
        self.pre_norm = Norm(width, config.norm_eps, config.norm) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.post_norm = Norm(width, config.norm_eps, config.norm) if config.post_norm else None

    def forward(
        self,
        images: Images,
        grid_thw: Tensor | None = None,
        *,
        layer: int | Sequence[int] | None = None,
        patches_only: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> VisionOutput:
        """Images to tokens.

        Args:
            images: what ``vlmops.images.prepare`` gives; or [n, 3, H, W], [n, frames, 3, H, W], a list of [3, H, W] of mixed
                sizes, or Qwen's flattened rows [N, K]; uint8 or floating point, on the tower's device.
            grid_thw: int64 [n, 3] on the CPU, with flattened rows only.
            layer: which hidden state: 0 is the input of the first block, -1 the output of the last, -2 that of the one before (as
                LLaVA takes it; the last block is not run then). Several: side by side. None: the last one through ``post_norm``.
            patches_only: leave out the class token and registers of ``tokens``.
            mean, std: for pixels not normalised yet, as ``vlmops.ops.patchify`` has them.

        Raises:
            TypeError, ValueError: images that do not fit the tower, a layer it does not have.
        """
        wanted = self.which(layer)
        x, made = self.embed(images, grid_thw, mean, std)
        states = {0: x} if 0 in wanted else {}
        for i in range(max(wanted)):
            if made.cu_windows is None or i in self.config.full_layers:
                x = self.blocks[i](x, made.cu_frames, made.longest_frame, made.rope)
            else:
                x = self.blocks[i](x, made.cu_windows, made.longest_window, made.rope)
            if i + 1 in wanted:
                states[i + 1] = x
        if layer is None and self.post_norm is not None:
            x = self.post_norm(x)
        else:
            x = states[wanted[0]] if len(wanted) == 1 else torch.cat([states[i] for i in wanted], 1)
        if made.back is not None:
            x = x[made.back]
        classes = None if self.class_token is None else x[made.cu_images[:-1]]
        if not patches_only:
            return VisionOutput(x, made.cu_images, made.grid_thw, classes)
        front = int(self.config.class_token) + self.config.registers
        if front:
            x = _join([part[front:] for part in x.split(made.lengths)], x)
        return VisionOutput(x, made.cu_patches, made.grid_thw, classes)

    def embed(
        self,
        images: Images,
        grid_thw: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> tuple[Tensor, Plan]:
        """What the first block reads, [T, width], in window order where there are windows; arguments as for ``forward``."""
        config = self.config
        if isinstance(images, Prepared):
            have, want = (images.patch_size, images.order), (config.patch_size, self.order)
            if len(images) and have != want:
                raise ValueError(f"images: expected patch size and order {want}, got prepared ones of {have}")
            mean, std, images = images.mean, images.std, images.pixels
        made = plan(config, self.grids(images, grid_thw), self.patch.device)
        position = None
        if self.position is not None:
            table = self.position[1:] if config.class_token else self.position
            position = learned_positions(table, made.grids, antialias=config.antialias)
        x, _ = ops.patchify(
            images, self.patch, self.patch_bias, patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size, mean=mean, std=std, grid_thw=grid_thw, position=position,
            order=self.order, crop=config.merge_size == 1,
        )  # fmt: skip
        front = []
        if self.class_token is not None:
            front.append((self.class_token if self.position is None else self.class_token + self.position[0])[None])
        if self.registers is not None:
            front.append(self.registers)
        if front:
            parts = x.split([h * w for _, h, w in made.grids])
            x = _join([row for part in parts for row in (*front, part)], x)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return (x if made.order is None else x[made.order]), made

    @property
    def order(self) -> str:
        """``patchify``'s order of the patches."""
        return "merge2x2" if self.config.merge_size == 2 else "raster"

    def grids(self, images: Tensor | Sequence[Tensor], grid_thw: Tensor | None) -> tuple[tuple[int, int, int], ...]:
        """Patches of each image in time, height and width.

        Raises:
            TypeError, ValueError: no images, or a size that cannot be cut into the tower's patches.
        """
        frames, unit = self.config.temporal_patch_size, self.config.patch_size * self.config.merge_size
        if isinstance(images, Tensor) and images.dim() == 2:
            if grid_thw is None or grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
                raise ValueError(f"grid_thw: expected [n, 3] with flattened rows {list(images.shape)}, got {grid_thw}")
            return tuple((t, h, w) for t, h, w in grid_thw.tolist())
        if isinstance(images, Tensor):
            shapes = [images.shape[1:]] * images.shape[0]
        elif isinstance(images, (list, tuple)) and all(isinstance(x, Tensor) for x in images):
            shapes = [x.shape for x in images]
        else:
            raise TypeError(
                f"images: expected a tensor, a list of tensors or prepared images, got {type(images).__name__}"
            )
        found = []
        for shape in shapes:
            if len(shape) not in (3, 4):
                raise ValueError(f"images: expected [3, H, W] or [frames, 3, H, W] each, got {list(shape)}")
            t, h, w = shape[0] if len(shape) == 4 else 1, shape[-2], shape[-1]
            if self.config.merge_size > 1 and (h % unit or w % unit):
                raise ValueError(f"images: expected height and width to be multiples of {unit}, got {h} x {w}")
            found.append((-(-t // frames), h // self.config.patch_size, w // self.config.patch_size))
        return tuple(found)

    def which(self, layer: int | Sequence[int] | None) -> list[int]:
        """Hidden states counted from the first block's input on."""
        n = len(self.blocks)
        asked = [n] if layer is None else [layer] if isinstance(layer, int) else list(layer)
        if not asked or any(not -n - 1 <= i <= n for i in asked):
            raise ValueError(f"layer: expected {-n - 1} to {n} in a tower of {n} blocks, got {layer}")
        return [i if i >= 0 else n + 1 + i for i in asked]


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    """The parts behind each other; nothing is copied where there is one, and no part is no token."""
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else like[:0]

"""The vision towers of real checkpoints at their true dimensions, with random weights: no download, same arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlmops.profiling.bars import random_tensor
from vlmops.profiling.roofline import attention_flops
from vlmops.profiling.timing import Work

__all__ = ["DEFAULT_LAYERS", "TOWERS", "Tower", "build", "reference", "shared_copy"]

DEFAULT_LAYERS = 4
Products = list[tuple[int, int, int]]  # (rows, K, N)


@dataclass(frozen=True)
class Tower:
    """A stock tower, its inputs, and what it has to compute at least.

    Args:
        name: a name of ``TOWERS``.
        module: the transformers module, in eval mode.
        inputs: keyword arguments of its forward.
        layers: how many it has.
        products: (rows, K, N) of every matrix product outside attention.
        attention: work of the attention over whole images.
        windows: work of the attention inside windows.
        what: shape in words.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    layers: int
    products: Products
    attention: Work
    windows: Work
    what: str

    def run(self, module: nn.Module | None = None) -> torch.Tensor:
        """The output that the rest of the model reads, from this or another copy of the module."""
        with torch.inference_mode():
            out = (self.module if module is None else module)(**self.inputs)
        found: torch.Tensor = out.pooler_output if self.name.startswith("qwen") else out.last_hidden_state
        return found


def reference(tower: Tower) -> torch.Tensor | None:
    """The stock tower's output in float32 for a 16-bit one (same weights, same pixels); None for float32."""
    if next(tower.module.parameters()).dtype == torch.float32:
        return None
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in tower.inputs.items()}
    return replace(tower, module=copy.deepcopy(tower.module).float(), inputs=inputs).run()


def shared_copy(module: nn.Module) -> nn.Module:
    """A second module tree on the very same parameters and buffers: two models for the memory of one."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _finish(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Eval mode without gradients; transformers' own random initialisation keeps activations in range."""
    return module.to(dtype).eval().requires_grad_(False)


def _attention_work(lengths: list[int], heads: int, head_dim: int, layers: int) -> Work:
    return Work(float(layers * attention_flops(lengths, heads, head_dim)))


def _qwen2_vl(dtype: torch.dtype, layers: int, patches: int) -> Tower:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    side, width = math.isqrt(patches), 1280
    config = Qwen2VLVisionConfig(depth=layers, embed_dim=width, hidden_size=1536, num_heads=16, mlp_ratio=4)
    module = _finish(Qwen2VisionTransformerPretrainedModel(config), dtype)
    tokens = side * side
    layer = [(tokens, width, 3 * width), (tokens, width, width), (tokens, width, 4 * width), (tokens, 4 * width, width)]
    merger = [(tokens // 4, 4 * width, 4 * width), (tokens // 4, 4 * width, 1536)]
    return Tower(
        "qwen2_vl", module, _qwen_inputs(side, dtype), layers, [(tokens, 1176, width), *layer * layers, *merger],
        _attention_work([tokens], 16, 80, layers), Work(), f"{tokens} patches, {layers} layers",
    )  # fmt: skip


def _qwen2_5_vl(dtype: torch.dtype, layers: int, patches: int) -> Tower:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    side, width, hidden = math.isqrt(patches), 1280, 3420
    # The checkpoint sees whole images in layers 7, 15, 23 and 31; a shorter tower keeps one such layer, its last.
    full = [i for i in range(layers) if i % 8 == 7] or [layers - 1]
    config = Qwen2_5_VLVisionConfig(
        depth=layers, hidden_size=width, intermediate_size=hidden, num_heads=16, window_size=112, out_hidden_size=2048,
        fullatt_block_indexes=full,
    )  # fmt: skip
    module = _finish(Qwen2_5_VisionTransformerPretrainedModel(config), dtype)
    tokens = side * side
    window = [a * b for a in _window_sides(side) for b in _window_sides(side)]
    layer = [
        (tokens, width, 3 * width),
        (tokens, width, width),
        *[(tokens, width, hidden)] * 2,
        (tokens, hidden, width),
    ]
    merger = [(tokens // 4, 4 * width, 4 * width), (tokens // 4, 4 * width, 2048)]
    return Tower(
        "qwen2_5_vl", module, _qwen_inputs(side, dtype), layers, [(tokens, 1176, width), *layer * layers, *merger],
        _attention_work([tokens], 16, 80, len(full)), _attention_work(window, 16, 80, layers - len(full)),
        f"{tokens} patches, windows of 112 pixels, {layers} layers ({len(full)} over the whole image)",
    )  # fmt: skip


def _window_sides(side: int, window: int = 8) -> list[int]:
    return [window] * (side // window) + ([side % window] if side % window else [])


def _qwen_inputs(side: int, dtype: torch.dtype) -> dict[str, Any]:
    pixels = random_tensor(side * side, 3 * 2 * 14 * 14, dtype=dtype, seed=3)
    return {"hidden_states": pixels, "grid_thw": torch.tensor([[1, side, side]])}


def _clip(dtype: torch.dtype, layers: int, patches: int) -> Tower:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    side, width, hidden = math.isqrt(patches), 1024, 4096
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=16,
        image_size=side * 14, patch_size=14,
    )  # fmt: skip
    module = _finish(CLIPVisionModel(config), dtype)
    tokens = side * side + 1  # and the class token
    layer = [*[(tokens, width, width)] * 4, (tokens, width, hidden), (tokens, hidden, width)]
    return Tower(
        "clip_l_336", module, {"pixel_values": random_tensor(1, 3, side * 14, side * 14, dtype=dtype, seed=3)}, layers,
        [(side * side, 588, width), *layer * layers], _attention_work([tokens], 16, 64, layers), Work(),
        f"1 image, {tokens} tokens, {layers} layers",
    )  # fmt: skip


def _pixtral(dtype: torch.dtype, layers: int, patches: int, images: int = 4) -> Tower:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    side, width, hidden = math.isqrt(patches // images), 1024, 4096
    config = PixtralVisionConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=16,
        image_size=max(1024, side * 16), patch_size=16,
    )  # fmt: skip
    module = _finish(PixtralVisionModel(config), dtype)
    tokens = images * side * side
    layer = [*[(tokens, width, width)] * 4, *[(tokens, width, hidden)] * 2, (tokens, hidden, width)]
    return Tower(
        "pixtral", module, {"pixel_values": random_tensor(images, 3, side * 16, side * 16, dtype=dtype, seed=3)},
        layers,
        [(tokens, 768, width), *layer * layers], _attention_work([side * side] * images, 16, 64, layers), Work(),
        f"{images} images of {side * side} patches, {layers} layers",
    )  # fmt: skip


@dataclass(frozen=True)
class _Recipe:
    make: Callable[[torch.dtype, int, int], Tower]
    layers: int  # of the checkpoint
    patches: int  # of the bar
    quick: int  # of a quick run


TOWERS = {
    "qwen2_vl": _Recipe(_qwen2_vl, 32, 4096, 256),
    "qwen2_5_vl": _Recipe(_qwen2_5_vl, 32, 4096, 256),
    "clip_l_336": _Recipe(_clip, 24, 576, 64),
    "pixtral": _Recipe(_pixtral, 24, 4096, 256),
}


def build(name: str, dtype: torch.dtype, *, layers: int | None = DEFAULT_LAYERS, patches: int | None = None) -> Tower:
    """A tower at its true width.

    Args:
        name: "qwen2_vl", "qwen2_5_vl", "clip_l_336" or "pixtral".
        dtype: of weights and pixels.
        layers: how many; None: as many as the checkpoint has.
        patches: over all images, square; None: what the bars use (4096, 576 for CLIP).

    Raises:
        ValueError: an unknown name.
    """
    recipe = TOWERS.get(name)
    if recipe is None:
        raise ValueError(f"name: expected one of {', '.join(TOWERS)}, got {name!r}")
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        return recipe.make(dtype, layers or recipe.layers, patches or recipe.patches)
    finally:
        torch.random.set_rng_state(state)

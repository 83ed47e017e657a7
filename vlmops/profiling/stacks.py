"""Whole models at the widths of real checkpoints with few layers: transformers' and ours on the same random weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from vlmops.models.vlm import VLM
from vlmops.profiling.bars import random_tensor

__all__ = ["STACKS", "Stack", "build"]

TOWER_LAYERS, DECODER_LAYERS = 4, 6
PROMPT = 512  # tokens


@dataclass(frozen=True)
class Stack:
    """A model twice.

    Args:
        name: a name of ``STACKS``.
        stock: transformers' model, in eval mode.
        ours: the reference stack's, with the same weights.
        pixels: the tower's inputs, by transformers' names.
        prompt: int64 [1, L], text alone.
        what: shape in words.
    """

    name: str
    stock: Any
    ours: VLM
    pixels: dict[str, torch.Tensor]
    prompt: torch.Tensor
    what: str

    def encode(self, model: Any) -> torch.Tensor:
        """Image features of a transformers model, as its language model reads them."""
        with torch.inference_mode():
            found = model.model.get_image_features(**self.pixels).pooler_output
        return found if isinstance(found, torch.Tensor) else torch.cat(list(found))

    def encode_ours(self) -> torch.Tensor:
        """The same of ours."""
        with torch.inference_mode():
            return self.ours.features(self.pixels["pixel_values"], self.pixels.get("image_grid_thw"))[0]  # type: ignore[operator]

    def answer(self, model: Any, tokens: int) -> torch.Tensor:
        """Greedy: the prompt and so many new tokens. ``model`` is transformers' or ours."""
        with torch.inference_mode():
            if isinstance(model, VLM):
                return model.generate(self.prompt, max_new_tokens=tokens, eos_token_id=())
            found: torch.Tensor = model.generate(
                input_ids=self.prompt, attention_mask=torch.ones_like(self.prompt), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return found

    def logits(self, model: Any) -> torch.Tensor:
        """[1, 1, vocab] of the prompt's last token."""
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=self.prompt, logits_to_keep=1).logits
        return found


def _qwen2_vl(quick: bool) -> tuple[Any, dict[str, torch.Tensor], str]:
    """Qwen2-VL-2B (Wang et al. 2024)."""
    import transformers as t

    side = 16 if quick else 32
    text = dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=1 if quick else DECODER_LAYERS,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    )  # fmt: skip
    vision = dict(
        depth=1 if quick else TOWER_LAYERS, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14
    )
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    pixels = random_tensor(side * side, 3 * 2 * 14 * 14, dtype=torch.float32, seed=3)
    inputs = dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, side, side]]))
    return t.Qwen2VLForConditionalGeneration(config), inputs, f"{side * side} patches"


def _llava(quick: bool) -> tuple[Any, dict[str, torch.Tensor], str]:
    """LLaVA-1.5-7B (Liu et al. 2023): CLIP-L/14-336 and Vicuna-7B."""
    import transformers as t

    side = 8 if quick else 24
    text = dict(
        model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=1 if quick else DECODER_LAYERS, num_attention_heads=32,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=side * 14,
        patch_size=14, num_hidden_layers=2 if quick else TOWER_LAYERS,
    )  # fmt: skip
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_id=32000)
    pixels = random_tensor(1, 3, side * 14, side * 14, dtype=torch.float32, seed=3)
    return t.LlavaForConditionalGeneration(config), dict(pixel_values=pixels), f"{side * side} patches"


STACKS = {"qwen2_vl": _qwen2_vl, "llava": _llava}


def build(name: str, dtype: torch.dtype, *, quick: bool = False) -> Stack:
    """A model with 4 tower layers and 6 decoder layers (quick: one or two), twice on the same weights.

    Args:
        name: "qwen2_vl" or "llava".
        dtype: of weights and pixels.
        quick: a smaller one, for checking that everything runs.
    """
    from vlmops.models import from_pretrained

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            stock, inputs, what = STACKS[name](quick)
        finally:
            torch.set_default_dtype(before)
    finally:
        torch.random.set_rng_state(state)
    stock = stock.eval().requires_grad_(False)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    with tempfile.TemporaryDirectory(prefix="vlmops-stack-") as folder:
        stock.save_pretrained(folder)
        ours = from_pretrained(folder).requires_grad_(False)
    prompt = torch.randint(3, 30000, (1, PROMPT // (8 if quick else 1)), generator=torch.Generator().manual_seed(5))
    layers = f"{len(ours.tower.blocks)} + {len(ours.decoder.blocks)} layers" if ours.tower is not None else ""
    return Stack(name, stock, ours, inputs, prompt, f"{what}, prompt of {prompt.shape[1]}, {layers}")

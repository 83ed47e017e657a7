"""Tiny random models of real transformers families, built offline: name -> (model, inputs of one forward)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

__all__ = ["FAMILIES", "OTHERS", "build", "first_output"]

IMAGE = 300
TEXT: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
)
MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
QWEN_TOKENS = dict(image_token_id=IMAGE, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)


def prompt(images: list[int]) -> torch.Tensor:
    """[1, L] token ids: some text, then each image's placeholder tokens between text."""
    parts = [torch.randint(3, 200, (4,))]
    for n in images:
        parts += [torch.full((n,), IMAGE), torch.randint(3, 200, (3,))]
    return torch.cat(parts)[None]


def clip() -> tuple[Any, dict]:
    return T.CLIPVisionModel(T.CLIPVisionConfig(**CLIP)), dict(pixel_values=torch.randn(2, 3, 56, 56))


def siglip() -> tuple[Any, dict]:
    return T.SiglipVisionModel(T.SiglipVisionConfig(**CLIP)), dict(pixel_values=torch.randn(2, 3, 56, 56))


def llava() -> tuple[Any, dict]:
    config = T.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", **CLIP),
        text_config=dict(model_type="llama", **TEXT),
        image_token_id=IMAGE,
    )
    model = T.LlavaForConditionalGeneration(config)
    return model, dict(input_ids=prompt([16, 16]), pixel_values=torch.randn(2, 3, 56, 56))


def pixtral() -> tuple[Any, dict]:
    vision = dict(
        model_type="pixtral", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=64,
        patch_size=16, head_dim=16,
    )  # fmt: skip
    config = T.LlavaConfig(
        vision_config=vision, text_config=dict(model_type="mistral", head_dim=16, **TEXT), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    sizes = torch.tensor([[64, 64], [32, 48]])
    inputs = dict(input_ids=prompt([16, 6]), pixel_values=torch.randn(2, 3, 64, 64), image_sizes=sizes)
    return T.LlavaForConditionalGeneration(config), inputs


def _qwen(model: Any) -> tuple[Any, dict]:
    ids = torch.cat([prompt([]), torch.tensor([[302]]), torch.full((1, 8), IMAGE), torch.tensor([[303, 5, 6]])], dim=1)
    kinds = (ids == IMAGE).long()
    grid = torch.tensor([[1, 4, 8]])
    inputs = dict(
        input_ids=ids, pixel_values=torch.randn(32, 3 * 2 * 14 * 14), image_grid_thw=grid, mm_token_type_ids=kinds
    )
    return model, inputs


def qwen2_vl() -> tuple[Any, dict]:
    vision = dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=14)
    config = T.Qwen2VLConfig(vision_config=vision, text_config=dict(TEXT, rope_parameters=MROPE), **QWEN_TOKENS)
    return _qwen(T.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> tuple[Any, dict]:
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, out_hidden_size=64, num_heads=4, patch_size=14, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config = T.Qwen2_5_VLConfig(vision_config=vision, text_config=dict(TEXT, rope_parameters=MROPE), **QWEN_TOKENS)
    return _qwen(T.Qwen2_5_VLForConditionalGeneration(config))


def idefics3() -> tuple[Any, dict]:
    vision = {**CLIP, "image_size": 28}
    config = T.Idefics3Config(
        vision_config=vision, text_config=dict(model_type="llama", **TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return T.Idefics3ForConditionalGeneration(config), dict(
        input_ids=prompt([1]), pixel_values=torch.randn(1, 1, 3, 28, 28)
    )


def paligemma() -> tuple[Any, dict]:
    config = T.PaliGemmaConfig(
        vision_config=dict(model_type="siglip_vision_model", projection_dim=64, **CLIP),
        text_config=dict(model_type="gemma2", head_dim=16, **TEXT), image_token_id=IMAGE, projection_dim=64,
    )  # fmt: skip
    ids = prompt([16])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56), token_type_ids=torch.zeros_like(ids))
    return T.PaliGemmaForConditionalGeneration(config), inputs


#: The families this version patches by name, and others that structure alone reaches.
FAMILIES: dict[str, Callable[[], tuple[Any, dict]]] = {
    "llava": llava, "pixtral": pixtral, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip
OTHERS: dict[str, Callable[[], tuple[Any, dict]]] = {
    "clip": clip, "siglip": siglip, "idefics3": idefics3, "paligemma": paligemma,
}  # fmt: skip


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, dict]:
    """A seeded model in eval mode and the inputs of one forward."""
    torch.manual_seed(seed)
    model, inputs = {**FAMILIES, **OTHERS}[name]()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval().to(dtype), inputs


def first_output(outputs: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a tower."""
    return outputs.logits if getattr(outputs, "logits", None) is not None else outputs.last_hidden_state

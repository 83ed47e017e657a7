"""The parts of the embedded checkpoint before any training: tokenizer, processor and a random model."""

from __future__ import annotations

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmops.demo.tiny.scenes import COLORS, SHAPES

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_TOKENS = GRID * GRID
HIDDEN_SIZE = 128

SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
QUESTION_WORDS = "is there a how many shapes are what color the number written which bar tallest shortest value of"
OTHER_WORDS = "describe picture yes no"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer; digits are single tokens and a word carries its leading space, so decoding is exact."""
    words = ["▁" + word for word in sorted({*QUESTION_WORDS.split(), *OTHER_WORDS.split(), *COLORS, *SHAPES})]
    vocab = [*SPECIAL_TOKENS, "▁", *"0123456789", *"?,.", *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Replace("colour", "color"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[0-9]|[?,.]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The processor saved with the checkpoint; Pillow-backed, so torchvision is not needed."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, dropped again by "default"
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """LLaVA with a 4-layer CLIP tower and a 3-layer Llama decoder, both 128 wide."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=4,  # LLaVA reads the last layer but one: three layers do the work
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=HIDDEN_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,  # a small width wants a larger initial spread than the library's 0.02
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype="float32",
    )


def _sinusoidal_positions() -> Tensor:
    """Fixed 2-D sine and cosine codes of the patch grid, ``[IMAGE_TOKENS, HIDDEN_SIZE]``."""
    frequencies = torch.logspace(0, math.log10(GRID / 2), HIDDEN_SIZE // 4) * math.pi / GRID
    angles = (torch.arange(GRID) + 0.5)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # [GRID, HIDDEN_SIZE / 2]
    rows, columns = code[:, None].expand(-1, GRID, -1), code[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(IMAGE_TOKENS, HIDDEN_SIZE)


@torch.no_grad()
def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised model whose vision tower starts out attending to neighbouring patches.

    A small transformer spends most of a short training run finding out which patches are close. Sinusoidal position
    embeddings of the size of the patch embeddings, with key weights equal to query weights, give it that at once.
    """
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    tower = model.model.vision_tower
    tower.embeddings.position_embedding.weight[1:] = _sinusoidal_positions()
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.05)
    for layer in tower.encoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model

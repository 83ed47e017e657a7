"""Stages from recorded spans, and on real generate calls of a tiny LLaVA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmops.profiling.stages import STAGES, compare_stages, find_parts, stage_seconds


def test_stages_from_spans_with_a_connector_behind_the_tower():
    spans = {
        "model": [(0.0, 10.0), (10.0, 11.0), (11.0, 14.0), (14.0, 15.0)],
        "vision": [(1.0, 5.0)],
        "connector": [(5.0, 6.0)],
    }
    assert stage_seconds(spans, 0.5, 16.0) == {
        "image preprocessing": 0.5,
        "vision tower": 4.0,
        "connector": 1.0,
        "prefill": 5.0,
        "decode, per token": 1.0,
        "whole answer": 16.5,
    }


def test_stages_from_spans_with_a_connector_inside_the_tower():
    spans = {"model": [(0.0, 10.0)], "vision": [(1.0, 5.0)], "connector": [(4.0, 5.0)]}
    found = stage_seconds(spans, 0.0, 10.0)
    assert found["vision tower"] == 3.0
    assert found["connector"] == 1.0
    assert found["prefill"] == 6.0
    assert "decode, per token" not in found


def hooks(model):
    return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]


def tiny_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=9)).eval()


def test_real_answers_have_every_stage_and_leave_no_hooks():
    model = tiny_llava()
    inputs = {"input_ids": torch.tensor([[1, 9, 9, 9, 9, 5]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    model.generate(**inputs, max_new_tokens=2)  # transformers itself adds hooks at the first call
    before = hooks(model)
    found, tokens = compare_stages(
        {"a": model, "b": model}, lambda: inputs, rounds=7, threads=1, max_new_tokens=3, do_sample=False
    )
    assert tuple(found) == STAGES
    for stage in STAGES:
        assert found[stage]["a"].median > 0
        assert len(found[stage]["b"].seconds) == 7
    assert torch.equal(tokens["a"], tokens["b"])
    assert tokens["a"].shape[1] == 9
    parts = sum(found[s]["a"].median for s in ("vision tower", "connector", "prefill"))
    assert parts < found["whole answer"]["a"].median
    assert hooks(model) == before


def test_no_vision_tower_is_said():
    with pytest.raises(ValueError, match="no vision tower"):
        find_parts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rounds"):
        compare_stages({}, dict, rounds=3)

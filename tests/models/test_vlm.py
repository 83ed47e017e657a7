"""Whole models against transformers': tiny random checkpoints, saved by them, read here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from tests.models import parity
from tests.support.tiny_models import CLIP, IMAGE, TEXT, build, prompt
from vlmops import images
from vlmops.models import from_pretrained
from vlmops.models.vlm import VLM


def llava_next() -> tuple[Any, dict]:
    config = T.LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", **CLIP), text_config=dict(model_type="mistral", **TEXT),
        image_token_id=IMAGE, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip
    sizes = torch.tensor([[50, 100], [90, 40]])
    counts = [images.layout(h, w, "anyres", size=56, pinpoints=config.image_grid_pinpoints) for h, w in sizes.tolist()]
    ids = prompt([c.tokens for c in counts])
    pixels = torch.randn(2, 5, 3, 56, 56)
    return T.LlavaNextForConditionalGeneration(config), dict(input_ids=ids, pixel_values=pixels, image_sizes=sizes)


def paligemma() -> tuple[Any, dict]:
    model, inputs = build("paligemma")
    types = torch.zeros_like(inputs["input_ids"])
    types[:, -2:] = 1
    return model, {**inputs, "token_type_ids": types}


def video(version: str) -> tuple[Any, dict]:
    model, inputs = build(version)
    ids = inputs["input_ids"][0]
    film = torch.cat([torch.tensor([302]), torch.full((4,), 301), torch.tensor([303, 7])])
    ids = torch.cat([ids[:3], film, ids[3:]])[None]
    kinds = (ids == IMAGE).long() + 2 * (ids == 301).long()
    more = dict(pixel_values_videos=torch.randn(16, 3 * 2 * 14 * 14), video_grid_thw=torch.tensor([[2, 2, 4]]))
    if version == "qwen2_5_vl":
        more["second_per_grid_ts"] = torch.tensor([1.5])
    return model, {**inputs, "input_ids": ids, "mm_token_type_ids": kinds, **more}


MODELS = {
    "llava": lambda: build("llava"),
    "llava_next": llava_next,
    "pixtral": lambda: build("pixtral"),
    "qwen2_vl": lambda: build("qwen2_vl"),
    "qwen2_vl_video": lambda: video("qwen2_vl"),
    "qwen2_5_vl": lambda: build("qwen2_5_vl"),
    "qwen2_5_vl_video": lambda: video("qwen2_5_vl"),
    "paligemma": paligemma,
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, VLM, dict]:
    torch.manual_seed(0)
    theirs, inputs = MODELS[request.param]()
    theirs = parity.randomised(theirs)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), inputs


def test_logits(pair: Any) -> None:
    parity.logits(*pair)


def test_greedy_tokens(pair: Any) -> None:
    parity.greedy_tokens(*pair, different=1)  # some of these random models say one thing again and again


def test_loss_and_gradients(pair: Any) -> None:
    ids = pair[2]["input_ids"]
    parity.gradients(*pair, ids.masked_fill(ids >= IMAGE, -100))


def test_saves_what_transformers_reads(pair: Any, tmp_path: Any) -> None:
    theirs, ours, inputs = pair
    ours.save_pretrained(tmp_path, shard_bytes=100_000)
    again, said = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    with torch.no_grad():
        assert parity.close(again.eval()(**inputs).logits, theirs(**inputs).logits)
        assert torch.equal(from_pretrained(tmp_path)(**inputs).logits, ours(**inputs).logits)

"""Whole models against transformers': tiny random checkpoints, saved by them, read here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from tests.support.tiny_models import CLIP, IMAGE, TEXT, build, prompt
from vlmops import images
from vlmops.models import from_pretrained
from vlmops.models.vlm import VLM

TOLERANCE = 1e-5


def randomised(model: Any) -> Any:
    """Weights of a size at which every part of the model matters to the logits."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
        if p.dim() == 1 and "norm" in name and "weight" in name:
            p.data += 1
    return model.eval()


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
    theirs = randomised(theirs)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), inputs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max())))


def test_logits(pair: Any) -> None:
    theirs, ours, inputs = pair
    with torch.no_grad():
        want, have = theirs(**inputs).logits, ours(**inputs).logits
        last = ours(**inputs, logits_to_keep=2).logits
    assert close(have, want)
    assert torch.equal(last, have[:, -2:])
    assert want.std() > 0.05  # something to compare


def test_greedy_tokens(pair: Any) -> None:
    theirs, ours, inputs = pair
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    want = theirs.generate(**inputs, **options, pad_token_id=0)
    have = ours.generate(**inputs, max_new_tokens=8, eos_token_id=())
    assert torch.equal(have, want)


def test_loss_and_gradients(pair: Any) -> None:
    theirs, ours, inputs = pair
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    theirs.zero_grad()
    ours.zero_grad()
    want = theirs(**inputs, labels=labels).loss
    want.backward()
    out = ours.train()(**inputs, labels=labels)
    assert out.logits is None and out.loss is not None
    out.loss.backward()
    assert close(out.loss, want)
    ours.eval()
    norms = [p.grad.norm() for p in theirs.parameters() if p.grad is not None]
    total = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    assert close(total, torch.stack(norms).norm())
    assert float(total) > 1e-3


def test_saves_what_transformers_reads(pair: Any, tmp_path: Any) -> None:
    theirs, ours, inputs = pair
    ours.save_pretrained(tmp_path, shard_bytes=100_000)
    again, said = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    with torch.no_grad():
        assert close(again.eval()(**inputs).logits, theirs(**inputs).logits)
        assert torch.equal(from_pretrained(tmp_path)(**inputs).logits, ours(**inputs).logits)

"""Type C with cross-attention: whole Idefics models against transformers', and Flamingo in OpenFlamingo's files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from tests.models.parity import close
from vlmops.models import from_pretrained
from vlmops.models.vlm import VLM

IMAGE = 98  # the second added token, as in the published models


def idefics(resampler: bool, norms: bool, added: int) -> Any:
    perceiver = dict(use_resampler=resampler, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2,
                     resampler_head_dim=12, qk_layer_norms_perceiver=norms)  # fmt: skip
    vision = dict(
        embed_dim=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=28, patch_size=14
    )
    config = T.IdeficsConfig(
        vocab_size=99 - added, additional_vocab_size=added, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, qk_layer_norms=norms, use_resampler=resampler,
        perceiver_config=perceiver, vision_config=vision, freeze_text_layers=False, freeze_vision_layers=False,
        freeze_lm_head=False, attn_implementation="eager",
    )  # fmt: skip
    model = T.IdeficsForVisionText2Text(config).eval()
    for name, p in model.named_parameters():
        one = "norm" in name.replace(".ln.", ".norm.") and name.endswith("weight")
        nn.init.normal_(p, mean=float(one), std=0.7 if "alpha" in name else 0.2)
    return model


def inputs() -> dict[str, torch.Tensor]:
    """Two prompts, of two images and of one; the second is padded in front, its missing image is zeros."""
    ids = torch.randint(3, 90, (2, 11))
    mask = torch.ones_like(ids)
    ids[0, 1] = ids[0, 6] = ids[1, 4] = IMAGE
    mask[1, :3] = 0
    pixels = torch.randn(2, 2, 3, 28, 28)
    pixels[1, 1] = 0
    sees = torch.zeros(2, 11, 2, dtype=torch.int64)
    sees[0, 1:6, 0] = sees[0, 6:, 1] = sees[1, 4:, 0] = 1
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_attention_mask=sees)


CASES = {"idefics": (True, True, 2), "without a perceiver": (False, False, 2), "without norms": (True, False, 2)}


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, VLM, dict]:
    torch.manual_seed(0)
    theirs = idefics(*CASES[request.param])
    folder = tmp_path_factory.mktemp("idefics")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), inputs()


def test_logits(pair: Any) -> None:
    theirs, ours, more = pair
    real = more["attention_mask"].bool()
    with torch.no_grad():
        want, have = theirs(**more).logits[real], ours(**more).logits[real]
        assert close(have, want) and want.std() > 0.05
        plain = {name: x for name, x in more.items() if name != "image_attention_mask"}
        assert close(ours(**plain).logits[real], want)  # the mask is what the prompts say
        turned = {name: x.flip(0) for name, x in plain.items()}  # fewer images than there is room for come first
        assert close(ours(**turned).logits.flip(0)[real], want)
        behind = torch.cat([more["pixel_values"][0], more["pixel_values"][1, :1]])
        assert close(ours(**{**plain, "pixel_values": behind}).logits[real], want)
        text = {name: more[name] for name in ("input_ids", "attention_mask")}
        blind = theirs(**{**more, "image_attention_mask": torch.zeros_like(more["image_attention_mask"])}).logits[real]
        assert close(ours(**text).logits[real], blind) and not close(blind, want)


def test_a_token_may_see_several_images(pair: Any) -> None:
    theirs, ours, more = pair
    sees = more["image_attention_mask"].clone()
    sees[0, 6:] = 1
    more, real = {**more, "image_attention_mask": sees}, more["attention_mask"].bool()
    with torch.no_grad():
        assert close(ours(**more).logits[real], theirs(**more).logits[real])


def test_greedy_tokens(pair: Any) -> None:
    theirs, ours, more = pair
    for use_cache in (True, False):
        want = theirs.generate(**more, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
                               use_cache=use_cache)  # fmt: skip
        assert torch.equal(ours.generate(**more, max_new_tokens=6, eos_token_id=()), want)


def test_loss_and_gradients(pair: Any) -> None:
    theirs, ours, more = pair
    labels = more["input_ids"].masked_fill(more["attention_mask"] == 0, -100)
    labels[1, 3] = -100  # they would predict it from the padding in front
    theirs.zero_grad()
    ours.zero_grad()
    logits = theirs(**more).logits  # their own loss knows no added tokens
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want.backward()
    out = ours(**more, labels=labels)
    out.loss.backward()
    assert close(out.loss, want)
    norms = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    total = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    assert close(total, norms) and float(total) > 1e-3


def test_saves_what_transformers_reads(pair: Any, tmp_path: Any) -> None:
    theirs, ours, more = pair
    ours.save_pretrained(tmp_path)
    again, said = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(**more).logits, ours(**more).logits)

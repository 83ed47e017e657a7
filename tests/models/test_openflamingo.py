"""OpenFlamingo as a whole: files in the published layout, the formula written out, generation, sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models import parity
from tests.models.test_crossed import IMAGE, dense
from vlmops.models import from_pretrained
from vlmops.models.checkpoint import assemble
from vlmops.models.formats.flamingo import read, rules, write
from vlmops.models.shards import CheckpointError, Shards

CONFIG = dict(
    architectures=["FlamingoForConditionalGeneration"], model_type="flamingo", cross_attn_every_n_layers=2,
    text_config=dict(model_type="llama", vocab_size=IMAGE - 1, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                     num_attention_heads=4, rms_norm_eps=1e-6),
    vision_config=dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                       num_attention_heads=2, image_size=8, patch_size=4, hidden_act="quick_gelu", layer_norm_eps=1e-5),
)  # fmt: skip
WIDE, SEEN, INNER = 32, 16, 512


def shapes():
    """Every tensor of such a file, as the modules declare them; the embedding has the three added tokens."""
    p, v = "lang_encoder.model.", "vision_encoder."
    rows = IMAGE + 2
    found = {
        p + "embed_tokens.weight": [rows, WIDE],
        p + "norm.weight": [WIDE],
        "lang_encoder.lm_head.weight": [rows, WIDE],
    }
    for i in range(4):
        block = f"{p}layers.{i}.decoder_layer."
        found |= {f"{block}self_attn.{x}_proj.weight": [WIDE, WIDE] for x in "qkvo"}
        found |= {
            f"{block}mlp.{x}_proj.weight": [WIDE, 48] if x == "down" else [48, WIDE] for x in ("gate", "up", "down")
        }
        found |= {f"{block}{x}_layernorm.weight": [WIDE] for x in ("input", "post_attention")}
    for i in (1, 3):
        block = f"{p}layers.{i}.gated_cross_attn_layer."
        found |= {block + "attn.norm.weight": [WIDE], block + "attn.norm.bias": [WIDE], block + "attn.to_q.weight": [INNER, WIDE],
                  block + "attn.to_kv.weight": [2 * INNER, SEEN], block + "attn.to_out.weight": [WIDE, INNER],
                  block + "attn_gate": [1], block + "ff_gate": [1], block + "feed_forward.0.weight": [WIDE],
                  block + "feed_forward.0.bias": [WIDE], block + "feed_forward.1.weight": [4 * WIDE, WIDE],
                  block + "feed_forward.3.weight": [WIDE, 4 * WIDE]}  # fmt: skip
    for i in range(6):
        block = f"perceiver.layers.{i}."
        found |= {
            f"{block}{n}.{x}": [SEEN]
            for n in ("norm_media", "norm_latents", "feed_forward.0")
            for x in ("weight", "bias")
        }
        found |= {block + "to_q.weight": [INNER, SEEN], block + "to_kv.weight": [2 * INNER, SEEN],
                  block + "to_out.weight": [SEEN, INNER], block + "feed_forward.1.weight": [4 * SEEN, SEEN],
                  block + "feed_forward.3.weight": [SEEN, 4 * SEEN]}  # fmt: skip
    for i in range(2):
        block = f"{v}encoder.layers.{i}."
        for name, shape in {**{f"self_attn.{x}_proj": [SEEN, SEEN] for x in ("q", "k", "v", "out")}, "mlp.fc1": [24, SEEN],
                            "mlp.fc2": [SEEN, 24], "layer_norm1": [SEEN], "layer_norm2": [SEEN]}.items():  # fmt: skip
            found |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    found |= {f"{v}{n}.{x}": [SEEN] for n in ("pre_layrnorm", "post_layernorm") for x in ("weight", "bias")}
    return found | {
        v + "embeddings.class_embedding": [SEEN], v + "embeddings.patch_embedding.weight": [SEEN, 3, 4, 4],
        v + "embeddings.position_embedding.weight": [5, SEEN], "perceiver.latents": [64, SEEN], "perceiver.norm.weight": [SEEN],
        "perceiver.norm.bias": [SEEN],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator, found = torch.Generator().manual_seed(1), {}
    for name, shape in shapes().items():
        one = ("norm" in name and name.endswith("weight")) or name.endswith("feed_forward.0.weight")
        found[name] = torch.randn(shape, generator=generator) * (0.7 if "gate" in name[-6:] else 0.2) + one
    path = tmp_path_factory.mktemp("flamingo")
    save_file(found, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path, found


def inputs():
    """Two prompts, of two images and of none, padded behind."""
    ids = torch.randint(3, 80, (2, 9))
    ids[0, 2] = ids[0, 6] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8))


def resampled(theirs, tokens):
    """The Perceiver on one image's [4, 16], float64, as the published module reads."""
    t = {name.removeprefix("perceiver."): x.double() for name, x in theirs.items() if name.startswith("perceiver.")}

    def norm(x, name):
        return nn.functional.layer_norm(x, (SEEN,), t[name + ".weight"], t[name + ".bias"])

    latents = t["latents"]
    for i in range(6):
        p = f"layers.{i}."
        x, own = norm(tokens, p + "norm_media"), norm(latents, p + "norm_latents")
        k, v = (torch.cat([x, own]) @ t[p + "to_kv.weight"].T).view(-1, 2, 8, 64).unbind(1)
        q = (own @ t[p + "to_q.weight"].T).view(-1, 8, 64) / 8
        seen = torch.einsum("hij,jhd->ihd", torch.einsum("ihd,jhd->hij", q, k).softmax(-1), v).flatten(1)
        latents = latents + seen @ t[p + "to_out.weight"].T
        hidden = nn.functional.gelu(norm(latents, p + "feed_forward.0") @ t[p + "feed_forward.1.weight"].T)
        latents = latents + hidden @ t[p + "feed_forward.3.weight"].T
    return norm(latents, "norm")


def test_logits(folder):
    path, theirs = folder
    vlm, more = from_pretrained(path), inputs()
    assert vlm.config.image_token == IMAGE and vlm.config.decoder.vocab == IMAGE + 2
    with torch.no_grad():
        have = vlm(**more).logits
        tokens = vlm.tower(more["pixel_values"], layer=-1, patches_only=True).tokens.double().split(4)
        media, head = torch.cat([resampled(theirs, x) for x in tokens]), theirs["lang_encoder.lm_head.weight"].double()
        none = torch.zeros(1, dtype=torch.int32)
        first = dense(vlm.decoder, more["input_ids"][0], media, torch.tensor([0, 64, 128])) @ head.T
        second = dense(vlm.decoder, more["input_ids"][1, :5], media[:0], none) @ head.T
    assert first.std() > 0.05
    torch.testing.assert_close(have[0], first.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(have[1, :5], second.float(), rtol=1e-5, atol=1e-5)


def test_prepared_images(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    prepared = vlm.prepare([torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(2)])
    parity.prepared_images(vlm, more, prepared)


def test_generate_loss_and_gradients(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    out = vlm.generate(**more, max_new_tokens=4, eos_token_id=())
    parity.without_a_cache(vlm, more["input_ids"][0], out[0, -4:], more["pixel_values"])
    vlm(**more, labels=more["input_ids"]).loss.backward()
    silent = {n for n, p in vlm.named_parameters() if p.grad is None or not float(p.grad.abs().max())}
    assert silent == {"tower.post_norm.weight", "tower.post_norm.bias"}  # CLIP's, which Flamingo does not look through


def test_saves_what_it_read(folder, tmp_path):
    path, theirs = folder
    vlm = from_pretrained(path)
    vlm.save_pretrained(tmp_path, shard_bytes=100_000)
    again, back = from_pretrained(tmp_path), Shards(tmp_path)
    assert replace(again.config, decoder=vlm.config.decoder) == vlm.config
    assert {n: list(x.shape) for n, x in back.items()} == shapes() and all(
        torch.equal(back[n], theirs[n]) for n in theirs
    )
    more = inputs()
    with torch.no_grad():
        assert torch.equal(again(**more).logits, vlm(**more).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(only_attend_immediate_media=False), "only_attend_immediate_media"),
        (dict(cross_attn_every_n_layers=5), "cross_attn_every_n_layers: expected 1 to 4"),
        (dict(text_config={**CONFIG["text_config"], "model_type": "mistral"}), "media_token_id: needed"),
        (dict(text_config={**CONFIG["text_config"], "model_type": "mpt"}), "model_type"),
    ],
)
def test_files_that_are_not(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_wrong_prompts(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    with pytest.raises(ValueError, match=r"images: expected 2 for the prompts' image tokens, got 1"):
        vlm(**{**more, "pixel_values": more["pixel_values"][:1]})
    with pytest.raises(ValueError, match=r"pixel_values: expected those of \[2, 0\] images, got 1 prompts of 2"):
        vlm(**{**more, "pixel_values": more["pixel_values"][None]})
    mask = torch.ones(2, 9, 1)
    with pytest.raises(ValueError, match="image_attention_mask: expected pixel_values"):
        vlm(**more, image_attention_mask=mask)
    gap = torch.tensor([1, 0, 1]).expand(2, 9, 3)
    with pytest.raises(ValueError, match="neighbouring"):
        vlm(**{**more, "pixel_values": torch.randn(2, 3, 3, 8, 8)}, image_attention_mask=gap)


def parameters(text, every, **more):
    clip = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, image_size=224, patch_size=14)  # fmt: skip
    config = read(dict(text_config=text, vision_config=clip, cross_attn_every_n_layers=every, **more))
    assert write(config) and rules(config)
    with torch.device("meta"):
        vlm = assemble(config)
    cross = sum(p.numel() for n, p in vlm.named_parameters() if ".cross." in n)
    parts = [sum(p.numel() for p in part.parameters()) for part in (vlm.tower, vlm.connector, vlm.decoder)]
    return parts, cross


def test_real_sizes():
    """The tower has CLIP L/14's 303,179,776 and Llama 7B its 6,738,415,616 and three more tokens; what stands between them is
    what the module's declarations add up to."""
    layer = 1024 * 512 + 1024 * 1024 + 512 * 1024 + 2 * 4 * 1024**2 + 6 * 1024
    perceiver = 6 * layer + 64 * 1024 + 2 * 1024

    def cross(width):
        return width * 512 + 1024 * 1024 + 512 * width + 2 * 4 * width**2 + 4 * width + 2

    llama = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                 num_attention_heads=32)  # fmt: skip
    parts, crossed = parameters(llama, 4)
    assert parts == [303_179_776, perceiver, 6_738_415_616 + 2 * 3 * 4096 + 8 * cross(4096)] and crossed == 8 * cross(
        4096
    )
    assert 8.0e9 < sum(parts) < 8.4e9  # the page says 9B
    opt = dict(model_type="opt", vocab_size=50272, hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32,
               max_position_embeddings=2048, word_embed_proj_dim=2048)  # fmt: skip
    parts, crossed = parameters(opt, 1, media_token_id=50266)
    assert crossed == 24 * cross(2048) and parts[2] - crossed == 1_315_758_080  # OPT 1.3B's page

"""Qwen-VL as a whole: files in its authors' layout, what takes the places between its marks, generation, sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models import parity
from vlmops.models import from_pretrained
from vlmops.models.checkpoint import assemble
from vlmops.models.connectors.resampler import sincos_2d
from vlmops.models.formats.qwen_vl import read
from vlmops.models.shards import CheckpointError, Shards

BEGIN, END, PAD, WIDE = 90, 91, 92, 128
CONFIG = dict(
    architectures=["QWenLMHeadModel"], model_type="qwen", vocab_size=100, hidden_size=WIDE, num_hidden_layers=2,
    num_attention_heads=2, kv_channels=64, intermediate_size=96, layer_norm_epsilon=1e-6, rotary_emb_base=10000,
    tie_word_embeddings=False,
    visual=dict(width=24, layers=2, heads=2, mlp_ratio=1.7, patch_size=4, image_size=48, output_dim=WIDE,
                image_start_id=BEGIN, n_queries=9),
)  # fmt: skip


def shapes():
    """Every tensor of such a file, as the authors' modules declare them."""
    c, hidden, p = 24, 40, "transformer.visual."
    found = {"transformer.wte.weight": [100, WIDE], "transformer.ln_f.weight": [WIDE], "lm_head.weight": [100, WIDE]}
    for i in range(2):
        block = f"transformer.h.{i}."
        found |= {block + "ln_1.weight": [WIDE], block + "ln_2.weight": [WIDE], block + "attn.c_attn.weight": [3 * WIDE, WIDE],
                  block + "attn.c_attn.bias": [3 * WIDE], block + "attn.c_proj.weight": [WIDE, WIDE],
                  block + "mlp.w1.weight": [48, WIDE], block + "mlp.w2.weight": [48, WIDE],
                  block + "mlp.c_proj.weight": [WIDE, 48]}  # fmt: skip
        block = f"{p}transformer.resblocks.{i}."
        for name, shape in {"ln_1": [c], "ln_2": [c], "attn.in_proj": [3 * c, c], "attn.out_proj": [c, c],
                            "mlp.c_fc": [hidden, c], "mlp.c_proj": [c, hidden]}.items():  # fmt: skip
            found |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    for name in ("attn_pool.ln_q", "attn_pool.ln_kv", "ln_post", "attn_pool.attn.out_proj"):
        found |= {f"{p}{name}.weight": [WIDE, WIDE] if "out" in name else [WIDE], f"{p}{name}.bias": [WIDE]}
    found |= {p + "ln_pre.weight": [c], p + "ln_pre.bias": [c]}
    return found | {
        p + "conv1.weight": [c, 3, 4, 4], p + "positional_embedding": [256, c], p + "proj": [WIDE, WIDE],
        p + "attn_pool.query": [9, WIDE], p + "attn_pool.kv_proj.weight": [WIDE, c], p + "attn_pool.pos_embed": [9, WIDE],
        p + "attn_pool.attn.in_proj_weight": [3 * WIDE, WIDE], p + "attn_pool.attn.in_proj_bias": [3 * WIDE],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator, found = torch.Generator().manual_seed(1), {}
    for name, shape in shapes().items():
        norm = ("ln_" in name) and name.endswith("weight")
        found[name] = torch.randn(shape, generator=generator) * 0.1 + norm
    found["transformer.visual.attn_pool.pos_embed"] = sincos_2d(WIDE, 3)
    path = tmp_path_factory.mktemp("qwen_vl")
    save_file(found, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path, found


def inputs():
    """Two prompts, of two images and of one, 9 places each: a file name's bytes and padding stand between the marks."""

    def image(letters):
        return [BEGIN, *range(10, 10 + letters), *[PAD] * (9 - letters), END]

    rows = [[1, *image(4), 5, 6, *image(0), 7], [*image(8), 8, 9, 4]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(3, 3, 48, 48))


def resampled(theirs, tokens):
    """The authors' attn_pool, ln_post and proj on one image's [144, 24], by torch's own attention."""
    t = {name.removeprefix("transformer.visual."): x for name, x in theirs.items()}
    p = "attn_pool."
    table = t[p + "pos_embed"]
    keys_at = nn.functional.interpolate(table.view(1, 3, 3, WIDE).permute(0, 3, 1, 2), size=(12, 12), mode="bicubic")
    keys_at = keys_at.flatten(2)[0].T

    def norm(x, name):
        return nn.functional.layer_norm(x, (WIDE,), t[name + ".weight"], t[name + ".bias"], 1e-6)

    x = norm(tokens @ t[p + "kv_proj.weight"].T, p + "ln_kv")
    q = norm(t[p + "query"], p + "ln_q") + table
    attention = nn.MultiheadAttention(WIDE, 1)
    attention.load_state_dict(
        {name.removeprefix(p + "attn."): y for name, y in t.items() if name.startswith(p + "attn.")}
    )
    return norm(attention(q, x + keys_at, x, need_weights=False)[0], "ln_post") @ t["proj"]


def test_logits(folder):
    path, theirs = folder
    vlm, more = from_pretrained(path), inputs()
    real = more["attention_mask"].bool()
    with torch.no_grad():
        have = vlm(**more).logits[real]
        tokens = vlm.tower(more["pixel_values"]).tokens.split(144)
        features = torch.cat([resampled(theirs, x) for x in tokens])
        ids = more["input_ids"][real]
        x = theirs["transformer.wte.weight"][ids]
        starts = [i for i, token in enumerate(ids.tolist()) if token == BEGIN]
        for start, part in zip(starts, features.split(9), strict=True):
            x[start + 1 : start + 10] = part
        cu = torch.tensor([0, 26, 40], dtype=torch.int32)
        want = vlm.decoder.logits(vlm.decoder(None, cu, inputs_embeds=x))
        assert want.std() > 0.05
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        text = vlm(input_ids=more["input_ids"], attention_mask=more["attention_mask"]).logits[real]
        assert not torch.allclose(text, have, atol=1e-2)


def test_prepared_images(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    prepared = vlm.prepare([torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8) for _ in range(3)])
    assert prepared.grid_thw.tolist() == [[1, 12, 12]] * 3
    parity.prepared_images(vlm, more, prepared)


def test_generate_loss_and_gradients(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    out = vlm.generate(**more, max_new_tokens=4, eos_token_id=())
    parity.without_a_cache(vlm, more["input_ids"][0], out[0, -4:], more["pixel_values"][:2])
    vlm(**more, labels=more["input_ids"]).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) for p in vlm.parameters())


def test_saves_what_it_read(folder, tmp_path):
    path, theirs = folder
    vlm = from_pretrained(path)
    vlm.save_pretrained(tmp_path, shard_bytes=100_000)
    again, back = from_pretrained(tmp_path), Shards(tmp_path)
    assert again.config == vlm.config
    assert back.keys() == theirs.keys() - {"transformer.visual.attn_pool.pos_embed"}
    assert all(torch.equal(x, theirs[name]) for name, x in back.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(visual=None), "visual: missing"),
        (dict(visual={**CONFIG["visual"], "output_dim": 64}), "output_dim: expected 128"),
    ],
)
def test_files_that_are_not(tmp_path, changes, message):
    kept = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_real_size():
    """The paper's table 1 has 7.7 billion for the language model and 9.6 (cut, not rounded) together."""
    visual = dict(heads=16, image_size=448, image_start_id=151857, layers=48, mlp_ratio=4.9231, output_dim=4096, patch_size=14,
                  width=1664)  # fmt: skip
    config = read(dict(model_type="qwen", vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                       kv_channels=128, intermediate_size=22016, visual=visual))  # fmt: skip
    assert config.vision.mlp_width == 8192 and config.image_token == 151859 and config.images["size"] == 448
    with torch.device("meta"):
        vlm = assemble(config)
    tower, connector, decoder = (sum(p.numel() for p in part.parameters()) for part in vlm.children())
    assert (tower, connector, decoder) == (1_842_770_688, 91_791_360, 7_721_324_544)
    assert math.floor((tower + connector + decoder) / 1e8) == 96 and round(decoder / 1e8) == 77

"""CogVLM2 as a whole: files in its authors' layout, the formula written out, generation, sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models.test_expert import dense, plainly
from vlmops.models import from_pretrained
from vlmops.models.checkpoint import assemble
from vlmops.models.formats.cogvlm2 import FORMAT, read
from vlmops.models.shards import CheckpointError, Shards

IMAGE = 128002
CONFIG = dict(
    architectures=["CogVLMForCausalLM"], vocab_size=IMAGE + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_multi_query_heads=2, intermediate_size=48, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
    eos_token_id=128001, pad_token_id=IMAGE,
    vision_config=dict(hidden_size=24, num_hidden_layers=2, num_heads=2, intermediate_size=40, patch_size=4, image_size=16,
                       hidden_act="gelu", layer_norm_eps=1e-6, num_positions=17, in_channels=3, dropout_prob=0.0),
)  # fmt: skip


def shapes():
    """Every tensor of such a file, as the authors' modules declare them."""
    c, wide, hidden, q, kv = 24, 32, 48, 32, 16
    found = {
        "model.embed_tokens.weight": [IMAGE + 3, wide],
        "model.norm.weight": [wide],
        "lm_head.weight": [IMAGE + 3, wide],
    }
    for i in range(2):
        p = f"model.layers.{i}."
        found |= {p + "input_layernorm.weight": [wide], p + "post_attention_layernorm.weight": [wide],
                  p + "self_attn.vision_expert_query_key_value.bias": [q + 2 * kv]}  # fmt: skip
        for kind in ("language", "vision"):
            found[f"{p}self_attn.{kind}_expert_query_key_value.weight"] = [q + 2 * kv, wide]
            found[f"{p}self_attn.{kind}_expert_dense.weight"] = [wide, wide]
            for x in ("gate", "up", "down"):
                found[f"{p}mlp.{kind}_mlp.{x}_proj.weight"] = [wide, hidden] if x == "down" else [hidden, wide]
        p = f"model.vision.transformer.layers.{i}."
        for name, shape in {"attention.query_key_value": [3 * c, c], "attention.dense": [c, c], "mlp.fc1": [40, c],
                            "mlp.fc2": [c, 40], "input_layernorm": [c], "post_attention_layernorm": [c]}.items():  # fmt: skip
            found |= {f"{p}{name}.weight": shape, f"{p}{name}.bias": shape[:1]}
    p = "model.vision."
    return found | {
        p + "patch_embedding.proj.weight": [c, 3, 4, 4], p + "patch_embedding.proj.bias": [c],
        p + "patch_embedding.cls_embedding": [1, c], p + "patch_embedding.position_embedding.weight": [17, c],
        p + "conv.weight": [c, c, 2, 2], p + "conv.bias": [c], p + "linear_proj.linear_proj.weight": [wide, c],
        p + "linear_proj.norm1.weight": [wide], p + "linear_proj.norm1.bias": [wide],
        p + "linear_proj.dense_h_to_4h.weight": [hidden, wide], p + "linear_proj.gate_proj.weight": [hidden, wide],
        p + "linear_proj.dense_4h_to_h.weight": [wide, hidden], p + "boi": [1, 1, wide], p + "eoi": [1, 1, wide],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator, found = torch.Generator().manual_seed(1), {}
    for name, shape in shapes().items():
        scale = 0.02 if "embed_tokens" in name or "lm_head" in name else 0.2
        found[name] = torch.randn(shape, generator=generator) * scale + ("norm" in name and name.endswith("weight"))
    path = tmp_path_factory.mktemp("cogvlm2")
    save_file(found, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path, found


def inputs():
    """Two prompts with an image each, padded in front, as ``build_conversation_input_ids`` makes them; 6 tokens an image."""
    rows, kinds = [], []
    for text in (3, 5):
        rows.append([1, *[IMAGE] * 6, *torch.randint(3, 900, (text,)).tolist()])
        kinds.append([0, *[1] * 6, *[0] * text])
    length = max(map(len, rows))
    ids, types, mask = (torch.tensor([[fill] * (length - len(r)) + r for r in part]) for fill, part in
                        ((IMAGE, rows), (0, kinds), (0, [[1] * len(r) for r in rows])))  # fmt: skip
    images = [[torch.randn(3, 16, 16)] for _ in rows]
    return dict(input_ids=ids, token_type_ids=types, attention_mask=mask, images=images)


def expected(vlm, theirs, more):
    """Logits of every real token, float64: conv2d and GLU, then the decoder, written out."""
    found = []
    w = {
        name.removeprefix("decoder."): p.detach().double() for name, p in vlm.state_dict().items() if "decoder" in name
    }
    t = {name: x.double() for name, x in theirs.items()}
    p = "model.vision."
    for ids, types, mask, (image,) in zip(*more.values(), strict=True):
        ids, types = ids[mask.bool()], types[mask.bool()]
        tokens = vlm.tower(image[None], patches_only=True).tokens.detach().double()
        x = nn.functional.conv2d(tokens.T.view(1, 24, 4, 4), t[p + "conv.weight"], t[p + "conv.bias"], stride=2)
        x = x.flatten(2)[0].T @ t[p + "linear_proj.linear_proj.weight"].T
        x = nn.functional.layer_norm(x, (32,), t[p + "linear_proj.norm1.weight"], t[p + "linear_proj.norm1.bias"])
        x = nn.functional.gelu(x)
        gated = nn.functional.silu(x @ t[p + "linear_proj.gate_proj.weight"].T) * (
            x @ t[p + "linear_proj.dense_h_to_4h.weight"].T
        )
        x = torch.cat([t[p + "boi"][0], gated @ t[p + "linear_proj.dense_4h_to_h.weight"].T, t[p + "eoi"][0]])
        stream = t["model.embed_tokens.weight"][ids]
        stream[types == 1] = x
        expert, positions = plainly(["tv"[k] for k in types.tolist()])
        hidden = dense(w, stream, torch.tensor(positions), torch.tensor(expert), vlm.decoder.config)
        found.append(hidden @ t["lm_head.weight"].T)
    return torch.cat(found).float()


def test_logits(folder):
    path, theirs = folder
    vlm, more = from_pretrained(path), inputs()
    assert vlm.config.end_tokens == (128001,) and vlm.config.pad_token == IMAGE
    real = more["attention_mask"].bool()
    with torch.no_grad():
        have = vlm(**more).logits[real]
        want = expected(vlm, theirs, {k: more[k] for k in ("input_ids", "token_type_ids", "attention_mask", "images")})
        assert want.std() > 0.05
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        plain = {name: more[name] for name in ("input_ids", "attention_mask")}
        pixels = torch.stack([image for (image,) in more["images"]])
        torch.testing.assert_close(vlm(**plain, pixel_values=pixels).logits[real], have, rtol=1e-5, atol=1e-5)
        text = vlm(**plain).logits[real]
        assert text.shape == have.shape and not torch.allclose(text, have, atol=1e-2)


def test_prepared_images(folder):
    vlm = from_pretrained(folder[0])
    pictures = [torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(2)]
    prepared = vlm.prepare(pictures)
    assert prepared.grid_thw.tolist() == [[1, 4, 4]] * 2
    more = inputs()
    with torch.no_grad():
        want = vlm(**{**more, "images": [[x] for x in prepared.pixel_values()]}).logits
        torch.testing.assert_close(vlm(**{**more, "images": prepared}).logits, want, rtol=1e-4, atol=1e-4)


def test_generate_loss_and_gradients(folder):
    vlm, more = from_pretrained(folder[0]), inputs()
    out = vlm.generate(**more, max_new_tokens=4, eos_token_id=())
    for i in range(2):  # step by step, without a cache, alone
        ids, types = (more[k][i][more["attention_mask"][i].bool()] for k in ("input_ids", "token_type_ids"))
        for token in out[i, -4:].tolist():
            logits = vlm(ids[None], token_type_ids=types[None], images=[more["images"][i]], logits_to_keep=1).logits
            assert int(logits.argmax()) == token
            ids, types = torch.cat([ids, torch.tensor([token])]), torch.cat([types, torch.tensor([0])])
    labels = more["input_ids"].masked_fill((more["token_type_ids"] == 1) | (more["attention_mask"] == 0), -100)
    loss = vlm(**more, labels=labels).loss
    logits = vlm(**more).logits[:, :-1]
    targets = labels[:, 1:].masked_fill(more["attention_mask"][:, :-1] == 0, -100)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    loss.backward()
    silent = [name for name, p in vlm.named_parameters() if p.grad is None or not float(p.grad.abs().max())]
    last = "decoder.blocks.1.expert."  # nothing is read from image tokens behind the last attention
    assert sorted(silent) == sorted(last + x for x in ("o", "w_gate", "w_up", "w_down"))


def test_saves_what_it_read(folder, tmp_path):
    path, theirs = folder
    vlm = from_pretrained(path)
    vlm.save_pretrained(tmp_path, shard_bytes=200_000)
    again = from_pretrained(tmp_path)
    assert again.config == vlm.config
    for name, x in vlm.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    back = Shards(tmp_path)
    assert {n: list(x.shape) for n, x in back.items()} == shapes() and all(
        torch.equal(back[n], theirs[n]) for n in theirs
    )
    assert json.loads((tmp_path / "config.json").read_text())["num_multi_query_heads"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_multi_query_heads=None), "num_multi_query_heads"),
        (dict(vision_config={**CONFIG["vision_config"], "num_positions": 5}), "num_positions: expected 17"),
    ],
)
def test_files_that_are_not(folder, tmp_path, changes, message):
    kept = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


REAL = {**CONFIG, "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_multi_query_heads": 8, "intermediate_size": 14336}  # fmt: skip
EVA = dict(hidden_size=1792, num_hidden_layers=63, num_heads=16, intermediate_size=15360, patch_size=14, hidden_act="gelu",
           layer_norm_eps=1e-6)  # fmt: skip


def count(size):
    side = size // 14
    config = read({**REAL, "vision_config": dict(EVA, image_size=size, num_positions=side * side + 1)})
    with torch.device("meta"):
        vlm = assemble(config)
    assert FORMAT.rules(config)
    parts = {
        part: sum(p.numel() for p in getattr(vlm, part).parameters()) for part in ("tower", "connector", "decoder")
    }
    return parts, sum(p.numel() for n, p in vlm.named_parameters() if ".expert." in n)


def test_real_size():
    """The model's page states 19.5 billion parameters. To the last one there is the file of CogVLM2-Caption, which is this model
    at 224 pixels without the expert: its six safetensors files have 25,015,199,008 bytes, headers included, of bfloat16."""
    parts, expert = count(1344)
    total = sum(parts.values())
    assert round(total / 1e8) == 195
    small, expert = count(224)
    headers = 25_015_199_008 - 2 * (sum(small.values()) - expert)
    tensors = 74 + 91 + 89 + 438 + 336 + 1
    assert 80 * tensors < headers < 200 * tensors

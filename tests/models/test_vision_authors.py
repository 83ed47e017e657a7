"""Towers that transformers does not have, against plain formulas over a checkpoint with their authors' names.

EVA-CLIP (EVA01-g, EVA02-L with rotary positions, SwiGLU and inner norms, EVA02-E with norms behind), CogVLM's and Qwen-VL's.
"""

import pytest
import torch
from torch.nn import functional as F

from vlmops.models.config import VisionConfig
from vlmops.models.keymap import KeyMapError, load_into, save
from vlmops.models.vision import VisionTransformer, keys
from vlmops.models.vision.positions import rotary_tables

WIDTH, HEADS, DIM, HIDDEN, LAYERS, PATCH, SIDE = 32, 2, 16, 40, 2, 4, 4
COMMON = dict(width=WIDTH, heads=HEADS, layers=LAYERS, mlp_width=HIDDEN, patch_size=PATCH, image_size=PATCH * SIDE)
EVA = dict(**COMMON, attention_bias="qvo", class_token=True)
CONFIGS = {
    "eva01-g": ("eva_clip", VisionConfig(**EVA)),
    "eva02-l": ("eva_clip", VisionConfig(**EVA, activation="silu", gated=True, position="learned+rope", rope="interleaved",
                                         rope_side=2, sub_norm=True)),
    "eva02-e": ("eva_clip", VisionConfig(**EVA, norm_after=True)),
    "cogvlm": ("cogvlm", VisionConfig(**COMMON, class_token=True, norm_after=True, post_norm=False)),
    "qwen-vl": ("qwen_vl", VisionConfig(**COMMON, patch_bias=False, pre_norm=True, post_norm=False)),
}  # fmt: skip


def linear(name, rows, columns, bias=True):
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name, n=WIDTH):
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def eva(name):
    """A checkpoint of EVA-CLIP."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE**2, WIDTH), "patch_embed.proj.bias": (WIDTH,),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), **norm("norm"), **linear("head", 8, WIDTH),
    }  # fmt: skip
    for i in range(LAYERS):
        b = f"blocks.{i}."
        shapes |= norm(b + "norm1") | norm(b + "norm2") | linear(b + "attn.proj", WIDTH, WIDTH)
        shapes |= {b + "attn.q_bias": (WIDTH,), b + "attn.v_bias": (WIDTH,)}
        if name == "eva02-l":
            for x in "qkv":
                shapes |= linear(f"{b}attn.{x}_proj", WIDTH, WIDTH, False)
            shapes |= norm(b + "attn.inner_attn_ln") | norm(b + "mlp.ffn_ln", HIDDEN)
            shapes |= linear(b + "mlp.w1", HIDDEN, WIDTH) | linear(b + "mlp.w2", HIDDEN, WIDTH)
            shapes |= linear(b + "mlp.w3", WIDTH, HIDDEN) | {b + "attn.rope.freqs_cos": (SIDE**2, DIM)}
        else:
            shapes |= linear(b + "attn.qkv", 3 * WIDTH, WIDTH, False)
            shapes |= linear(b + "mlp.fc1", HIDDEN, WIDTH) | linear(b + "mlp.fc2", WIDTH, HIDDEN)
    return shapes


def cogvlm():
    p, shapes = "patch_embedding.", {}
    shapes |= {p + "cls_embedding": (1, WIDTH), p + "position_embedding.weight": (1 + SIDE**2, WIDTH),
               p + "proj.weight": (WIDTH, 3, PATCH, PATCH), p + "proj.bias": (WIDTH,)}  # fmt: skip
    for i in range(LAYERS):
        b = f"transformer.layers.{i}."
        shapes |= norm(b + "input_layernorm") | norm(b + "post_attention_layernorm")
        shapes |= linear(b + "attention.query_key_value", 3 * WIDTH, WIDTH) | linear(
            b + "attention.dense", WIDTH, WIDTH
        )
        shapes |= linear(b + "mlp.fc1", HIDDEN, WIDTH) | linear(b + "mlp.fc2", WIDTH, HIDDEN)
    return shapes


def qwen_vl():
    shapes = {"conv1.weight": (WIDTH, 3, PATCH, PATCH), "positional_embedding": (SIDE**2, WIDTH), **norm("ln_pre")}
    for i in range(LAYERS):
        b = f"transformer.resblocks.{i}."
        shapes |= norm(b + "ln_1") | norm(b + "ln_2")
        shapes |= linear(b + "attn.in_proj", 3 * WIDTH, WIDTH) | linear(b + "attn.out_proj", WIDTH, WIDTH)
        shapes |= linear(b + "mlp.c_fc", HIDDEN, WIDTH) | linear(b + "mlp.c_proj", WIDTH, HIDDEN)
    return shapes


def build(name):
    shapes = eva(name) if name.startswith("eva") else {"cogvlm": cogvlm, "qwen-vl": qwen_vl}[name]()
    checkpoint = {n: 0.2 * torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    checkpoint = {n: t + 1 if t.dim() == 1 and n.endswith("weight") else t for n, t in checkpoint.items()}
    family, config = CONFIGS[name]
    ours = VisionTransformer(config)
    load_into(ours, checkpoint, keys(config, family))
    return checkpoint, ours


def attend(q, k, v):
    """[n, L, C] each."""
    q, k, v = (x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def turn(x, stretch=2 / SIDE, theta=10000.0):
    """Each channel pair of each patch (not of the class token) turned by its own angle, one by one."""
    x = x.clone().unflatten(-1, (HEADS, DIM))
    for token in range(1, x.shape[1]):
        row, column = divmod(token - 1, SIDE)
        for pair in range(DIM // 2):
            place, j = (row, pair) if pair < DIM // 4 else (column, pair - DIM // 4)
            angle = torch.tensor(place * stretch * theta ** (-4 * j / DIM), dtype=torch.float64)
            a, b = x[:, token, :, 2 * pair].clone(), x[:, token, :, 2 * pair + 1].clone()
            x[:, token, :, 2 * pair] = a * angle.cos() - b * angle.sin()
            x[:, token, :, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return x.flatten(2)


class Formula:
    """A tower in float64 by the names of its checkpoint; hidden states of all blocks, then the normed last."""

    def __init__(self, name, w):
        self.name, self.w = name, w

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def conv(self, x, name):
        return (
            F.conv2d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), stride=PATCH).flatten(2).transpose(1, 2)
        )

    def __call__(self, x):
        w = self.w
        if self.name.startswith("eva"):
            x = self.conv(x, "patch_embed.proj")
            x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], 1) + w["pos_embed"]
        elif self.name == "cogvlm":
            x = self.conv(x, "patch_embedding.proj")
            x = torch.cat([w["patch_embedding.cls_embedding"].expand(len(x), 1, -1), x], 1)
            x = x + w["patch_embedding.position_embedding.weight"]
        else:
            x = self.norm(self.conv(x, "conv1") + w["positional_embedding"], "ln_pre")
        states = [x]
        for i in range(LAYERS):
            x = getattr(self, self.name.replace("-", "_"))(x, i)
            states.append(x)
        return states + [self.norm(x, "norm")] if self.name.startswith("eva") else states

    def eva_attention(self, x, b):
        bias = torch.cat([self.w[b + "q_bias"], torch.zeros(WIDTH, dtype=x.dtype), self.w[b + "v_bias"]])
        return attend(*F.linear(x, self.w[b + "qkv.weight"], bias).chunk(3, -1))

    def eva_mlp(self, x, b):
        return self.linear(F.gelu(self.linear(x, b + "mlp.fc1")), b + "mlp.fc2")

    def eva01_g(self, x, i):
        b = f"blocks.{i}."
        x = x + self.linear(self.eva_attention(self.norm(x, b + "norm1"), b + "attn."), b + "attn.proj")
        return x + self.eva_mlp(self.norm(x, b + "norm2"), b)

    def eva02_e(self, x, i):
        b = f"blocks.{i}."
        x = x + self.norm(self.linear(self.eva_attention(x, b + "attn."), b + "attn.proj"), b + "norm1")
        return x + self.norm(self.eva_mlp(x, b), b + "norm2")

    def eva02_l(self, x, i):
        b = f"blocks.{i}."
        y = self.norm(x, b + "norm1")
        q = self.linear(y, b + "attn.q_proj") + self.w[b + "attn.q_bias"]
        k, v = self.linear(y, b + "attn.k_proj"), self.linear(y, b + "attn.v_proj") + self.w[b + "attn.v_bias"]
        x = x + self.linear(self.norm(attend(turn(q), turn(k), v), b + "attn.inner_attn_ln"), b + "attn.proj")
        y = self.norm(x, b + "norm2")
        y = F.silu(self.linear(y, b + "mlp.w1")) * self.linear(y, b + "mlp.w2")
        return x + self.linear(self.norm(y, b + "mlp.ffn_ln"), b + "mlp.w3")

    def cogvlm(self, x, i):
        b = f"transformer.layers.{i}."
        y = self.linear(attend(*self.linear(x, b + "attention.query_key_value").chunk(3, -1)), b + "attention.dense")
        x = x + self.norm(y, b + "input_layernorm")
        return x + self.norm(self.eva_mlp(x, b), b + "post_attention_layernorm")

    def qwen_vl(self, x, i):
        b = f"transformer.resblocks.{i}."
        mixed = self.linear(self.norm(x, b + "ln_1"), b + "attn.in_proj").unflatten(-1, (HEADS, 3, DIM))
        x = x + self.linear(attend(*(mixed[..., j, :].flatten(2) for j in range(3))), b + "attn.out_proj")
        return x + self.linear(F.gelu(self.linear(self.norm(x, b + "ln_2"), b + "mlp.c_fc")), b + "mlp.c_proj")


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_gradients(name):
    checkpoint, ours = build(name)
    leaves = {n: t.clone().requires_grad_() for n, t in checkpoint.items()}
    x = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    want = Formula(name, leaves)(x.double())
    for i in range(LAYERS + 1):
        torch.testing.assert_close(ours(x, layer=i).tokens, want[i].flatten(0, 1).float(), rtol=1e-5, atol=1e-5)
    found = ours(x).tokens
    torch.testing.assert_close(found, want[-1].flatten(0, 1).float(), rtol=1e-5, atol=1e-5)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    (want[-1].flatten(0, 1) * weight).sum().backward()
    grads = dict(save({n: p.grad for n, p in ours.named_parameters()}, keys(ours.config, CONFIGS[name][0])))
    unused = {n for n in leaves if n.startswith("head.") or "rope" in n}
    assert grads.keys() == leaves.keys() - unused
    for key, grad in grads.items():
        scale = float(leaves[key].grad.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            grad.double(), leaves[key].grad, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_as_it_was(name):
    checkpoint, ours = build(name)
    for key, t in save(ours.state_dict(), keys(ours.config, CONFIGS[name][0])):
        assert torch.equal(t.double(), checkpoint[key].float().double()), key
    checkpoint.pop(next(n for n in checkpoint if "proj.weight" in n))
    with pytest.raises(KeyMapError, match="missing"):
        load_into(ours, checkpoint, keys(ours.config, CONFIGS[name][0]))


def test_rotary_positions_of_oblong_images():
    """Every axis is stretched to the pre-training's side; images of several shapes share a call."""
    _, ours = build("eva02-l")
    images = [torch.randn(3, 8, 24), torch.randn(3, 16, 16)]
    with torch.no_grad():
        both = ours(images).tokens
        each = torch.cat([ours(x[None]).tokens for x in images])
    torch.testing.assert_close(both, each, rtol=1e-5, atol=1e-5)
    cos, _ = rotary_tables(ours.config, [(1, 2, 6)])
    assert cos.shape == (12, DIM)
    row, column = torch.tensor(1 * 2 / 2), torch.tensor(4 * 2 / 6)
    torch.testing.assert_close(cos[10, [0, 1, 8, 9]], torch.stack([row, row, column, column]).cos())

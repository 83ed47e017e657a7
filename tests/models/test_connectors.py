"""Every connector against transformers' own (Qwen-VL's resampler against torch's attention): outputs and gradients."""

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, IdeficsConfig, InternVLConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaConfig, LlavaMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors import CONNECTORS, connect
from vlmops.models.connectors.resampler import sincos_2d

WIDTH, OUT = 24, 40


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def grids(*sizes):
    return torch.tensor([(1, h, w) for h, w in sizes])


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
        if "norm" in name.lower() and "weight" in name:
            p.data += 1
    return module.eval()


def fill(ours, theirs):
    """Copies tensors by our names; ``theirs``: name -> tensor or tensors to put behind each other."""
    state = {name: torch.cat(list(t)) if isinstance(t, (list, tuple)) else t for name, t in theirs.items()}
    ours.load_state_dict({name: t.detach().clone() for name, t in state.items()})
    return ours


def compare(ours, theirs, tokens, lengths, sizes):
    """Outputs and the gradient of the tokens; ``theirs`` takes the tokens too."""
    mine, other = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    out, cu_seqlens = ours(mine, cu(lengths), grids(*sizes))
    want = theirs(other).reshape(-1, out.shape[1])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert cu_seqlens[-1] == len(out) and cu_seqlens.dtype == torch.int32 and len(cu_seqlens) == len(lengths) + 1
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_linear_and_mlp():
    theirs = randomised(nn.Linear(WIDTH, OUT))
    ours = fill(connect(ConnectorConfig("linear", WIDTH, OUT)), {"weight": theirs.weight, "bias": theirs.bias})
    compare(ours, theirs, torch.randn(10, WIDTH), [4, 6], [(2, 2), (2, 3)])
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", "hidden_size": WIDTH},
                         text_config={"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 4})  # fmt: skip
    theirs = randomised(LlavaMultiModalProjector(config))
    names = {
        "w1": theirs.linear_1.weight,
        "b1": theirs.linear_1.bias,
        "w2": theirs.linear_2.weight,
        "b2": theirs.linear_2.bias,
    }
    ours = fill(connect(ConnectorConfig("mlp", WIDTH, OUT)), names)
    compare(ours, theirs, torch.randn(10, WIDTH), [4, 6], [(2, 2), (2, 3)])


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_merger_is_qwen2_vls(norm):
    kind = PatchMerger if norm == "layer_norm" else Qwen2_5_VLPatchMerger
    theirs = randomised(kind(dim=OUT, context_dim=WIDTH, spatial_merge_size=2))
    names = {"norm.weight": theirs.ln_q.weight, "w1": theirs.mlp[0].weight, "b1": theirs.mlp[0].bias, "w2": theirs.mlp[2].weight,
             "b2": theirs.mlp[2].bias}  # fmt: skip
    if norm == "layer_norm":
        names["norm.bias"] = theirs.ln_q.bias
    ours = fill(connect(ConnectorConfig("merger", WIDTH, OUT, norm=norm)), names)
    compare(ours, theirs, torch.randn(40, WIDTH), [16, 24], [(4, 4), (4, 6)])


def test_pixel_shuffle_is_internvls():
    config = InternVLConfig(
        vision_config={"hidden_size": WIDTH}, text_config={"model_type": "qwen2", "hidden_size": OUT}
    )
    theirs = randomised(InternVLMultiModalProjector(config))
    names = {"norm.weight": theirs.layer_norm.weight, "norm.bias": theirs.layer_norm.bias, "w1": theirs.linear_1.weight,
             "b1": theirs.linear_1.bias, "w2": theirs.linear_2.weight, "b2": theirs.linear_2.bias}  # fmt: skip
    ours = fill(connect(ConnectorConfig("pixel_shuffle", WIDTH, OUT, norm="layer_norm", norm_eps=1e-5)), names)

    def whole(tokens):
        return theirs(InternVLModel.pixel_shuffle(None, tokens.view(2, 6, 6, WIDTH), 0.5))

    compare(ours, whole, torch.randn(72, WIDTH), [36, 36], [(6, 6), (6, 6)])
    with pytest.raises(ValueError, match="even rows and columns"):
        ours(torch.randn(6, WIDTH), cu([6]), grids((2, 3)))


def test_pixel_shuffle_of_other_shapes_and_a_single_layer():
    """Mixed sizes: each image on its own; Idefics3's connector is one product."""
    ours = randomised(connect(ConnectorConfig("pixel_shuffle", WIDTH, OUT, hidden=-1, bias=False)))
    x = torch.randn(4 * 6 + 2 * 4, WIDTH)
    out, _ = ours(x, cu([24, 8]), grids((4, 6), (2, 4)))
    first = x[:24].view(4, 6, WIDTH)
    block = torch.cat([first[2, 4], first[2, 5], first[3, 4], first[3, 5]])  # second row of blocks, third column
    torch.testing.assert_close(out[5], ours.w1 @ block, rtol=1e-5, atol=1e-5)
    assert out.shape == (8, OUT)


def test_perceiver_is_idefics():
    heads, dim, depth, latents = 3, 8, 2, 5
    config = IdeficsConfig(vision_config={"embed_dim": WIDTH}, perceiver_config={"qk_layer_norms_perceiver": False})
    theirs = randomised(IdeficsPerceiverResampler(config, WIDTH, depth, heads, dim, latents))
    ours = connect(ConnectorConfig("perceiver", WIDTH, WIDTH, queries=latents, layers=depth, heads=heads, head_dim=dim,
                                   activation="relu", norm_eps=1e-5))  # fmt: skip
    names = {"latents": theirs.latents, "norm.weight": theirs.layer_norm.weight, "norm.bias": theirs.layer_norm.bias}
    for i, (attention, ff) in enumerate(theirs.blocks):
        at = f"layers.{i}."
        for mine, norm in (("context_norm", attention.context_layer_norm), ("latent_norm", attention.latents_layer_norm),
                           ("mlp_norm", ff.ln)):  # fmt: skip
            names[f"{at}{mine}.weight"], names[f"{at}{mine}.bias"] = norm.weight, norm.bias
        names |= {f"{at}q": attention.q_proj.weight, f"{at}kv": [attention.k_proj.weight, attention.v_proj.weight],
                  f"{at}out": attention.output_proj.weight, f"{at}w1": ff.fc.weight, f"{at}w2": ff.c_proj.weight}  # fmt: skip
    fill(ours, names)

    def whole(tokens):
        return torch.cat([theirs(x[None])[0] for x in tokens.split([7, 9])])

    compare(ours, whole, torch.randn(16, WIDTH), [7, 9], [(1, 7), (3, 3)])


def test_qformer_is_blip2s():
    config = Blip2QFormerConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                                encoder_hidden_size=WIDTH, cross_attention_frequency=2)  # fmt: skip
    theirs, queries = randomised(Blip2QFormerModel(config)), torch.randn(1, 6, 32)
    projection = randomised(nn.Linear(32, OUT), seed=1)
    ours = connect(
        ConnectorConfig("qformer", WIDTH, OUT, hidden=48, queries=6, layers=3, heads=4, width=32, norm_eps=1e-12)
    )
    names = {"latents": queries[0], "norm.weight": theirs.layernorm.weight, "norm.bias": theirs.layernorm.bias,
             "weight": projection.weight, "bias": projection.bias}  # fmt: skip

    def attention(at, part):
        a, o = part.attention, part.output
        return {f"{at}.q": a.query.weight, f"{at}.q_bias": a.query.bias, f"{at}.kv": [a.key.weight, a.value.weight],
                f"{at}.kv_bias": [a.key.bias, a.value.bias], f"{at}.out": o.dense.weight, f"{at}.out_bias": o.dense.bias,
                f"{at}.norm.weight": o.LayerNorm.weight, f"{at}.norm.bias": o.LayerNorm.bias}  # fmt: skip

    for i, layer in enumerate(theirs.encoder.layer):
        names |= attention(f"layers.{i}.attention", layer.attention)
        if layer.has_cross_attention:
            names |= attention(f"layers.{i}.cross", layer.crossattention)
        first, second = layer.intermediate_query.dense, layer.output_query
        names |= {f"layers.{i}.w1": first.weight, f"layers.{i}.b1": first.bias, f"layers.{i}.w2": second.dense.weight,
                  f"layers.{i}.b2": second.dense.bias, f"layers.{i}.norm.weight": second.LayerNorm.weight,
                  f"layers.{i}.norm.bias": second.LayerNorm.bias}  # fmt: skip
    fill(ours, names)

    def whole(tokens):
        found = [
            theirs(query_embeds=queries, encoder_hidden_states=x[None]).last_hidden_state[0]
            for x in tokens.split([4, 9])
        ]
        return projection(torch.cat(found))

    compare(ours, whole, torch.randn(13, WIDTH), [4, 9], [(2, 2), (3, 3)])


def test_resampler_is_a_multi_head_attention_with_positions():
    """Qwen-VL's, written down a second time with torch's own modules."""
    heads, side = 4, 3
    ours = randomised(connect(ConnectorConfig("resampler", WIDTH, OUT, queries=9, heads=heads, image_positions=4)))
    attention = nn.MultiheadAttention(OUT, heads, batch_first=True)
    attention.load_state_dict({"in_proj_weight": ours.qkv, "in_proj_bias": ours.qkv_bias, "out_proj.weight": ours.out,
                               "out_proj.bias": ours.out_bias})  # fmt: skip

    def norm(x, part):
        return nn.functional.layer_norm(x, (OUT,), part.weight, part.bias, part.eps)

    def whole(tokens):
        found = []
        for x in tokens.split([16, 16]):
            values = norm(x @ ours.kv_proj.t(), ours.kv_norm)
            asks = norm(ours.latents, ours.q_norm) + sincos_2d(OUT, side)
            out, _ = attention(asks[None], (values + sincos_2d(OUT, 4))[None], values[None])
            found.append(norm(out[0], ours.out_norm) @ ours.proj)
        return torch.cat(found)

    compare(ours, whole, torch.randn(32, WIDTH), [16, 16], [(4, 4), (4, 4)])
    out, _ = ours(torch.randn(10, WIDTH), cu([10]), grids((2, 5)))  # another grid: the positions are resized
    assert out.shape == (9, OUT) and out.isfinite().all()


def test_positions_have_the_published_form():
    table = sincos_2d(8, 3)
    assert table.shape == (9, 8) and torch.equal(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(
        table[5, :2], torch.tensor([2.0, 2 / 100]).sin()
    )  # row 1, column 2: the column comes first
    torch.testing.assert_close(table[5, 4:6], torch.tensor([1.0, 1 / 100]).sin())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_each_is_made_on_meta_and_takes_no_image(kind):
    config = ConnectorConfig(kind, WIDTH, OUT, queries=9, heads=4)
    with torch.device("meta"):
        assert sum(p.numel() for p in connect(config).parameters()) > 0
    ours = randomised(connect(config))
    out, cu_seqlens = ours(torch.randn(0, WIDTH), cu([]), torch.zeros(0, 3, dtype=torch.int64))
    assert out.shape == (0, OUT) and cu_seqlens.tolist() == [0]


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="kind: expected one of linear"):
        connect(ConnectorConfig("lineal", 4, 4))
    with pytest.raises(ValueError, match="square number"):
        connect(ConnectorConfig("resampler", 4, 8, queries=8))
    with pytest.raises(ValueError, match="a multiple of 4"):
        connect(ConnectorConfig("resampler", 4, 10, queries=4, heads=2))

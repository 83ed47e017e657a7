"""Flamingo's gated cross-attention against Idefics' layer, and what its gates and media masks promise."""

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from vlmops.models.config import CrossConfig
from vlmops.models.language.cross import GatedCrossAttention

WIDTH, CONTEXT, HEADS = 32, 20, 4


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()


def cu(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def config(**options):
    return CrossConfig(WIDTH, CONTEXT, HEADS, WIDTH // HEADS, 48, **options)


def run(ours, x, media, cu_seqlens, cu_media, index):
    return ours(x, ours.keys_values(media), cu_seqlens, cu_media, torch.tensor(index, dtype=torch.int32))


def test_it_is_idefics():
    theirs_config = IdeficsConfig(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=HEADS, qk_layer_norms=False,
                                  vision_config={"embed_dim": CONTEXT}, rms_norm_eps=1e-6, alpha_type="float",
                                  attn_implementation="eager")  # fmt: skip
    theirs = randomised(IdeficsGatedCrossAttentionLayer(theirs_config, layer_idx=0))
    ours = GatedCrossAttention(config(gated=True, norm="rms_norm", norm_eps=1e-6, activation="silu"))
    attention, mlp = theirs.cross_attn, theirs.mlp
    ours.load_state_dict({
        "norm1.weight": theirs.input_layernorm.weight, "q": attention.q_proj.weight,
        "kv": torch.cat([attention.k_proj.weight, attention.v_proj.weight]), "out": attention.o_proj.weight,
        "attention_gate": theirs.alpha_cross_attn.view(1), "norm2.weight": theirs.post_attention_layernorm.weight,
        "w1": mlp.up_proj.weight, "w_gate": mlp.gate_proj.weight, "w2": mlp.down_proj.weight,
        "mlp_gate": theirs.alpha_dense.view(1),
    })  # fmt: skip
    x, media = torch.randn(7, WIDTH, requires_grad=True), torch.randn(9, CONTEXT, requires_grad=True)
    # tokens 0 and 1 see nothing, 2..4 the first image (4 tokens), 5 and 6 the second (5 tokens)
    out = run(ours, x, media, cu(7), cu(4, 5), [-1, -1, 0, 0, 0, 1, 1])
    sees = torch.zeros(7, 9, dtype=torch.bool)
    sees[2:5, :4], sees[5:, 4:] = True, True
    mask = torch.zeros(1, 1, 7, 9).masked_fill(~sees, torch.finfo(torch.float32).min)
    gate = sees.any(1).float().view(1, 7)
    x2, media2 = x.detach().clone().requires_grad_(), media.detach().clone().requires_grad_()
    want = theirs(x2[None], image_hidden_states=media2[None], image_attention_mask=mask, cross_attention_gate=gate)
    want = (want if isinstance(want, torch.Tensor) else want[0])[0]
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(media.grad, media2.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_closed_gates_change_nothing(gated):
    ours = randomised(GatedCrossAttention(config(gated=gated)))
    fresh = GatedCrossAttention(config(gated=gated))
    assert fresh.attention_gate.item() == fresh.mlp_gate.item() == 0
    nn.init.zeros_(ours.attention_gate)
    nn.init.zeros_(ours.mlp_gate)
    x = torch.randn(5, WIDTH)
    assert torch.equal(run(ours, x, torch.randn(3, CONTEXT), cu(5), cu(3), [0] * 5), x)


def test_a_token_sees_its_own_images_alone():
    ours = randomised(GatedCrossAttention(config()))
    x, media = torch.randn(4, WIDTH), torch.randn(6, CONTEXT)
    index = [-1, 0, 1, 1]
    before = run(ours, x, media, cu(2, 2), cu(2, 4), index)
    changed = media.clone()
    changed[3] += 1  # of the second image
    after = run(ours, x, changed, cu(2, 2), cu(2, 4), index)
    assert torch.equal(before[:2], after[:2]) and not torch.isclose(before[2:], after[2:]).all(1).any()
    ranges = [[0, 0], [0, 1], [1, 2], [1, 2]]  # the same as ranges
    torch.testing.assert_close(run(ours, x, media, cu(2, 2), cu(2, 4), ranges), before)

"""Chameleon's image tokenizer: the same codes as transformers'."""

import pytest
import torch
from torch import nn
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from vlmops.models.vision.vq import VqConfig, VqTokenizer


def pair():
    torch.manual_seed(0)
    sizes = dict(
        embed_dim=16,
        num_embeddings=64,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=2,
    )
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(resolution=32, **sizes))
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = VqTokenizer(VqConfig(codes=64, code_width=16, latent=16, base=32, multipliers=(1, 1, 2), blocks=2))
    state = {}
    for name, p in theirs.state_dict().items():
        name = name.removeprefix("encoder.")
        for old, new in (("mid.block_1", "middle.0"), ("mid.attn_1", "middle.1"), ("mid.block_2", "middle.2"),
                         ("nin_shortcut", "shortcut"), ("quantize.embedding.weight", "codebook")):  # fmt: skip
            name = name.replace(old, new)
        if name.startswith("down."):
            level, kind, *rest = name.split(".")[1:]
            name = ".".join(["levels", level, *rest]) if kind == "block" else ".".join(["down", level, rest[-1]])
        state[name.replace("post_quant_conv", "from_code").replace("quant_conv", "to_code")] = p
    for end in ("weight", "bias"):
        parts = [state.pop(f"middle.1.{x}.{end}") for x in "qkv"]
        state["middle.1.qkv" + ("_bias" if end == "bias" else "")] = torch.cat(parts)
        state["middle.1.out" + ("_bias" if end == "bias" else "")] = state.pop(f"middle.1.proj_out.{end}")
    ours.load_state_dict(state)
    return ours.eval(), theirs.eval()


def test_codes_are_transformers():
    ours, theirs = pair()
    images = torch.randn(3, 3, 32, 48)
    want = theirs.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.latents(images), theirs.quant_conv(want.last_hidden_state), rtol=1e-4, atol=1e-4
        )
        codes = ours(images)
    assert codes.shape == (3, 8 * 12) and len(codes.unique()) > 5
    assert torch.equal(codes.flatten(), want.image_tokens.flatten())


def test_the_real_size_is_chameleons():
    with torch.device("meta"):
        ours = VqTokenizer()
        theirs = ChameleonVQVAE(ChameleonVQVAEConfig())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert ours.config.reduction == 16 and ours.config.tokens == 1024


def test_sides_that_do_not_fit():
    ours, _ = pair()
    with pytest.raises(ValueError, match="multiples of 4"):
        ours(torch.randn(1, 3, 30, 32))

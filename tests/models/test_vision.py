"""Every tower against transformers' own with the same weights: all hidden states, other sizes, every gradient."""

import pytest
import torch
from torch.nn import functional

from tests.models.towers import TOWERS, build, family, gradients, without_merger, written
from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors import connect
from vlmops.models.keymap import KeyMapError, load_into, save
from vlmops.models.vision import keys
from vlmops.models.vision.windows import window_order

SQUARES = ["vit", "clip", "siglip", "dinov2", "dinov2-g", "dinov2_with_registers", "blip2"]
NATIVE = ["qwen2_vl", "qwen2_5_vl"]


def close(found, want, scale=1.0):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * scale)


def padded(theirs):
    """[n, L, C] -> packed."""
    return theirs.flatten(0, 1)


def rows(grids, seed=0):
    """Qwen's flattened patches."""
    n = sum(t * h * w for t, h, w in grids)
    return torch.randn(n, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SQUARES)
def test_hidden_states_of_fixed_size_towers(name):
    theirs, ours = build(name)
    size = 60 if name == "siglip" else 56  # 60: a convolution leaves out the last pixels, and so do we
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        want = theirs(images, output_hidden_states=True)
        for i, state in enumerate(want.hidden_states):
            close(ours(images, layer=i).tokens, padded(state))
        close(ours(images, layer=-2).tokens, padded(want.hidden_states[-2]))
        found = ours(images)
    if name == "clip":  # transformers' last hidden state of CLIP is not normed, its pooled one is
        close(found.class_tokens, want.pooler_output)
        close(ours(images, layer=-1).tokens, padded(want.last_hidden_state))
    else:
        close(found.tokens, padded(want.last_hidden_state))
    front = int(ours.config.class_token) + ours.config.registers
    assert found.grid_thw.tolist() == [[1, 4, 4]] * 3
    assert found.cu_seqlens.tolist() == [(16 + front) * i for i in range(4)] and found.cu_seqlens.dtype == torch.int32
    if front:
        close(found.class_tokens, found.tokens[:: 16 + front])
    else:
        assert found.class_tokens is None
    only = ours(images, layer=-2, patches_only=True)
    close(only.tokens, padded(want.hidden_states[-2][:, front:]))
    assert only.cu_seqlens.tolist() == [0, 16, 32, 48]


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "dinov2_with_registers", "blip2"])
def test_other_and_mixed_sizes(name):
    """Positions are resized as the family does it, and images of several sizes share a call."""
    theirs, ours = build(name)
    images = [torch.randn(3, h, w) for h, w in [(70, 42), (56, 56), (28, 84), (70, 42)]]
    asks = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        found = ours(images, patches_only=True)
        whole = ours(images, layer=-1)
        front = int(ours.config.class_token) + ours.config.registers
        want = [theirs(x[None], **asks, output_hidden_states=True) for x in images]
        close(whole.tokens, torch.cat([x.hidden_states[-1][0] for x in want]))
        if name != "clip":
            close(found.tokens, torch.cat([x.last_hidden_state[0, front:] for x in want]))
    assert found.grid_thw.tolist() == [[1, 5, 3], [1, 4, 4], [1, 2, 6], [1, 5, 3]]
    assert found.cu_seqlens.tolist() == [0, 15, 31, 43, 58]


@pytest.mark.parametrize("name", NATIVE)
def test_native_resolution_towers(name):
    theirs, ours = build(name)
    grids = [(1, 4, 6), (2, 6, 2), (1, 10, 6)]  # windows of 4 x 4 patches: some are cut, some have two frames
    pixels, grid_thw = rows(grids), torch.tensor(grids)
    with torch.no_grad():
        want = theirs(pixels, grid_thw=grid_thw, output_hidden_states=True)
        found = ours(pixels, grid_thw)
        config = ConnectorConfig("merger", 32, 24, norm=ours.config.norm)
        merger = connect(config)
        state = {n.removeprefix("merger."): t for n, t in written(theirs).items() if n.startswith("merger.")}
        names = {"norm.weight": "ln_q.weight", "norm.bias": "ln_q.bias", "w1": "mlp.0.weight", "b1": "mlp.0.bias",
                 "w2": "mlp.2.weight", "b2": "mlp.2.bias"}  # fmt: skip
        merger.load_state_dict({n: state[t] for n, t in names.items() if t in state})
        merged, cu_seqlens = merger(found.tokens, found.cu_seqlens, found.grid_thw)
    close(merged, want.pooler_output)
    assert found.cu_seqlens.tolist() == [0, 24, 48, 108] and cu_seqlens.tolist() == [0, 6, 12, 27]
    order = window_order(grids, 4, 2)[0] if name == "qwen2_5_vl" else torch.arange(108)
    for i, state in enumerate(want.hidden_states):
        close(ours(pixels, grid_thw, layer=i).tokens[order], state)


@pytest.mark.parametrize("name", NATIVE)
def test_images_and_videos_are_flattened_rows(name):
    """Pixels as a tensor or list give what Qwen's processor's rows give."""
    _, ours = build(name)
    image, video = torch.randn(3, 16, 24), torch.randn(3, 3, 24, 8)
    with torch.no_grad():
        found = ours([image, video])
        patches = []
        for frames in (image[None].expand(2, -1, -1, -1), torch.cat([video, video[-1:]])):
            t, _, h, w = frames.shape
            x = frames.reshape(t // 2, 2, 3, h // 8, 2, 4, w // 8, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            patches.append(x.reshape(t // 2 * h // 4 * (w // 4), -1))
        want = ours(torch.cat(patches), torch.tensor([[1, 4, 6], [2, 6, 2]]))
    assert found.grid_thw.tolist() == [[1, 4, 6], [2, 6, 2]]
    close(found.tokens, want.tokens)


def test_pixtral():
    theirs, ours = build("pixtral")
    sizes = [(16, 24), (32, 8), (4, 4)]
    images = [torch.randn(3, h, w) for h, w in sizes]
    canvas = torch.stack([functional.pad(x, (0, 24 - x.shape[2], 0, 32 - x.shape[1])) for x in images])
    with torch.no_grad():
        want = theirs(canvas, image_sizes=torch.tensor(sizes), output_hidden_states=True)
        close(ours(images).tokens, want.last_hidden_state[0])
        close(ours(images, layer=1).tokens, want.hidden_states[1][0])
        close(ours(images, layer=[0, -1]).tokens, torch.cat([want.hidden_states[i][0] for i in (0, -1)], 1))


@pytest.mark.parametrize("name", TOWERS)
def test_every_gradient(name):
    theirs, ours = build(name)
    if name in NATIVE:
        pixels, grid = rows([(1, 4, 6), (1, 6, 4)]), torch.tensor([[1, 4, 6], [1, 6, 4]])
        mine, other = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
        found, want = ours(mine, grid).tokens, theirs(other, grid_thw=grid).last_hidden_state
        if name == "qwen2_5_vl":
            found = found[window_order([(1, 4, 6), (1, 6, 4)], 4, 2)[0]]
    else:
        mine, other = (
            torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "12"
        )
        want = theirs(other)
        if name == "clip":  # reaches post_norm too
            found = ours(mine)
            found = torch.cat([ours(mine, layer=-1).tokens, found.class_tokens])
            want = torch.cat([want.last_hidden_state.flatten(0, 1), want.pooler_output])
        else:
            found, want = ours(mine).tokens, want.last_hidden_state.flatten(0, 1)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
    expected = gradients(theirs, ours, name)
    for key, p in ours.named_parameters():
        scale = float(expected[key].abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            p.grad, expected[key], rtol=1e-4, atol=2e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", TOWERS)
def test_saved_as_it_was(name):
    theirs, ours = build(name)
    checkpoint, rules = without_merger(written(theirs)), keys(ours.config, family(name))
    back = dict(save(ours.state_dict(), rules))
    unused = {"embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"}
    assert checkpoint.keys() - back.keys() <= unused | {n for n in checkpoint if n.startswith("head.")}
    for key, t in back.items():
        assert torch.equal(t, checkpoint[key]), key
    with pytest.raises(KeyMapError, match="missing"):
        load_into(ours, {n: t for n, t in checkpoint.items() if "norm1" not in n and "layernorm_after" not in n
                         and "layer_norm1" not in n and "attention_norm" not in n}, rules)  # fmt: skip

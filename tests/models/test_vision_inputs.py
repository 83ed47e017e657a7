"""What goes into a tower and what is refused: bytes, prepared images, no image, bad options; half precision, compilation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.models.towers import TOWERS, build
from vlmops.images import prepare
from vlmops.models.config import VisionConfig
from vlmops.models.vision import VisionTransformer, from_json, keys
from vlmops.models.vision.plan import plan


def close(found, want, scale=1.0):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * scale)


def test_bytes_are_normalised_in_the_product():
    """Prepared images, bytes and pixel values are one thing."""
    _, ours = build("clip")
    photos = [torch.randint(0, 256, (3, 80, 60), dtype=torch.uint8) for _ in range(2)]
    prepared = prepare(photos, size=56, patch_size=14)
    with torch.no_grad():
        found = ours(prepared, layer=-2, patches_only=True)
        close(found.tokens, ours(prepared.pixel_values(), layer=-2, patches_only=True).tokens, 10)
        close(
            found.tokens,
            ours(prepared.pixels, layer=-2, patches_only=True, mean=prepared.mean, std=prepared.std).tokens,
        )
    with pytest.raises(ValueError, match=r"patch size and order \(14, 'raster'\)"):
        ours(prepare(photos, size=56, patch_size=28))


def test_prepared_native_images():
    _, ours = build("qwen2_5_vl")
    photos = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in [(16, 40), (24, 24)]]
    prepared = prepare(photos, mode="native", patch_size=4, min_pixels=64, max_pixels=4096)
    with torch.no_grad():
        found = ours(prepared)
        close(found.tokens, ours(prepared.flattened(), prepared.grid_thw).tokens, 10)
    assert torch.equal(found.grid_thw, prepared.grid_thw)


@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl", "dinov2_with_registers"])
def test_no_image_at_all(name):
    _, ours = build(name)
    out = ours(torch.empty(0, 3, 56, 56), patches_only=True)
    assert out.tokens.shape == (0, 32) and out.cu_seqlens.tolist() == [0] and out.grid_thw.shape == (0, 3)


@pytest.mark.parametrize("name", TOWERS)
def test_bfloat16_stays_near(name):
    _, ours = build(name)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        want = ours(x).tokens
        found = ours.bfloat16()(x).tokens
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl"])
def test_compiles_whole(name):
    _, ours = build(name)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        want = ours(x, layer=-2).tokens
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        close(compiled(x, layer=-2).tokens, want)


def test_a_plan_made_without_gradients_serves_training():
    _, ours = build("qwen2_5_vl")
    x = torch.randn(1, 3, 40, 32)
    with torch.inference_mode():
        ours(x)
    ours(x).tokens.sum().backward()
    assert ours.patch.grad is not None


def test_the_last_block_is_not_run_for_an_earlier_layer():
    _, ours = build("clip")
    ours.blocks[2].forward = None
    ours(torch.randn(1, 3, 56, 56), layer=-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=3), "heads: expected a divisor of width 32"),
        (dict(position="sine"), "position: expected one of 'learned'"),
        (dict(rope="spiral"), "rope: expected one of 'axial'"),
        (dict(attention_bias="kv"), "attention_bias: expected one of 'qkvo'"),
        (dict(activation="tanh"), "activation: expected one of"),
        (dict(norm="batch_norm"), 'kind: expected "layer_norm"'),
        (dict(image_size=None), "image_size: expected at least 14"),
        (dict(image_size=13), "image_size: expected at least 14"),
        (dict(layers=0), "layers: expected at least 1"),
        (dict(merge_size=2), "merge_size: expected 1 with learned positions"),
        (dict(merge_size=3), "merge_size: expected one of 1, 2"),
        (dict(position="rope", head_dim=6), "head_dim: expected a multiple of 4"),
        (dict(position="rope", rope="alternating", merge_size=2), "merge_size: expected 1 with rope 'alternating'"),
        (dict(window=50), "window: expected a multiple of 14"),
        (dict(window=28, class_token=True), "window: a tower with windows has no class token"),
        (dict(norm_after=True, layer_scale=True), "norm_after: not with layer_scale"),
    ],
)
def test_bad_configs(change, message):
    base = dict(width=32, layers=2, heads=2, mlp_width=48, patch_size=14, image_size=56)
    with pytest.raises(ValueError, match=message):
        VisionTransformer(VisionConfig(**{**base, **change}))


def test_bad_inputs():
    _, ours = build("clip")
    for layer in (4, -5, [], [0, 9]):
        with pytest.raises(ValueError, match="layer: expected -4 to 3"):
            ours(torch.randn(1, 3, 56, 56), layer=layer)
    with pytest.raises(ValueError, match="grid_thw: expected"):
        ours(torch.randn(4, 588))
    with pytest.raises(ValueError, match="frames as images of their own"):
        ours(torch.randn(1, 2, 3, 56, 56))
    with pytest.raises(ValueError, match="3 channels"):
        ours(torch.randn(1, 4, 56, 56))
    for images in ("photo.jpg", [torch.zeros(3, 56, 56), None]):
        with pytest.raises(TypeError, match="images: expected a tensor, a list"):
            ours(images)
    with pytest.raises(ValueError, match=r"each, got \[56, 56\]"):
        ours(torch.zeros(3, 56, 56))
    with pytest.raises(TypeError, match="images"):
        ours(torch.zeros(1, 3, 56, 56, dtype=torch.int32))
    _, native = build("qwen2_vl")
    with pytest.raises(ValueError, match="multiples of 8"):
        native(torch.randn(1, 3, 20, 16))
    with pytest.raises(ValueError, match="model_type: expected one of"):
        from_json({"model_type": "resnet"})
    with pytest.raises(ValueError, match="family: expected one of"):
        from_json({}, "resnet")
    with pytest.raises(ValueError, match="family: expected one of"):
        keys(ours.config, "resnet")


def test_no_plan_of_fake_tensors_is_kept():
    config, grids = build("clip")[1].config, ((1, 2, 9),)
    with FakeTensorMode():
        assert type(plan(config, grids, torch.device("cpu")).cu_images) is not torch.Tensor
    assert plan(config, grids, torch.device("cpu")).cu_images.tolist() == [0, 19]
    assert plan(config, grids, torch.device("cpu")) is plan(config, grids, torch.device("cpu"))

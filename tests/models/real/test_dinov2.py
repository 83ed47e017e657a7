"""DINOv2-small's features are those of ONNX Runtime, to 1e-4, at the size of its training and at others."""

import pytest
import torch

from tests.support.scripts import ROOT
from vlmops.images import prepare
from vlmops.models.vision import SIZES

pytestmark = pytest.mark.real_weights

PICTURE = ROOT / "vlmops" / "demo" / "tiny" / "picture.png"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TOLERANCE = 1e-4


def smooth(height, width):
    """An image between noise and a photograph: [3, H, W]."""
    coarse = torch.randn(1, 3, max(2, height // 28), max(2, width // 28))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0] + 0.1 * torch.randn(
        3, height, width
    )


def apart(ours, theirs):
    """Greatest difference of a packed image [patches, C] from [1, patches, C]; the features are of size 1 to 10."""
    assert ours.shape == theirs.shape[1:] and theirs.abs().max() > 1
    return (ours - theirs[0]).abs().max()


def test_two_images_of_the_training_size(dinov2):
    """The demo's picture in bytes, and a made one: 1 + 37 * 37 tokens each."""
    prepared = prepare(PICTURE, size=518, mean=MEAN, std=STD)
    pixels = [prepared.pixel_values()[0], smooth(518, 518)]
    with torch.no_grad():
        parts = [dinov2.ours(prepared).tokens, dinov2.ours(pixels[1][None]).tokens]
    for ours, image in zip(parts, pixels, strict=True):
        assert apart(ours, dinov2.theirs(image[None])) < TOLERANCE


def test_other_sizes_in_one_batch(dinov2):
    """Positions are resized for each; (H, W) that are no multiple of a patch are cut."""
    sizes = [(224, 224), (112, 112), (168, 238), (14, 14), (230, 120), (28, 560)]
    images = [smooth(*size) for size in sizes]
    with torch.no_grad():
        out = dinov2.ours(images)
    parts = out.tokens.split(out.cu_seqlens.diff().tolist())
    for i, (ours, image) in enumerate(zip(parts, images, strict=True)):
        theirs = dinov2.theirs(image[None])
        assert apart(ours, theirs) < TOLERANCE, sizes[i]
        assert apart(out.class_tokens[i : i + 1], theirs[:, :1]) < TOLERANCE


def test_the_weights_are_trained_ones(dinov2):
    """Two crops of a picture are closer to each other than to noise: random weights see no such thing."""
    prepared = prepare(PICTURE, size=224, mean=MEAN, std=STD).pixel_values()
    crops = torch.stack([prepared[0, :, :196, :196], prepared[0, :, 28:, 28:], torch.randn(3, 196, 196)])
    with torch.no_grad():
        tokens = torch.nn.functional.normalize(dinov2.ours(crops).class_tokens, dim=1)
    near, far = tokens[0] @ tokens[1], tokens[0] @ tokens[2]
    assert near > 0.8 and far < 0.5, (near, far)


def test_the_preset_is_this_model(dinov2):
    assert SIZES["dinov2-s"][1] == dinov2.ours.config
    assert sum(t.numel() for t in dinov2.tensors.values()) == sum(p.numel() for p in dinov2.ours.parameters())

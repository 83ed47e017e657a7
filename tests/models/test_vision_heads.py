"""Contrastive heads and losses against transformers' CLIP and SigLIP, and gradients against float64 differences."""

import pytest
import torch
import transformers as T
from torch.nn import functional as F

from tests.models.towers import SHAPE, randomise
from vlmops.models.keymap import load_into, prefixed, save
from vlmops.models.vision import (
    ClipHead,
    SiglipHead,
    VisionTransformer,
    clip_head_keys,
    from_json,
    keys,
    siglip_head_keys,
    sigmoid_loss,
    softmax_loss,
)

TEXT = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
    max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(**SHAPE, image_size=28, patch_size=7)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def build(kind):
    """A whole contrastive model, our tower and our head with its weights."""
    if kind == "clip":
        theirs = T.CLIPModel(T.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24))
    else:
        theirs = T.SiglipModel(T.SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32}))
    theirs = randomise(theirs)
    config = from_json(theirs.config.vision_config.to_dict())
    tower = VisionTransformer(config)
    head = ClipHead(32, 24) if kind == "clip" else SiglipHead(config)
    head_rules = clip_head_keys() if kind == "clip" else siglip_head_keys()
    state = theirs.state_dict()
    load_into(tower, state, prefixed(keys(config, kind), theirs="vision_model."), strict=False)
    load_into(head, state, head_rules, strict=False)
    for key, t in save(head.state_dict(), head_rules):
        assert torch.equal(t, state[key]), key
    return theirs, tower, head


def image_vectors(kind, tower, head, images):
    out = tower(images)
    return head(out.class_tokens) if kind == "clip" else head(out.tokens, out.cu_seqlens)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_logits_loss_and_gradients(kind):
    theirs, tower, head = build(kind)
    mine, other = (torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "12")
    ids = torch.randint(3, 50, (5, 8))
    want = theirs(input_ids=ids, pixel_values=other, return_loss=True)
    image, text = image_vectors(kind, tower, head, mine), want.text_embeds.detach()
    close(image, want.image_embeds)
    close(head.logits(image, text), want.logits_per_image)
    loss = head.loss(image, text)
    close(loss, want.loss)
    loss.backward()
    want.loss.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    grads = dict(save({n: p.grad for n, p in head.named_parameters()},
                      clip_head_keys() if kind == "clip" else siglip_head_keys()))  # fmt: skip
    theirs_by_name = dict(theirs.named_parameters())
    for key, grad in grads.items():
        expected = theirs_by_name[key].grad
        torch.testing.assert_close(
            grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=lambda m, k=key: f"{k}: {m}"
        )


def test_siglip_pools_images_of_several_sizes():
    _, tower, head = build("siglip")
    images = [torch.randn(3, 28, 14), torch.randn(3, 7, 7), torch.randn(3, 28, 28)]
    with torch.no_grad():
        found = image_vectors("siglip", tower, head, images)
        close(found, torch.cat([image_vectors("siglip", tower, head, x[None]) for x in images]))
    close(found.norm(dim=1), torch.ones(3))


def vectors(n, c=6, dtype=torch.float64):
    return (F.normalize(torch.randn(n, c, dtype=dtype), dim=1).requires_grad_() for _ in "12")


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_gradients_of_the_losses(n):
    image, text = vectors(n)
    assert torch.autograd.gradcheck(softmax_loss, (image, text, number(1.5)))
    assert torch.autograd.gradcheck(sigmoid_loss, (image, text, number([1.5]), number([-2.0])))
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, rows=3), (image, text, number(1.5), number(-2.0)))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_losses_are_their_formulas(rows):
    image, text = vectors(7)
    scale, bias = number(2.0), number(-3.0)
    logits = scale.exp() * image @ text.t()
    own = torch.arange(7)
    torch.testing.assert_close(
        softmax_loss(image, text, scale), (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    )
    z = 2 * torch.eye(7, dtype=torch.float64) - 1
    want = -F.logsigmoid(z * (logits + bias)).sum() / 7
    found = sigmoid_loss(image, text, scale, bias, rows=rows)
    torch.testing.assert_close(found, want)
    inputs = (image, text, scale, bias)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bfloat16_losses_are_summed_in_float32():
    image, text = (x.detach().bfloat16() for x in vectors(16))
    scale, bias = number(1.0, torch.float32), number(-1.0, torch.float32)
    for found, want in (
        (softmax_loss(image, text, scale), softmax_loss(image.double(), text.double(), scale.double())),
        (
            sigmoid_loss(image, text, scale, bias),
            sigmoid_loss(image.double(), text.double(), scale.double(), bias.double()),
        ),
    ):
        assert found.dtype == torch.float32
        assert abs(found.item() - want.item()) < 0.02 * want.item()


def test_extremes():
    image, text = vectors(4)
    far = sigmoid_loss(image, text, number(8.0), number(0.0))  # logits in the thousands
    assert torch.isfinite(far)
    none = torch.empty(0, 6, requires_grad=True)
    assert softmax_loss(none, none, number(1.0, torch.float32)).isnan()
    assert sigmoid_loss(none, none, number(1.0, torch.float32), number(0.0, torch.float32)).isnan()
    for loss in (softmax_loss, lambda a, b, s: sigmoid_loss(a, b, s, s)):
        with pytest.raises(ValueError, match=r"text: expected \[n, C\] like image \[4, 6\], got \[3, 6\]"):
            loss(image, text[:3], number(1.0))

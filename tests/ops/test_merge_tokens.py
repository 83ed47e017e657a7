"""merge_tokens: both ways to merge against the oracle and against transformers' masked_scatter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.ops import merge_tokens
from vlmops.ops.merge_tokens import composition

IMAGE = 7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(ids, channels=5, grad=True):
    ids = torch.tensor(ids, dtype=torch.int64)
    n = int((ids == IMAGE).sum())
    return ids, torch.randn(*ids.shape, channels, requires_grad=grad), torch.randn(n, channels, requires_grad=grad)


CASES = {
    "one image": [1, 7, 7, 2],
    "batch": [[7, 1, 7, 2], [3, 7, 4, 7]],
    "no image": [1, 2, 3],
    "only image": [7, 7, 7],
    "empty": [],
    "empty rows": [[], []],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case, dtype):
    check_op(merge_tokens, (*make(CASES[case]), IMAGE), {}, backend="torch", dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_bool_mask_is_the_same(case):
    ids, embeds, features = make(CASES[case], grad=False)
    assert torch.equal(merge_tokens(ids == IMAGE, embeds, features), merge_tokens(ids, embeds, features, IMAGE))


@given(ids=st.lists(st.sampled_from([1, IMAGE, 9]), max_size=12), channels=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_random_places(ids, channels):
    check_op(merge_tokens, (*make(ids, channels), IMAGE), {}, backend="torch", dtype=torch.float32)


@given(ids=st.lists(st.sampled_from([1, IMAGE]), max_size=12))
@settings(max_examples=30, deadline=None)
def test_sync_free_path_agrees(ids):
    """What a GPU would run, run here on CPU tensors, gradients too."""
    ids, embeds, features = make(ids, grad=False)
    with vlmops.use_backend("reference"):
        want = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(composition.select(ids, embeds, features, IMAGE), want)
    grad = torch.randn_like(embeds)
    expected = composition.backward([grad], [], [ids, embeds, features, IMAGE], [True, True])
    found = composition.select_backward(grad, ids, IMAGE, features.shape[0], [True, True])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_sync_free_path_with_another_number_of_features(rows):
    """Surplus image tokens keep their embedding, surplus features are unused and get no gradient."""
    ids, embeds, _ = make([1, 7, 7, 2, 7], grad=False)
    features = torch.randn(rows, 5)
    want = embeds.clone()
    for j, place in zip(range(rows), (1, 2, 4), strict=False):
        want[place] = features[j]
    assert torch.equal(composition.select(ids, embeds, features, IMAGE), want)
    grad = torch.randn_like(embeds)
    d_embeds, d_features = composition.select_backward(grad, ids, IMAGE, rows, [True, True])
    leaves = [embeds.requires_grad_(), features.requires_grad_()]
    out = torch.stack(
        [
            leaves[1][j] if (j := [1, 2, 4].index(i) if i in (1, 2, 4) else rows) < rows else leaves[0][i]
            for i in range(5)
        ]
    )
    expected = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    torch.testing.assert_close(d_embeds, expected[0])
    torch.testing.assert_close(d_features, torch.zeros(rows, 5) if expected[1] is None else expected[1])


def test_against_llava():
    """LlavaModel's own masked_scatter: image features in, hidden states out."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()
    ids = torch.tensor([[1, 7, 7, 7, 7, 2], [7, 7, 3, 7, 7, 4]])
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features = torch.cat([*model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output])
        embeds = model.get_input_embeddings()(ids)
        mask = model.model.get_placeholder_mask(ids, embeds, features[None])
        merged = merge_tokens(ids, embeds, features, IMAGE)
        assert torch.equal(merged, embeds.masked_scatter(mask, features))
        stock = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(model(inputs_embeds=merged).logits, stock)


def test_features_are_cast_and_flattened():
    ids, embeds, features = make([[1, 7, 7], [7, 2, 7]], grad=False)
    out = merge_tokens(ids, embeds.bfloat16(), features.unflatten(0, (2, 2)), IMAGE)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, merge_tokens(ids, embeds.bfloat16(), features.bfloat16(), IMAGE))


def test_the_input_is_left_alone():
    ids, embeds, features = make([1, 7, 2], grad=False)
    before = embeds.clone()
    out = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(embeds, before) and out.data_ptr() != embeds.data_ptr()


def test_gradcheck_of_the_reference():
    ids, embeds, features = make([1, 7, 7, 2])
    leaves = [x.detach().double().requires_grad_() for x in (embeds, features)]
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda e, f: merge_tokens(ids, e, f, IMAGE), leaves)


def test_opcheck():
    opcheck(torch.ops.vlmops.merge_tokens.default, (*make([1, 7, 7, 2]), IMAGE, "torch"))


def test_compile_has_no_graph_break():
    ids, embeds, features = make([[1, 7, 7], [7, 2, 7]])
    call = lambda f: merge_tokens(ids, embeds, f, IMAGE).square().sum()  # noqa: E731
    (got,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(features), features)
    (want,) = torch.autograd.grad(call(features), features)
    torch.testing.assert_close(got, want)


def test_autocast_changes_nothing():
    ids, embeds, features = make([1, 7, 2], grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(out, merge_tokens(ids, embeds, features, IMAGE))


def test_nan_flows_through():
    ids, embeds, features = make([1, 7, 2], grad=False)
    features[0, 3] = embeds[1, 1] = float("nan")  # row 1 is replaced: its own NaN must vanish
    out = merge_tokens(ids, embeds, features, IMAGE)
    assert out.isnan().nonzero().tolist() == [[1, 3]]


BAD = {
    "more tokens": (lambda a: dict(image_features=a["image_features"][:-1]), "each of 2 image tokens, got 1"),
    "more features": (lambda a: dict(input_ids=torch.tensor([1, 7, 2])), "each of 1 image tokens, got 2"),
    "float ids": (lambda a: dict(input_ids=a["input_ids"].float()), "input_ids: expected integers or a bool mask"),
    "mask and number": (lambda a: dict(input_ids=a["input_ids"] == IMAGE), "image_token_id: expected None with a bool"),
    "no number": (lambda a: dict(image_token_id=None), "image_token_id: expected an int"),
    "embeds shape": (lambda a: dict(inputs_embeds=a["inputs_embeds"][:-1]), r"inputs_embeds: expected \[3, 'C'\]"),
    "channels": (lambda a: dict(image_features=a["image_features"][:, :-1]), r"image_features: expected \[N, 5\]"),
    "features rank": (lambda a: dict(image_features=a["image_features"][0]), r"image_features: expected \[N, 5\]"),
    "integer features": (
        lambda a: dict(image_features=a["image_features"].int()),
        "image_features: expected a floating-point",
    ),
    "device": (lambda a: dict(image_features=a["image_features"].to("meta")), "image_features: expected on cpu"),
    "not a tensor": (lambda a: dict(inputs_embeds=[1.0]), "inputs_embeds: expected a tensor"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    ids, embeds, features = make([7, 7, 2], grad=False)
    args = dict(input_ids=ids, inputs_embeds=embeds, image_features=features, image_token_id=IMAGE)
    change, message = BAD[case]
    args.update(change(args))
    with vlmops.use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
        merge_tokens(**args)

"""Modules found by what they are: siblings of the known families are replaced, look-alikes are not."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import vlmops
from vlmops.patch.classes import original_class
from vlmops.patch.structure import activation_name


def rows(model, status=None):
    return [r for r in vlmops.patch_report(model).rows if status in (None, r.status)]


def why(model, path=""):
    return {r.module: r.why for r in rows(model)}[path]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.act, self.first = nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 48)

    def forward(self, anything):
        return self.second(self.act(self.first(anything)))


class WithResidual(TwoLayers):
    def forward(self, x):
        return x + super().forward(x)


class WithScale(TwoLayers):
    def forward(self, x):
        return super().forward(x) * 0.9


class WithTuple(TwoLayers):
    def forward(self, x):
        return super().forward(x), None


class WithDropout(TwoLayers):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class WithFunctionalDropout(TwoLayers):
    def __init__(self):
        super().__init__()
        self.dropout = 0.5

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.dropout, self.training)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 48)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class OnePlusRMSNorm(nn.Module):
    """Gemma's norm under the attribute names of Llama's."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(32)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class CausalAttention(nn.Module):
    """Looks like CLIP's, but masks the future by itself."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.dropout = 4, 8, 8**-0.5, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None):
        q, k, v = (
            p(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("cls", [TwoLayers, WithDropout, WithFunctionalDropout, Gated])
def test_mlps_of_any_name_are_replaced_in_the_order_that_fits(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls()).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        want = model(x)
        vlmops.patch_model(model)
        assert [r.operation for r in rows(model, "patched")] == ["mlp"]
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model[0](*[], **{"x" if cls is not TwoLayers else "anything": x}), want)


@pytest.mark.parametrize("cls", [WithDropout, WithFunctionalDropout])
def test_active_dropout_is_the_originals(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls()), torch.randn(64, 32)
    vlmops.patch_model(model.eval())
    model.train()
    with torch.no_grad():
        zeros = (model(x) == 0).float().mean()
    assert 0.4 < zeros < 0.6


def test_monte_carlo_dropout_is_seen():
    model, x = nn.Sequential(WithDropout()).eval(), torch.randn(64, 32)
    vlmops.patch_model(model)
    model[0].drop.train()
    with torch.no_grad():
        assert (model(x) == 0).float().mean() > 0.4


@pytest.mark.parametrize("cls", [WithResidual, WithScale, WithTuple, OnePlusRMSNorm, CausalAttention])
def test_look_alikes_are_left_alone(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls()).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        want = model(x)
        vlmops.patch_model(model)
        assert "computes something else" in why(model, "0") or "could not be tried" in why(model, "0")
        assert original_class(model[0]) is None
        got = model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    linears = [m for m in model[0].modules() if isinstance(m, nn.Linear)]
    assert all(original_class(m) is nn.Linear for m in linears), "their linears are replaced one by one"


def test_a_class_inside_a_function_cannot_be_pickled_so_it_stays():
    class Local(TwoLayers):
        pass

    model = nn.Sequential(Local())
    vlmops.patch_model(model)
    assert "cannot be imported by its name" in why(model, "0")


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.LeakyReLU()])
def test_an_activation_the_ops_do_not_have(activation):
    assert activation_name(activation) is None
    model = TwoLayers()
    model.act = activation
    vlmops.patch_model(model)
    assert "is not one of" in why(model)
    assert original_class(model.first) is nn.Linear


def test_gelu_is_told_from_its_tanh_form():
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"


def test_sequential_mlp_and_a_slice_of_it():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval(), torch.randn(3, 32)
    with torch.no_grad():
        want, half = model(x), model[:2](x)
        vlmops.patch_model(model)
        assert [r.operation for r in rows(model, "patched")] == ["mlp"]
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model[:2](x), half, atol=1e-5, rtol=1e-4)


class Tower(nn.Module):
    """A patch embedding whose tokens are made by .view(), which needs dense memory."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)

    def forward(self, x):
        return self.proj(x).view(x.shape[0], 32, -1)


def test_a_patch_embedding_followed_by_view():
    model, x = Tower(), torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        want = model(x)
        vlmops.patch_model(model)
        assert [r.operation for r in rows(model, "patched")] == ["patchify"]
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model.proj(x[..., :29, :]), original_class(model.proj).forward(model.proj, x[..., :29, :])
        )


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 32, 8, 4), nn.Conv2d(3, 32, 8, 8, padding=1), nn.Conv2d(4, 32, 8, 8, groups=2), nn.Conv2d(3, 32, 1)],
    ids=["overlapping", "padded", "grouped", "pointwise"],
)
def test_other_convolutions_stay(layer):
    model = nn.Sequential(layer)
    vlmops.patch_model(model)
    assert type(model[0]) is nn.Conv2d


def test_qwen3_vl_is_found_without_being_named():
    torch.manual_seed(0)
    config = T.Qwen3VLConfig().vision_config
    for name, value in dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64, patch_size=8,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    ).items():  # fmt: skip
        setattr(config, name, value)
    tower = T.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel(config).eval()
    grid = torch.tensor([[1, 4, 8], [1, 2, 4]])
    x = torch.randn(40, 3 * config.temporal_patch_size * 8 * 8)
    with torch.no_grad():
        want = tower(x, grid_thw=grid)
        vlmops.patch_model(tower)
        got = tower(x, grid_thw=grid)
    names = {r.cls for r in rows(tower, "patched")}
    assert {"Qwen3VLVisionAttention", "Qwen3VLVisionMLP", "Qwen3VLVisionPatchMerger", "Conv3d"} <= names
    torch.testing.assert_close(got.pooler_output, want.pooler_output, atol=2e-5, rtol=1e-4)
    for a, b in zip(got.deepstack_features, want.deepstack_features, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_linears_inside_an_mlp_are_patched_where_only_linears_are_asked_for():
    model, x = nn.Sequential(TwoLayers()).eval(), torch.randn(4, 32)
    with torch.no_grad():
        want = model(x)
        vlmops.patch_model(model, ops="linear")
        assert original_class(model[0]) is None
        assert original_class(model[0].first) is nn.Linear
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
        vlmops.patch_model(model)
        assert original_class(model[0]) is TwoLayers, "children that are ours are plain enough to fuse over"
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)
    vlmops.unpatch_model(model)
    assert type(model[0]) is TwoLayers
    assert type(model[0].first) is nn.Linear

"""What a patched module notices at each call, and what it does under compile, transforms and forced backends."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import vlmops
from tests.support.tiny_models import FAMILIES, IMAGE, build, first_output
from vlmops.backends import choice
from vlmops.ops._shared.registry import OPS
from vlmops.patch import base
from vlmops.patch.base import KEY, Patched
from vlmops.patch.classes import original_class
from vlmops.patch.layers import PatchedMLP


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


@pytest.fixture
def fused(monkeypatch):
    """Names of the classes whose fused forward ran, not counting the tries that patching makes."""
    seen = []
    forward = Patched.forward

    def counted(self, *args, **kwargs):
        cls, original = type(self), type(self).fused
        cls.fused = lambda *a, **k: seen.append(cls.__name__) or original(*a, **k)
        try:
            return forward(self, *args, **kwargs)
        finally:
            del cls.fused

    monkeypatch.setattr(Patched, "forward", counted)
    return seen


def mlp_model(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)), nn.LayerNorm(32)).eval()
    return vlmops.patch_model(model, **options), torch.randn(5, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_replacement_runs_fused(name, fused):
    model, inputs = build(name)
    vlmops.patch_model(model, backend="torch")
    run(model, inputs)
    patched = {r.cls for r in vlmops.patch_report(model).rows if r.status == "patched"}
    assert patched == set(fused)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_towers_stay_fused_in_training_and_trained_modules_do_not(name, fused):
    model, inputs = build(name)
    vlmops.patch_model(model, backend="torch")
    model.train()
    model(**inputs)
    assert set(fused) <= {"PixtralAttention"}, "it would build a dense mask otherwise"
    fused.clear()
    model.requires_grad_(False)
    model(**inputs)
    assert "VisionAttention" in fused or any("Attention" in n for n in fused)


@pytest.mark.parametrize("where", ["activation", "linear", "prehook", "backward", "global"])
def test_hooks_added_later_are_called(where, fused):
    model, x = mlp_model()
    mlp, calls = model[0], []
    hook = lambda *a: calls.append(1)  # noqa: E731
    if where == "global":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, a, o: calls.append(1) if m is mlp[1] else None
        )
    else:
        handle = {
            "activation": mlp[1].register_forward_hook, "linear": mlp[0].register_forward_hook,
            "prehook": mlp[2].register_forward_pre_hook, "backward": mlp[0].register_full_backward_hook,
        }[where](hook)  # fmt: skip
    if where == "backward":
        model(x.requires_grad_()).sum().backward()
    else:
        run_plain(model, x)
    handle.remove()
    assert calls == [1]
    assert "Sequential" not in fused
    with torch.no_grad():
        model(x)
    assert "Sequential" in fused, "and fused again once the hook is gone"


def run_plain(model, x):
    with torch.no_grad():
        return model(x)


def test_an_activation_replaced_later_is_used():
    model, x = mlp_model()
    model[0][1] = nn.Tanh()
    with torch.no_grad():
        want = nn.functional.layer_norm(model[0][2](model[0][0](x).tanh()), (32,), model[1].weight, model[1].bias)
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)


class Doubled(torch.Tensor):
    """A weight only its own class can multiply with, like a quantised one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * 2 if func is nn.functional.linear else out


def test_weights_of_another_class_are_left_to_it():
    def doubled(model):
        with torch.no_grad():
            for name in ("0", "2"):
                layer = model[0]._modules[name]
                layer._parameters["weight"] = layer.weight.detach().as_subclass(Doubled)

    stock, x = mlp_model(dry_run=True)
    doubled(stock)
    want = run_plain(stock, x)
    later, _ = mlp_model()
    doubled(later)
    torch.testing.assert_close(run_plain(later, x), want)
    before, _ = mlp_model(dry_run=True)
    doubled(before)
    vlmops.patch_model(before)
    assert any("Doubled" in r.why for r in vlmops.patch_report(before).rows)
    torch.testing.assert_close(run_plain(before, x), want)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_eager_attention_asked_for_after_patching_returns_weights(name):
    model, inputs = build(name)
    vlmops.patch_model(model)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower if name == "llava" else None
    if tower is not None:
        with torch.no_grad():
            out = tower(inputs["pixel_values"], output_attentions=True)
        assert all(a is not None for a in out.attentions)
    got = run(model, inputs, output_attentions=True)
    assert all(a is not None for a in got.attentions)


def test_pixtral_follows_an_implementation_set_after_patching():
    model, inputs = build("pixtral")
    want = first_output(run(model, inputs))
    vlmops.patch_model(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(first_output(run(model, inputs)), want, atol=2e-5, rtol=1e-4)
    vlmops.unpatch_model(model)
    torch.testing.assert_close(first_output(run(model, inputs)), want, atol=2e-5, rtol=1e-4)


def test_pixtral_images_do_not_see_each_other():
    model, inputs = build("pixtral")
    vlmops.patch_model(model)
    changed = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    changed["pixel_values"][1] += 1.0
    with torch.no_grad():
        a, b = (
            model.model.get_image_features(i["pixel_values"], image_sizes=i["image_sizes"]) for i in (inputs, changed)
        )
    assert torch.equal(a.pooler_output[0], b.pooler_output[0])
    assert not torch.allclose(a.pooler_output[1], b.pooler_output[1])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_two_images_of_different_size(name):
    model, inputs = build(name)
    torch.manual_seed(3)
    start, end = 302, 303
    parts = []
    for n in (8, 4):
        parts += [5, start, *[IMAGE] * n, end]
    ids = torch.tensor([[*parts, 7]])
    two = dict(
        input_ids=ids, pixel_values=torch.randn(48, inputs["pixel_values"].shape[1]),
        mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=torch.tensor([[1, 4, 8], [1, 4, 4]]),
    )  # fmt: skip
    want = first_output(run(model, two))
    vlmops.patch_model(model)
    torch.testing.assert_close(first_output(run(model, two)), want, atol=2e-5, rtol=1e-4)


def test_left_padded_batch_generates_the_same_tokens():
    model, inputs = build("llava")
    ids = inputs["input_ids"]
    short = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:, 4:]], dim=1)  # pad 0 in place of the first words
    batch = dict(
        input_ids=torch.cat([ids, short]), attention_mask=torch.cat([torch.ones_like(ids), (short != 0).long()]),
        pixel_values=torch.cat([inputs["pixel_values"]] * 2),
    )  # fmt: skip
    with torch.no_grad():
        want = model.generate(**batch, max_new_tokens=6, do_sample=False)
        vlmops.patch_model(model)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), want)


def test_functional_call_and_vmap():
    model, x = mlp_model()
    stock, _ = mlp_model(dry_run=True)
    other = {k: v + 0.1 for k, v in stock.state_dict().items()}
    want = torch.func.functional_call(stock, other, (x,))
    torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), want, atol=1e-5, rtol=1e-4)
    many = torch.stack([x, x + 1])
    with torch.no_grad():
        want = torch.stack([stock(one) for one in many])
        torch.testing.assert_close(torch.func.vmap(model)(many), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_compiled_whole_with_a_forced_backend(backend):
    model, x = mlp_model(backend=backend)
    want = run_plain(model, x)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend=keep)(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    calls = [n for g in graphs for n in g.graph.nodes if str(n.target).startswith("vlmops.")]
    assert {n.args[-1] for n in calls} == {backend}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "pixtral", "qwen2_vl"])
def test_compiling_a_whole_model_breaks_no_more_graphs_than_stock(name):
    model, inputs = build(name)
    counts = []
    with torch.no_grad():
        want = first_output(model(**inputs))
        for patch in (False, True):
            if patch:
                vlmops.patch_model(model)
            torch._dynamo.reset()
            counts.append(torch._dynamo.explain(model)(**inputs).graph_break_count)
        torch._dynamo.reset()
        got = first_output(torch.compile(model, backend="eager")(**inputs))
    assert counts[1] <= counts[0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_small_calls_are_left_to_the_original(monkeypatch, fused):
    monkeypatch.setattr(base, "SMALL_PRODUCT", 6 * 32 * 48)
    monkeypatch.setattr(base, "SMALL_NORM", 6 * 32)
    model, x = mlp_model()
    run_plain(model, x)
    assert not fused
    run_plain(model, torch.randn(6, 32))
    assert set(fused) == {"Sequential", "LayerNorm"}


def test_a_short_call_that_is_slower_fused_is_left_to_the_original(monkeypatch, tuning_cache):
    model, x = mlp_model()
    slow, calls = PatchedMLP.fused, []

    def fused(self, *args):
        calls.append(len(args))
        return slow(self, *args)

    def timed(run, device, real=choice._timed):  # no sleep: on a busy machine the original may take longer than that
        calls.clear()
        took = real(run, device)
        return 60.0 if calls else took

    monkeypatch.setattr(choice, "_timed", timed)
    monkeypatch.setattr(PatchedMLP, "fused", fused)
    monkeypatch.setattr("vlmops.patch.base.LONG_S", 60.0)  # short even on a busy machine
    want = run_plain(model, x)
    record = model[0].__dict__[KEY]
    assert list(record.chosen.values()) == ["original"]
    calls.clear()
    torch.testing.assert_close(run_plain(model, x), want)
    assert not calls
    monkeypatch.setattr("vlmops.patch.base.LONG_S", 0.0)
    run_plain(model, torch.randn(100, 32))
    by_op = OPS["mlp"].last
    assert list(record.chosen.values())[1] == ("original" if by_op == "torch" else by_op), "the op's own choice"


def test_where_measuring_picked_plain_torch_the_original_runs(fused):
    model, x = mlp_model()
    run_plain(model, x)
    record = model[0].__dict__[KEY]
    (key,) = record.chosen
    record.chosen[key] = "original"
    fused.clear()
    run_plain(model, x)
    assert "Sequential" not in fused
    assert "auto (original)" in str(vlmops.patch_report(model))
    with vlmops.use_backend("torch"):
        run_plain(model, x)
    assert "Sequential" in fused, "a forced backend is obeyed"
    assert not pickle.loads(pickle.dumps(record)).chosen, "measured on this machine, so not carried to another"
    assert not copy.deepcopy(model)[0].__dict__[KEY].chosen


def test_patching_again_changes_the_backend(fused):
    model, _ = mlp_model(backend="reference")
    classes = [type(m) for m in model.modules()]
    vlmops.patch_model(model, backend="torch")
    assert [type(m) for m in model.modules()] == classes
    assert {r.backend for r in vlmops.patch_report(model).rows} == {"torch"}


def test_disable_after_patching_keeps_the_report(monkeypatch):
    model, _ = mlp_model()
    monkeypatch.setenv("VLMOPS_DISABLE", "1")
    vlmops.patch_model(model)
    report = vlmops.patch_report(model)
    assert {r.status for r in report.rows} == {"patched"}
    assert "VLMOPS_DISABLE" in str(report)


def test_hidden_states_keep_their_number_with_skipped_layers():
    model, inputs = build("llava")
    tower = model.model.vision_tower
    with torch.no_grad():
        want = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        vlmops.patch_model(model, skip_unused_layers=True)
        got = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert len(got) == len(want)
    for a, b in zip(got[:-1], want[:-1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert torch.equal(got[-1], got[-2]), "the last layer hands its input on"


def test_patched_undoes_itself_when_the_block_fails():
    model, _ = mlp_model(dry_run=True)

    def fail():
        assert original_class(model[0]) is nn.Sequential
        raise KeyError

    with pytest.raises(KeyError), vlmops.patched(model):
        fail()
    assert type(model[0]) is nn.Sequential

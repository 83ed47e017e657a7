"""Patched against stock: outputs, gradients, generated tokens, states, checkpoints, undo, for each family."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import set_seed

import vlmops
from tests.support.tiny_models import FAMILIES, OTHERS, build, first_output
from vlmops.patch.classes import original_class

ALL = [*FAMILIES, *OTHERS]


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def patched_modules(model):
    return [m for m in model.modules() if original_class(m) is not None]


@pytest.mark.parametrize("name", ALL)
def test_same_outputs_and_bit_identical_after_undo(name):
    model, inputs = build(name)
    before = first_output(run(model, inputs))
    assert vlmops.patch_model(model) is model
    assert patched_modules(model)
    torch.testing.assert_close(first_output(run(model, inputs)), before, atol=2e-5, rtol=1e-4)
    assert vlmops.unpatch_model(model) is model
    assert not patched_modules(model)
    assert torch.equal(first_output(run(model, inputs)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_is_as_close_to_float32_as_stock(name, dtype):
    exact, inputs = build(name)
    want = first_output(run(exact, inputs)).double()
    model, low = build(name, dtype=dtype)
    stock = first_output(run(model, low)).double()
    vlmops.patch_model(model)
    ours = first_output(run(model, low)).double()
    assert (ours - want).abs().max() <= 2 * (stock - want).abs().max() + 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_are_identical(name):
    model, inputs = build(name)
    options = dict(max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        want = model.generate(**inputs, **options)
        with vlmops.patched(model):
            assert torch.equal(model.generate(**inputs, **options), want)
        assert torch.equal(model.generate(**inputs, **options), want)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_parameters(name, checkpointing):
    model, inputs = build(name)
    vlmops_model = copy.deepcopy(model)
    vlmops.patch_model(vlmops_model)
    for m in (model, vlmops_model):
        m.train()
        if checkpointing:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m(**inputs).logits.float().square().mean().backward()
    for (path, p), q in zip(model.named_parameters(), vlmops_model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-3, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_still_recomputes(name):
    model, inputs = build(name)
    vlmops.patch_model(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    block = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
    block.mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    model(**inputs).logits.float().mean().backward()
    assert len(calls) == 2, "the layer runs once forward and once again in backward"


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_recorded(name):
    model, inputs = build(name)
    want = run(model, inputs, output_hidden_states=True)
    vlmops.patch_model(model)
    got = run(model, inputs, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "pixtral", "qwen2_vl"])
def test_attention_weights_come_from_the_original(name):
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    want = run(model, inputs, output_attentions=True)
    vlmops.patch_model(model)
    got = run(model, inputs, output_attentions=True)
    assert len(got.attentions) == len(want.attentions)
    torch.testing.assert_close(got.attentions[0], want.attentions[0], atol=1e-5, rtol=1e-4)
    why = {row.why for row in vlmops.patch_report(model).rows if row.operation == "varlen_attention"}
    assert why == {"attn_implementation is eager, which returns attention weights"}


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_keys_and_values_stay(name):
    model, _ = build(name)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    vlmops.patch_model(model)
    got = model.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    fresh, _ = build(name, seed=1)
    fresh.load_state_dict(got)


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_and_pickle_of_a_patched_model(name):
    model, inputs = build(name)
    vlmops.patch_model(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before the first run: transformers then hangs unpicklable hooks on its layers
    buffer.seek(0)
    want = first_output(run(model, inputs))
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert len(patched_modules(other)) == len(patched_modules(model))
        torch.testing.assert_close(first_output(run(other, inputs)), want)
        assert vlmops.patch_report(other).rows
        vlmops.unpatch_model(other)
        assert not patched_modules(other)
    assert patched_modules(model), "undoing a copy leaves the model alone"


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained_of_a_patched_model(name, tmp_path):
    model, inputs = build(name)
    want = first_output(run(model, inputs))
    vlmops.patch_model(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not patched_modules(loaded)
    torch.testing.assert_close(first_output(run(loaded, inputs)), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_models_from_one_config_do_not_see_each_other(name):
    model, inputs = build(name)
    set_seed(1)
    other = type(model)(model.config).eval()
    want = first_output(run(other, inputs))
    vlmops.patch_model(model)
    assert torch.equal(first_output(run(other, inputs)), want)
    assert not patched_modules(other)
    third = type(model)(model.config).eval()
    run(third, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_patching_twice_is_patching_once(name):
    model, inputs = build(name)
    vlmops.patch_model(model)
    classes = [type(m) for m in model.modules()]
    rows = len(vlmops.patch_report(model).rows)
    vlmops.patch_model(model)
    assert [type(m) for m in model.modules()] == classes
    assert len(vlmops.patch_report(model).rows) == rows
    run(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_without_graph_breaks(name):
    """CLIP's whole tower; one layer of the others, whose towers break graphs by themselves."""
    model, inputs = build(name)
    hidden, cu, tables = torch.randn(32, 64), torch.tensor([0, 32], dtype=torch.int32), (torch.randn(32, 16),) * 2
    kwargs = {}
    if name == "llava":
        part, args = model.model.vision_tower, (inputs["pixel_values"],)
    elif name == "pixtral":
        part, args = model.model.vision_tower.transformer.layers[0], (hidden[None], None, tables)
        kwargs = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=32, max_length_k=32)
    else:
        part, args = model.model.visual.blocks[0], (hidden, cu, tables)
    with torch.no_grad():
        want = part(*args, **kwargs)
        vlmops.patch_model(model)
        torch._dynamo.reset()
        compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
        got = compiled(*args, **kwargs)
    want, got = (x if isinstance(x, torch.Tensor) else x.last_hidden_state for x in (want, got))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_pixtral_builds_no_dense_mask(monkeypatch):
    from transformers.models.pixtral import modeling_pixtral

    model, inputs = build("pixtral")
    called = []
    monkeypatch.setattr(
        modeling_pixtral, "generate_block_attention_mask",
        lambda *a, _f=modeling_pixtral.generate_block_attention_mask: called.append(1) or _f(*a),
    )  # fmt: skip
    run(model, inputs)
    assert called
    called.clear()
    shared = model.config.vision_config
    implementation = shared._attn_implementation
    with vlmops.patched(model):
        run(model, inputs)
        assert not called
        assert model.config.vision_config is shared
        assert shared._attn_implementation == implementation
    run(model, inputs)
    assert called
    assert model.model.vision_tower.config is shared


def test_skip_unused_layers_keeps_the_logits():
    model, inputs = build("llava")
    want = first_output(run(model, inputs))
    ran = []
    layers = model.model.vision_tower.encoder.layers
    layers[-1].mlp.fc1.register_forward_hook(lambda *a: ran.append(1))
    vlmops.patch_model(model, skip_unused_layers=True)
    torch.testing.assert_close(first_output(run(model, inputs)), want, atol=2e-5, rtol=1e-4)
    assert not ran, "the layer after the one that is used did not run"
    skipped = [r for r in vlmops.patch_report(model).rows if r.operation == "skip_unused_layers"]
    assert [r.module for r in skipped] == ["model.vision_tower.encoder.layers.2"]
    vlmops.unpatch_model(model)
    assert torch.equal(first_output(run(model, inputs)), want)
    assert ran

"""What patching must leave alone, notice later, refuse, and say."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import vlmops
from tests.support.tiny_models import build, first_output
from vlmops.patch import api
from vlmops.patch.classes import original_class


def run(model, inputs):
    with torch.no_grad():
        return first_output(model(**inputs))


def why(model, path):
    return {row.module: row.why for row in vlmops.patch_report(model).rows}[path]


def test_transformers_symbols_exist():
    """Everything the patches know by name; a missing one is listed."""
    import importlib

    wanted = {
        "transformers.models.clip.modeling_clip": ["CLIPAttention", "CLIPMLP"],
        "transformers.models.siglip.modeling_siglip": ["SiglipAttention", "SiglipMLP"],
        "transformers.models.llava.modeling_llava": ["LlavaMultiModalProjector"],
        "transformers.models.pixtral.modeling_pixtral": [
            "PixtralAttention", "PixtralVisionModel", "PixtralMLP", "PixtralRMSNorm", "generate_block_attention_mask",
        ],
        "transformers.models.qwen2_vl.modeling_qwen2_vl": ["VisionAttention", "PatchMerger", "VisionMlp", "Qwen2MLP"],
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": [
            "Qwen2_5_VLVisionAttention", "Qwen2_5_VLPatchMerger", "Qwen2_5_VLMLP",
        ],
        "transformers.modeling_utils": ["ALL_ATTENTION_FUNCTIONS"],
        "transformers.masking_utils": ["ALL_MASK_ATTENTION_FUNCTIONS"],
    }  # fmt: skip
    missing = [f"{m}.{n}" for m, names in wanted.items() for n in names if not hasattr(importlib.import_module(m), n)]
    assert not missing, f"gone from transformers: {missing}"


def test_a_model_with_nothing_to_patch():
    model = nn.Sequential(nn.ReLU())
    assert vlmops.patch_model(model) is model
    assert vlmops.patch_report(model).rows == []
    assert "nothing to patch" in str(vlmops.patch_report(model))


def test_dry_run_changes_nothing():
    model, inputs = build("llava")
    want = run(model, inputs)
    vlmops.patch_model(model, dry_run=True)
    assert all(original_class(m) is None for m in model.modules())
    assert {row.status for row in vlmops.patch_report(model).rows} == {"would patch"}
    assert torch.equal(run(model, inputs), want)


def test_disabled_by_environment(monkeypatch):
    monkeypatch.setenv("VLMOPS_DISABLE", "1")
    model, _ = build("clip")
    vlmops.patch_model(model)
    assert all(original_class(m) is None for m in model.modules())
    assert "VLMOPS_DISABLE" in str(vlmops.patch_report(model))


def test_only_the_ops_asked_for():
    model, inputs = build("llava")
    want = run(model, inputs)
    vlmops.patch_model(model, ops=["mlp"])
    rows = vlmops.patch_report(model).rows
    assert {row.operation for row in rows if row.status == "patched"} == {"mlp"}
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [(dict(ops=["conv"]), "ops: expected"), (dict(backend="fastest"), "backend: expected")],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        vlmops.patch_model(nn.Linear(2, 2), **options)


def test_not_a_module():
    for call in (vlmops.patch_model, vlmops.unpatch_model):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            call("llava-hf/llava-1.5-7b-hf")


def test_unsupported_transformers(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "6.0.0")
    with pytest.raises(RuntimeError, match=r"transformers >= 5\.19, < 6\.0; this is 6\.0\.0"):
        vlmops.patch_model(nn.Linear(2, 2))
    monkeypatch.setenv("VLMOPS_DISABLE", "1")  # the way out
    assert type(vlmops.patch_model(nn.Linear(2, 2))) is nn.Linear


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_forced_backend_travels_with_the_module(backend):
    model, inputs = build("llava")
    want = run(model, inputs)
    vlmops.patch_model(model, backend=backend)
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)


def test_verify_passes_a_good_model_and_fills_the_errors():
    model, inputs = build("qwen2_vl")
    vlmops.patch_model(model, verify=inputs)
    rows = [r for r in vlmops.patch_report(model).rows if r.operation == "varlen_attention"]
    assert rows
    assert all(r.error is not None and r.error < 1e-4 for r in rows)
    assert {r.status for r in rows} == {"patched"}


@pytest.mark.parametrize("now", [True, False])
def test_verify_undoes_what_differs(monkeypatch, now):
    from vlmops.patch.layers import PatchedMLP

    model, inputs = build("llava")
    want = run(model, inputs)
    fused = PatchedMLP.fused
    # Wrong on batches only: patching itself tries every module on a few rows without a batch dimension.
    monkeypatch.setattr(PatchedMLP, "fused", lambda self, x: fused(self, x) * (1.01 if x.dim() == 3 else 1.0))
    vlmops.patch_model(model, verify=inputs if now else True)
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)
    for _ in range(2):
        rows = [r for r in vlmops.patch_report(model).rows if r.cls == "CLIPMLP"]
        # vision_feature_layer -2: the last layer runs, too
        assert [r.status for r in rows] == ["undone"] * 3
        assert all("differs from the original" in r.why for r in rows)
        vlmops.patch_model(model)  # does not bring back what was found wrong
        torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)


def test_the_report_knows_of_parts_unpatched_on_their_own():
    model, _ = build("llava")
    vlmops.patch_model(model)
    paths = [r.module for r in vlmops.patch_report(model).rows]
    vlmops.unpatch_model(model.model.vision_tower)
    model.lm_head = nn.Linear(64, 320, bias=False)
    status = {r.module: r.status for r in vlmops.patch_report(model).rows}
    assert {s for path, s in status.items() if "vision_tower" in path or path == "lm_head"} == {"skipped"}
    assert status["model.language_model.norm"] == "patched"
    vlmops.patch_model(model)
    rows = vlmops.patch_report(model).rows
    assert sorted(r.module for r in rows) == sorted(paths), "one row a module"
    assert {r.status for r in rows} == {"patched"}


def test_subclassed_linears_are_left_alone():
    class Quantised(nn.Linear):
        pass

    model, inputs = build("llava")
    mlp = model.model.language_model.layers[0].mlp
    mlp.up_proj.__class__ = Quantised
    want = run(model, inputs)
    vlmops.patch_model(model)
    path = "model.language_model.layers.0.mlp"
    assert "up_proj is a" in why(model, path)
    assert "subclass" in why(model, f"{path}.up_proj")
    assert original_class(mlp.down_proj) is nn.Linear, "its plain siblings are patched one by one"
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)


def test_hooks_on_children_before_and_after():
    model, inputs = build("llava")
    want = run(model, inputs)
    mlp = model.model.language_model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda m, a, out: out * 2)
    doubled = run(model, inputs)
    vlmops.patch_model(model)
    assert "up_proj has hooks" in why(model, "model.language_model.layers.0.mlp")
    torch.testing.assert_close(run(model, inputs), doubled, atol=2e-5, rtol=1e-4)
    other, _ = build("llava")
    vlmops.patch_model(other)
    torch.testing.assert_close(run(other, inputs), want, atol=2e-5, rtol=1e-4)
    other.model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out: out * 2)
    torch.testing.assert_close(run(other, inputs), doubled, atol=2e-5, rtol=1e-4)


def test_an_instance_forward_is_left_alone():
    model, inputs = build("llava")
    layer = model.lm_head
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 3
    want = run(model, inputs)
    vlmops.patch_model(model)
    assert "forward was replaced" in why(model, "lm_head")
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)


def test_accelerate_hooks_before_and_after():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    model, inputs = build("llava")
    add_hook_to_module(model.lm_head, Doubles())
    want = run(model, inputs)
    vlmops.patch_model(model)
    assert "accelerate" in why(model, "lm_head")
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)
    other, _ = build("llava")
    vlmops.patch_model(other)
    add_hook_to_module(other.lm_head, Doubles())
    torch.testing.assert_close(run(other, inputs), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_before_and_after(first):
    from peft import LoraConfig, get_peft_model

    def add_lora(model):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "fc1", "up_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    model, inputs = build("llava")
    plain = run(model, inputs)
    stock = add_lora(model).eval()
    want = run(stock, inputs)
    assert not torch.allclose(want, plain, atol=1e-3), "the adapter must matter for this test to mean anything"
    other, _ = build("llava")
    steps = (add_lora, vlmops.patch_model) if first == "lora" else (vlmops.patch_model, add_lora)
    for step in steps:
        other = step(other).eval()
    torch.testing.assert_close(run(other, inputs), want, atol=2e-5, rtol=1e-4)
    vlmops.unpatch_model(other)
    torch.testing.assert_close(run(other, inputs), want, atol=2e-5, rtol=1e-4)


def test_a_patch_embedding_that_transformers_has_fused_keeps_its_class():
    """What ``from_pretrained(fusion_config=...)`` puts in: its linear is replaced, itself it is not."""
    from transformers.fusion_mapping import PatchEmbeddingsFusionSpec

    model, inputs = build("qwen2_vl")
    tower = model.model.visual
    fused = PatchEmbeddingsFusionSpec().make_fused_class(type(tower.patch_embed))
    tower.patch_embed = fused(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=64).eval()
    want = run(model, inputs)
    vlmops.patch_model(model)
    assert type(tower.patch_embed) is fused
    assert original_class(tower.patch_embed.linear_proj) is nn.Linear
    torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=1e-4)
    vlmops.unpatch_model(model)
    assert torch.equal(run(model, inputs), want)


def test_parametrized_and_meta_modules_are_left_alone():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    vlmops.patch_model(model)
    assert "parametrization" in why(model, "0") or "subclass" in why(model, "0")
    assert "meta" in why(model, "1")


def test_unpatch_leaves_a_class_that_somebody_changed_later():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    vlmops.patch_model(model)

    class Sharded(type(model[0])):
        pass

    model[0].__class__ = Sharded
    vlmops.unpatch_model(model)
    assert type(model[0]) is Sharded
    assert type(model[1]) is nn.Linear
    assert "left alone" in str(vlmops.patch_report(model))


def test_tied_weights_stay_tied():
    model, inputs = build("paligemma")
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    want = run(model, inputs)
    vlmops.patch_model(model)
    assert (embedding.weight is head.weight) == tied
    torch.testing.assert_close(run(model, inputs), want, atol=5e-5, rtol=1e-4)


def test_autocast_runs_the_original():
    model, inputs = build("llava")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = run(model, inputs)
    vlmops.patch_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(model, inputs), want)


def test_weights_changed_after_a_run_are_seen():
    model, inputs = build("llava")
    vlmops.patch_model(model)
    run(model, inputs)
    other, _ = build("llava", seed=5)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model, inputs), run(other, inputs), atol=2e-5, rtol=1e-4)


def test_dropout_in_training_is_the_originals():
    from torch.nn import functional as F

    model, inputs = build("clip")
    for layer in model.encoder.layers:
        layer.self_attn.dropout = 0.5
    vlmops.patch_model(model)
    model.train()
    seen = []
    original = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k.get("dropout_p")) or original(*a, **k)
        )
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", F.scaled_dot_product_attention)
        model(**inputs)
    assert seen == [0.5] * 3


def test_report_is_json_and_says_the_class_once():
    model, inputs = build("llava")
    vlmops.patch_model(model)
    run(model, inputs)
    report = vlmops.patch_report(model)
    data = json.loads(report.to_json())
    assert len(data["rows"]) == len(report.rows)
    assert str(report).count("CLIPMLP") == 1
    assert report.packed_bytes > 0


def test_version_window_is_what_the_package_says():
    assert api.SUPPORTED == ((5, 19), (6, 0))


def test_little_work_runs_the_original(monkeypatch):
    from vlmops.patch import base
    from vlmops.patch.layers import PatchedLinear

    calls = []
    fused = PatchedLinear.fused
    monkeypatch.setattr(PatchedLinear, "fused", lambda self, x: calls.append(len(x)) or fused(self, x))
    monkeypatch.setattr(base, "SMALL_PRODUCT", 1 << 20)
    model = vlmops.patch_model(nn.Sequential(nn.Linear(256, 256)))
    with torch.no_grad():
        model(torch.randn(1, 256))
        assert calls == []
        model(torch.randn(64, 256))
    assert set(calls) == {64}

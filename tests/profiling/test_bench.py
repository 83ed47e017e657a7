"""`vlmops bench`: the bars' schema, the towers' arithmetic, the memory probe, and a quick run end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from vlmops.cli import app
from vlmops.ops._shared import gemm_cpu
from vlmops.profiling import bars, bench_ops, memory, towers, workloads
from vlmops.profiling.bars import Row
from vlmops.profiling.peak import packed_linear, packed_sequence, peak_call
from vlmops.profiling.settings import Settings


def bench(*args):
    return CliRunner().invoke(app, ["bench", *args])


def test_every_bar_of_the_issue_is_there():
    by_lengths = {case.lengths: case for case in bars.ATTENTION}
    assert [(len(k), max(k), c.head_dim) for k, c in by_lengths.items()] == [
        (1, 577, 64), (1, 729, 72), (1, 1024, 80), (1, 4096, 80), (5, 1000, 80), (64, 64, 80)
    ]  # fmt: skip
    for case in bars.ATTENTION[:-1]:
        assert case.share == {"bf16": 0.65, "fp32": 0.80}
        assert case.ratio == {"bf16": 2.0}
    assert (bars.ATTENTION[-1].share, bars.ATTENTION[-1].ratio) == ({"bf16": 0.45}, {"bf16": 3.0})
    assert [case.ratio["bf16"] for case in bars.PATCHIFY] == [1.1, 2.0]
    assert bars.MLP[0].ratio == {"fp32": 1.4, "bf16": 1.1}
    assert {name: bar.floor for name, bar in bars.TOWERS.items()} == {
        "qwen2_vl": {"bf16": 1.35, "fp32": 1.35},
        "qwen2_5_vl": {},
        "clip_l_336": {"fp32": 1.45, "bf16": 1.35},
        "pixtral": {"fp32": 2.0, "bf16": 2.3},
    }
    assert all(bar.budget == 1.15 for bar in bars.TOWERS.values())


def test_met_follows_the_direction():
    assert Row("g", "c", "bf16", "m", 1.2, 1.1).met is True
    assert Row("g", "c", "bf16", "m", 1.2, 1.1, higher=False).met is False
    assert Row("g", "c", "bf16", "m", None, 1.1).met is False
    assert Row("g", "c", "bf16", "m", 1.2, None).met is None
    assert Row("g", "c", "bf16", "m", 1.2, 1.1).as_dict()["met"] is True


@pytest.mark.parametrize("name", towers.TOWERS)
def test_products_are_all_the_weights_of_the_tower(name):
    """The GEMM-only time is of the right products: their weights are the tower's own matrices, one for one."""
    tower = towers.build(name, torch.float32, layers=2, patches=towers.TOWERS[name].quick)
    listed = sum(k * n for _, k, n in tower.products)
    skipped = ("position_embedding", "class_embedding")
    owned = sum(
        p.numel() for n, p in tower.module.named_parameters() if p.dim() > 1 and not any(s in n for s in skipped)
    )
    assert listed == owned
    tokens = tower.products[1][0]
    out = tower.run()
    rows = {"clip_l_336": 65, "pixtral": tokens}.get(name, tokens // 4)  # Qwen's merger makes one token of four
    assert out.shape[-2] == rows
    assert bool(out.isfinite().all())


def test_attention_work_of_the_bars():
    tower = towers.build("qwen2_5_vl", torch.float32, layers=2, patches=256)
    assert tower.attention.flops == 4 * 256**2 * 16 * 80  # one of two layers sees the whole image
    assert tower.windows.flops == 4 * (4 * 64**2) * 16 * 80
    assert towers.build("pixtral", torch.float32, layers=1, patches=256).attention.flops == 4 * (4 * 64**2) * 16 * 64


def test_a_shared_copy_costs_no_weights_and_is_independent():
    import vlmops
    from vlmops.patch.classes import original_class

    tower = towers.build("clip_l_336", torch.float32, layers=1, patches=16)
    patched = vlmops.patch_model(towers.shared_copy(tower.module))
    assert all(a is b for a, b in zip(patched.parameters(), tower.module.parameters(), strict=True))
    assert any(original_class(m) for m in patched.modules())
    assert not any(original_class(m) for m in tower.module.modules())
    torch.testing.assert_close(tower.run(patched), tower.run(), rtol=1e-3, atol=1e-4)


def test_reference_of_a_low_precision_tower_is_closer_than_the_tower():
    tower = towers.build("clip_l_336", torch.bfloat16, layers=1, patches=16)
    wide = towers.reference(tower)
    assert wide.dtype == torch.float32
    assert 0 < float((tower.run().float() - wide).abs().max()) < 0.2
    assert towers.reference(towers.build("clip_l_336", torch.float32, layers=1, patches=16)) is None


def test_packed_products():
    run, work = packed_sequence([(32, 64, 48), (32, 48, 16)], torch.float32)
    assert run().shape == (32, 16)
    assert work.flops == 2 * 32 * (64 * 48 + 48 * 16)
    out = peak_call(torch.float32)()
    assert out.shape == (1024, 4096)
    assert bool(out.any())


@pytest.mark.parametrize("native_bf16", [True, False])
def test_a_packed_product_is_the_product(monkeypatch, native_bf16):
    if native_bf16 and not gemm_cpu._has_bf16():
        pytest.skip("this processor has no bf16 products")
    monkeypatch.setattr(gemm_cpu, "_has_bf16", lambda: native_bf16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, w, b = (torch.randn(*shape).to(dtype) for shape in ((32, 64), (48, 64), (48,)))
        out = packed_linear(w, 32, b)(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, torch.nn.functional.linear(x, w, b), atol=1e-1, rtol=2e-2)


@pytest.mark.parametrize("dtype", bars.DTYPES)
def test_workloads_agree(dtype):
    """Small versions of every workload: ours and each peer compute the same thing."""
    kind = bars.DTYPES[dtype]
    loads = [
        workloads.attention(bars.AttentionCase("small", (5, 33, 7), 16, "SDPA per sequence", {}, {}), kind),
        workloads.mlp(bars.MlpCase("small", 8, 32, 64, 32, "gelu", {}), kind),
        workloads.linear(bars.LinearCase("small", 8, 32, 64), kind),
        workloads.patchify(bars.PatchifyCase("small", "float", "peer", {}, tokens=16, channels=32), kind),
        workloads.patchify(bars.PatchifyCase("small", "uint8", "peer", {}, tokens=16, channels=32), kind),
        workloads.rotary(bars.RotaryCase("small", 33, 16), kind),
    ]
    for load in loads:
        with torch.no_grad():
            load.correct({name: call() for name, call in load.calls.items()})


def test_wrong_output_becomes_a_wrong_row_and_exit_code_1(monkeypatch):
    real = workloads.mlp

    def broken(case, dtype):
        load = real(bars.MlpCase("small", 8, 32, 64, 32, "gelu", {"fp32": 1.4}), dtype)
        return workloads.Workload(
            {**load.calls, workloads.OURS: lambda: load.calls["nn.Linear, GELU, nn.Linear"]() + 1}, load.correct
        )

    monkeypatch.setattr(bench_ops.workloads, "mlp", broken)
    result = bench("--op", "mlp", "--dtype", "fp32", "--json", "-")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["wrong"] == 1
    assert data["rows"][0]["measured"] is None
    assert "largest error" in data["rows"][0]["note"]


@pytest.mark.slow
def test_quick_run(tmp_path):
    target = tmp_path / "bench.json"
    options = [
        "--op",
        "mlp",
        "--op",
        "overhead",
        "--model",
        "clip_l_336",
        "--dtype",
        "fp32",
        "--quick",
        "--json",
        str(target),
    ]
    result = bench(*options)
    assert result.exit_code == 0, result.output
    for word in ("overhead", "clip_l_336", "G = fp32", "median spread", "--quick"):
        assert word in result.stdout
    data = json.loads(target.read_text())
    assert data["machine"]["torch"] == torch.__version__
    assert data["peak_gflops"]["fp32"] > 0
    assert data["wrong"] == 0
    rows = {(row["group"], row["metric"]): row for row in data["rows"]}
    assert rows["mlp", "vs nn.Linear, GELU, nn.Linear"]["bar"] == 1.4
    assert rows["clip_l_336", "time / (GEMMs + attention)"]["bar"] == 1.15
    assert rows["clip_l_336", "vs stock"]["ratios"]["stock"] > 0
    assert rows["clip_l_336", "peak / (stock + packed)"]["measured"] > 0
    assert rows["overhead", "us per op call"]["bar"] == 15
    for row in data["rows"]:
        assert row["measured"] is not None and math.isfinite(row["measured"])
        if row["bar"] is not None:
            assert row["met"] is (row["measured"] >= row["bar"] if row["higher"] else row["measured"] <= row["bar"])
        if row["low"] is not None:
            assert row["low"] <= row["measured"] <= row["high"]
    assert data["met"] + data["missed"] == sum(row["bar"] is not None for row in data["rows"])


def test_strict_exits_1_on_a_miss(monkeypatch):
    def rows(settings):
        yield Row("mlp", "small", "fp32", "vs peer", 1.0, 1.4, low=0.9, high=1.1, ms=1.0, spread=0.1)

    monkeypatch.setattr(bench_ops, "mlp_rows", rows)
    assert bench("--op", "mlp", "--dtype", "fp32").exit_code == 0
    result = bench("--op", "mlp", "--dtype", "fp32", "--strict")
    assert result.exit_code == 1
    assert "MISSED" in result.stdout
    assert "0 met, 1 missed" in result.stdout


@pytest.mark.parametrize("options", [("--op", "nonsense"), ("--model", "gpt2"), ("--dtype", "fp8"), ("--rounds", "3")])
def test_unknown_names_are_refused(options):
    result = bench(*options)
    assert result.exit_code == 2
    assert options[0] in result.output


def test_memory_of_a_forward_that_cannot_run_is_an_error_not_a_figure():
    (row,) = memory.measure([{"tower": "nothing", "dtype": "fp32", "patched": False, "layers": 1}])
    assert "error" in row
    assert memory.measure([]) == []


def test_settings_default_to_both_dtypes():
    assert Settings().dtypes == tuple(bars.DTYPES)


def test_preparing_photos_is_checked_before_it_is_timed():
    """Few photos: pixels equal the PIL processor's, or there is no speed."""
    from vlmops.profiling import bench_stack

    (row,) = bench_stack.preprocess_rows(Settings(quick=True, warmup=1))
    assert not row.wrong and row.measured is not None and row.measured > 0
    assert row.bar == 2.0

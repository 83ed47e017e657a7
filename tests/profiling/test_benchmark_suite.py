"""What benchmarks/ lists, and the parts of the suites: expressions, peers, roofs, pinning, options."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmops.ops._shared.registry import OPS
from vlmops.profiling.gpu_check import loads
from vlmops.profiling.gpu_check.cases.case import Values
from vlmops.profiling.suite import Case, Model, cases, chosen, measure, models, peers, pinning, plain, row
from vlmops.profiling.suite.chosen import Chosen
from vlmops.profiling.suite.group import Candidate, LeftOut
from vlmops.profiling.timing import Comparison, Timing, Work

REPO = Path(__file__).resolve().parents[2]
FULL = Chosen.of(dtype=["fp32"], device="cpu")
QUICK = replace(FULL, quick=True, peers=chosen.QUICK_PEERS)


def modules():
    found = {}
    for path in sorted((REPO / "benchmarks").glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem.removeprefix("bench_")] = module.CASES
    return found


LISTED = modules()
ALL = [case for found in LISTED.values() for case in found]
LOADS = [load for load in loads.LOADS if "rotary inside" not in load.label]


def placed(load, dtype="fp32"):
    """A load in the interpreter's sizes."""
    return cases._Op(replace(load, make=lambda v: load.make(Values(load.name, True))), dtype, FULL)


def first(op):
    return next(load for load in LOADS if load.op == op)


# -- what is listed ----------------------------------------------------------------------------------------------------


def test_every_op_and_every_model_has_a_file_with_cases():
    assert set(LISTED) == {*OPS, *chosen.MODELS}
    for name, found in LISTED.items():
        assert {case.what for case in found} == {name}
        assert len({case.key for case in found}) == len(found)


def test_a_quick_run_has_every_op_and_three_models_against_torch_and_its_compiler():
    quick = [case for case in ALL if case.chosen(QUICK)]
    assert {case.what for case in quick if case.kind == "op"} == set(OPS)
    assert len({case.what for case in quick if case.kind == "model"}) >= 3
    assert all(set(case.names(QUICK)) >= {"vlmops", "torch", "compile"} for case in quick)
    assert {case.what for case in ALL if case.chosen(replace(FULL, ops=(), models=("llava",)))} == {"llava"}


def test_the_full_run_has_the_towers_and_products_in_both_runtimes():
    exported = {case.what for case in ALL if {"openvino", "onnxruntime"} <= set(case.names(FULL))}
    assert exported >= {"qwen2_vl", "qwen2_5_vl", "clip_l_336", "pixtral", "linear", "mlp", "varlen_attention"}
    assert {case.what for case in ALL if "flash-attn" in case.names(FULL)} == {"varlen_attention"}
    liger = {
        load.op for load in loads.LOADS if any(p.name.startswith("Liger") for p in load.peers(*load.arguments(True)))
    }
    assert {case.what for case in ALL if "liger" in case.names(FULL)} == liger


@pytest.mark.parametrize("case", [case for case in ALL if case.kind == "op"], ids=lambda case: f"{case.op}-{case.key}")
def test_the_sizes_are_the_makers_own(case):
    small, large, gpu = case.sized(QUICK), case.sized(FULL), case.sized(replace(FULL, device="cuda"))
    assert gpu == replace(next(x for x in loads.LOADS if x.label == gpu.label and x.op == case.op), make=gpu.make)
    assert gpu.make.keywords == {**gpu.make.keywords} and set(large.make.keywords) == set(gpu.make.keywords)
    for name, value in case.cpu.items():
        assert large.make.keywords[name] == value and f"{name} " in case.label(FULL)
    if case.quick is not None:
        assert small.make.keywords == {**large.make.keywords, **case.quick}


def test_a_case_that_fits_no_load_is_refused():
    with pytest.raises(ValueError, match="'Qwen2' is of"):
        Case("varlen_attention", "Qwen2").sized(FULL)
    with pytest.raises(ValueError, match="columns is none of rows"):
        Case("linear", "Qwen2-VL qkv", cpu=dict(columns=3)).sized(FULL)


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_the_plain_expression_is_the_op(load):
    """In the interpreter's sizes: ours and the plain expression are right, a changed result is not."""
    op = placed(load)
    setting = op.setting()
    for name in ("vlmops", "torch"):
        candidate = setting.make[name]()
        out = candidate.calls[0]()
        if not candidate.compared:
            assert (name, load.op) in (("torch", "fp8_attention"), ("torch", "quantized_linear"))
            continue
        assert setting.check(name, out) == ""
        bad = (out[0] if isinstance(out, tuple) else out).clone()
        bad.view(-1)[-1] += 0.05 * max(1.0, float(bad.abs().max()))
        assert "error" in setting.check(name, (bad, *out[1:]) if isinstance(out, tuple) else bad)
    assert setting.work().bytes > 0
    # as a module on its live inputs, it is the same function
    expression = plain.Expression(op.plain)
    found, want = expression(*op.plain.live), op.plain()
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert all(b.data_ptr() not in {x.data_ptr() for x in op.plain.live} for b in expression.buffers())


def test_the_number_and_the_places_of_results_are_checked():
    op = placed(first("rotary"))
    q, k = op.plain()
    assert op._check("vlmops", (q, k)) == ""
    assert op._check("vlmops", (q,)) == "1 results instead of 2"
    assert "NaN" in op._check("vlmops", (q.clone().fill_(float("nan")), k))
    assert "shape" in op._check("vlmops", (q[:-1], k))


def test_a_gpus_buffers_rotate(monkeypatch):
    op, seen = placed(first("linear")), []

    class Clock:
        def __init__(self):
            self.time = 0.0

        def now(self):
            self.time += 1e-3
            return self.time

        def synchronize(self):
            pass

        def seconds(self, run, host_seconds):
            run()
            return 1e-3

    op.copies = [cases.parity.map_tensors(copy, torch.clone) for copy in op.copies * 3]
    assert len(op._ours().calls) == len(op._plain().calls) == 3
    watched = Candidate([lambda i=i: seen.append(i) for i in range(3)])
    monkeypatch.setattr(measure, "_roofs", lambda *_: {
        "peak product": (lambda: None, Work(1.0)), "peak copy": (lambda: None, Work(bytes=1.0)),
    })  # fmt: skip
    result = measure.Measured("linear: x, fp32")
    found, _ = measure._timed(ALL[0], {"vlmops": watched}, op.setting(), result, replace(FULL, device="cuda"), Clock())
    assert len(found["vlmops"].seconds) >= FULL.rounds
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_tower_is_checked_against_stock():
    case = Model("clip_l_336", "tower", layers=1, patches=16)
    setting = case.build("fp32", FULL)
    outputs = {name: setting.make[name]().calls[0]() for name in ("vlmops", "torch")}
    for name, out in outputs.items():
        assert setting.check(name, out) == ""
        assert "error" in setting.check("vlmops", out * 1.01)
        assert "finite" in setting.check("vlmops", out * float("nan"))
    assert "mlp: " in setting.backend()
    assert setting.work().flops > 2 * 17 * 1024 * 4096
    assert case.label(FULL) == "tower, 16 patches, layers 1"
    tower = models.towers.build("clip_l_336", torch.float32, layers=1, patches=16)
    as_function = models._TowerOutput(tower.module, tower, "pixel_values")  # what exporters get
    assert torch.equal(as_function(tower.inputs["pixel_values"]), outputs["torch"])


# -- peers -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_one_graph_is_compiled_in_several_and_says_so(monkeypatch):
    asked = []

    def compiler(call, fullgraph=False, dynamic=None):
        asked.append(fullgraph)
        if fullgraph:
            raise RuntimeError("a graph break\nwith details")
        return call

    monkeypatch.setattr(torch, "compile", compiler)
    call, note = peers.compiled(torch.add, ((torch.ones(1), torch.ones(1)), {}))
    assert (asked, note) == ([True, False], "not in one graph (RuntimeError: a graph break)")
    assert float(call(torch.ones(1), torch.ones(1))) == 2


def test_folded_weights_are_let_go(monkeypatch):
    """Inductor's cache of modules, as it is: each holds the weights that were folded into it."""
    module = types.ModuleType("compiled")
    module._frozen_param0, module.call = torch.ones(1), len
    held = weakref.ref(module._frozen_param0)
    cleared = []

    class PyCodeCache:
        modules = (module,)
        cache_clear = staticmethod(lambda: cleared.append(True))

    monkeypatch.setitem(sys.modules, "torch._dynamo", types.SimpleNamespace(reset=lambda: cleared.append(False)))
    monkeypatch.setattr(torch, "_dynamo", sys.modules["torch._dynamo"], raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", types.SimpleNamespace(PyCodeCache=PyCodeCache))
    peers.forget()
    assert held() is None and module.call is len and cleared == [False, True]


@pytest.mark.parametrize("name", peers.EXPORTERS)
def test_a_runtime_that_is_not_there_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(LeftOut, match=r'is not installed \(pip install "vlmops\[bench-peers\]"\)'):
        peers.EXPORTERS[name](nn.Identity(), (torch.ones(1),), FULL)


@pytest.mark.parametrize("name", peers.EXPORTERS)
def test_a_runtime_computes_the_expression(name):
    for package in {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxruntime")}[name]:
        pytest.importorskip(package)
    op = placed(first("mlp"))
    candidate = op.setting().make[name]()
    assert candidate.keeps and op._check(name, candidate.calls[0]()) == ""


def test_onnx_runtime_has_no_16_bit_products():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    with pytest.raises(LeftOut, match="no 16-bit products"):
        peers.onnxruntime(nn.Identity(), (torch.ones(1, dtype=torch.bfloat16),), FULL)


def test_gpu_peers_say_what_they_lack():
    op = placed(first("rotary"))
    with pytest.raises(LeftOut, match=r"liger_kernel is not installed|needs a GPU"):
        op.setting().make["liger"]()
    with pytest.raises(LeftOut, match="no kernel for this case"):
        op.setting().make["flash-attn"]()


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "bound", "share"),
    [
        (Work(8e9, 1e6), "compute", 8e9 / 100e9 / 0.1),  # 80 ms of 100 at the product's rate
        (Work(1e6, 5e8), "memory", 5e8 / 10e9 / 0.1),
        (Work(0.0, 5e8), "memory", 0.5),
        (Work(), "memory", None),
    ],
)
def test_the_nearer_roof_bounds(work, bound, share):
    """Roofs of 100 GFLOP/s and 10 GB/s."""
    found = Comparison(
        {
            "vlmops": Timing("vlmops", (0.1,) * 7), "torch": Timing("torch", (0.2, 0.25, 0.3, 0.3, 0.35, 0.4, 0.5)),
            row.COMPUTE: Timing("", (0.01,) * 7), row.COPY: Timing("", (0.02,) * 7),
        }
    )  # fmt: skip
    one = row.Row("g", "op", "case", "fp32", "op", "vlmops", "cpu", found["vlmops"].seconds)
    row.describe(one, found, work, {row.COMPUTE: Work(1e9), row.COPY: Work(bytes=2e8)})
    assert one.bound == bound
    assert one.share_of_peak == (None if share is None else pytest.approx(share))
    assert one.ridge == pytest.approx(10)
    assert set(one.peers) == {"torch"}
    assert one.peers["torch"]["ratio"] == pytest.approx(3) and one.peers["torch"]["low"] < one.peers["torch"]["high"]


def test_outliers_are_counted_as_tukey_does():
    assert row.outliers((1.0, 1.1, 1.2, 1.3, 1.4, 9.0, 0.1)) == 2
    assert row.outliers((1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)) == 0
    assert row.outliers((1.0, 9.0)) == 0


def test_threads_get_one_processor_of_each_core(tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert pinning.cores({0, 1, 2, 3}, 2, tmp_path) == {0, 1}
    assert pinning.cores({0, 2, 3}, 2, tmp_path) == {0, 3}
    assert pinning.cores({0, 2}, 2, tmp_path) == {0, 2}
    assert pinning.cores({5, 4, 7}, 2, tmp_path / "nowhere") == {4, 5}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_pinning_holds_inside_and_is_undone():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with pinning.pinned(1) as cores:
        assert os.sched_getaffinity(0) == cores and len(cores) == 1
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == before and torch.get_num_threads() == threads


def test_a_cpu_is_measured_in_what_every_peer_computes():
    found = Chosen.of(device="cpu")
    assert (found.dtypes, found.peers, found.models) == (("fp32",), chosen.PEERS, chosen.MODELS)
    assert Chosen.of(device="cpu", dtype=["bf16,fp32", "bf16"]).dtypes == ("bf16", "fp32")
    assert Chosen.of(op=["mlp"], device="cpu").models == ()
    assert Chosen.of(quick=True, device="cpu").peers == ("torch", "compile")
    with (
        pytest.raises(ValueError, match="--device cuda: torch sees no GPU")
        if not torch.cuda.is_available()
        else contextlib.nullcontext()
    ):
        Chosen.of(device="cuda")

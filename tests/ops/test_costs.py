"""Every op with GPU kernels states its least bytes and FLOPs, on its own schema's arguments; benchmarks use no other figures."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import vlmops
from vlmops.ops._shared.registry import OPS
from vlmops.profiling import bars, roofline, workloads

KERNELS = sorted(name for name, op in OPS.items() if {"triton", "cuda"} & set(op.backends))


@pytest.mark.parametrize("name", KERNELS)
def test_every_op_with_kernels_states_its_cost(name):
    """``cost`` takes the schema's arguments in order; whatever else it takes is by keyword and has a default."""
    cost = roofline.stated(name)
    assert cost is not None, f"vlmops/ops/{name}/cost.py is missing"
    parameters = list(inspect.signature(cost).parameters.values())
    arguments = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert arguments == OPS[name].arg_names
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_costs_of_a_call_add_up():
    from vlmops.ops import linear, rms_norm

    x, w = torch.randn(5, 8), torch.randn(6, 8)

    def run():
        with vlmops.use_backend("torch"):
            linear(rms_norm(x, eps=1e-6), w)

    found = roofline.cost_of(run)
    assert found.flops == 2 * 5 * 8 * 6
    assert found.bytes == 4 * (2 * x.numel() + x.numel() + w.numel() + 5 * 6)
    assert roofline.cost_of(lambda: x + 1) is None


def test_an_op_without_cost_gives_no_figure(monkeypatch):
    monkeypatch.setattr(roofline, "stated", lambda op: None)
    x = torch.randn(3, 8)
    run = lambda: vlmops.ops.rms_norm(x, eps=1e-6)  # noqa: E731
    assert roofline.cost_of(run) is None
    assert roofline.work_of(run) == roofline.Work()


def test_attention_of_a_tower_is_the_ops_own():
    assert roofline.attention_flops([64, 0, 3], 16, 80) == 4 * (64**2 + 3**2) * 16 * 80


@pytest.mark.parametrize(
    ("load", "flops", "numbers"),
    [
        (lambda: workloads.attention(bars.AttentionCase("", (5, 33), 16, "peer", {}, {}), torch.float32),
         4 * (25 + 33**2) * 16 * 16, 4 * 38 * 16 * 16 + 38 * 16),
        (lambda: workloads.mlp(bars.MlpCase("", 8, 32, 64, 16, "gelu", {}), torch.float32),
         2 * 8 * 64 * (32 + 16), 8 * 32 + 32 * 64 + 64 + 2 * 8 * 64 + 64 * 16 + 16 + 8 * 16),
        (lambda: workloads.linear(bars.LinearCase("", 8, 32, 64), torch.float32),
         2 * 8 * 32 * 64, 8 * 32 + 32 * 64 + 64 + 8 * 64),
        (lambda: workloads.patchify(bars.PatchifyCase("", "float", "peer", {}, tokens=16, channels=32), torch.float32),
         2 * 16 * 1176 * 32, 16 * 1176 + 1176 * 32 + 16 * 32),
        (lambda: workloads.rotary(bars.RotaryCase("", 33, 16), torch.float32), 0, 2 * 33 * 32 * 16 + 2 * 33 * 16),
    ],
    ids=["varlen_attention", "mlp", "linear", "patchify", "rotary"],
)  # fmt: skip
def test_benchmarks_take_their_work_from_there(load, flops, numbers):
    """The figures written out once more: float32, so four bytes a number."""
    work = load().work
    assert work.flops == flops and work.bytes == 4 * numbers


def test_no_benchmark_has_a_formula_of_its_own():
    """``Work`` with a product in it is written only where roofs are defined, which are no ops, and where costs become Work."""
    folder = Path(importlib.import_module("vlmops.profiling").__file__).parent
    own = [
        path.name
        for path in sorted(folder.rglob("*.py"))
        if re.search(r"Work\((?!\)|float\(cost|float\(layers|work\.flops)[^)]*\*", path.read_text())
    ]
    assert own == ["peak.py", "measure.py"]

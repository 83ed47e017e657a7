"""`vlmops gpu-check`: timing by a fake clock."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch

from tests.support import triton_interpreter
from tests.support.gpu_check import (
    FakeClock,
    broken_forward,
    timed,
)
from vlmops.ops._shared.cost import Cost
from vlmops.profiling.gpu_check import loads, measure, peak, timing
from vlmops.profiling.gpu_check.peak import Peaks
from vlmops.profiling.gpu_check.tasks import Reason

pytest.importorskip("triton")
triton_interpreter.install()


@pytest.fixture
def one_round(monkeypatch):
    """The interpreter is slow, and its times mean nothing."""
    monkeypatch.setattr(measure, "interleave", functools.partial(timing.interleave, least=1, most=1))


# -- timing ------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_medians_are_taken():
    clock = FakeClock()
    found, host = timing.interleave(
        {"a": clock.taking("a", 1e-3, 1e-3, 9e-3), "b": clock.taking("b", 2e-3)}, clock, seconds=1e9, most=9
    )
    assert found["a"].median == pytest.approx(1e-3) and found["b"].median == pytest.approx(2e-3)
    assert len(found["a"].seconds) == 9 and found.speedup("a", "b").value == pytest.approx(2.0)
    assert "".join(clock.order[4:]) == "abbaabbaabbaabbaab", "every round starts with another one"
    assert set(host) == {"a", "b"}


def test_a_sample_is_of_a_cold_cache_and_of_the_device_alone(monkeypatch):
    """In order: the cache is overwritten, the stream is held while the host queues, then events around the call alone."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("hold", cycles)))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 10)
    )
    clock = timing.CudaClock(torch.device("cpu"))
    assert clock.evict.numel() == 2 << 10
    clock.evict.fill_(7)
    assert clock.seconds(lambda: log.append("call"), 1e-3) == pytest.approx(2e-3)
    assert [entry if isinstance(entry, str) else entry[0] for entry in log] == [
        "hold",
        "event",
        "call",
        "event",
        "wait",
    ]
    assert log[0][1] >= 1e-3 * timing.CYCLES_PER_S and not clock.evict.any()
    clock.seconds(lambda: None, 60.0)
    assert log[5][1] <= timing.LONGEST_LEAD_S * timing.CYCLES_PER_S


def test_rounds_fit_the_time_but_are_never_few():
    clock = FakeClock()
    found, _ = timing.interleave({"a": clock.taking("a", 0.5)}, clock, seconds=1.0)
    assert len(found["a"].seconds) == timing.MIN_ROUNDS
    found, _ = timing.interleave({"a": clock.taking("a", 0.01)}, clock, seconds=0.2)
    assert timing.MIN_ROUNDS < len(found["a"].seconds) <= 20
    with pytest.raises(RuntimeError, match="did not advance"):
        timing.interleave({"a": lambda: None}, FakeClock(), seconds=0.1)
    with pytest.raises(ValueError, match="candidates"):
        timing.interleave({}, clock, seconds=1.0)


def test_arguments_rotate():
    seen = []
    call = timing.rotating(lambda x: seen.append(x), [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_peaks_are_bytes_and_flops_over_time(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(clock, "seconds", lambda call, host: call() is not None and 2e-3)
    found = peak.measure(torch.device("cpu"), clock, [torch.float32], copy_bytes=1 << 10, side=8)
    assert found.bandwidth == pytest.approx(2 * 1024 / 2e-3)
    assert found.flops == {"fp32": pytest.approx(2 * 8**3 / 2e-3)}


def test_a_load_is_checked_then_timed(one_round):
    peaks = Peaks(1e9, {"fp32": 1e12})
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", peaks=peaks)
    assert result.status == "passed", result.note
    forward, both = result.rows
    assert [row["direction"] for row in result.rows] == ["forward", "forward + backward"]
    assert set(forward["times"]) == {"vlmops triton", "vlmops torch", "F.rms_norm"}
    assert forward["ours"] == "vlmops triton" and forward["absent"]["Liger rms_norm"] == "liger_kernel is not installed"
    moved = 2 * 8 * 80 * 4 + 80 * 4  # x and the result, and the weight
    assert forward["bytes"] == moved and forward["gbytes"] == pytest.approx(moved / 1e-3 / 1e9)
    assert forward["share"] == pytest.approx(moved / 1e9 / 1e-3) and forward["limit"] == "memory"
    assert forward["ratios"]["F.rms_norm"]["value"] == pytest.approx(1.0)
    assert forward["oracle"] == "reference, float64" and both["share"] is None


def test_the_share_of_a_product_is_of_the_measured_peak():
    clock = FakeClock()
    found, host = timing.interleave({"vlmops triton": clock.taking("a", 1e-3)}, clock, seconds=0.0, least=1, most=1)
    load, peaks = loads.find("varlen_attention: Qwen2-VL, 4096 patches, head 80"), Peaks(1e12, {"fp32": 1e13})
    cost = Cost(read=3 * 10**8, written=10**8, flops=5 * 10**9)
    forward, both = (
        measure.describe(load, "fp32", way, found, host, cost, peaks) for way in ("forward", "forward + backward")
    )
    assert forward["limit"] == "compute" and forward["share"] == pytest.approx(0.5)
    assert forward["least_ms"] == pytest.approx(0.5) and forward["gflops"] == pytest.approx(5000)
    assert both["flops"] == pytest.approx(3.5 * 5e9) and both["share"] == pytest.approx(1.75)
    slower = dataclasses.replace(peaks, bandwidth=5e11)
    memory = measure.describe(load, "fp32", "forward", found, host, cost, slower)
    assert memory["limit"] == "memory" and memory["share"] == pytest.approx(0.8)
    unknown = measure.describe(load, "bf16", "forward", found, host, cost, peaks)
    assert unknown["share"] is None and unknown["gflops"] > 0, "no peak of this dtype was measured"


def test_a_wrong_kernel_is_not_timed(monkeypatch, one_round):
    module, forward = broken_forward(lambda found: (found[0] * 1.01, found[1]))
    monkeypatch.setattr(module, "forward", forward)
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280")
    assert (result.status, result.reason) == ("failed", Reason.WRONG) and "vlmops triton: result 0" in result.note
    assert all("vlmops triton" not in row["times"] for row in result.rows)


def test_a_peer_with_another_result_is_not_compared(monkeypatch, one_round):
    monkeypatch.setattr(loads.F, "rms_norm", lambda *args: torch.zeros_like(args[0]).requires_grad_() * args[2])
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280")
    assert result.status == "passed" and all("F.rms_norm" not in row["times"] for row in result.rows)
    assert "another result" in result.rows[0]["absent"]["F.rms_norm"]


def test_no_room_for_any_oracle_is_a_skip(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        measure, "no_room", lambda device, needed: sizes.append(needed) or ("full" if len(sizes) > 1 else "")
    )
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", "bf16")
    assert (result.status, result.reason, result.note) == ("skipped", Reason.MEMORY, "full")
    assert len(sizes) == 3, "float64, then float32"


def test_a_smaller_oracle_is_named(monkeypatch, one_round):
    answers = iter(["", "full", ""])
    monkeypatch.setattr(measure, "no_room", lambda device, needed: next(answers))
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", "bf16")
    assert result.rows[0]["oracle"] == "torch, float32"

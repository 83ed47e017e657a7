"""Interleaved timing: the maths on known answers, and that a wrong output is never given a speed."""

from __future__ import annotations

import time

import pytest
import torch

from vlmops.profiling.timing import (
    Comparison,
    Timing,
    Work,
    WrongOutputError,
    agrees,
    bootstrap_ratio,
    compare,
    num_threads,
)


def test_median_spread_and_rates():
    timing = Timing("x", (1.0, 2.0, 3.0, 4.0, 100.0))  # one outlier moves neither
    assert timing.median == 3.0
    assert timing.iqr == 2.0
    assert timing.spread == pytest.approx(2 / 3)
    assert timing.gflops(Work(flops=6e9)) == pytest.approx(2.0)
    assert timing.gbytes(Work(bytes=9e9)) == pytest.approx(3.0)
    assert Timing("once", (5.0,)).iqr == 0.0


def test_ratio_of_proportional_rounds_has_no_width():
    """Rounds are drawn as a whole: drift that hits both sides alike cannot widen their ratio."""
    slow = [2.0, 4.0, 8.0, 6.0, 2.2, 9.0, 3.0]
    ratio = bootstrap_ratio(slow, [x / 2 for x in slow])
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_ratio_interval_holds_the_value_and_widens_with_noise():
    base = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.0]
    calm = bootstrap_ratio([2.0] * 7, base)
    noisy = bootstrap_ratio([1.0, 3.0, 2.0, 1.5, 2.5, 4.0, 1.2], base)
    for ratio in (calm, noisy):
        assert ratio.low <= ratio.value <= ratio.high
    assert noisy.high - noisy.low > 10 * (calm.high - calm.low)
    assert bootstrap_ratio([3.0], [1.5], scale=0.5).value == 1.0


@pytest.mark.parametrize(("left", "right"), [([1.0], []), ([], []), ([1.0, 2.0], [1.0])])
def test_ratio_wants_the_same_rounds(left, right):
    with pytest.raises(ValueError, match="same rounds"):
        bootstrap_ratio(left, right)


def test_speedup_and_share_of_peak():
    found = Comparison(
        {"ours": Timing("ours", (1.0,) * 7), "peer": Timing("peer", (3.0,) * 7), "G": Timing("G", (2.0,) * 7)}
    )
    assert found.speedup("ours", "peer").value == 3.0
    # 4 FLOP in 1 s against 16 FLOP in 2 s: 4 of 8
    assert found.share("ours", Work(4.0), "G", Work(16.0)).value == pytest.approx(0.5)


def test_rounds_are_interleaved_and_rotate():
    seen = []

    def note(name):
        def run():
            seen.append(name)
            time.sleep(0.003)
            return torch.ones(1)

        return run

    found = compare({name: note(name) for name in "abc"}, rounds=7, warmup=2)
    assert seen[:6] == ["a", "a", "b", "b", "c", "c"]
    timed = "".join(seen[6:])
    assert timed == "abcbcacab" * 2 + "abc"
    assert all(len(found[name].seconds) == 7 for name in "abc")
    assert 0.003 <= found["a"].median < 0.1


def test_short_calls_are_repeated_inside_the_timer():
    count = 0

    def run():
        nonlocal count
        count += 1

    found = compare({"short": run}, rounds=7, sample_seconds=1e-3)
    assert count > 70
    assert 0 < found["short"].median < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounds": 6}, "rounds: expected at least 7"), ({"warmup": 0}, "warmup: expected at least 1")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": lambda: None}, **options)
    with pytest.raises(ValueError, match="candidates"):
        compare({})


def test_threads_are_set_inside_and_restored():
    before = torch.get_num_threads()
    seen = set()
    found = compare({"a": lambda: seen.add(torch.get_num_threads())}, threads=1)
    assert seen == {1}
    assert found.threads == 1
    assert torch.get_num_threads() == before
    with num_threads(None) as used:
        assert used == before


X = torch.linspace(-1, 1, 64)
WRONG = {
    "too far": (X + 0.5, "largest error"),
    "nan": (X.where(X > 0, torch.nan), "finite"),
    "zeros": (torch.zeros_like(X), "all zeros"),
    "shape": (X[:-1], "shape"),
}


@pytest.mark.parametrize("oracle", [None, X.double()])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_output_raises_before_timing(case, oracle):
    out, message = WRONG[case]
    calls = []

    def ours():
        calls.append(1)
        return out

    with pytest.raises(WrongOutputError, match=message):
        compare({"ours": ours, "peer": lambda: X}, correct=agrees("ours", "peer", oracle))
    assert len(calls) == 1  # the warm-up; nothing was timed


def test_correct_may_return_false():
    with pytest.raises(WrongOutputError, match="wrong output"):
        compare({"a": lambda: 1}, correct=lambda outputs: outputs["a"] == 2)


def test_right_outputs_pass_by_the_peers_own_error():
    truth = X.double()
    low = X.bfloat16()
    agrees("ours", "peer", truth)({"ours": low, "peer": low})
    agrees("ours", "peer")({"ours": (X * (1 + 1e-6), None), "peer": X})  # a tuple's first tensor
    with pytest.raises(WrongOutputError):
        agrees("ours", "peer", truth)({"ours": low + 0.05, "peer": low})

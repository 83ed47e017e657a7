"""The measured choice: what it picks, what it remembers, and what cannot break it."""

from __future__ import annotations

import json
import time

import pytest
import torch

import vlmops
from vlmops.backends import choice, forced_backend
from vlmops.ops import varlen_attention

CPU = torch.device("cpu")


def sleeper(ms, calls=None):
    def run():
        if calls is not None:
            calls.append(ms)
        time.sleep(ms / 1e3)

    return run


def test_the_faster_candidate_wins_and_is_remembered(tuning_cache):
    calls = []
    candidates = {"cpu": sleeper(1, calls), "torch": sleeper(4, calls)}
    assert choice.decide("op", "key", candidates, ["cpu", "torch"], CPU) == "cpu"
    seen = len(calls)
    assert choice.decide("op", "key", candidates, ["cpu", "torch"], CPU) == "cpu"
    assert len(calls) == seen, "a remembered key was measured again"
    choice.save()
    choice.forget()
    assert choice.decide("op", "key", candidates, ["cpu", "torch"], CPU) == "cpu"
    assert len(calls) == seen, "the file was not used"


def test_plain_torch_wins_ties(tuning_cache):
    assert choice.decide("op", "tie", {"cpu": sleeper(5), "torch": sleeper(5)}, ["cpu", "torch"], CPU) == "torch"


def test_measuring_is_bounded(tuning_cache):
    calls = []
    choice.decide("op", "slow", {"cpu": sleeper(40, calls), "torch": sleeper(40, calls)}, ["cpu", "torch"], CPU)
    assert len(calls) <= 4, "a slow op runs once warm and once counted per candidate"


def test_a_broken_candidate_is_left_out(tuning_cache, caplog):
    def broken():
        raise RuntimeError("no such kernel")

    assert choice.decide("op", "broken", {"cpu": broken, "torch": sleeper(1)}, ["cpu", "torch"], CPU) == "torch"
    assert "no such kernel" in caplog.text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 99, "choices": {}}', '{"format": 1, "choices": {"x": 3}}']
)
def test_a_corrupt_file_is_rebuilt(tuning_cache, content):
    path = tuning_cache / "tuning-v1.json"
    path.write_text(content)
    assert choice.decide("op", "key", {"cpu": sleeper(1), "torch": sleeper(3)}, ["cpu", "torch"], CPU) == "cpu"
    choice.save()
    assert json.loads(path.read_text())["format"] == 1


def test_two_processes_merge(tuning_cache):
    choice.decide("op", "a", {"cpu": sleeper(1), "torch": sleeper(3)}, ["cpu", "torch"], CPU)
    choice.save()
    choice.forget()
    (tuning_cache / "tuning-v1.json").rename(tuning_cache / "kept")
    choice.decide("op", "b", {"cpu": sleeper(1), "torch": sleeper(3)}, ["cpu", "torch"], CPU)
    (tuning_cache / "kept").rename(tuning_cache / "tuning-v1.json")  # what another process wrote meanwhile
    choice.save()
    choice.forget()
    assert {"op:cpu:a", "op:cpu:b"} <= set(choice.measured())


def test_tuning_off_takes_the_fixed_order(monkeypatch):
    monkeypatch.setenv("VLMOPS_TUNING", "off")
    assert choice.decide("op", "key", {"cpu": sleeper(9), "torch": sleeper(0)}, ["cpu", "torch"], CPU) == "cpu"


def test_environment_forces_a_backend_and_auto_lifts_it(monkeypatch):
    monkeypatch.setenv("VLMOPS_BACKEND", "reference")
    assert forced_backend() == "reference"
    with vlmops.use_backend("auto"):
        assert forced_backend() is None
    monkeypatch.setenv("VLMOPS_BACKEND", "quickest")
    with pytest.raises(ValueError, match="unknown backend 'quickest'"):
        forced_backend()


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    from vlmops.ops.varlen_attention import OP

    seen = []
    module = OP.module("reference")
    monkeypatch.setattr(module, "forward", lambda *a, _f=module.forward: seen.append("reference") or _f(*a))
    q = torch.randn(4, 1, 4, requires_grad=True)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with vlmops.use_backend("reference"):
        out = varlen_attention(q, q, q, cu)
    count = len(seen)
    with vlmops.use_backend("torch"):
        out.sum().backward()
    assert len(seen) == count + 1, "the backward recomputes by the backend that ran the forward"

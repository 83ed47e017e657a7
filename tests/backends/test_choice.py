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


@pytest.mark.parametrize(("ours", "winner"), [(5.05, "torch"), (5.0, "torch"), (4.95, "torch"), (4.85, "cpu")])
def test_plain_torch_wins_ties(tuning_cache, monkeypatch, ours, winner):
    monkeypatch.setattr(choice, "_measure", lambda *_: {"cpu": ours / 1e3, "torch": 5e-3})
    assert choice.decide("op", "tie", {"cpu": None, "torch": None}, ["cpu", "torch"], CPU) == winner


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


def pretend_gpus(monkeypatch, *names):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choice.machine_key.cache_clear()


def test_choices_belong_to_the_gpu_they_were_measured_on(tuning_cache, monkeypatch):
    """Two different GPUs in one machine keep their own; a driver, the processor and threads play no part."""
    pretend_gpus(monkeypatch, "GPU A", "GPU B", "GPU A")
    runs = []
    monkeypatch.setattr(
        choice, "_measure", lambda names, *_: runs.append(1) or {n: 1.0 + i for i, n in enumerate(names)}
    )
    for index in (0, 1, 2, 0):
        device = torch.device("cuda", index)
        assert choice.decide("op", "key", {"triton": None, "torch": None}, ["triton", "torch"], device) == "triton"
    assert len(runs) == 2, "GPU 2 is of the kind of GPU 0"
    assert choice.decide("op", "key", {"triton": None, "torch": None}, ["triton", "torch"], torch.device("cuda"))
    assert len(runs) == 2, "the current GPU is GPU 0"
    assert choice.measured(torch.device("cuda", 1)) and not choice.measured()
    key = choice.machine_key(torch.device("cuda", 0))
    assert key.startswith("GPU A|torch-") and "driver" not in key and "threads" not in key
    choice.machine_key.cache_clear()


def test_the_processors_choices_do_not_depend_on_a_gpu(monkeypatch):
    from vlmops.backends.machine import cpu_model

    before = choice._section(CPU)
    pretend_gpus(monkeypatch, "GPU A")
    assert choice._section(CPU) == before and before.startswith(cpu_model()) and "threads-" in before
    choice.machine_key.cache_clear()


def test_other_kernels_are_measured_anew(tuning_cache, monkeypatch):
    runs = []
    monkeypatch.setattr(choice, "_measure", lambda names, *_: runs.append(1) or dict.fromkeys(names, 1.0))
    for key in ("one build", "another", "one build"):
        monkeypatch.setattr(choice.native, "build_key", lambda key=key: key)
        choice.decide("op", "key", {"cpu": None, "torch": None}, ["cpu", "torch"], CPU)
    assert len(runs) == 2


def test_a_rehearsal_lists_keys_and_measures_nothing(tuning_cache):
    calls = []
    candidates = {"cpu": sleeper(1, calls), "torch": sleeper(4, calls)}
    choice.decide("op", "known", candidates, ["cpu", "torch"], CPU)
    count = len(calls)
    with choice.rehearse() as keys, choice.watch() as asked:
        assert choice.decide("op", "known", candidates, ["torch", "cpu"], CPU) == "cpu"
        assert choice.decide("op", "new", candidates, ["torch", "cpu"], CPU) == "torch"
    assert keys == {"op:cpu:known": True, "op:cpu:new": False} and asked == list(keys)
    assert len(calls) == count and list(choice.measured()) == ["op:cpu:known"]

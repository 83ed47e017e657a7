"""The tables of `vlmops gpu-check`: every op, every option of every schema, every activation; loads agree with their peers."""

from __future__ import annotations

import pytest
import torch

import vlmops
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops._shared.quantisation import KINDS
from vlmops.ops._shared.registry import OPS
from vlmops.ops.linear_cross_entropy import REDUCTIONS
from vlmops.profiling.gpu_check import cases, loads
from vlmops.profiling.recorder import OpRecorder

#: Arguments that are the same in every case for a reason.
FIXED = {("merge_tokens", "image_token_id"): "1 for a mask, the token's number otherwise"}


@pytest.fixture(scope="module")
def seen():
    """op -> argument -> kinds of values that the cases give it."""
    found: dict[str, dict[str, set]] = {}
    for case in cases.all_cases():
        args, kwargs = case.arguments(True)
        with OpRecorder() as calls, vlmops.use_backend("torch"):
            case.call(*args, **kwargs)
        (raw,) = [values[:-1] for func, values in calls.calls if func._schema.name == f"vlmops::{case.op}"]
        table = found.setdefault(case.op, {})
        for name, value in zip(OPS[case.op].arg_names, raw, strict=True):
            if isinstance(value, torch.Tensor):
                kind = (value.dtype.is_floating_point, value.dim(), value.requires_grad)
            else:
                kind = tuple(value) if isinstance(value, list) else value
            table.setdefault(name, set()).add(kind)
    return found


def test_every_op_has_cases_and_loads():
    assert {case.op for case in cases.all_cases()} == set(OPS)
    assert {load.op for load in loads.LOADS} == set(OPS)
    assert {case.op for case in cases.all_cases() if case.core} == set(OPS), "an op that a short run would leave out"
    assert {load.op for load in loads.LOADS if load.quick} == set(OPS)


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_option_is_set_and_left_out(seen, op):
    for name, kind in zip(OPS[op].arg_names, OPS[op].arg_types, strict=True):
        values = seen[op][name]
        if kind == "Tensor?":
            assert None in values and len(values) > 1, f"{op}: {name} is always or never given"
        elif kind == "bool":
            assert values == {False, True}, f"{op}: {name} is always {values}"
        elif kind != "Tensor" and (op, name) not in FIXED:
            assert len(values) > 1, f"{op}: {name} is always {values}"


def test_every_named_choice_is_there(seen):
    assert seen["linear"]["activation"] == {"", *ACTIVATIONS}
    assert seen["mlp"]["activation"] == set(ACTIVATIONS)
    assert seen["mlp"]["norm"] == seen["mlp"]["mid_norm"] == {"", "layer_norm", "rms_norm"}
    assert seen["mlp"]["gather"] == {"", "merge2x2", "pixel_shuffle"}
    assert seen["patchify"]["order"] == {"raster", "merge2x2"}
    assert seen["linear_cross_entropy"]["reduction"] == set(REDUCTIONS)
    assert seen["quantized_linear"]["kind"] == set(KINDS)


def test_head_sizes_of_the_field():
    dims = {case.arguments(True)[0][0].shape[2] for case in cases.all_cases() if case.op == "varlen_attention"}
    assert dims >= {64, 72, 80, 88, 96, 128, 256}


def test_arguments_are_the_same_every_time():
    first, second = (cases.find("varlen_attention: ragged, head 64").arguments(True)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(KeyError):
        cases.find("varlen_attention: sideways")


def test_gpu_sizes_are_odd_and_empty_too():
    """The lengths a GPU gets are no multiples of a tile, and some are 0."""
    lengths = cases.find("varlen_attention: ragged, head 64").arguments(False)[0][3].diff().tolist()
    assert 0 in lengths and 1 in lengths and any(n % 16 for n in lengths if n > 16)


@pytest.mark.parametrize("load", loads.LOADS, ids=lambda load: load.name)
def test_a_load_and_its_peers_compute_the_same(load):
    """Small versions: every peer that runs on a CPU agrees with the op, and the op states its cost."""
    from vlmops.profiling.gpu_check.measure import cost_of
    from vlmops.profiling.gpu_check.parity import tensors

    args, kwargs = load.arguments(True)
    with torch.no_grad():
        with vlmops.use_backend("reference"):
            want = tensors(load.call(*args, **kwargs))
        ran = []
        for peer in load.peers(args, kwargs):
            if peer.missing:
                continue
            try:
                got = tensors(peer.call(*args, **kwargs))
            except RuntimeError as err:
                if "viable backend" not in str(err) and "available kernel" not in str(err):
                    raise
                continue  # an SDPA kernel that only a GPU has
            ran.append(peer.name)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape
                if peer.compared:
                    near = dict(rtol=2e-3, atol=2e-4)
                    torch.testing.assert_close(a, b, **near, msg=lambda text, peer=peer: f"{peer.name}: {text}")
    assert ran, "no peer was compared"
    cost = cost_of(load.call, args, kwargs)
    assert cost is not None and cost.read > 0 and cost.written > 0
    assert (cost.flops > 0) is (load.op not in ("norms", "rotary", "merge_tokens"))

"""Ranges: names, nesting, which modules get them, and what they cost when nobody records."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from PIL import Image

import vlmops
from tests.support.tiny_models import build
from vlmops import images, models, ops
from vlmops.backends import ranges
from vlmops.ops._shared.registry import OPS
from vlmops.profiling.annotate import annotated, covered, stage_of
from vlmops.profiling.nsight import names


class Nvtx:
    """Notes what the nvtx package is asked for, as (depth, message, options)."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, dict]] = []
        self.open: list[str] = []

    @property
    def depth(self) -> int:
        return len(self.open)

    def annotate(self, message: str, **options: Any) -> Any:
        outer = self

        class Range:
            def __enter__(self) -> None:
                outer.seen.append((outer.depth, message, options))
                outer.open.append(message)

            def __exit__(self, *error: object) -> None:
                assert outer.open.pop() == message

        return Range()


@pytest.fixture
def nvtx(monkeypatch: Any) -> Nvtx:
    found = Nvtx()
    monkeypatch.setattr(ranges, "installed", lambda: found)
    return found


def test_an_op_says_its_backend_shapes_and_dtypes(nvtx: Nvtx) -> None:
    x, w = torch.randn(5, 8), torch.randn(3, 8, dtype=torch.float32)
    with ranges.recording(record=False):
        ops.linear(x, w)
    ops.linear(x, w)  # nobody records
    ((depth, message, options),) = nvtx.seen
    assert depth == 0 and message.startswith("op: linear ") and message.endswith("| 5x8 fp32, 3x8 fp32")
    assert options == {"color": "blue", "domain": "vlmops", "category": "op"}


def test_the_profiler_sees_them_too() -> None:
    with torch.profiler.profile() as profile, ranges.recording(nvtx=False), ranges.stage("vision"):
        ops.rms_norm(torch.randn(4, 8), torch.randn(8), eps=1e-6)
    names = {event.name for event in profile.events()}
    assert "stage: vision" in names
    assert any(name.startswith("op: norms") for name in names)


def test_gradients_are_the_same(nvtx: Nvtx) -> None:
    def gradient() -> torch.Tensor:
        x = torch.ones(3, 4, requires_grad=True)
        (found,) = torch.autograd.grad(ops.linear(x, torch.arange(8.0).view(2, 4)).sum(), x)
        return found

    want = gradient()
    with ranges.recording(record=False):
        assert torch.equal(gradient(), want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backward_has_a_range_of_its_own(nvtx: Nvtx, backend: str) -> None:
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with vlmops.use_backend(backend), ranges.recording(record=False):
        out = ops.linear(x, w).sum()
    nvtx.seen.clear()
    with ranges.recording(record=False):  # the backend is that of the forward, wherever the backward runs
        out.backward()
    ((depth, message, options),) = nvtx.seen
    assert depth == 0 == nvtx.depth and message == f"op: linear.backward {backend} | 5x8 fp32, 3x8 fp32"
    assert options == {"color": "blue", "domain": "vlmops", "category": "op"}
    assert names.parse(message, "vlmops") == names.Range("op", "linear.backward", backend, "5x8 fp32, 3x8 fp32")
    ops.linear(x, w).sum().backward()
    assert len(nvtx.seen) == 1  # nobody records


@pytest.mark.parametrize("op", ["norms", "rotary", "linear"])
def test_triton_kernels_are_launched_inside_the_range_of_their_direction(nvtx: Nvtx, op: str, monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    from vlmops.backends import triton_runtime

    launched: list[tuple[str, list[str]]] = []
    launch = triton_runtime.launch

    def spy(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append((kernel.__name__, list(nvtx.open)))
        launch(kernel, *args, **options)

    monkeypatch.setattr(triton_runtime, "launch", spy)
    x = torch.randn(4, 2, 16, requires_grad=True)
    calls = {
        "norms": lambda: ops.rms_norm(x, torch.randn(16, requires_grad=True), eps=1e-6),
        "rotary": lambda: ops.rotary(x, torch.randn(4, 16), torch.randn(4, 16)),
        "linear": lambda: ops.linear(x, torch.randn(8, 16, requires_grad=True)),
    }
    with vlmops.use_backend("triton"), ranges.recording(record=False):
        out = calls[op]()
        forward = len(launched)
        assert forward
        out.sum().backward()
    assert len(launched) > forward
    for i, (kernel, stack) in enumerate(launched):
        name = op if i < forward else f"{op}.backward"
        assert len(stack) == 1 and stack[0].startswith(f"op: {name} triton | "), (kernel, stack)


def test_a_failing_backward_closes_its_range(nvtx: Nvtx, monkeypatch: Any) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    with vlmops.use_backend("torch"), ranges.recording(record=False):
        out = ops.linear(x, torch.randn(3, 8)).sum()
        monkeypatch.setattr(OPS["linear"], "_gradients", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.backward()
    assert nvtx.seen[-1][1].startswith("op: linear.backward") and nvtx.depth == 0


@pytest.mark.parametrize("patched", [False, True])
def test_stages_and_modules_of_a_model(nvtx: Nvtx, patched: bool) -> None:
    model, inputs = build("llava")
    if patched:
        vlmops.patch_model(model)
    with torch.no_grad():
        want = model(**inputs).logits  # transformers puts in its own hooks at the first call
        hooks = {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}
        with annotated(model, record=False):
            got = model(**inputs).logits
    assert torch.equal(got, want)
    assert nvtx.depth == 0
    messages = [m for _, m, _ in nvtx.seen]
    stages = [m for m in messages if m.startswith("stage")]
    assert stages == ["stage: vision", "stage: connector", "stage: prefill"]
    assert any(m.startswith("module: model.vision_tower.") for m in messages)
    hidden = covered(model)
    assert bool(hidden) is patched
    assert not any(m.startswith(f"module: {path} ") for m in messages for path in hidden)
    assert hooks == {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}


def test_hooks_do_not_undo_a_patch(nvtx: Nvtx) -> None:
    """A patched module runs fused with ranges as it does without."""
    model, inputs = build("qwen2_vl")
    vlmops.patch_model(model, backend="torch")
    plain: list[str] = []
    with torch.no_grad(), ranges.recording(record=False):
        model(**inputs)
        plain, nvtx.seen = [m for _, m, _ in nvtx.seen if m.startswith("op")], []
    with torch.no_grad(), annotated(model, record=False):
        model(**inputs)
    assert [m for _, m, _ in nvtx.seen if m.startswith("op")] == plain


def test_the_stack_decodes(nvtx: Nvtx, tmp_path: Any) -> None:
    build("llava")[0].save_pretrained(tmp_path)
    vlm = models.from_pretrained(tmp_path)
    with annotated(vlm, record=False):
        prepared = images.prepare(Image.new("RGB", (56, 56)), size=56)
        ids = torch.cat([torch.tensor([[5]]), torch.full((1, 16), 300), torch.tensor([[6, 7]])], 1)
        vlm.generate(ids, max_new_tokens=3, images=prepared, eos_token_id=())
    stages = [m.removeprefix("stage: ") for _, m, _ in nvtx.seen if m.startswith("stage")]
    assert stages == ["preprocess", "vision", "connector", "prefill", "decode", "decode"]


def test_a_failing_forward_closes_its_ranges(nvtx: Nvtx) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(3, 3))
    with annotated(model, record=False), pytest.raises(RuntimeError):
        model(torch.randn(2, 4))
    assert nvtx.depth == 0


def test_names_of_stages() -> None:
    paths = {
        "model.visual": "vision", "model.vision_tower": "vision", "tower": "vision", "model.visual.merger": "connector",
        "connector": "connector", "model.multi_modal_projector": "connector", "model.language_model": "text", "decoder": "text",
        "decoder.blocks.0": None, "lm_head": None, "model.visual.blocks.3.attn": None,
    }  # fmt: skip
    assert {path: stage_of(path) for path in paths} == paths


def test_nvtx_must_be_there_where_it_is_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(ranges, "installed", lambda: None)
    with pytest.raises(ImportError, match="pip install nvtx"), ranges.recording(nvtx=True):
        pass
    with ranges.recording(record=False):
        ops.linear(torch.ones(1, 2), torch.ones(1, 2))
    assert ranges.ACTIVE is None


def test_nobody_recording_costs_below_a_microsecond() -> None:
    """The look an op takes, over that of an empty loop."""
    n = 20000

    def loop(look: bool) -> float:
        begin = time.perf_counter()
        if look:
            for _ in range(n):
                recorder = ranges.ACTIVE
                if recorder is not None:
                    raise AssertionError
        else:
            for _ in range(n):
                pass
        return time.perf_counter() - begin

    cost = min(loop(True) for _ in range(7)) - min(loop(False) for _ in range(7))
    assert cost / n < 1e-6


def test_nobody_recording_describes_nothing(monkeypatch: Any) -> None:
    """What an op looks at is the one global: shapes are put into words for somebody who records alone."""

    def fail(args: Any) -> str:
        raise AssertionError("described for nobody")

    monkeypatch.setattr(ranges, "describe", fail)
    ops.linear(torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)).sum().backward()
    with pytest.raises(AssertionError, match="for nobody"), ranges.recording(nvtx=False, record=False):
        ops.linear(torch.randn(2, 3), torch.randn(4, 3))

"""patchify's Triton launches: tables without waiting, traffic and FLOPs against the least, the registered op."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_patchify import STATS, pixels, weights
from tests.support import triton_interpreter
from tests.support.ops import opcheck
from vlmops.backends import triton_runtime
from vlmops.ops.patchify import triton as backend
from vlmops.ops.patchify import triton_layout
from vlmops.ops.patchify.cost import cost, images_cost, weight_cost

pytest.importorskip("triton")
triton_interpreter.install()


class TestTables:
    """Tables on a GPU, without one."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        state = dict(stream=1, capturing=False, made=0)

        def upload(rows, dtype, device):
            state["made"] += 1
            return torch.tensor(rows, dtype=dtype), torch.tensor(rows, dtype=dtype)

        class Stream:
            cuda_stream = property(lambda self: state["stream"])

        monkeypatch.setattr(triton_layout, "_upload", upload)
        monkeypatch.setattr(triton_layout, "MAX_TABLES", 2)
        monkeypatch.setattr(triton_layout, "_TABLES", type(triton_layout._TABLES)())
        monkeypatch.setattr(triton_layout, "_CAPTURED", [])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
        state["get"] = lambda *row: triton_layout.on_device((row,), torch.int32, torch.device("cuda", 0))
        return state

    def test_copied_once_for_each_stream(self, gpu):
        a = gpu["get"](1, 2)
        assert gpu["get"](1, 2) is a and gpu["made"] == 1
        gpu["stream"] = 2
        assert gpu["get"](1, 2) is not a and gpu["made"] == 2

    def test_the_oldest_is_dropped(self, gpu):
        for row in (1, 2, 1, 3):
            gpu["get"](row)
        assert gpu["made"] == 3
        gpu["get"](1)
        assert gpu["made"] == 3
        gpu["get"](2)
        assert gpu["made"] == 4

    def test_a_capture_copies_nothing_it_has_and_keeps_what_it_used(self, gpu):
        a = gpu["get"](1)
        gpu["stream"], gpu["capturing"] = 9, True
        assert gpu["get"](1) is a and gpu["made"] == 1
        b = gpu["get"](2)
        assert any(b is t for kept in triton_layout._CAPTURED for t in kept)
        assert any(a is t for kept in triton_layout._CAPTURED for t in kept)
        gpu["capturing"] = False
        assert gpu["get"](2) is not b  # its values are there only once the graph has run


def raw_args(images, w, bias=None, position=None, *, p=14, frames=1, sizes=None, tokens, **stats):
    return (
        images,
        sizes,
        w,
        bias,
        position,
        stats.get("mean", []),
        stats.get("std", []),
        p,
        frames,
        "raster",
        False,
        tokens,
        True,
    )


@pytest.mark.parametrize(
    ("form", "dtype"), [("stack", torch.float32), *((f, torch.bfloat16) for f in ("stack", "rows", "still", "video"))]
)
def test_traffic_and_flops_are_the_least(form, dtype):
    frames = 1 if form == "stack" else 2
    video = pixels(1, 2 if form == "video" else 1, 3, 8 * 14, 8 * 14)
    images = torch.randn(64, 1176, dtype=dtype) if form == "rows" else video
    w, b = torch.randn(128, 3, frames, 14, 14).to(dtype), torch.randn(128).to(dtype)
    args = raw_args(
        images, w, b, torch.randn(64, 128).to(dtype), frames=frames, tokens=64, **({} if form == "rows" else STATS)
    )
    with triton_runtime.record(triton_runtime.INTERPRETER) as launches:
        backend.forward(*args)
    blocks = launches[0].constants
    with triton_interpreter.count() as seen:
        backend.forward(*args)
    least = cost(*args, block_m=blocks["BM"], block_n=blocks["BN"])
    assert cost(*args).bytes <= seen.bytes and least.bytes <= seen.bytes <= 1.15 * least.bytes
    assert least.flops <= seen.flops <= 1.1 * least.flops


@pytest.mark.parametrize(("frames", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)])
def test_traffic_and_flops_of_the_backward_are_the_least(frames, dtype):
    images = pixels(1, frames, 3, 4 * 14, 4 * 14, raw=False).to(dtype)
    w, grad = torch.randn(64, 3, frames, 14, 14).to(dtype), torch.randn(16, 64).to(dtype)
    args = raw_args(images, w, frames=frames, tokens=16, **STATS)
    for i, name in enumerate(("images", "weight")):
        needs = [j == i for j in range(4)]
        with triton_runtime.record(triton_runtime.INTERPRETER) as launches:
            backend.backward([grad], [], args, needs)
        first = launches[0]
        with triton_interpreter.count() as seen:
            backend.backward([grad], [], args, needs)
        if name == "images":
            least = images_cost(images, w, 16, block_m=first.constants["BM"], block_k=first.constants["BK"])
        else:
            blocks = dict(block_e=first.constants["BE"], block_k=first.constants["BK"])
            least = weight_cost(images, w, 16, parts=first.grid[1], **blocks)
        assert least.bytes <= 1.02 * seen.bytes and seen.bytes <= 1.15 * least.bytes, name
        assert least.flops <= seen.flops <= 1.1 * least.flops, name


def test_a_still_is_read_once_for_all_its_frames():
    reads = []
    for images in (pixels(1, 1, 3, 56, 56), pixels(1, 2, 3, 56, 56)):
        args = raw_args(images, torch.zeros(16, 3, 2, 14, 14), frames=2, tokens=16)
        with triton_interpreter.count() as seen:
            backend.forward(*args)
        reads.append(seen.read)
    assert 0.9 * 3 * 56 * 56 < reads[1] - reads[0] < 1.1 * 3 * 56 * 56


def test_opcheck():
    w, b = weights(grad=True)
    op, rest = torch.ops.vlmops.patchify.default, ([0.4] * 3, [0.2] * 3, 4, 1, "raster", False)
    sizes = torch.tensor([[1, 8, 8, 0], [1, 4, 4, 1]])
    opcheck(
        op,
        (
            torch.rand(240, requires_grad=True),
            sizes,
            w,
            b,
            torch.randn(5, 32, requires_grad=True),
            *rest,
            5,
            False,
            "triton",
        ),
    )

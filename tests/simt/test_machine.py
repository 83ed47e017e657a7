"""Every bug the host SIMT machine has to find is found and named, and the same kernels without it are clean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import simt
from tests.support.simt import FORWARD, SCHEDULES

hooked = pytest.mark.skipif(
    simt.SANITIZED, reason="a kernel built for AddressSanitizer has no hooks, so nothing is checked"
)


def _run(
    entry: str, bug: int, schedule: int = FORWARD, seed: int = 7, block: int = 64
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Launches a kernel of bugs.cu on its usual arguments. Returns the reports and the buffers."""
    grid, shared = (1,), 0
    if entry in ("blocks", "atomics", "last_block"):
        grid = (3,)
    if entry in ("warp_barrier", "ldmatrix"):
        block = 32
    kernel = simt.build_kernel("bugs.cu", entry, entry, block)
    machine = simt.machine()
    machine.clear()
    x = torch.randn(64 * 8)
    y = torch.full((64 * 8,), float("nan"))
    buffers = {"x": x, "y": y}
    args: list[Any] = [x, y]
    written: tuple[str, ...] = ("x",)
    if entry == "atomics":
        y.zero_()
        args, written = [y, x], ("x", "y")
    elif entry == "last_block":
        buffers |= {"partial": torch.full((256,), float("nan")), "arrived": torch.zeros(1, dtype=torch.int32)}
        args, written = [x, buffers["partial"], y, buffers["arrived"]], ("x", "arrived")
    elif entry == "ldmatrix":
        buffers = {"x": torch.randn(256).bfloat16(), "y": torch.zeros(128, dtype=torch.int32)}
        args = [buffers["x"], buffers["y"]]
    elif entry == "hang":
        buffers = {"flag": torch.zeros(1, dtype=torch.int32), "y": y}
        args, written = [buffers["flag"], y], ("flag",)
    if entry == "bounds":
        # 50 of 64 elements are the kernel's, in the middle of the tensor; float 64 on is 16-byte aligned
        begin = 64
        machine.register(x[begin : begin + 50], "x")
        machine.register(y[begin : begin + 50], "y", False)
        args, shared = [x[begin:], y[begin:], 50, None], 64 * 4
    else:
        for name, tensor in buffers.items():
            machine.register(tensor, name, name in written)
    reports = machine.launch(kernel, [*args, bug], grid, block, shared, schedule, seed)
    machine.clear()
    return reports, buffers


def _expected(entry: str, buffers: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the correct form of a kernel computes: (got, wanted)."""
    x, y = buffers.get("x"), buffers["y"]
    assert x is not None or entry == "hang"
    if entry == "hang":
        return y[:64], torch.ones(64)
    assert x is not None
    if entry == "barrier":
        return y[:64], 2 * x[:64].roll(-1)
    if entry == "warp_barrier":
        return y[:32], x[:32].view(16, 2).flip(1).reshape(32)
    if entry == "readers":
        return y[:64], x[:1].expand(64)
    if entry == "last_block":
        return y[:64], (2 * x[:192]).view(3, 64).sum(0)
    if entry == "atomics":
        return y[:1], 3 * x[:64].sum(0, keepdim=True)
    if entry == "blocks":
        wanted = x[:192].clone()
        wanted[::64] -= 1
        return y[:192], wanted
    if entry == "bounds":
        return y[64:114], x[64:114]
    if entry == "alignment":
        return y[:256], x[:256]
    if entry == "async":
        return y[:256], x[:256].view(64, 4).roll(-1, 0).reshape(-1)
    if entry == "divergence":
        return y[:64], x[:64].view(32, 2).flip(1).reshape(64)
    if entry == "ldmatrix":
        tiles = x.view(4, 8, 4, 2).view(torch.int16)  # matrix, row, pair
        words = (tiles[..., 0].int() & 0xFFFF) | (tiles[..., 1].int() << 16)
        return y.view(32, 4), words.reshape(4, 32).T
    return y[:64], x[:64]


ENTRIES = {
    "barrier": 2, "warp_barrier": 1, "write_write": 1, "readers": 2, "blocks": 3, "atomics": 1, "last_block": 3,
    "uninitialised": 3, "bounds": 8, "alignment": 4, "divergence": 5, "deadlock": 4, "async": 8, "ldmatrix": 4, "hang": 1,
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_correct_kernels_give_no_report_in_any_schedule(entry):
    for schedule in SCHEDULES:
        for seed in (1, 2) if schedule == simt.SEEDED else (0,):
            reports, buffers = _run(entry, 0, schedule, seed)
            assert reports == []
            got, wanted = _expected(entry, buffers)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# entry, bug, kind, words of the report
BUGS = [
    ("barrier", 1, "race", "read of shared tile"),
    ("barrier", 2, "race", "write of shared tile"),
    ("warp_barrier", 1, "race", "read of shared tile"),
    ("write_write", 1, "race", "write of shared one+0 by thread 1"),
    ("readers", 1, "race", "of shared one+0"),
    ("readers", 2, "race", "of shared one+0"),
    ("blocks", 1, "race", "write of y+0 by thread 0 of block (1, 0, 0)"),
    ("blocks", 2, "race", "read of y"),
    ("blocks", 3, "race", "write of x"),
    ("atomics", 1, "race", "of y+0"),
    ("last_block", 1, "race", "read of partial"),
    ("last_block", 2, "race", "read of partial"),
    ("last_block", 3, "race", "read of partial"),
    ("uninitialised", 1, "uninitialised", "read of shared tile+160, never written, by thread 40"),
    ("uninitialised", 2, "uninitialised", "read of y+12, never written, by thread 3"),
    ("uninitialised", 3, "uninitialised", "read of y+12, never written, by thread 3"),
    ("bounds", 1, "out-of-bounds", "read of 4 bytes by thread 50 of block (0, 0, 0) reaches 4 bytes past the end of x (200"),
    ("bounds", 2, "out-of-bounds", "write of 4 bytes by thread 50 of block (0, 0, 0) reaches 4 bytes past the end of y"),
    ("bounds", 3, "out-of-bounds", "reaches 4 bytes past the end of shared tile (256 bytes)"),
    ("bounds", 4, "out-of-bounds", "reaches 4 bytes before x"),
    ("bounds", 5, "out-of-bounds", "past the end of shared dynamic memory (256 bytes)"),
    ("bounds", 6, "out-of-bounds", "read of 16 bytes by thread 48 of block (0, 0, 0) reaches 8 bytes past the end of x"),
    ("bounds", 7, "out-of-bounds", "reaches the null pointer + 4"),
    ("bounds", 8, "out-of-bounds", "reaches a private variable of thread 0"),
    ("alignment", 1, "misaligned", "read of 16 bytes by thread 0 of block (0, 0, 0) at an address that is 4 past"),
    ("alignment", 2, "misaligned", "write of 8 bytes"),
    ("alignment", 3, "misaligned", "read of 16 bytes"),
    ("alignment", 4, "misaligned", "cp.async of 16 bytes"),
    ("divergence", 1, "divergence", "thread 0 is at a shuffle"),
    ("divergence", 2, "divergence", "thread 16 at a ballot"),
    ("divergence", 3, "divergence", "mask 0x0000ffff"),
    ("divergence", 4, "divergence", "thread 31 at the end"),
    ("divergence", 5, "divergence", "is at __syncwarp (bugs.cu:"),
    ("deadlock", 1, "deadlock", "thread 0 waits at __syncthreads (bugs.cu:"),
    ("deadlock", 2, "deadlock", "thread 7 at the end"),
    ("deadlock", 3, "deadlock", "thread 32 at __syncthreads (bugs.cu:"),
    ("deadlock", 4, "deadlock", "thread 32 at __syncthreads (bugs.cu:"),
    ("async", 1, "async", "has not been waited for"),
    ("async", 2, "async", "was never committed to a group"),
    ("async", 3, "async", "has not been waited for"),
    ("async", 4, "race", "read of shared tile"),
    ("async", 5, "async", "write of shared tile+1024"),
    ("async", 6, "async", "ends with 2 copies it never waited for"),
    ("async", 7, "race", "write of shared tile"),
    ("async", 8, "async", "its destination is shared memory"),
    ("ldmatrix", 1, "ldmatrix", "is not 16-byte aligned"),
    ("ldmatrix", 2, "ldmatrix", "reaches 16 bytes past the end of shared tile (512 bytes)"),
    ("ldmatrix", 3, "ldmatrix", "is not in shared memory"),
    ("ldmatrix", 4, "uninitialised", "read of shared tile+496"),
    ("hang", 1, "hang", "without ever waiting"),
]  # fmt: skip


@hooked
@pytest.mark.parametrize(("entry", "bug", "kind", "words"), BUGS, ids=[f"{b[0]}-{b[1]}" for b in BUGS])
def test_a_bug_is_found_and_named(entry, bug, kind, words):
    reports, _ = _run(entry, bug)
    mine = [r for r in reports if r.startswith(f"{kind}: ") and words in r]
    assert mine, reports
    assert "bugs.cu:" in mine[0]  # with the line


@hooked
@pytest.mark.parametrize("schedule", [simt.REVERSE, simt.SEEDED])
@pytest.mark.parametrize(("entry", "bug", "kind"), sorted({b[:3] for b in BUGS} - {("hang", 1, "hang")}))
def test_a_bug_is_found_in_other_schedules(entry, bug, kind, schedule):
    reports, _ = _run(entry, bug, schedule)
    assert any(r.startswith(f"{kind}: ") for r in reports), reports


def test_every_bug_of_the_kernels_is_in_the_table():
    assert {b[:2] for b in BUGS} == {(entry, i + 1) for entry, count in ENTRIES.items() for i in range(count)}


@hooked
def test_a_race_is_found_though_the_answer_is_right():
    for entry, bug in (("write_write", 1), ("async", 7)):
        found = 0
        for schedule in SCHEDULES:
            reports, buffers = _run(entry, bug, schedule)
            got, wanted = _expected(entry, buffers)
            found += torch.equal(got, wanted) and any(r.startswith("race: ") for r in reports)
        assert found > 0, entry


@hooked
@pytest.mark.parametrize(("block", "bug"), [(32, 1), (64, 1), (64, 2)])
def test_a_write_after_reads_of_several_threads_is_found_in_any_order(block, bug):
    for schedule, seed in [(0, 0), (1, 0), *((simt.SEEDED, seed) for seed in range(8))]:
        reports, _ = _run("readers", bug, schedule, seed, block)
        assert [r for r in reports if r.startswith("race: ")], (schedule, seed)


@hooked
def test_both_places_of_a_race_are_named():
    source = (simt.KERNELS / "bugs.cu").read_text().splitlines()
    reports, _ = _run("barrier", 2)
    write = source.index("  tile[t] = neighbour * 2.f;") + 1
    read = source.index("  const float neighbour = tile[(t + 1) % VLMOPS_THREADS];") + 1
    assert any(
        f"at bugs.cu:{write}; not ordered after the read by thread" in r and f"bugs.cu:{read}" in r for r in reports
    )


@hooked
def test_schedules_differ_and_a_seed_repeats():
    seen = {}
    for schedule, seed in ((0, 0), (1, 0), (2, 1), (2, 1), (2, 2)):
        reports, _ = _run("blocks", 1, schedule, seed)
        seen.setdefault((schedule, seed), set()).add(tuple(reports))
    assert all(len(r) == 1 for r in seen.values())
    assert len({next(iter(r)) for r in seen.values()}) == 4


def test_too_much_shared_memory_and_wrong_sizes():
    machine = simt.machine()
    machine.clear()
    x, y = torch.randn(64), torch.zeros(64)
    machine.register(x, "x")
    machine.register(y, "y", False)
    kernel = simt.build_kernel("bugs.cu", "barrier", "barrier", 64)
    assert machine.launch(kernel, [x, y, 0], (1,), 64, shared=227 * 1024 - 256) == []
    assert machine.launch(kernel, [x, y, 0], (1,), 64, shared=227 * 1024 - 255)[0].startswith("shared-size: ")
    assert machine.launch(kernel, [x, y, 0], (1,), 1056)[0].startswith("launch: a block of 1056")
    assert machine.launch(kernel, [x, y, 0], (0,), 64)[0].startswith("launch: a grid of 0")
    assert machine.launch(kernel, [x, y, 0], (1, 65536), 64)[0].startswith("launch: a grid of 1 x 65536")


@hooked
def test_what_a_launch_wrote_is_known_to_the_next():
    machine = simt.machine()
    kernel = simt.build_kernel("bugs.cu", "barrier", "barrier", 64)
    x, middle, y = torch.randn(64), torch.zeros(64), torch.zeros(64)
    machine.clear()
    for tensor, name in ((x, "x"), (middle, "middle"), (y, "y")):
        machine.register(tensor, name, name == "x")
    assert machine.launch(kernel, [middle, y, 0], (1,), 64)[0].startswith("uninitialised: read of middle")
    assert machine.launch(kernel, [x, middle, 0], (1,), 64) == []
    assert machine.launch(kernel, [middle, y, 0], (1,), 64) == []  # launches are ordered: no race between them
    machine.register(middle, "middle", False)
    assert machine.launch(kernel, [middle, y, 0], (1,), 64)[0].startswith("uninitialised: read of middle")


@hooked
def test_views_of_one_tensor_are_one_buffer():
    machine = simt.machine()
    kernel = simt.build_kernel("bugs.cu", "barrier", "barrier", 64)
    x = torch.randn(128)
    machine.clear()
    machine.register(x[:66], "low")
    machine.register(x[60:128], "high", False)
    assert machine.launch(kernel, [x, x[64:], 0], (1,), 64) == []  # reads what "low" has, writes into "high"
    assert machine.launch(kernel, [x[60:], x, 0], (1,), 64) == []
    machine.clear()
    machine.register(x[:66], "low")
    machine.register(x[60:128], "high", False)
    reports = machine.launch(kernel, [x[60:], x, 0], (1,), 64)
    assert reports[0].startswith("uninitialised: read of low|high+264"), reports

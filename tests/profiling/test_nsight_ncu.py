"""Nsight Compute's raw page: figures and units, budgets, roofline, what is refused."""

from __future__ import annotations

import json

import pytest

from tests.support.nsight_files import FIXED, STALLED, UNITS, message, ncu_csv, nvtx_cell
from vlmops.profiling.nsight import ProfileFileError, budgets, ncu
from vlmops.profiling.nsight.attribution import Place
from vlmops.profiling.nsight.ncu import Peaks, Roof, roofline

OP = message("op", "mlp cuda", "8x16 bf16, 3 fp32")
KERNEL = {
    "name": "void mlp_few_rows<4>(float *)", "gpu__time_duration.sum": "12,500", "dram__bytes_read.sum": "20,000,000",
    "dram__bytes_write.sum": "5000000.0", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "61.5",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "43.25",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "12.5", "launch__registers_per_thread": "96",
    "launch__shared_mem_per_block_static": "16", "launch__shared_mem_per_block_dynamic": "4,096",
    STALLED.format("long_scoreboard"): "3.0", STALLED.format("barrier"): "1.0", STALLED.format("selected"): "9.0",
}  # fmt: skip


def one(path, **changes):
    (found,) = ncu.read(ncu_csv(path, [{**KERNEL, **changes}]))
    return found


def test_every_figure(tmp_path):
    found = one(
        tmp_path / "a.csv",
        nvtx=nvtx_cell(7, message("stage", "prefill"), message("module", "visual.blocks.0 (Block)"), OP),
    )
    assert (found.name, found.short, found.capability) == ("void mlp_few_rows<4>(float *)", "mlp_few_rows", "9.0")
    assert found.place == Place("prefill", "visual.blocks.0", "mlp", None, "cuda", OP)
    assert (found.ns, found.dram_bytes, found.dram_rate) == (12500, 25e6, pytest.approx(2e12))
    assert (found.dram_share, found.tensor, found.occupancy, found.registers, found.shared) == (
        61.5,
        12.5,
        43.25,
        96,
        4112,
    )
    assert found.stalls == {"long_scoreboard": 3.0, "barrier": 1.0}  # a selected warp does not wait


def test_a_kernels_own_range_and_other_domains(tmp_path):
    cell = nvtx_cell(7, OP, "mlp_few_rows_t128") + nvtx_cell(7, "op: thief cuda", domain="other").removeprefix("7")
    assert one(tmp_path / "a.csv", nvtx=cell).place == Place(
        None, None, "mlp", "mlp_few_rows_t128", "cuda", "op: thief cuda"
    )


@pytest.mark.parametrize(
    ("unit", "value", "ns"),
    [
        ("ns", "12.5", 12.5), ("nsecond", "12.5", 12.5), ("usecond", "12.5", 12500), ("us", "1,200.5", 1200500),
        ("msecond", "2", 2e6), ("ms", "2", 2e6), ("second", "1.25e-05", 12500), ("s", "2", 2e9),
    ],
)  # fmt: skip
def test_units_of_time(tmp_path, unit, value, ns):
    (found,) = ncu.read(
        ncu_csv(
            tmp_path / "a.csv", [{"name": "k", "gpu__time_duration.sum": value}], units={"gpu__time_duration.sum": unit}
        )
    )
    assert found.ns == pytest.approx(ns)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("byte/second", 1), ("Kbyte/second", 1e3), ("Mbyte/s", 1e6), ("Gbyte/s", 1e9), ("Tbyte/second", 1e12)],
)
def test_units_of_rates(tmp_path, unit, factor):
    metric = "dram__bytes.sum.per_second"
    (found,) = ncu.read(ncu_csv(tmp_path / "a.csv", [{"name": "k", metric: "1.5"}], units={metric: unit}))
    assert found.dram_rate == pytest.approx(1.5 * factor)


def test_what_a_file_lacks_is_none(tmp_path):
    (found,) = ncu.read(ncu_csv(tmp_path / "a.csv", [{"name": "k", "cc": ""}]))
    assert found == ncu.Counters("k", "k")
    assert roofline(found) is None


def test_messages_around_the_table_and_other_encodings(tmp_path):
    before, after = '==PROF== Connected, "ID"\nthe program: 1,2,3\n\n', "==PROF== Disconnected\n"
    path = ncu_csv(tmp_path / "a.csv", [KERNEL, KERNEL], before=before, after=after)
    assert len(ncu.read(path)) == 2
    text = path.read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert len(ncu.read(path)) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------

HEAD = ",".join(f'"{name}"' for name in (*FIXED, *UNITS))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "no column 'Kernel Name'"),
        ("a,b\n1,2\n", "--page raw"),
        ('"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n', "details page"),
        ('"ID","Kernel Name","x","x"\n"","","",""\n', "same name"),
        (f"{HEAD}\n", "no row of units"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"0","k","12"\n', "no row of units"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n', "no kernel was measured"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","k"\n', "truncated: row 3 has 2 of 3"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","k","1,5"\n', "LC_ALL=C"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","k","27.595.520"\n', "decimal comma"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","k","1e999"\n', "too large"),
        ('"ID","Kernel Name","gpu__time_duration.sum"\n"","","parsec"\n"0","k","1"\n', "unit 'parsec'"),
        ('"ID","Kernel Name"\n"",""\n"0","' + "x" * 200_000 + '"\n', "no CSV"),
        ("ID\0,Kernel Name\n", "no text"),
    ],
)
def test_other_files_are_refused(tmp_path, content, word):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(ProfileFileError, match=word):
        ncu.read(path)


def test_bytes_and_sizes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xb5\xff\x00\x80" * 9)
    with pytest.raises(ProfileFileError, match="no text"):
        ncu.read(path)
    monkeypatch.setattr(ncu, "MAX_BYTES", 10)
    with pytest.raises(ProfileFileError, match="fewer launches"):
        ncu.read(path)


def test_every_cut_is_read_or_refused(tmp_path):
    data = ncu_csv(tmp_path / "a.csv", [KERNEL] * 3).read_bytes()
    path = tmp_path / "b.csv"
    whole = refused = 0
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        try:
            whole = len(ncu.read(path))
        except ProfileFileError:
            refused += 1
    assert refused > 20 and whole <= 3


# -- roofline ----------------------------------------------------------------------------------------------------------


def test_roofline_takes_the_nearer_limit():
    found = ncu.Counters("k", "k", ns=1000.0, dram_rate=1e12, dram_share=40.0, tensor=20.0)
    assert roofline(found) == Roof("memory", 0.4, "ncu")
    assert roofline(found, Peaks(2e12, 1e15)) == Roof("memory", 0.5, "given")
    assert roofline(found, Peaks(2e12, 1e15), flops=8e8) == Roof("compute", pytest.approx(0.8), "given")
    assert roofline(found, Peaks(8e12, 1e15)) == Roof("compute", 0.2, "given")  # the tensor pipes are busier
    assert roofline(ncu.Counters("k", "k", tensor=30.0)) == Roof("compute", 0.3, "ncu")


# -- budgets -----------------------------------------------------------------------------------------------------------


def row(registers, shared):
    return {"registers": registers, "shared": shared, "spills": 0, "warps": 4}


@pytest.fixture
def known(tmp_path):
    triton = {
        "mlp | forward a | k_kernel": {"sm_90": row(100, 10)}, "mlp | forward b | k_kernel #2": {"sm_90": row(160, 20)},
        "linear | x | shared_kernel": {"sm_90": row(1, 1)}, "mlp | x | shared_kernel": {"sm_80": row(1, 1)},
    }  # fmt: skip
    (tmp_path / "triton.json").write_text(json.dumps({"format": 1, "kernels": triton}))
    cuda = {"13.0": {"norms | norms_t128": {"sm_90a": row(40, 0), "sm_80": row(44, 0)}}}
    (tmp_path / "cuda.json").write_text(json.dumps({"format": 1, "nvcc": cuda, "counters": {}}))
    return budgets.load(tmp_path)


def test_ops_of_kernels(known):
    assert (known.op("k_kernel"), known.op("norms_t128")) == ("mlp", "norms")
    assert known.op("shared_kernel") is None and known.op("ampere_sgemm") is None


@pytest.mark.parametrize(
    ("kernel", "capability", "registers", "shared", "status", "text"),
    [
        ("k_kernel", "9.0", 128, 20, "within", "128 registers, budget 100..160; 20 B shared, budget 10..20"),
        ("k_kernel", "9.0", 168, 5, "above", "168 registers, budget 100..160; 5 B shared, budget 10..20"),
        ("k_kernel", "9.0", 90, None, "below", "90 registers, budget 100..160"),
        ("norms_t128", "9.0", 40, 0, "within", "40 registers, budget 40; 0 B shared, budget 0"),
        ("norms_t128", "9.0", 40, 1024, "above", "40 registers, budget 40; 1024 B shared, budget 0"),
        ("norms_t128", "8.6", 40, 0, "none", "no budget for sm_86"),
        ("norms_t128", None, 40, 0, "none", "the file does not say which GPU"),
        ("norms_t128", "9.0", None, None, "none", "neither registers nor shared memory were recorded"),
        ("ampere_sgemm", "9.0", 40, 0, "none", "no kernel of ours"),
    ],
)
def test_verdicts(known, kernel, capability, registers, shared, status, text):
    assert known.compare(kernel, capability, registers, shared) == budgets.Verdict(status, text)


def test_the_checked_in_budgets_name_our_kernels():
    found = budgets.load()
    assert found.op("varlen_forward_kernel") == "varlen_attention"
    assert found.op("norms_forward_fp16_wfp16_ofp16_vec8_items4_lanes128_t128") == "norms"
    assert {entry.arch for entry in found.kernels["varlen_forward_kernel"]} >= {"sm_80", "sm_90", "sm_100"}


def test_budgets_that_are_not_there_or_not_ours(tmp_path):
    assert budgets.load(tmp_path / "nowhere").kernels == {}
    for content in ('{"format": 2, "kernels": {}}', "[]", '{"format": 1, "kernels": {"a | b": {"sm_90": {}}}}', "{"):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "triton.json").write_text(content)
        with pytest.raises(ProfileFileError, match="budget file"):
            budgets.load(folder)

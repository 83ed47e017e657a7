"""`vlmops profile --peaks` and `--flops`: a GPU's measured limits in the place of those Nsight Compute states."""

from __future__ import annotations

import json

import pytest

from tests.profiling.test_nsight_ncu import KERNEL
from tests.profiling.test_nsight_report import run, trace  # noqa: F401 - fixtures
from tests.support.nsight_files import ncu_csv
from vlmops.profiling.gpu_check import report as gpu_report
from vlmops.profiling.gpu_check.peak import Peaks as MeasuredPeaks
from vlmops.profiling.gpu_check.run import Check, Settings
from vlmops.profiling.nsight import ProfileFileError, peaks
from vlmops.profiling.nsight.ncu import Counters, Peaks, roofline

GPU = "NVIDIA H100 80GB HBM3"


def gpu_check(folder, gpu=GPU, found=None):
    """gpu-check.json by the code that writes it."""
    measured = MeasuredPeaks(2.9e12, {"bf16": 6.2e14, "fp32": 5e13}) if found is None else found
    check = Check({"gpu": gpu}, Settings(), None if measured == "none" else measured.as_dict())
    return gpu_report.write(check.as_dict(), folder)[0]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2900,620", Peaks(2.9e12, 6.2e14)),
        (" 2900.5 , 6.2e2 ", Peaks(2.9005e12, 6.2e14)),
        ("2900", Peaks(2.9e12, None)),
    ],
)
def test_numbers(text, want):
    found = peaks.given(text)
    assert (found.peaks.bandwidth, found.peaks.flops) == (
        pytest.approx(want.bandwidth),
        want.flops and pytest.approx(want.flops),
    )
    assert found.gpu is None and "GB/s" in found.text and ("TFLOP/s" in found.text) is (want.flops is not None)
    assert len(found.notes(["any"])) == 1


@pytest.mark.parametrize(
    "text", ["", "fast", "2900,", "0,620", "2900,-1", "1,2,3", "1e999", "1.2.3", "2900;620", "nan"]
)
def test_numbers_that_are_none(text):
    with pytest.raises(ValueError, match=r"GB/s and TFLOP/s"):
        peaks.given(text)


def test_a_gpu_check(tmp_path):
    found = peaks.given(str(gpu_check(tmp_path)))
    assert found.peaks == Peaks(2.9e12, 6.2e14) and found.gpu == GPU
    assert found.text == f"2900 GB/s, 620 TFLOP/s in bf16 (gpu-check.json, {GPU})"
    assert (
        found.notes([GPU]) == found.notes([]) == (f"shares of bandwidth are of the peak that was given: {found.text}",)
    )
    assert "the recording is of NVIDIA A100" in found.notes(["NVIDIA A100", "NVIDIA A100"])[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "no result of gpu-check"),
        ('{"peaks": null}', "no result of gpu-check"),
        ('{"machine": {}, "peaks": {"bandwidth": 1}}', "not those of gpu-check"),
        ('{"machine": {}, "peaks": {"bandwidth": 1, "flops": [2]}}', "not those of gpu-check"),
        ('{"machine": {}, "peaks": {"bandwidth": "x", "flops": {}}}', "not those of gpu-check"),
        ('{"machine": {}, "peaks": {"bandwidth": 0, "flops": {}}}', "not above 0"),
        ('{"machine": {}, "peaks": {"bandwidth": 1, "flops": {"bf16": NaN}}}', "not above 0"),
        ("[" * 100000, "no JSON"),
    ],
)
def test_files_that_are_no_gpu_check(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ProfileFileError, match=words):
        peaks.given(str(tmp_path / "x.json"))


def test_a_check_without_a_gpu_has_no_peak(tmp_path):
    with pytest.raises(ProfileFileError, match="ran without a GPU"):
        peaks.given(str(gpu_check(tmp_path, found="none")))


def test_flops_of_kernels():
    assert peaks.flops(["gemm_kernel=1.2e12", "a=b=3"]) == {"gemm_kernel": 1.2e12, "a=b": 3.0}
    for text in ("gemm_kernel", "=3", "k=", "k=-1", "k=inf", "k=nan"):
        with pytest.raises(ValueError, match="KERNEL=FLOPS"):
            peaks.flops([text])


def test_a_roof_without_a_compute_peak():
    found = Counters("k", "k", ns=1000.0, dram_rate=1e12, tensor=20.0)
    assert roofline(found, Peaks(2e12), flops=1e9).share == pytest.approx(0.5)
    assert roofline(found, Peaks(2e12, 1e12), flops=1e9).limit == "compute"


# -- the command -------------------------------------------------------------------------------------------------------


def rows(out):
    return {(row["kernel"], row["op"]): row for row in json.loads(out)["rows"]}


def test_shares_are_of_the_given_peak(run, trace, tmp_path):  # noqa: F811
    """The kernel moves 2000 GB/s, which ncu calls 61.5% of its own peak."""
    table = ncu_csv(tmp_path / "a.csv", [{**KERNEL, "name": "few_rows"}])
    words = ("--from", trace.path, "--from", table, "--json")
    code, out, _ = run(*words)
    assert code == 0 and rows(out)["few_rows", "mlp"]["roof"] == pytest.approx(0.615)
    code, out, _ = run(*words, "--peaks", "8000,1000")
    row = rows(out)["few_rows", "mlp"]
    assert code == 0 and (row["roof"], row["limit"]) == (pytest.approx(0.25), "memory")
    assert any("8000 GB/s, 1000 TFLOP/s" in note for note in json.loads(out)["notes"])
    code, out, _ = run(*words, "--peaks", "8000,1000", "--flops", "few_rows=1e12")  # in 2 ms: half of the peak
    row = rows(out)["few_rows", "mlp"]
    assert code == 0 and (row["roof"], row["limit"]) == (pytest.approx(0.5), "compute")
    code, out, _ = run("--from", table, "--json", "--peaks", "4000")  # without a trace
    assert code == 0 and rows(out)["few_rows", None]["roof"] == pytest.approx(0.5)


def test_the_peaks_of_a_gpu_check(run, trace, tmp_path):  # noqa: F811
    table = ncu_csv(tmp_path / "a.csv", [{**KERNEL, "name": "few_rows"}])
    code, out, _ = run("--from", trace.path, "--from", table, "--peaks", gpu_check(tmp_path / "check"))
    assert code == 0 and "69% of memory" in out and GPU in out  # 2000 of 2900 GB/s
    if trace.gpus:
        assert "the recording is of" in out


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--from", "x", "--peaks", "fast"), "--peaks"),
        (("--from", "x", "--peaks", "1", "--flops", "k"), "--flops"),
        (("--from", "x", "--flops", "k=1"), "--flops"),
        (("tiny", "--peaks", "1"), "--peaks"),
        (("tiny", "--flops", "k=1"), "--flops"),
    ],
)
def test_usage_errors(run, words, option):  # noqa: F811
    code, _, err = run(*words)
    assert code == 2 and option in err


def test_a_file_that_is_no_gpu_check_exits_with_2(run, trace, tmp_path):  # noqa: F811
    (tmp_path / "x.json").write_text("{}")
    code, _, err = run("--from", trace.path, "--peaks", tmp_path / "x.json")
    assert code == 2 and "no result of gpu-check" in err

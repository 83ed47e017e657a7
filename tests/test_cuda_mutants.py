"""scripts/cuda_mutants.py: what it finds to break, and that what it wrote down belongs to these sources."""

import json
import shutil

import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def tool():
    return load_script("cuda_mutants")


@pytest.mark.parametrize(("line", "changed"), [
    ("  __syncthreads();", ["  ;"]),
    ("  cp_async_wait_group<kStages - 2>();", ["  ;"]),
    ("  cp_async_commit();  // also here", ["  ;  // also here"]),
    ("  if (row < m) out[row] = x;", ["  if (row < 1073741824 + m) out[row] = x;"]),
    ("  if (row >= m) return;", ["  if (row >= 1073741824 + m) return;"]),
    ("  if (tile < 0) return;", ["  if (tile < -1073741824 + 0) return;"]),
    ("  begin = min_of(max_of(a - left, 0), keys);", ["  begin = (max_of(a - left, 0));", "  begin = min_of((a - left), keys);"]),
    ("  const bool valid = inside[i] && part < left;", ["  const bool valid = inside[i] && part < 1073741824 + left;"]),
    ("  for (int i = 0; i < n; ++i) {", []),
    ("  if constexpr (kLeft < 2) {", []),
    ("template <class T, int N>", []),
    ("  // if (a < b) nothing", []),
    ("  const auto x = static_cast<float>(y);", []),
])  # fmt: skip
def test_what_is_changed(tool, line, changed, tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text(line + "\n")
    found = [line[: m.begin] + m.text + line[m.end :] for m in tool.mutants(file, "kernel.cu")]
    assert found == changed


def test_keys_tell_equal_lines_apart_and_outlive_other_lines(tool, tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text("  __syncthreads();\n  __syncthreads();\n")
    first = [m.key for m in tool.mutants(file, "kernel.cu")]
    assert len(set(first)) == 2
    file.write_text("int x;\n  __syncthreads();\nint y;\n  __syncthreads();\n")
    assert [m.key for m in tool.mutants(file, "kernel.cu")] == first


def test_every_kernel_and_header_is_tested_by_something(tool):
    for mutant in tool.all_mutants():
        assert tool.tests_of(mutant.file), mutant.file


def test_the_outcomes_are_of_these_sources(tool):
    """What was tried is still there; each survivor is told to be equivalent and why; of the others >= 95% were caught.

    Of all mutants together fewer are: a guard that another one implies cannot be missed by any test (docs/cuda.md has the share).
    """
    stored = json.loads(tool.FILE.read_text())
    outcomes = stored["outcomes"]
    assert set(outcomes) <= {m.key for m in tool.all_mutants()}, "run scripts/cuda_mutants.py --missing"
    survivors = [key for key, outcome in outcomes.items() if outcome == "survived"]
    assert sorted(stored["reasons"]) == sorted(survivors)
    equivalent = [r for r in stored["reasons"].values() if r.startswith("equivalent: ") and len(r) > 40]
    assert len(survivors) - len(equivalent) <= 0.05 * (len(outcomes) - len(equivalent))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_mutants_are_caught_and_the_source_itself_is_not(tool):
    """Two of the smallest kernel file, really run: the tests pass without a change (else this raises) and fail with one."""
    chosen = [m for m in tool.all_mutants("merge_tokens.cu") if m.kind == "barrier"]
    found = tool.run_all(chosen, jobs=1)
    assert len(found) == 2
    for key, row in found.items():
        assert row["outcome"] == "caught" and "race" in row["said"], (key, row)

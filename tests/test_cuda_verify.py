"""scripts/cuda_verify.py: the static verifier agrees where the kernel is right, and does not where a barrier is gone."""

import json
import shutil

import pytest
import torch

from tests.support.scripts import load_script
from vlmops.backends import build, cuda_build
from vlmops.ops.norms import cuda as norms

pytest.importorskip("sentryward", reason="sentryward is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool():
    try:
        cuda_build.toolkit()
    except build.BuildError as err:
        pytest.skip(str(err))
    return load_script("cuda_verify")


def plan():
    return norms.sum_plan(torch.randn(3, 4), torch.empty(4))


def test_a_kernel_is_proved_free_of_races(tool):
    found = tool.verify(plan())
    assert found["result"] == "race_free", found


def test_a_missing_barrier_is_found(tool, tmp_path):
    shutil.copytree(build.csrc_dir(), tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "norms.cu"
    code, barrier = source.read_text(), "  __syncthreads();\n"
    at = code.rindex(barrier)  # of the column sums
    source.write_text(code[:at] + code[at + len(barrier) :])
    found = tool.verify(plan(), tmp_path / "csrc")
    assert found["result"] == "potential_race", found


def test_a_launch_is_described_with_null_pointers_and_unsigned_scalars(tool):
    launch = plan()
    launch = launch.__class__(
        **{**launch.__dict__, "args": (None, *launch.args[1:3], launch.args[3]._replace(value=-1))}
    )
    assert tool.configuration(launch)["arguments"] == [
        {"parameter": 0, "type": "pointer", "value": None},
        {"parameter": 2, "type": "u32", "value": 3},
        {"parameter": 3, "type": "u32", "value": 2**32 - 1},
    ]


def test_what_is_written_down_has_no_finding(tool):
    """Each kernel is proved or unverified with a reason."""
    rows = json.loads(tool.FILE.read_text())
    assert sum(row["result"] == "race_free" for row in rows.values()) >= 25
    for key, row in rows.items():
        assert row["result"] not in tool.FINDINGS, (key, row)
        assert row["result"] == "race_free" or row["why"], key

"""Names of ranges: written by the code that opens ranges, read by the code that reads profiles."""

from __future__ import annotations

import re

import pytest

from tests.support.nsight_files import message
from vlmops.backends import ranges
from vlmops.profiling.nsight import names
from vlmops.profiling.nsight.names import Range, base_name, parse


def test_what_is_opened_is_read():
    made = {
        message("stage", "prefill"): Range("stage", "prefill"),
        message("module", "visual.blocks.0 (Block)"): Range("module", "visual.blocks.0", "Block"),
        message("op", "mlp triton", "8x16 bf16, 5 int32"): Range("op", "mlp", "triton", "8x16 bf16, 5 int32"),
        "mlp_few_rows_bf16_t128": Range("kernel", "mlp_few_rows_bf16_t128"),
    }
    assert {text: parse(text, ranges.DOMAIN) for text in made} == made
    assert set(names.KINDS) | {"kernel"} == set(ranges.COLOURS)


@pytest.mark.parametrize("domain", ["", "NCCL"])
def test_ranges_of_others_are_not_ours(domain):
    assert parse("op: mlp triton", domain) is None and parse("ncclAllReduce", domain) is None


def test_without_a_named_domain_only_a_prefix_counts():
    assert parse("stage: decode", None) == Range("stage", "decode")
    assert parse("aten__mm", None) is None


@pytest.mark.parametrize("text", ["", "op: ", "op:mlp", "a range, of mine", "stage : x"])
def test_other_texts_of_our_domain(text):
    assert parse(text, ranges.DOMAIN) is None


def test_capture_names_the_domain_last():
    assert names.nsys_capture("stage", "prefill") == "stage: prefill@vlmops"
    with pytest.raises(ValueError, match="domain"):
        names.nsys_capture("stage", "a@b")


def test_include_matches_what_is_opened_and_nothing_longer():
    found = names.ncu_include("op", "mlp")
    assert found.startswith("regex:vlmops@") and found.endswith("/")
    pattern = re.compile(found.removeprefix("regex:vlmops@").removesuffix("/"))
    assert pattern.fullmatch(message("op", "mlp cuda", "8x16 bf16"))
    assert not pattern.fullmatch(message("op", "mlp2 cuda", "8x16 bf16"))
    module = re.compile(names.ncu_include("module", "visual.blocks.0").removeprefix("regex:vlmops@").removesuffix("/"))
    assert module.fullmatch(message("module", "visual.blocks.0 (Block)"))
    assert not module.fullmatch(message("module", "visual_blocks.0 (Block)"))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("mlp_few_rows_bf16_t128", "mlp_few_rows_bf16_t128"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::F<float>>(int, float*)", "vectorized_elementwise_kernel"),
        ("void (anonymous namespace)::softmax<(int)4>(float*)", "softmax"),
        ("ampere_sgemm_128x64_nn", "ampere_sgemm_128x64_nn"),
        ("(", "("),
    ],
)  # fmt: skip
def test_base_names(name, base):
    assert base_name(name) == base


def test_names_cannot_drive_a_terminal():
    assert "\x1b" not in names.clean("a\x1b[31mb\nc") and "\n" not in names.clean("a\nb")
    assert len(names.clean("x" * 5000)) == names.LONGEST

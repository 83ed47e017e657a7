"""What the documents say of the code: the table of ops and backends, and examples that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.tiny_models import build
from vlmops import ops
from vlmops.ops._shared.registry import OPS

REPO = Path(__file__).resolve().parents[1]
#: Public faces whose op has another name.
OP_OF = {"rms_norm": "norms", "layer_norm": "norms"}


def test_the_table_of_ops_names_every_op_and_its_backends():
    found = {}
    for line in (REPO / "docs" / "ops.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].startswith("`"):
            names = re.findall(r"`(\w+)`", cells[1])
            assert all(hasattr(ops, name) for name in names)
            op = OP_OF.get(names[0], names[0])
            assert op not in found, f"{op} has two rows"
            found[op] = cells[3].split(", ")
    assert found == {name: [b for b in op.backends if b != "reference"] for name, op in OPS.items()}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/ops.md", "docs/patching.md", "docs/images.md", "docs/models.md", "docs/profiling.md"]
)
def test_the_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (REPO / page).read_text(), re.S)
    assert blocks
    model, inputs = build("llava")
    for block in blocks:
        exec(compile(block, page, "exec"), {"model": model, "inputs": inputs})

"""What is compiled ahead of time for the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.merge_tokens import triton as kernels


def _run(dtype: torch.dtype, backward: bool) -> None:
    ids = torch.empty(4096, dtype=torch.int64, device="meta")
    embeds, features = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (4096, 1024))
    if backward:
        kernels.backward([embeds], [], [ids, embeds, features, 32000], [True, True])
    else:
        kernels.forward(ids, embeds, features, 32000)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    yield "forward bfloat16 4096", partial(_run, torch.bfloat16, False)
    yield "forward float32 4096", partial(_run, torch.float32, False)
    yield "backward bfloat16 4096", partial(_run, torch.bfloat16, True)

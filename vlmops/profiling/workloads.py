"""Ours and the peers as calls on random data, for the bars of single operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmops import ops
from vlmops.profiling.bars import (
    HEADS,
    AttentionCase,
    LinearCase,
    MlpCase,
    PatchifyCase,
    RotaryCase,
    cu_seqlens,
    random_tensor,
)
from vlmops.profiling.roofline import work_of
from vlmops.profiling.timing import Work, agrees

__all__ = ["OURS", "Workload", "attention", "linear", "mlp", "patchify", "rotary"]

OURS = "vlmops"
#: CLIP's normalisation, which Qwen2-VL uses too.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Workload:
    """Calls that compute the same thing (``OURS`` is ours), and the check that they do."""

    calls: dict[str, Callable[[], Any]]
    correct: Callable[[dict[str, Any]], Any]

    @cached_property
    def work(self) -> Work:
        """What one call has to compute and move, by the op's own cost function."""
        return work_of(self.calls[OURS])


def attention(case: AttentionCase, dtype: torch.dtype) -> Workload:
    """varlen_attention against one SDPA a sequence, on the packed layout a vision tower has."""
    tokens = sum(case.lengths)
    q, k, v = (random_tensor(tokens, HEADS, case.head_dim, dtype=dtype, seed=i) for i in range(3))
    borders = cu_seqlens(case.lengths)
    lengths = list(case.lengths)

    def per_sequence(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(*part) for part in parts
        ]  # [1, H, S, D] each, as transformers splits them
        return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)

    with torch.no_grad():
        oracle = (
            per_sequence(q.double(), k.double(), v.double())
            if tokens <= 2200
            else per_sequence(q.float(), k.float(), v.float())
        )
    longest = max(lengths)
    return Workload(
        {
            OURS: lambda: ops.varlen_attention(q, k, v, borders, max_seqlen_q=longest, max_seqlen_k=longest),
            case.peer: per_sequence,
        },
        agrees(OURS, case.peer, oracle),
    )


def patchify(case: PatchifyCase, dtype: torch.dtype) -> Workload:
    """patchify against the product on a view (what the embedding is) and Conv3d (what the stock model runs)."""
    size, t = case.patch_size, case.temporal_patch_size
    weight = random_tensor(case.channels, 3, t, size, size, dtype=dtype, seed=1, scale=case.width**-0.5)
    flat, grid = weight.view(case.channels, -1), case.grid
    mean, std = (torch.tensor(x).view(1, 3, 1) for x in (MEAN, STD))

    def conv(x: Tensor) -> Tensor:
        return F.conv3d(x.view(-1, 3, t, size, size), weight, stride=(t, size, size)).view(-1, case.channels)

    if case.source == "float":
        pixels = random_tensor(case.tokens, case.width, dtype=dtype, seed=2)
        calls: dict[str, Callable[[], Any]] = {
            OURS: lambda: ops.patchify(pixels, weight, patch_size=size, temporal_patch_size=t, grid_thw=grid),
            case.peer: lambda: F.linear(pixels.view(-1, case.width), flat),
            "Conv3d": lambda: conv(pixels),
        }
        oracle = F.linear(pixels.double(), flat.double())
        return Workload(calls, agrees(OURS, case.peer, oracle))

    raw = torch.randint(
        0, 256, (case.tokens, case.width), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )

    def normalised(x: Tensor, work: torch.dtype, out: torch.dtype) -> Tensor:
        scaled = (x.to(work) * (1 / 255)).view(-1, 3, case.width // 3)
        return ((scaled - mean.to(work)) / std.to(work)).view(-1, case.width).to(out)

    calls = {
        OURS: lambda: ops.patchify(
            raw, weight, patch_size=size, temporal_patch_size=t, grid_thw=grid, mean=MEAN, std=STD
        ),
        case.peer: lambda: F.linear(normalised(raw, torch.float32, dtype), flat),
        "rescale + normalise + Conv3d": lambda: conv(normalised(raw, torch.float32, dtype)),
    }
    oracle = F.linear(normalised(raw, torch.float64, torch.float64), flat.double())
    return Workload(calls, agrees(OURS, case.peer, oracle))


def mlp(case: MlpCase, dtype: torch.dtype) -> Workload:
    """mlp against nn.Linear, GELU, nn.Linear."""
    stock = nn.Sequential(nn.Linear(case.width, case.hidden), nn.GELU(), nn.Linear(case.hidden, case.out)).to(dtype)
    stock.requires_grad_(False)
    with torch.no_grad():
        for i, p in enumerate(stock.parameters()):
            p.copy_(random_tensor(*p.shape, dtype=torch.float32, seed=i, scale=p.shape[-1] ** -0.5))
    first, second = stock[0], stock[2]
    x = random_tensor(case.rows, case.width, dtype=dtype, seed=9)
    with torch.no_grad():
        hidden = F.gelu(F.linear(x.double(), first.weight.double(), first.bias.double()))
        oracle = F.linear(hidden, second.weight.double(), second.bias.double())
    calls = {
        OURS: lambda: ops.mlp(x, first.weight, first.bias, second.weight, second.bias, activation=case.activation),
        "nn.Linear, GELU, nn.Linear": lambda: stock(x),
    }
    return Workload(calls, agrees(OURS, "nn.Linear, GELU, nn.Linear", oracle))


def linear(case: LinearCase, dtype: torch.dtype) -> Workload:
    """linear against F.linear."""
    weight = random_tensor(case.out, case.width, dtype=dtype, seed=1, scale=case.width**-0.5)
    bias, x = random_tensor(case.out, dtype=dtype, seed=2), random_tensor(case.rows, case.width, dtype=dtype, seed=3)
    oracle = F.linear(x.double(), weight.double(), bias.double())
    calls = {OURS: lambda: ops.linear(x, weight, bias), "F.linear": lambda: F.linear(x, weight, bias)}
    return Workload(calls, agrees(OURS, "F.linear", oracle))


def rotary(case: RotaryCase, dtype: torch.dtype) -> Workload:
    """rotary against the expression transformers runs: float32, two halves swapped by a copy."""
    qk = random_tensor(
        case.tokens, 2 * HEADS, case.head_dim, dtype=dtype, seed=1
    )  # side by side, as one product makes them
    angles = random_tensor(case.tokens, case.head_dim // 2, dtype=torch.float32, seed=3).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def rotated(x: Tensor, work: torch.dtype) -> Tensor:
        wide, c, s = x.to(work), cos.to(work)[:, None], sin.to(work)[:, None]
        return wide * c + half(wide) * s

    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.rotary(qk, cos, sin),
        "expression": lambda: rotated(qk, torch.float32).to(dtype),
    }
    return Workload(calls, agrees(OURS, "expression", rotated(qk, torch.float64)))

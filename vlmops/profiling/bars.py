"""The performance bars: which shapes, against whom, how much. Shared by `vlmops bench` and benchmarks/."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmops.profiling.timing import Ratio, Timing, Work

__all__ = [
    "ATTENTION",
    "DTYPES",
    "HEADS",
    "LINEAR",
    "MEMORY_BAR",
    "MLP",
    "MODELS",
    "OPS",
    "OVERHEAD_BAR_US",
    "PATCHIFY",
    "PEAK_SHAPE",
    "PREPROCESS_BAR",
    "ROTARY",
    "STACK",
    "STACKS",
    "TOWERS",
    "AttentionCase",
    "LinearCase",
    "MlpCase",
    "PatchifyCase",
    "RotaryCase",
    "Row",
    "TowerBar",
    "cu_seqlens",
    "dtype_name",
    "random_tensor",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPS = ("varlen_attention", "patchify", "mlp", "overhead", "preprocess")
MODELS = ("qwen2_vl", "qwen2_5_vl", "clip_l_336", "pixtral")
STACKS = ("qwen2_vl", "llava")

#: The reference stack: least speed-up of a stage over transformers' model, as it is and patched.
STACK = {"vision": {"stock": 1.3, "patched": 1.0}, "prefill": {"stock": 1.05}, "decode": {"stock": 1.5}}
PREPROCESS_BAR = 2.0

#: (M, K, N) of the product whose rate is the machine's measured peak, G.
PEAK_SHAPE = (1024, 1024, 4096)
OVERHEAD_BAR_US = 15.0
MEMORY_BAR = 1.0  # (patched peak) / (stock peak + packed weights)
HEADS = 16


def dtype_name(dtype: torch.dtype) -> str:
    """ "bf16", "fp32", ..."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def random_tensor(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Seeded normal values: zeros would let a kernel or a processor skip work."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=rng) * scale).to(dtype)


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    """int32 [n + 1] borders of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class AttentionCase:
    """Packed bidirectional attention, 16 heads. ``share``: of G, by dtype; ``ratio``: over the peer, by dtype."""

    name: str
    lengths: tuple[int, ...]
    head_dim: int
    peer: str
    share: dict[str, float]
    ratio: dict[str, float]


_FULL_SHARE, _FULL_RATIO = {"bf16": 0.65, "fp32": 0.80}, {"bf16": 2.0}
_SDPA = "SDPA per sequence"
ATTENTION = (
    AttentionCase("577 d64 (CLIP-L-336)", (577,), 64, _SDPA, _FULL_SHARE, _FULL_RATIO),
    AttentionCase("729 d72 (SigLIP-so400m)", (729,), 72, _SDPA, _FULL_SHARE, _FULL_RATIO),
    AttentionCase("1024 d80 (Qwen2-VL)", (1024,), 80, _SDPA, _FULL_SHARE, _FULL_RATIO),
    AttentionCase("4096 d80 (Qwen2-VL)", (4096,), 80, _SDPA, _FULL_SHARE, _FULL_RATIO),
    AttentionCase("packed 100,300,700,33,1000 d80", (100, 300, 700, 33, 1000), 80, _SDPA, _FULL_SHARE, _FULL_RATIO),
    AttentionCase("64 windows of 64 d80", (64,) * 64, 80, "split loop", {"bf16": 0.45}, {"bf16": 3.0}),
)


@dataclass(frozen=True)
class PatchifyCase:
    """Qwen2-VL's flattened patches [tokens, 3 * 2 * 14 * 14] to 1280 channels."""

    name: str
    source: str  # "float" or "uint8"
    peer: str
    ratio: dict[str, float]
    tokens: int = 4096
    channels: int = 1280
    patch_size: int = 14
    temporal_patch_size: int = 2

    @property
    def width(self) -> int:
        """Values of one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def grid(self) -> Tensor:
        """grid_thw of one square image."""
        side = math.isqrt(self.tokens)
        return torch.tensor([[1, side, side]])


PATCHIFY = (
    PatchifyCase("4096 Qwen patches", "float", "view + F.linear", {"bf16": 1.1}),
    PatchifyCase("4096 Qwen patches, uint8", "uint8", "rescale + normalise + view + F.linear", {"bf16": 2.0}),
)


@dataclass(frozen=True)
class MlpCase:
    """linear -> activation -> linear."""

    name: str
    rows: int
    width: int
    hidden: int
    out: int
    activation: str
    ratio: dict[str, float]


MLP = (
    MlpCase(
        "576x1024 -> 4096 -> 4096 gelu (LLaVA projector)", 576, 1024, 4096, 4096, "gelu", {"fp32": 1.4, "bf16": 1.1}
    ),
)


@dataclass(frozen=True)
class LinearCase:
    """One projection; no bar of its own, shown by benchmarks/."""

    name: str
    rows: int
    width: int
    out: int


LINEAR = (
    LinearCase("577x1024 -> 1024 (CLIP-L out)", 577, 1024, 1024),
    LinearCase("1024x1280 -> 3840 (Qwen2-VL qkv)", 1024, 1280, 3840),
    LinearCase("16x1536 -> 8960 (Qwen2-VL-2B, 16 rows)", 16, 1536, 8960),
    LinearCase("1x1536 -> 8960 (Qwen2-VL-2B, decoding)", 1, 1536, 8960),
)


@dataclass(frozen=True)
class RotaryCase:
    """Rotary tables applied to q and k of a vision tower, 16 heads; no bar of its own."""

    name: str
    tokens: int
    head_dim: int


ROTARY = (RotaryCase("1024 d80 (Qwen2-VL)", 1024, 80), RotaryCase("4096 d64 (Pixtral)", 4096, 64))


@dataclass(frozen=True)
class TowerBar:
    """Bars of a whole vision tower.

    Args:
        budget: time over (packed GEMMs alone, measured + attention FLOPs at ``attention_share`` of G).
        floor: least speed-up over the stock module, by dtype.
    """

    name: str
    budget: float = 1.15
    floor: dict[str, float] = field(default_factory=dict)
    attention_share: dict[str, float] = field(default_factory=lambda: dict(_FULL_SHARE))
    window_share: dict[str, float] = field(default_factory=lambda: {"bf16": 0.45, "fp32": 0.80})


TOWERS = {
    "qwen2_vl": TowerBar("Qwen2-VL-2B vision tower", floor={"bf16": 1.35, "fp32": 1.35}),
    "qwen2_5_vl": TowerBar("Qwen2.5-VL-3B vision tower"),
    "clip_l_336": TowerBar("CLIP-L/14-336", floor={"fp32": 1.45, "bf16": 1.35}),
    "pixtral": TowerBar("Pixtral vision tower", floor={"fp32": 2.0, "bf16": 2.3}),
}


@dataclass
class Row:
    """One bar and what was measured.

    Args:
        group: operation or model.
        case: shape in words.
        dtype: "bf16", "fp32" or "" where it does not matter.
        metric: what the figure is.
        measured: the figure; None where it could not be measured (``note`` says why).
        bar: what it has to be; None: shown only.
        higher: True if larger is better.
        low, high: bootstrap interval of the figure, where there is one.
        numerator, denominator, scale: what the figure is made of, one value a round, mostly the seconds of ours and of the
            peer: measured = scale * median(numerator) / median(denominator).
        ms, spread: median time of our side in ms and its interquartile range over it.
        gflops, gbytes, share_of_peak: rates by the op's own cost function, and the first one's share of G.
        ratios: speed-up over each peer of the same run.
        backend: which of our backends ran.
        wrong: a wrong output: nothing was timed.
    """

    group: str
    case: str
    dtype: str
    metric: str
    measured: float | None
    bar: float | None
    higher: bool = True
    low: float | None = None
    high: float | None = None
    numerator: tuple[float, ...] = ()
    denominator: tuple[float, ...] = ()
    scale: float = 1.0
    ms: float | None = None
    spread: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    share_of_peak: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    backend: str = ""
    note: str = ""
    wrong: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is no bar. What could not be measured is not met."""
        if self.bar is None:
            return None
        if self.measured is None:
            return False
        return self.measured >= self.bar if self.higher else self.measured <= self.bar

    def add(self, ratio: Ratio, timing: Timing | None = None, work: Work | None = None) -> Row:
        """Fill in the figure from a ratio, and the time and rate from our timing; returns itself."""
        self.measured, self.low, self.high = ratio.value, ratio.low, ratio.high
        self.numerator, self.denominator, self.scale = ratio.numerator, ratio.denominator, ratio.scale
        if timing is not None:
            self.ms, self.spread = timing.median * 1e3, timing.spread
            if work is not None and work.flops:
                self.gflops = timing.gflops(work)
            if work is not None and work.bytes:
                self.gbytes = timing.gbytes(work)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with ``met``."""
        return {**asdict(self), "met": self.met}

"""Host side of the matrix product: operands in any layout, tiles by shape and GPU, tensor descriptors where they fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config, Target
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_gemm import few_rows_kernel, gemm_kernel
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two

__all__ = ["Epilogue", "Gathered", "Product", "flatten", "gather_rows", "gemm", "why_not_gemm"]

FEW = 4  # rows up to which the weight is streamed past sums instead of tensor cores


@dataclass
class Epilogue:
    """What happens to A B before it is written: residual + mask * tanh(gate) * scale * act(. + bias).

    With ``weight_gate`` [N, K] it is act(A Wg^T + bias_gate) * (A B + bias) instead of act(A B + bias).
    """

    bias: Tensor | None = None
    activation: str = ""
    weight_gate: Tensor | None = None
    bias_gate: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Gathered:
    """A matrix [M, 4 C] that lies in memory as rows of C.

    Args:
        source: [4 M, C] ("merge2x2": four consecutive rows make one), or [n, height * width, C] ("pixel_shuffle": each 2x2
            block does, row by row). Unit stride in a row.
    """

    source: Tensor
    kind: str
    height: int = 0
    width: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape[:-1].numel() // 4, 4 * self.source.shape[-1]

    @property
    def strides(self) -> tuple[int, int]:
        """Of a source row and of a picture."""
        return self.source.stride(-2), self.source.stride(0) if self.source.dim() == 3 else 0


def why_not_gemm(x: Tensor, *others: Tensor | None) -> str | None:
    """Why these kernels take no product of these tensors; None if they do."""
    for t in others:
        if t is not None and t.dtype != x.dtype:
            return f"{str(t.dtype)[6:]} beside {str(x.dtype)[6:]}"
    return triton_runtime.why_not(x)


def flatten(x: Tensor) -> Tensor:
    """[..., C] as [rows, C], also where there are no elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def gather_rows(x: Tensor, kind: str, height: int, width: int) -> Tensor | Gathered:
    """[M, K] of an mlp's x [..., C]: a view, or a description of where the rows lie. Never a copy of dense rows."""
    if kind == "":
        return flatten(x)
    if kind == "merge2x2" and x.is_contiguous():
        return x.view(x.shape[0] // 4, 4 * x.shape[1])
    return Gathered(dense_rows(x), kind, height, width)


def _layout(x: Tensor) -> tuple[Tensor, bool, int]:
    """A 2-D operand with one unit stride, whether it is transposed (columns are dense), and its other stride."""
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x, False, x.stride(0) if x.shape[0] > 1 else max(1, x.shape[1])
    if x.stride(0) == 1:
        return x, True, x.stride(1)
    x = x.contiguous()
    return x, False, x.stride(0)


@lru_cache(maxsize=1)
def _descriptor() -> Any:
    """Triton's tensor descriptor made on the host; None where this Triton has none."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor


def _descriptor_fits(x: Tensor) -> bool:
    """Base and rows aligned to 16 bytes and not overlapping, as tensor descriptors want."""
    start = x.storage_offset() * x.element_size() if x.device.type == "meta" else x.data_ptr()
    return (
        min(x.shape) > 0 and x.stride(1) == 1 and x.stride(0) >= x.shape[1] and start % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) * x.element_size() < 1 << 40
    )  # fmt: skip


class Product:
    """The operands of A B as the kernels take them.

    Args:
        a: [M, K] with any strides (a transposed view is read as it lies), or Gathered.
        b: [N, K], likewise; Gathered stands for its transpose.
        pair: a second product of the same shape: "gated" with ``b_more``, "sum" with ``a_more`` and ``b_more``.
    """

    def __init__(self, a: Tensor | Gathered, b: Tensor | Gathered, a_more: Tensor | None = None, b_more: Tensor | None = None,
                 pair: str = "") -> None:  # fmt: skip
        self.m, self.k = a.shape
        self.n = b.shape[1] if isinstance(b, Gathered) else b.shape[0]
        self.pair = pair
        picture = next((x for x in (a, b) if isinstance(x, Gathered)), None)
        image = 0 if picture is None else picture.strides[1]
        self.a, a_t, la = (a.source, False, a.strides[0]) if isinstance(a, Gathered) else _layout(a)
        self.b, flipped, lb = (b.source, True, b.strides[0]) if isinstance(b, Gathered) else _layout(b)
        self.a_more, self.b_more = self.a, self.b
        if b_more is not None:
            self.b_more, same, stride = _layout(b_more)
            if (same, stride) != (flipped, lb):
                (self.b, flipped, lb), (self.b_more, *_) = _layout(self.b.contiguous()), _layout(b_more.contiguous())
        if a_more is not None:
            self.a_more, same, stride = _layout(a_more)
            if (same, stride) != (a_t, la):
                (self.a, a_t, la), (self.a_more, *_) = _layout(self.a.contiguous()), _layout(a_more.contiguous())
        self.a_t, self.b_t = a_t, not flipped
        self.plain = picture is None and not a_t and not flipped
        k_unit, la_unit, lb_unit, i_unit = (math.gcd(16, x) for x in (self.k, la, lb, image))
        self.units = (k_unit, la_unit, lb_unit, i_unit)
        self.steps = (self.k // k_unit, la // la_unit, lb // lb_unit, image // i_unit)
        self.picture = (0, 0) if picture is None else (picture.height, picture.width)
        self.meta: dict[str, Any] = dict(
            CHANNELS=0 if picture is None else picture.source.shape[-1], GATHER_A=a.kind if isinstance(a, Gathered) else "",
            GATHER_B=b.kind if isinstance(b, Gathered) else "", A_T=a_t, B_T=self.b_t, PAIR=pair, K_UNIT=k_unit,
            LA_UNIT=la_unit, LB_UNIT=lb_unit, I_UNIT=i_unit,
        )  # fmt: skip
        memory = [self.a.t() if a_t else self.a, self.b if self.b_t else self.b.t()] if picture is None else []
        memory += [] if b_more is None else [self.b_more if self.b_t else self.b_more.t()]
        memory += [] if a_more is None else [self.a_more.t() if a_t else self.a_more]
        self.tma = (
            picture is None and self.a.element_size() == 2 and triton_runtime.capability(self.a) >= 90
            and _descriptor() is not None and all(map(_descriptor_fits, memory))
        )  # fmt: skip

    @property
    def key(self) -> str:
        """What the speed of its tiles depends on."""
        m = self.meta
        kinds = f"{m['GATHER_A']}/{m['GATHER_B']} {m['A_T']} {m['B_T']} {self.pair} {self.tma}"
        k = self.k.bit_length() if self.a_t else self.k
        return f"{self.a.dtype} {self.n} {k} {kinds} {self.m.bit_length()}"

    def tiles(self, config: Config) -> int:
        """Programs of a grid with one tile each."""
        return cdiv(self.m, config["BM"]) * cdiv(self.n, config["BN"])

    def operands(self, config: Config) -> list[Any]:
        """A, B, A_MORE, B_MORE of the kernels."""
        if not self.tma:
            return [self.a, self.b, self.a_more, self.b_more]
        bm, bn, bk = config["BM"], config["BN"], config["BK"]

        def describe(x: Tensor, rows: int, flipped: bool) -> Any:
            memory, block = (x.t(), [bk, rows]) if flipped else (x, [rows, bk])
            return _descriptor()(memory, list(memory.shape), list(memory.stride()), block)

        return [
            describe(x, rows, flipped)
            for x, y in ((self.a, self.b), (self.a_more, self.b_more))
            for x, rows, flipped in ((x, bm, self.a_t), (y, bn, not self.b_t))
        ]

    def constants(self, config: Config) -> dict[str, Any]:
        """The constexpr arguments about the operands."""
        return {**self.meta, "TMA": self.tma, "EVEN_K": self.k % config["BK"] == 0}

    def configs(self, extra: int = 0, persistent: bool = False) -> list[Config]:
        """Tiles, the default first.

        Args:
            extra: matrices besides the result that the epilogue reads or writes: registers for smaller tiles.
            persistent: whether a kernel can walk tiles itself.
        """
        where, wide = triton_runtime.target(self.a), self.a.element_size() == 4
        gated = self.pair == "gated"
        bk = max(16, min(32 if wide or where.backend == "hip" else 64, next_power_of_two(self.k)))
        tiles = _tiles(where, wide, gated, extra)
        # The first that gives every SM a tile; where none does, the one with the most tiles.
        tiles.sort(key=lambda t: -min(where.processors, cdiv(self.m, t[0]) * cdiv(self.n, t[1])))
        rows = max(16, next_power_of_two(self.m))
        found: list[Config] = []
        for bm, bn, warps, stages in tiles:
            bm, warps = min(bm, rows), warps if rows > 32 else min(warps, 4)
            size = stages * (bm + bn * (1 + gated)) * bk * self.a.element_size()
            config = Config.of(BM=bm, BN=bn, BK=bk, GROUP=8, warps=warps, stages=stages)
            if config not in found and size <= where.shared:
                found.append(config)
        if not persistent:
            return found
        both = [
            Config.of(PERSISTENT=p, warps=c.warps, stages=c.stages, **dict(c.meta))
            for p in (False, True)
            for c in found
        ]
        return both[: len(found) + 1]


def _tiles(where: Target, wide: bool, gated: bool, extra: int) -> list[tuple[int, int, int, int]]:
    """(BM, BN, warps, stages), the best for large shapes first."""
    if wide and (gated or where.backend == "hip"):
        return [(32, 32, 4, 2)] if gated else [(64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
    if wide:  # exact products run on the plain FMA units: as many sums a thread as fit
        return [(128, 64, 8, 2), (64, 64, 4, 2), (32, 32, 4, 2)]
    if where.backend == "hip":
        return [(128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
    if gated or extra:
        return [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 4)]
    return [(128, 128, 8, 3), (128, 256, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 5)]


def few_rows_configs(product: Product) -> list[Config]:
    """Blocks of the kernel for few rows: 16 sums a lane for each row, the default first."""
    rows = next_power_of_two(product.m)
    warps = 8 if rows == 4 and product.pair == "gated" else 4
    k = max(16, next_power_of_two(product.k))
    stages = 3 if triton_runtime.target(product.a).backend == "cuda" else 1
    blocks = [(4, 512), (8, 256), (2, 1024)]
    found = []
    for bn, bk in blocks:
        config = Config.of(BN=bn, BK=min(bk, k), STAGES=stages, warps=warps, stages=stages)
        if config not in found:
            found.append(config)
    return found


def gemm(
    a: Tensor | Gathered, b: Tensor | Gathered, epilogue: Epilogue | None = None, *,
    more: tuple[Tensor, Tensor] | None = None, out: Tensor | Gathered | None = None,
) -> Tensor:  # fmt: skip
    """epilogue(a b^T), [M, N] in a's dtype.

    Args:
        a, b: [M, K] and [N, K] as Product takes them.
        more: (a', b'): a b^T + a' b'^T before the epilogue.
        out: where to write, rows of unit stride; Gathered writes each row to the places such rows come from.
    """
    e = epilogue or Epilogue()
    a_more, b_more = more or (None, e.weight_gate)
    p = Product(a, b, a_more, b_more, "sum" if more is not None else "gated" if e.weight_gate is not None else "")
    if out is None:
        out = p.a.new_empty(p.m, p.n)
    scatter = out if isinstance(out, Gathered) else None
    target = out.source if isinstance(out, Gathered) else out
    if p.m == 0 or p.n == 0:
        return target
    residual = None if e.residual is None else dense_rows(e.residual)
    mask = None if e.row_mask is None else e.row_mask.contiguous().view(torch.uint8)
    bias, bias_gate, gate, scale = (t if t is None else t.contiguous() for t in (e.bias, e.bias_gate, e.gate, e.scale))
    tensors = [target if t is None else t for t in (bias, bias_gate, gate, mask, scale, residual)]
    strides = (0 if residual is None else residual.stride(0), target.stride(-2))
    meta: dict[str, Any] = dict(
        ACTIVATION=e.activation, HAS_BIAS=bias is not None, HAS_BIAS_G=bias_gate is not None,
        GATE_KIND="" if gate is None else "scalar" if gate.numel() == 1 else "vector", HAS_MASK=mask is not None,
        HAS_SCALE=scale is not None, HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
    key = f"{p.key} {e.activation}"
    if p.m <= FEW and p.plain and p.pair != "sum" and scatter is None:

        def run_few(config: Config) -> None:
            triton_runtime.launch(
                few_rows_kernel, (cdiv(p.n, config["BN"]),), p.a, p.b, p.b_more, *tensors, target, p.m, p.n, *p.steps[:3],
                *strides, ROWS=next_power_of_two(p.m), EVEN_K=p.k % config["BK"] == 0, PAIR=p.pair, K_UNIT=p.units[0],
                LA_UNIT=p.units[1], LB_UNIT=p.units[2], config=config, **meta,
            )  # fmt: skip

        run_few(triton_runtime.pick("few_rows", key, few_rows_configs(p), run_few, p.a.device))
        return target
    constants, steps, picture = {**meta, "SCATTER": ""}, p.steps, p.picture
    if scatter is not None:
        image = scatter.strides[1]
        constants |= dict(SCATTER=scatter.kind, CHANNELS=scatter.source.shape[-1], I_UNIT=math.gcd(16, image))
        steps = (*steps[:3], image // math.gcd(16, image))
        picture = (scatter.height, scatter.width)

    def run(config: Config) -> None:
        tiles = p.tiles(config)
        programs = min(tiles, triton_runtime.processors(p.a)) if config["PERSISTENT"] else tiles
        triton_runtime.launch(
            gemm_kernel, (programs,), *p.operands(config), *tensors, target, p.m, p.n, *steps, *picture, *strides,
            config=config, **{**p.constants(config), **constants},
        )  # fmt: skip

    run(triton_runtime.pick("gemm", key, p.configs(persistent=True), run, p.a.device))
    return target

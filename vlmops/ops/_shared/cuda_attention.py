"""What the CUDA forwards of the attentions share: the sizes of a block, and keys split between blocks.

Split keys (Flash-Decoding, Dao et al. 2023): where query tiles are too few to fill the GPU, each tile's keys are shared by
several blocks, whose float results a second kernel combines in a fixed order. The number of parts comes from shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, vector

__all__ = [
    "CHUNK",
    "LOG2E",
    "THREADS",
    "Shape",
    "aligned",
    "parts",
    "positive_scale",
    "score_scales",
    "sequence_slots",
    "shape",
    "split_plans",
    "tiles_are_few",
    "why_not",
    "window_bounds",
]

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
CHUNK = 8  # elements of a 16-byte access
COMBINED = 4  # elements of a thread of attention_combine
WARPS = 4
THREADS = 32 * WARPS
MAX_HEADS = 65535  # second size of a grid
LOG2E = math.log2(math.e)
LEAST_TILES = 4  # tiles of keys that are worth a block of their own
MOST_PARTS = 64
UNBOUNDED = 1 << 30  # of a window


@dataclass(frozen=True)
class Shape:
    """Sizes of a block's work.

    Args:
        atoms: times 16 query rows of a warp.
        keys: keys of a tile.
        stages: tiles of keys or values in flight or in use.
    """

    atoms: int
    keys: int
    stages: int

    @property
    def rows(self) -> int:
        """Query rows of a block."""
        return WARPS * 16 * self.atoms

    def shared(self, dim: int) -> int:
        """Bytes of shared memory."""
        return (self.rows + self.stages * self.keys) * dim * 2

    def defines(self, q: Tensor) -> tuple[tuple[str, int | str], ...]:
        """The specialisation for q [T, H, D]."""
        return (
            ("T", CTYPE[q.dtype]),
            ("D", q.shape[2]),
            ("ATOMS", self.atoms),
            ("BN", self.keys),
            ("STAGES", self.stages),
        )


def why_not(q: Tensor) -> str | None:
    """Why these kernels cannot run on q [T, H, D]; None if they can."""
    _, heads, dim = q.shape
    if dim % CHUNK or dim > MAX_HEAD_DIM:
        return f"head_dim {dim} (a multiple of {CHUNK}, at most {MAX_HEAD_DIM})"
    if heads > MAX_HEADS:
        return f"{heads} heads (at most {MAX_HEADS})"
    return cuda_runtime.why_not(q, DTYPES)


def shape(q: Tensor, sequences: int, longest: int) -> Shape:
    """The block for q [T, H, D]: 128 rows, or 64 where sequences are short or 128 would leave processors idle.

    Args:
        sequences: how many.
        longest: rows of the longest sequence, if known on the host, or <= 0.
    """
    dim = q.shape[2]
    if dim > 128:
        return Shape(atoms=1, keys=32, stages=2)
    atoms = 1 if tiles_are_few(q, sequences, longest) else 2
    found = Shape(atoms, 48 if atoms == 2 and dim > 96 else 64, 2)  # 64 keys beside such heads do not fit the registers
    if 2 * found.shared(dim) > cuda_runtime.shared_bytes(q):  # two blocks a processor
        found = Shape(found.atoms, 32, 2)
    return found


def tiles_are_few(q: Tensor, sequences: int, longest: int) -> bool:
    """Whether tiles of 128 rows of q [T, H, D] are too wide for its sequences or too few for the GPU (arguments: ``shape``)."""
    tokens, heads, _ = q.shape
    short = (0 < longest <= 64) or tokens // max(1, sequences) <= 96
    return short or -(-tokens // 128) * heads < cuda_runtime.processors(q)


def sequence_slots(tokens: int, sequences: int, longest: int, rows: int) -> tuple[int, int]:
    """The grid of packed sequences in tiles of ``rows``: (slots, slots of each sequence).

    As many for each as the longest has tiles, where that is known (> 0) and no more slots; else 0, and a sequence has as
    many as its own length asks for (csrc/cuda/tile/segments.cuh).
    """
    slots, each = tokens // rows + sequences, -(-longest // rows)
    return (sequences * each, each) if longest > 0 and sequences * each <= slots else (slots, 0)


def window_bounds(left: int, right: int) -> list[int]:
    """The kernels' ``left`` and ``right`` of a window, where -1 is unbounded."""
    return [UNBOUNDED if side < 0 else min(side, UNBOUNDED) for side in (left, right)]


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """The kernels' factor on q k^T and ``cap``, in units of log2."""
    return (2 * LOG2E * scale / softcap, softcap * LOG2E) if softcap > 0.0 else (scale * LOG2E, 0.0)


def aligned(x: Tensor) -> Tensor:
    """x with dense heads whose every row starts at 16 bytes."""
    return x if x.stride(-1) == 1 and vector([x]) % CHUNK == 0 else x.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products and a scale > 0: the kernels take a row's maximum before they scale."""
    if scale > 0.0:
        return q, scale
    return (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)


def parts(q: Tensor, blocks: int, keys: float, tile: int) -> int:
    """How many blocks share a query tile's keys: where processors are idle, as many as give each two, with some tiles of keys.

    Args:
        q: a tensor on the GPU.
        blocks: query tiles times heads.
        keys: a query tile's, about: lengths are on the device.
        tile: keys of a tile.
    """
    processors = cuda_runtime.processors(q)
    if blocks >= processors:
        return 1
    return max(1, min(2 * processors // max(1, blocks), int(keys) // (LEAST_TILES * tile), MOST_PARTS))


def split_plans(forward: Callable[[Tensor, Tensor], Plan], out: Tensor, lse: Tensor, count: int) -> list[Plan]:
    """The launches of a forward whose keys are split ``count`` times.

    Args:
        forward: its plan, given where it writes: [count, *out.shape] and [count, *lse.shape] in float32 if count > 1.
        out: [T, H, D], contiguous.
        lse: float32 [H, T].
        count: parts; 1: the forward alone.
    """
    if count == 1:
        return [forward(out, lse)]
    tokens, heads, dim = out.shape
    threads = tokens * heads * (dim // COMBINED)
    part_out = torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(count, *lse.shape, dtype=torch.float32, device=out.device)
    combine = Plan(
        "attention_combine.cu", "attention_combine", (("T", CTYPE[out.dtype]), ("D", dim)),
        (-(-threads // THREADS), 1, 1), THREADS,
        (part_out, part_lse, Out(out), Out(lse), i32(count), i32(tokens), i32(heads), i32(threads)),
    )  # fmt: skip
    return [forward(part_out, part_lse), combine]

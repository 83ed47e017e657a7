"""CUDA C++ for the sm_80 class (csrc/cuda/varlen_attention.cu): blocks find their tile on the device, keys stream through a ring.

Forward only: the gradient is the ``torch`` backend's. RoPE is one pass over q and k in front, as in the Triton backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, f32, i32, i64, vector
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops.rotary.cuda import rotate_heads

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
CHUNK = 8  # elements of a 16-byte access
WARPS = 4
UNBOUNDED = 1 << 30
MAX_HEADS = 65535  # second size of a grid
LOG2E = math.log2(math.e)


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


def supports(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run these arguments; None if it can."""
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
    tokens, heads, dim = q.shape
    if dim > 128:
        return Shape(atoms=1, keys=32, stages=2)
    short = (0 < longest <= 64) or tokens // max(1, sequences) <= 96
    idle = -(-tokens // 128) * heads < cuda_runtime.processors(q)
    atoms = 1 if short or idle else 2
    found = Shape(atoms, 48 if atoms == 2 and dim > 96 else 64, 2)  # 64 keys beside such heads do not fit the registers
    if 2 * found.shared(dim) > cuda_runtime.shared_bytes(q):  # two blocks a processor
        found = Shape(found.atoms, 32, 2)
    return found


def _aligned(x: Tensor) -> Tensor:
    """x with dense heads whose every row starts at 16 bytes."""
    return x if x.stride(-1) == 1 and vector([x]) % CHUNK == 0 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse float32 [Hq, Tq]."""
    (tq, heads, dim), tk = q.shape, k.shape[0]
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
    if cos_q is not None and sin_q is not None and cos_k is not None and sin_k is not None:
        if cos_q is cos_k and sin_q is sin_k:
            q, k = rotate_heads(q, k, cos_q, sin_q, interleaved, False)
        else:
            q = rotate_heads(q, None, cos_q, sin_q, interleaved, False)[0]
            k = rotate_heads(k, None, cos_k, sin_k, interleaved, False)[0]
    if scale <= 0.0 and softcap <= 0.0:  # the kernel takes a row's maximum before it scales
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    cuda_runtime.run([
        forward_plan(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, left, right, prefix_lens,
                     softcap)
    ])  # fmt: skip
    return out, lse


def forward_plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
) -> Plan:  # fmt: skip
    """The launch; scale > 0, or a softcap."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    (tokens, heads, dim), n = q.shape, cu_seqlens_q.shape[0] - 1
    block = shape(q, n, max_seqlen_q)
    # A sequence's share of the grid: as many slots as the longest has tiles, or as its own length asks for.
    slots, per_sequence = tokens // block.rows + n, 0
    if max_seqlen_q > 0 and n * -(-max_seqlen_q // block.rows) <= slots:
        per_sequence = -(-max_seqlen_q // block.rows)
        slots = n * per_sequence
    if prefix_lens is not None:
        prefix_lens = prefix_lens.to(torch.int32).contiguous()
    bounds = [UNBOUNDED if side < 0 else min(side, UNBOUNDED) for side in (left, 0 if causal else right)]
    scaled = (2 * LOG2E * scale / softcap, softcap * LOG2E) if softcap > 0.0 else (scale * LOG2E, 0.0)
    return Plan(
        "varlen_attention.cu", "varlen_attention_forward",
        (("T", CTYPE[q.dtype]), ("D", dim), ("ATOMS", block.atoms), ("BN", block.keys), ("STAGES", block.stages),
         ("SOFTCAP", softcap > 0.0)),
        (slots if tokens else 0, heads if n else 0, 1), 32 * WARPS,
        (q, k, v, Out(out), Out(lse), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), prefix_lens, i64(q.stride(0)),
         i64(q.stride(1)), i64(k.stride(0)), i64(k.stride(1)), i64(v.stride(0)), i64(v.stride(1)), i32(tokens), i32(k.shape[0]),
         i32(n), i32(heads // k.shape[1]), i32(per_sequence), i32(bounds[0]), i32(bounds[1]), f32(scaled[0]), f32(scaled[1])),
        block.shared(dim),
    )  # fmt: skip

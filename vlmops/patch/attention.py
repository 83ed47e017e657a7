"""Vision attention on packed tokens: no split loop over images, no dense block mask."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmops import ops
from vlmops.patch.base import KEY, PLAIN, Patched, Record, plain_call, plain_parts
from vlmops.patch.structure import implementation

__all__ = [
    "ATTENTION_NAME",
    "KINDS",
    "PatchedDenseAttention",
    "PatchedPackedAttention",
    "PatchedPixtralAttention",
    "register_interface",
]

#: transformers asks for packed sequences where the name has "flash" in it.
ATTENTION_NAME = "vlmops_flash"


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


class _Attention(Patched):
    """Projections and attention of packed or batched tokens; ``record.children`` names the projections."""

    op = "varlen_attention"

    def usable(self, record: Record, x: Any, kwargs: dict[str, Any]) -> bool:
        """Nobody asked for attention weights, a causal mask or dropout, and no child was touched."""
        first = self._modules[record.children[0]]
        if type(first) not in PLAIN or kwargs.get("output_attentions") or kwargs.get("is_causal"):
            return False
        if implementation(self) == "eager" or not plain_parts(self, record):
            return False
        return isinstance(x, Tensor) and x.dtype is first._parameters["weight"].dtype

    def project(self, x: Tensor, name: str) -> Tensor:
        own = self._modules[name]._parameters
        return ops.linear(x, own["weight"], own["bias"])

    def weight(self, record: Record) -> Tensor:
        return self._modules[record.children[0]]._parameters["weight"]


class PatchedPackedAttention(_Attention):
    """Qwen's towers: fused q/k/v projection, 2-D RoPE in the attention's own loads, all images in one call."""

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if not self.usable(record, x, kwargs) or x.dim() != 2 or not plain_call(x, self.weight(record)):
            return False
        tables = args[2] if len(args) > 2 else kwargs.get("position_embeddings")
        cu_seqlens = args[1] if len(args) > 1 else kwargs.get("cu_seqlens")
        return tables is not None and isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype is torch.int32

    def fused(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, max_seqlen: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        facts = self.__dict__[KEY].facts
        tokens, heads, size = hidden_states.shape[0], facts["heads"], facts["head_dim"]
        q, k, v = self.project(hidden_states, "qkv").view(tokens, 3, heads, size).unbind(1)
        cos, sin = position_embeddings
        longest = max_seqlen if isinstance(max_seqlen, int) else None  # a tensor would have to be read back
        out = ops.varlen_attention(
            q, k, v, cu_seqlens, rope=(cos.reshape(tokens, size), sin.reshape(tokens, size)), scale=facts["scale"],
            max_seqlen_q=longest, max_seqlen_k=longest,
        )  # fmt: skip
        return self.project(out.view(tokens, heads * size), "proj")


class PatchedDenseAttention(_Attention):
    """CLIP, SigLIP and their like: a batch of equal sequences without a mask."""

    declines = True

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if len(args) > 2 or not self.usable(record, x, kwargs) or x.dim() != 3:
            return False
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        return mask is None and plain_call(x, self.weight(record))

    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        batch, length, _ = hidden_states.shape
        record = self.__dict__[KEY]
        facts, names = record.facts, record.children
        tokens, heads, size = batch * length, facts["heads"], facts["head_dim"]
        x = hidden_states.reshape(tokens, -1)
        q, k, v = (self.project(x, name).view(tokens, heads, size) for name in names[:3])
        cu = equal_borders(batch, length, x.device)
        out = ops.varlen_attention(q, k, v, cu, scale=facts["scale"], max_seqlen_q=length, max_seqlen_k=length)
        return self.project(out.view(batch, length, heads * size), names[3]), None


class PatchedPixtralAttention(_Attention):
    """Pixtral: all images' patches in one sequence; their borders come as cu_seq_lens_q instead of a dense mask.

    Fused with a gradient, too: the original would build that mask.
    """

    compares = False

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if not self.usable(record, x, kwargs) or x.dim() != 3 or x.shape[0] != 1:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        tables = args[2] if len(args) > 2 else kwargs.get("position_embeddings")
        return kwargs.get("cu_seq_lens_q") is not None and tables is not None

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        record = self.__dict__[KEY]
        facts, names = record.facts, record.children
        x = hidden_states[0]
        tokens, heads, size = x.shape[0], facts["heads"], facts["head_dim"]
        q, k, v = (self.project(x, name).view(tokens, heads, size) for name in names[:3])
        cos, sin = position_embeddings
        longest = kwargs.get("max_length_q")
        out = ops.varlen_attention(
            q, k, v, kwargs["cu_seq_lens_q"], rope=(cos.reshape(tokens, size), sin.reshape(tokens, size)),
            scale=facts["scale"], max_seqlen_q=longest, max_seqlen_k=longest,
        )  # fmt: skip
        return self.project(out.view(tokens, heads * size), names[3])[None], None


def equal_borders(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens int32 [batch + 1] of equal sequences; the same tensor every time, but in a traced graph."""
    if torch.compiler.is_compiling():
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
    return _kept_borders(batch, length, device)


@lru_cache(maxsize=64)
def _kept_borders(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)


def interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What a tower under ``ATTENTION_NAME`` runs where a module's fused forward steps aside (LoRA, hooks, dropout).

    q, k, v [1, H, T, D], already rotated; sequences from ``cu_seq_lens_q``. Returns [1, T, H, D] and no weights.
    """
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
    if dropout > 0.0:
        borders = cu_seq_lens_q.tolist()
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), dropout_p=dropout, scale=scaling
            )[0].transpose(0, 1)
            for a, b in itertools.pairwise(borders)
        ]
        out = torch.cat(parts)
    else:
        out = ops.varlen_attention(q, k, v, cu_seq_lens_q, scale=scaling)
    return out.unflatten(0, (batch, length)), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of ``ATTENTION_NAME``: none, sequence borders say it all."""
    return None


def register_interface() -> None:
    """Add our name to transformers' attention and mask registries; names already there are not touched."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, no_mask)


KINDS: dict[str, type[Patched]] = {
    "packed_attention": PatchedPackedAttention, "dense_attention": PatchedDenseAttention,
    "pixtral_attention": PatchedPixtralAttention,
}  # fmt: skip

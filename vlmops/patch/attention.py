"""Vision attention on packed tokens: no split loop over images, no dense block mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops import ops
from vlmops.patch.base import KEY, Patched, is_plain, needs_grad, too_small
from vlmops.patch.classes import register_mixin

__all__ = [
    "ATTENTION_NAME",
    "PatchedDenseAttention",
    "PatchedPackedAttention",
    "PatchedPixtralAttention",
    "register_interface",
]

#: transformers asks for packed sequences where the name has "flash" in it.
ATTENTION_NAME = "vlmops_flash"


def plain_children(module: Any) -> bool:
    modules = module._modules
    return all(is_plain(modules[name]) for name in module.__dict__[KEY].children)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def usable(module: Any, x: Any) -> bool:
    """No gradient, autocast, active dropout, touched child or request for attention weights."""
    if not isinstance(x, Tensor) or torch.is_autocast_enabled(x.device.type) or not plain_children(module):
        return False
    first = module._modules[module.__dict__[KEY].children[0]]
    return x.dtype is first.weight.dtype and not too_small(x, first.out_features)


def inactive_dropout(module: Any) -> bool:
    return not module.training or module.__dict__[KEY].facts["dropout"](module) == 0.0


def qwen_dropout(module: Any) -> float:
    return float(module.attention_dropout)


def plain_dropout(module: Any) -> float:
    return float(module.dropout)


class PatchedPackedAttention(Patched):
    """Qwen2-VL and Qwen2.5-VL: fused q/k/v projection, 2-D RoPE in the attention's own loads, all images in one call."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if not usable(self, x) or not inactive_dropout(self) or kwargs.get("output_attentions"):
            return False
        positions = args[2] if len(args) > 2 else kwargs.get("position_embeddings")
        return positions is not None and not needs_grad(self, x)

    def fused(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Any = None,
        max_seqlen: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        tokens = hidden_states.shape[0]
        qkv = ops.linear(hidden_states, self.qkv.weight, self.qkv.bias).view(tokens, 3, self.num_heads, -1)
        cos, sin = position_embeddings
        out = ops.varlen_attention(
            qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, rope=(cos.reshape(tokens, -1), sin.reshape(tokens, -1)),
            scale=self.scaling, max_seqlen_q=max_seqlen if isinstance(max_seqlen, int) else None,
            max_seqlen_k=max_seqlen if isinstance(max_seqlen, int) else None,
        )  # fmt: skip
        return ops.linear(out.view(tokens, -1), self.proj.weight, self.proj.bias)


class PatchedDenseAttention(Patched):
    """CLIP, SigLIP and their like: a batch of equal sequences without a mask."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if not usable(self, x) or not inactive_dropout(self) or x.dim() != 3:
            return False
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None or kwargs.get("is_causal") or kwargs.get("output_attentions"):
            return False
        return not needs_grad(self, x)

    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        batch, length, _ = hidden_states.shape
        facts, modules = self.__dict__[KEY].facts, self._modules
        names = self.__dict__[KEY].children
        x = hidden_states.reshape(batch * length, -1)
        q, k, v = (
            ops.linear(x, modules[name].weight, modules[name].bias).view(batch * length, -1, facts["head_dim"])
            for name in names[:3]
        )
        cu = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=x.device)
        out = ops.varlen_attention(q, k, v, cu, scale=facts["scale"], max_seqlen_q=length, max_seqlen_k=length)
        last = modules[names[3]]
        return ops.linear(out.view(batch, length, -1), last.weight, last.bias), None


class PatchedPixtralAttention(Patched):
    """Pixtral: all images' patches in one sequence; their borders come as cu_seq_lens_q instead of a dense mask."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = first_tensor(args, kwargs)
        if not usable(self, x) or not inactive_dropout(self) or x.dim() != 3 or x.shape[0] != 1:
            return False
        positions = args[2] if len(args) > 2 else kwargs.get("position_embeddings")
        return kwargs.get("cu_seq_lens_q") is not None and positions is not None

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states[0]
        tokens = x.shape[0]
        q, k, v = (
            project(x, self._modules[name]).view(tokens, self.num_heads, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = position_embeddings
        longest = kwargs.get("max_length_q")
        out = ops.varlen_attention(
            q, k, v, kwargs["cu_seq_lens_q"], rope=(cos.reshape(tokens, -1), sin.reshape(tokens, -1)), scale=self.scaling,
            max_seqlen_q=longest, max_seqlen_k=longest,
        )  # fmt: skip
        return project(out.view(tokens, -1), self.o_proj)[None], None


def project(x: Tensor, layer: Any) -> Tensor:
    """A plain linear: packed where no gradient is wanted."""
    return ops.linear(x, layer.weight, layer.bias)


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
            for a, b in zip(borders, borders[1:], strict=False)
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


for kind, mixin in {
    "packed_attention": PatchedPackedAttention,
    "dense_attention": PatchedDenseAttention,
    "pixtral_attention": PatchedPixtralAttention,
}.items():
    register_mixin(kind, mixin)

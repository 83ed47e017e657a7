"""Linears, norms, MLPs and patch embeddings: leaf-like modules whose whole forward is one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmops import ops
from vlmops.ops.patchify import convolve
from vlmops.patch import base
from vlmops.patch.base import KEY, PLAIN, Patched, Record, plain_call, plain_parts, too_small

__all__ = ["KINDS", "PatchedConv", "PatchedLayerNorm", "PatchedLinear", "PatchedMLP", "PatchedMerger", "PatchedRMSNorm"]


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a call, whatever its name; None where there are more."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else next(iter(kwargs.values()))


class _Leaf(Patched):
    """One tensor in, one op, its own weight."""

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x, weight = only_tensor(args, kwargs), self._parameters["weight"]  # type: ignore[attr-defined]
        return plain_call(x, weight) and not too_small(x, weight.shape[0])


class _Norm(_Leaf):
    """A normalisation over the last dimension."""

    op = "norms"

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        x = only_tensor(args, kwargs)
        return plain_call(x, self._parameters["weight"]) and x.numel() >= base.SMALL_NORM  # type: ignore[attr-defined]


class PatchedLinear(_Leaf):
    """``nn.Linear`` with a packed weight."""

    op, declines = "linear", True

    def fused(self, input: Tensor) -> Tensor:
        own = self._parameters
        return ops.linear(input, own["weight"], own["bias"])


class PatchedLayerNorm(_Norm):
    """``nn.LayerNorm`` over the last dimension."""

    declines = True

    def fused(self, input: Tensor) -> Tensor:
        own = self._parameters
        return ops.layer_norm(input, own["weight"], own["bias"], eps=self.eps)


class PatchedRMSNorm(_Norm):
    """The RMSNorm of Llama, Mistral, Qwen and Pixtral: weight * round(x / rms)."""

    def fused(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return ops.rms_norm(only_tensor(args, kwargs), self._parameters["weight"], eps=self.__dict__[KEY].facts["eps"])


class _Compound(Patched):
    """One tensor in, one op, the weights of children: ``record.children`` names them."""

    op = "mlp"

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        first, x = self._modules[record.children[0]], only_tensor(args, kwargs)
        if type(first) not in PLAIN or not plain_call(x, first._parameters["weight"]):
            return False
        return not too_small(x, first._parameters["weight"].shape[0]) and plain_parts(self, record)


class PatchedMLP(_Compound):
    """linear -> activation -> linear, or its gated form (children: gate, up, down)."""

    declines = True

    def fused(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = only_tensor(args, kwargs)
        record = self.__dict__[KEY]
        modules = self._modules
        activation = record.facts["activation"]
        if len(record.children) == 2:
            first, second = (modules[name]._parameters for name in record.children)
            return ops.mlp(x, first["weight"], first["bias"], second["weight"], second["bias"], activation=activation)
        gate, up, down = (modules[name]._parameters for name in record.children)
        return ops.mlp(
            x, up["weight"], up["bias"], down["weight"], down["bias"], activation=activation, w_gate=gate["weight"],
            b_gate=gate["bias"],
        )  # fmt: skip


class PatchedMerger(_Compound):
    """The 2x2 mergers of Qwen: norm, four rows into one, MLP (its linears may sit in an ``nn.Sequential``)."""

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        inner = self._modules.get("mlp", self)
        inner_record: Record = record.facts["inner"]
        x = only_tensor(args, kwargs)
        first = inner._modules[inner_record.children[0]]
        if type(first) not in PLAIN or not plain_call(x, first._parameters["weight"]) or x.dim() != 2:
            return False
        return not too_small(x, first.out_features) and plain_parts(self, record) and plain_parts(inner, inner_record)

    def fused(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = only_tensor(args, kwargs)
        facts = self.__dict__[KEY].facts
        inner = self._modules.get("mlp", self)
        first, second = (inner._modules[name]._parameters for name in facts["inner"].children)
        norm = self._modules[facts["norm_name"]]._parameters
        if facts["gather"] is None:  # the norm comes after the merge
            x = x.reshape(-1, first["weight"].shape[1])
        return ops.mlp(
            x, first["weight"], first["bias"], second["weight"], second["bias"], activation=facts["activation"],
            norm=(facts["norm"], norm["weight"], norm.get("bias"), facts["eps"]), gather=facts["gather"],
        )  # fmt: skip


class PatchedConv(_Leaf):
    """A patch embedding: a convolution whose kernel is its stride is one matrix product."""

    op = "patchify"

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not super().ready(record, args, kwargs):
            return False
        x = only_tensor(args, kwargs)
        weight = self._parameters["weight"]
        return x.dim() == weight.dim() and all(
            size % k == 0 for size, k in zip(x.shape[2:], weight.shape[2:], strict=True)
        )

    def fused(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        tokens = convolve(input, weight, bias)
        grid = [size // k for size, k in zip(input.shape[2:], weight.shape[2:], strict=True)]
        out = tokens.view(input.shape[0], *grid, -1).movedim(-1, 1)
        # Most towers flatten and transpose next, which makes a copy here useless; one that calls .view() needs it.
        return out.contiguous() if self.__dict__[KEY].facts["contiguous"] else out


class SkippedLayer(Patched):
    """A layer whose output nobody reads (``skip_unused_layers``): hands its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


KINDS: dict[str, type[Patched]] = {
    "linear": PatchedLinear, "layer_norm": PatchedLayerNorm, "rms_norm": PatchedRMSNorm, "mlp": PatchedMLP,
    "merger": PatchedMerger, "patchify": PatchedConv, "skip": SkippedLayer,
}  # fmt: skip

"""Linears, norms, MLPs and patch embeddings: leaf-like modules whose whole forward is one op."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlmops import ops
from vlmops.ops.patchify import convolve
from vlmops.patch.base import KEY, PLAIN, Patched, Record, plain_call, plain_parts

__all__ = ["KINDS", "PatchedConv", "PatchedLayerNorm", "PatchedLinear", "PatchedMLP", "PatchedMerger", "PatchedRMSNorm"]


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a call, whatever its name; None where there are more."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else next(iter(kwargs.values()))


class _Leaf(Patched):
    """One tensor in, one op, its own weight."""

    def ready(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return plain_call(only_tensor(args, kwargs), self._parameters.get("weight"))  # type: ignore[attr-defined]


class _Norm(_Leaf):
    """A normalisation over the last dimension."""

    op = "norms"


class PatchedLinear(_Leaf):
    """``nn.Linear`` with a packed weight."""

    op, declines = "linear", True

    def forward(self, input: Tensor) -> Tensor:
        # Few rows: what nn.Linear does, without its two slow attribute lookups.
        own = self._parameters
        if type(input) is Tensor and input.numel() < self.__dict__[KEY].least and own.get("weight") is not None:
            return F.linear(input, own["weight"], own["bias"])
        return super().forward(input)

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
        return type(first) in PLAIN and plain_call(x, first._parameters["weight"]) and plain_parts(self, record)


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
        return plain_parts(self, record) and plain_parts(inner, inner_record)

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
        shape, kernel = only_tensor(args, kwargs).shape, self._parameters["weight"].shape
        if len(shape) != len(kernel):
            return False
        for i in range(2, len(kernel)):  # noqa: SIM110 - before every call, and all() with a generator costs 1 us
            if shape[i] % kernel[i]:
                return False
        return True

    def fused(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        tokens = convolve(input, weight, bias)
        shape, kernel = input.shape, weight.shape
        grid = [shape[i] // kernel[i] for i in range(2, len(kernel))]
        out = tokens.view(shape[0], *grid, kernel[0]).movedim(-1, 1)
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

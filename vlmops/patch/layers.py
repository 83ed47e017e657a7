"""Linears, norms, MLPs and patch embeddings: leaf-like modules whose whole forward is one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops import ops
from vlmops.patch import base
from vlmops.patch.base import KEY, Patched, is_plain, needs_grad, plain_norm, too_small
from vlmops.patch.classes import register_mixin

__all__ = ["PatchedConv", "PatchedLayerNorm", "PatchedLinear", "PatchedMLP", "PatchedMerger", "PatchedRMSNorm"]


def runs_fused(module: Any, x: Any) -> bool:
    """A call that can be fused: a tensor of the weights' dtype, no autocast, no gradient wanted."""
    if not isinstance(x, Tensor) or x.dtype is not module.__dict__[KEY].facts["dtype"](module):
        return False
    return not torch.is_autocast_enabled(x.device.type) and not needs_grad(module, x)


def weight_dtype(module: Any) -> torch.dtype:
    """dtype of a module's own weight."""
    return module.weight.dtype


class PatchedLinear(Patched):
    """``nn.Linear`` with a packed weight."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return len(args) == 1 and not kwargs and runs_fused(self, args[0]) and not too_small(args[0], self.out_features)

    def fused(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class PatchedLayerNorm(Patched):
    """``nn.LayerNorm`` over the last dimension."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return len(args) == 1 and not kwargs and runs_fused(self, args[0]) and args[0].numel() >= base.SMALL_NORM

    def fused(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class PatchedRMSNorm(Patched):
    """The RMSNorm of Llama, Mistral, Qwen and Pixtral: weight * round(x / rms)."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return len(args) == 1 and not kwargs and runs_fused(self, args[0]) and args[0].numel() >= base.SMALL_NORM

    def fused(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.__dict__[KEY].facts["eps"])


class PatchedMLP(Patched):
    """linear -> activation -> linear, or its gated form, by the names in the record."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != 1 or kwargs or not runs_fused(self, args[0]):
            return False
        modules, names = self._modules, self.__dict__[KEY].children
        if too_small(args[0], modules[names[0]].out_features):
            return False
        return all(is_plain(modules[name]) for name in names)

    def fused(self, x: Tensor) -> Tensor:
        record = self.__dict__[KEY]
        modules = self._modules
        activation = record.facts["activation"]
        if len(record.children) == 2:
            first, second = (modules[name] for name in record.children)
            return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, activation=activation)
        gate, up, down = (modules[name] for name in record.children)
        return ops.mlp(
            x, up.weight, up.bias, down.weight, down.bias, activation=activation, w_gate=gate.weight, b_gate=gate.bias
        )


class PatchedMerger(Patched):
    """Qwen2-VL's merger: norm, four rows into one, MLP."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != 1 or kwargs or not runs_fused(self, args[0]) or args[0].dim() != 2:
            return False
        return is_plain(self.mlp[0]) and is_plain(self.mlp[2]) and plain_norm(self.ln_q) and plain_norm(self.mlp)

    def fused(self, x: Tensor) -> Tensor:
        first, second = self.mlp[0], self.mlp[2]
        facts = self.__dict__[KEY].facts
        norm = (facts["norm"], self.ln_q.weight, getattr(self.ln_q, "bias", None), facts["eps"])
        return ops.mlp(
            x,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            activation=facts["activation"],
            norm=norm,
            gather="merge2x2",
        )


class PatchedConv(Patched):
    """A patch embedding: a convolution whose kernel is its stride is one matrix product."""

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != 1 or kwargs or not runs_fused(self, args[0]):
            return False
        x = args[0]
        if too_small(x, self.out_channels):
            return False
        return x.dim() == self.weight.dim() and all(
            size % k == 0 for size, k in zip(x.shape[2:], self.kernel_size, strict=True)
        )

    def fused(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dim() == 5:
            n, _, t, h, w = x.shape
            grid = (t // weight.shape[2], h // weight.shape[3], w // weight.shape[4])
            if grid == (1, 1, 1):  # Qwen: every row is one patch already
                tokens, _ = ops.patchify(
                    x.reshape(n, -1), weight, self.bias, patch_size=weight.shape[3], temporal_patch_size=weight.shape[2],
                    grid_thw=torch.tensor([[1, 1, n]]),
                )  # fmt: skip
                return tokens.view(n, weight.shape[0], 1, 1, 1)
            tokens, _ = ops.patchify(
                x.transpose(1, 2), weight, self.bias, patch_size=weight.shape[3], temporal_patch_size=weight.shape[2]
            )
            return tokens.view(n, *grid, -1).permute(0, 4, 1, 2, 3)
        n, _, h, w = x.shape
        tokens, _ = ops.patchify(x, weight, self.bias, patch_size=weight.shape[2])
        return tokens.view(n, h // weight.shape[2], w // weight.shape[3], -1).permute(0, 3, 1, 2)


class SkippedLayer(Patched):
    """A layer whose output nobody reads (``skip_unused_layers``): hands its input on."""

    def fused(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


for kind, mixin in {
    "linear": PatchedLinear, "layer_norm": PatchedLayerNorm, "rms_norm": PatchedRMSNorm, "mlp": PatchedMLP,
    "merger": PatchedMerger, "patchify": PatchedConv, "skip": SkippedLayer,
}.items():  # fmt: skip
    register_mixin(kind, mixin)

"""Which modules can be replaced, by structure first: what it has and what it computes, not only what it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.ops._shared.activations import ACTIVATIONS, activate
from vlmops.patch import attention, layers
from vlmops.patch.base import KEY, Record, is_plain
from vlmops.patch.classes import original_class

__all__ = ["Candidate", "activation_name", "find"]

#: Attribute names of the MLPs of transformers: two layers (first, activation, second), gated (gate, up, down, activation).
TWO_LAYER = (("fc1", "activation_fn", "fc2"), ("fc1", "act", "fc2"), ("linear_1", "act", "linear_2"))
GATED = (("gate_proj", "up_proj", "down_proj", "act_fn"),)
#: Vision attentions without a mask, by class name: q/k/v/out projections, scale, dropout attribute.
DENSE_ATTENTION = {
    "CLIPAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "SiglipAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
PACKED_ATTENTION = ("VisionAttention", "Qwen2_5_VLVisionAttention")
MERGERS = ("PatchMerger", "Qwen2_5_VLPatchMerger")
KIND_TO_OP = {
    "linear": "linear", "layer_norm": "norms", "rms_norm": "norms", "mlp": "mlp", "merger": "mlp", "patchify": "patchify",
    "packed_attention": "varlen_attention", "dense_attention": "varlen_attention", "pixtral_attention": "varlen_attention",
    "skip": "skip_unused_layers",
}  # fmt: skip


@dataclass
class Candidate:
    """A module worth replacing: how, or why not."""

    path: str
    module: nn.Module
    kind: str
    record: Record
    why_not: str = ""
    covered: tuple[str, ...] = field(default_factory=tuple)

    @property
    def operation(self) -> str:
        """The op it would run."""
        return KIND_TO_OP[self.kind]


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The op's name for an activation, found by what it computes; None for one the ops do not have."""
    x = torch.linspace(-6.0, 6.0, 97)
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # any callable may stand here
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name in ACTIVATIONS:
        # 2e-5 tells gelu from its tanh form (they differ by 5e-4) and forgives float32 rounding.
        if torch.allclose(y, activate(x, name), atol=2e-5, rtol=0):
            return name
    return None


def touched(module: nn.Module) -> str:
    """Why a module must be left alone whatever it is; empty if it may be replaced."""
    state = module.__dict__
    if "_hf_hook" in state or "_old_forward" in state:
        return "an accelerate hook moves its weights"
    if "forward" in state:
        return "its forward was replaced on the instance"
    if type(module).__name__.startswith("Fused"):
        return "transformers has fused it already"
    if "parametrizations" in module._modules:
        return "a parametrization computes its weight"
    for p in module.parameters(recurse=True):
        if p.is_meta:
            return "its parameters are on the meta device"
        if p.device.type not in ("cpu", "cuda"):
            return f"its parameters are on {p.device}"
    return ""


def odd_child(module: nn.Module, names: tuple[str, ...]) -> str:
    """Why the children of a fused module are not plain linears; empty if they are."""
    for name in names:
        child = module._modules.get(name)
        reason = touched(child) if child is not None else "missing"
        if reason:
            return f"{name}: {reason}"
        if not is_plain(child):
            kind = f"{type(child).__module__.split('.')[0]}.{type(child).__name__}"
            return f"{name} is a {kind}" if type(child) is not nn.Linear else f"{name} has hooks"
    return ""


def _norm(module: nn.Module) -> tuple[str, Record] | None:
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "layer_norm", Record("norms", facts={"dtype": layers.weight_dtype})
    eps = getattr(module, "variance_epsilon", None)
    weight = module._parameters.get("weight")
    only = len(module._parameters) == 1 and not module._modules and not module._buffers
    if (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(eps, float)
        and only
        and weight is not None
        and weight.dim() == 1
    ):
        return "rms_norm", Record("norms", facts={"dtype": layers.weight_dtype, "eps": eps})
    return None


def child_dtype(module: Any) -> torch.dtype:
    """dtype of the first linear of a fused module."""
    return module._modules[module.__dict__[KEY].children[0]].weight.dtype


def merger_dtype(module: Any) -> torch.dtype:
    """dtype of a merger's first linear."""
    return module.mlp[0].weight.dtype


def _mlp(module: nn.Module) -> Candidate | None:
    have = module._modules
    for names in (*TWO_LAYER, *GATED):
        gated = len(names) == 4
        act_name = names[3] if gated else names[1]
        linears = names[:3] if gated else (names[0], names[2])
        act = getattr(module, act_name, None)
        extra = set(have) - set(names)
        if act is None or not callable(act) or not set(linears) <= set(have) or extra or module._parameters:
            continue
        name = activation_name(act)
        record = Record("mlp", children=tuple(linears), facts={"dtype": child_dtype, "activation": name})
        why = odd_child(module, tuple(linears))
        if not why and name is None:
            why = f"activation {type(act).__name__} is not one of {', '.join(ACTIVATIONS)}"
        return Candidate("", module, "mlp", record, why, tuple(linears))
    return None


def _merger(module: nn.Module) -> Candidate | None:
    if type(module).__name__ not in MERGERS or not isinstance(getattr(module, "mlp", None), nn.Sequential):
        return None
    mlp, norm = module.mlp, module.ln_q
    kind = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
    eps = norm.eps if kind == "layer_norm" else norm.variance_epsilon
    name = activation_name(mlp[1]) if len(mlp) == 3 else None
    facts = {"dtype": merger_dtype, "activation": name, "norm": kind, "eps": float(eps)}
    why = odd_child(mlp, ("0", "2")) or touched(norm)
    if not why and name is None:
        why = "an activation the ops do not have"
    if not why and mlp[0].in_features != 4 * norm.weight.shape[0]:
        why = "merges other than 2x2 patches"
    return Candidate("", module, "merger", Record("mlp", facts=facts), why, ("mlp", "mlp.0", "mlp.2", "ln_q"))


def _attention(module: nn.Module) -> Candidate | None:
    name = type(module).__name__
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if name in DENSE_ATTENTION:
        children: tuple[str, ...] = DENSE_ATTENTION[name]
        facts = {"dropout": attention.plain_dropout, "head_dim": module.head_dim, "scale": float(module.scale)}
        kind = "dense_attention"
    elif name in PACKED_ATTENTION:
        children, kind = ("qkv", "proj"), "packed_attention"
        facts = {"dropout": attention.qwen_dropout}
    elif name == "PixtralAttention":
        children, kind = ("q_proj", "k_proj", "v_proj", "o_proj"), "pixtral_attention"
        facts = {"dropout": attention.plain_dropout}
    else:
        return None
    record = Record("varlen_attention", children=tuple(children), facts=facts)
    why = odd_child(module, tuple(children))
    if not why and implementation == "eager":
        why = "attn_implementation is eager, which returns attention weights"
    return Candidate("", module, kind, record, why, tuple(children))


def _leaf(module: nn.Module) -> Candidate | None:
    if type(module) is nn.Linear:
        why = "" if is_plain(module) or touched(module) else "it has hooks"
        return Candidate("", module, "linear", Record("linear", facts={"dtype": layers.weight_dtype}), why)
    if isinstance(module, nn.Linear) and original_class(module) is None:
        record = Record("linear", facts={"dtype": layers.weight_dtype})
        return Candidate("", module, "linear", record, f"a subclass of nn.Linear: {type(module).__name__}")
    if type(module) in (nn.Conv2d, nn.Conv3d):
        patches = module.kernel_size == module.stride and module.groups == 1 and set(module.dilation) == {1}
        square = len(set(module.kernel_size[-2:])) == 1 and module.kernel_size[-1] > 1
        if patches and square and module.padding in ((0,) * len(module.kernel_size), "valid"):
            return Candidate("", module, "patchify", Record("patchify", facts={"dtype": layers.weight_dtype}))
        return None
    norm = _norm(module)
    return None if norm is None else Candidate("", module, norm[0], norm[1])


def find(model: nn.Module) -> Iterator[Candidate]:
    """Every module that could be replaced, in order; modules inside a fused one are not listed again."""
    covered: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if original_class(module) is not None:  # patched before
            covered.update(prefix + name for name in module.__dict__[KEY].covered)
        if path in covered or original_class(module) is not None:
            continue
        found = _attention(module) or _merger(module) or _mlp(module) or _leaf(module)
        if found is None:
            continue
        found.path = path
        found.why_not = touched(module) or found.why_not
        if not found.why_not:
            found.record.covered = found.covered
            covered.update(prefix + name for name in found.covered)
        yield found

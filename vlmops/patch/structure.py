"""What a module is, from its children and signature: MLP, merger, vision attention. ``probe`` then tries it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.ops._shared.activations import ACTIVATIONS, activate
from vlmops.patch.base import PLAIN, Record, is_plain

__all__ = ["Candidate", "activation_name", "attention", "merger", "mlp", "odd_child", "touched"]

#: Arguments a vision attention may have for its replacement to know what each means.
DENSE_ARGUMENTS = {"hidden_states", "attention_mask", "output_attentions"}
PACKED_ARGUMENTS = {"hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen", "rotary_pos_emb"}


@dataclass
class Candidate:
    """A module worth replacing: how, or why not."""

    path: str
    module: nn.Module
    kind: str
    record: Record
    why_not: str = ""
    orders: list[tuple[str, ...]] = field(default_factory=list)  # of record.children, where sizes alone do not tell


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
        if type(p) is not nn.Parameter:
            return f"its weight is a {type(p).__name__}"
        if not p.is_floating_point():
            return f"its weight is {str(p.dtype)[6:]}"
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
            return f"{name} is a {kind}" if type(child) not in PLAIN else f"{name} has hooks"
    return ""


def dropouts(module: nn.Module) -> tuple[str, ...]:
    """Names of what may drop values in training: dropout children, and numbers called so."""
    children = tuple(name for name, child in module._modules.items() if isinstance(child, nn.Dropout))
    rates = tuple(
        name for name, v in module.__dict__.items() if "dropout" in name and isinstance(v, float) and name[0] != "_"
    )
    return children + rates


def _is_activation(child: nn.Module | None) -> bool:
    return child is not None and not any(True for _ in child.parameters()) and not isinstance(child, nn.Dropout)


def _mlp_parts(module: nn.Module, extra: tuple[str, ...] = ()) -> tuple[list[str], list[str], Any] | None:
    """(linears, activation children, activation) of a module with 2 or 3 linears, one activation, nothing else."""
    linears, activations = [], []
    for name, child in module._modules.items():
        if isinstance(child, nn.Linear):
            linears.append(name)
        elif name in extra or isinstance(child, (nn.Dropout, nn.Identity)):
            continue
        elif _is_activation(child) and not child._modules:  # type: ignore[union-attr]
            activations.append(name)
        else:
            return None
    if module._parameters or len(linears) not in (2, 3) or len(activations) > 1:
        return None
    if activations:
        return linears, activations, module._modules[activations[0]]
    functions = [f for n, f in module.__dict__.items() if "act" in n and callable(f)]
    return (linears, activations, functions[0]) if len(functions) == 1 else None


def _sizes(module: nn.Module, name: str) -> tuple[int, int]:
    layer: Any = module._modules[name]
    return layer.in_features, layer.out_features


def _orders(module: nn.Module, names: list[str]) -> list[tuple[str, ...]]:
    """The linears in the orders whose sizes fit, (first, second) or (gate, up, down), likely ones first."""
    found: list[tuple[str, ...]] = []
    for order in permutations(names):
        sizes = [_sizes(module, name) for name in order]
        if sizes[-2][1] == sizes[-1][0] and (len(sizes) == 2 or sizes[0] == sizes[1]):
            found.append(order)
    return found


def _finish(found: Candidate, activation: Any, children: tuple[str, ...], owner: nn.Module) -> Candidate:
    name = activation_name(activation)
    found.record.facts["activation"] = name
    found.why_not = odd_child(owner, children)
    if not found.why_not and name is None:
        kind = getattr(activation, "__name__", type(activation).__name__)
        found.why_not = f"activation {kind} is not one of {', '.join(ACTIVATIONS)}"
    return found


def mlp(module: nn.Module) -> Candidate | None:
    """Two linears around an activation, or a gated MLP: LLaVA's projector, ViT MLPs, SwiGLU."""
    parts = _mlp_parts(module)
    if parts is None or type(module).__name__.startswith("Fused"):
        return None
    names, activations, activation = parts
    orders = _orders(module, names)
    if not orders:
        return None
    children = orders[0]
    others = {name: type(module._modules[name]) for name in activations}
    passive = [n for n, c in module._modules.items() if isinstance(c, (nn.Dropout, nn.Identity))]
    others |= {name: type(module._modules[name]) for name in passive}
    record = Record("mlp", children=children, others=others, covered=(*children,), dropout=dropouts(module))
    return _finish(Candidate("", module, "mlp", record, orders=orders), activation, children, module)


def merger(module: nn.Module) -> Candidate | None:
    """Qwen's patch mergers: a norm, 2x2 patches into one row (before or after it), two linears around an activation."""
    norms = [
        n for n, c in module._modules.items() if c is not None and type(c).__name__.endswith(("LayerNorm", "RMSNorm"))
    ]
    if "Merger" not in type(module).__name__ or len(norms) != 1:
        return None
    inner: Any = module._modules.get("mlp", module)
    parts = _mlp_parts(inner, extra=(norms[0],))
    if parts is None or len(parts[0]) != 2 or not _orders(inner, parts[0]):
        return None
    children = _orders(inner, parts[0])[0]
    norm: Any = module._modules[norms[0]]
    kind = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    wide, narrow = inner._modules[children[0]].in_features, norm.weight.shape[0]
    if eps is None or wide not in (narrow, 4 * narrow):
        return None
    inner_record = Record(
        "mlp", children=children, others={n: type(inner._modules[n]) for n in parts[1]}, dropout=dropouts(inner)
    )
    prefix = "" if inner is module else "mlp."
    own = {norms[0]: type(norm)} | ({} if inner is module else {"mlp": type(inner)})
    facts = {
        "norm": kind, "eps": float(eps), "norm_name": norms[0], "inner": inner_record,
        "gather": "merge2x2" if wide == 4 * narrow else None,
    }  # fmt: skip
    covered = (*(prefix + n for n in children), norms[0], *(["mlp"] if prefix else []))
    record = Record("mlp", others=own, covered=covered, dropout=dropouts(module), facts=facts)
    found = _finish(Candidate("", module, "merger", record), parts[2], children, inner)
    found.why_not = found.why_not or touched(norm)
    return found


@cache
def _arguments(cls: type[nn.Module]) -> frozenset[str]:
    """Named arguments of a class's forward."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(cls.forward).parameters
    return frozenset(n for n, p in parameters.items() if p.kind not in kinds) - {"self"}


def attention(module: nn.Module) -> Candidate | None:
    """Vision attention: q/k/v/out projections and a head count, no cache, no second source of keys."""
    names = {n for n, c in module._modules.items() if not isinstance(c, (nn.Dropout, nn.Identity))}
    arguments = _arguments(type(module))
    own = module.__dict__
    heads = own.get("num_heads")
    scale = own.get("scale", own.get("scaling"))
    if not isinstance(heads, int) or not isinstance(scale, float) or own.get("is_causal") or module._parameters:
        return None
    if names == {"q_proj", "k_proj", "v_proj", "out_proj"} and arguments <= DENSE_ARGUMENTS:
        kind, children = "dense_attention", ("q_proj", "k_proj", "v_proj", "out_proj")
    elif names == {"q_proj", "k_proj", "v_proj", "o_proj"} and type(module).__name__ == "PixtralAttention":
        kind, children = "pixtral_attention", ("q_proj", "k_proj", "v_proj", "o_proj")
    elif names == {"qkv", "proj"} and {"hidden_states", "cu_seqlens"} <= arguments <= PACKED_ARGUMENTS:
        kind, children = "packed_attention", ("qkv", "proj")
    else:
        return None
    first: Any = module._modules[children[0]]
    width = getattr(first, "out_features", 0) // (3 if kind == "packed_attention" else 1)
    record = Record("varlen_attention", children=children, covered=children, dropout=dropouts(module))
    record.facts = {"head_dim": width // heads, "heads": heads, "scale": scale}
    why = odd_child(module, children)
    if not why and implementation(module) == "eager":
        why = "attn_implementation is eager, which returns attention weights"
    return Candidate("", module, kind, record, why)


def implementation(module: nn.Module) -> str | None:
    """The attention implementation its config asks for now."""
    config = module.__dict__.get("config")
    return None if config is None else config.__dict__.get("_attn_implementation_internal")

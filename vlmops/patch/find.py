"""Which modules can be replaced, by structure first: what it has and what it computes, not only what it is called."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from functools import cache

from torch import nn

from vlmops.patch.base import KEY, Record
from vlmops.patch.classes import original_class, patched_class
from vlmops.patch.probe import Prober
from vlmops.patch.structure import Candidate, attention, merger, mlp, touched

__all__ = ["KIND_TO_OP", "OPERATIONS", "Candidate", "find"]

#: What each kind of replacement runs.
KIND_TO_OP = {
    "linear": "linear", "layer_norm": "norms", "rms_norm": "norms", "mlp": "mlp", "merger": "mlp",
    "patchify": "patchify", "packed_attention": "varlen_attention", "dense_attention": "varlen_attention",
    "pixtral_attention": "varlen_attention", "skip": "skip_unused_layers",
}  # fmt: skip
OPERATIONS = tuple(sorted(set(KIND_TO_OP.values()) - {"skip_unused_layers"}))


def _linear(module: nn.Module) -> Candidate | None:
    if type(module) is nn.Linear:
        # Its own hooks run around whichever forward it has.
        return Candidate("", module, "linear", Record("linear"))
    if isinstance(module, nn.Linear):
        return Candidate("", module, "linear", Record("linear"), f"a subclass of nn.Linear: {type(module).__name__}")
    return None


@cache
def _views(parent: type[nn.Module]) -> bool:
    """Whether a module's forward calls ``.view`` on something: its patch embedding must then return a dense tensor."""
    try:
        return ".view(" in inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return True


def _patch_embedding(module: nn.Module, parent: nn.Module) -> Candidate | None:
    if type(module) not in (nn.Conv2d, nn.Conv3d):
        return None
    kernel = module.kernel_size
    patches = kernel == module.stride and module.groups == 1 and set(module.dilation) == {1}
    if (
        not patches
        or len(set(kernel[-2:])) != 1
        or kernel[-1] == 1
        or module.padding not in ((0,) * len(kernel), "valid")
    ):
        return None
    return Candidate("", module, "patchify", Record("patchify", facts={"contiguous": _views(type(parent))}))


def _norm(module: nn.Module) -> Candidate | None:
    if type(module) is nn.LayerNorm:
        one = len(module.normalized_shape) == 1 and module.weight is not None
        return Candidate("", module, "layer_norm", Record("norms")) if one else None
    eps = module.__dict__.get("variance_epsilon")
    weight = module._parameters.get("weight")
    only = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not only:
        return None
    if weight is None or weight.dim() != 1:
        return None
    return Candidate("", module, "rms_norm", Record("norms", facts={"eps": eps}))


def _candidate(module: nn.Module, parent: nn.Module) -> Candidate | None:
    found = attention(module) or merger(module) or mlp(module) or _linear(module)
    return found or _patch_embedding(module, parent) or _norm(module)


def _refusal(found: Candidate, prober: Prober) -> str:
    """Why this module must stay as it is; empty if it may be replaced."""
    why = touched(found.module) or found.why_not
    if why:
        return why
    try:
        patched_class(found.kind, type(found.module))
    except ValueError as err:
        return str(err)
    return prober.why_not(found)


def find(model: nn.Module, operations: Collection[str] = OPERATIONS) -> Iterator[Candidate]:
    """Every module that could be replaced, in order; modules inside a fused one are not listed again.

    Args:
        model: where to look.
        operations: those asked for; a module that would run another is listed with that as the reason.
    """
    prober = Prober()
    covered: set[str] = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        if original_class(module) is not None:  # patched before
            record = module.__dict__.get(KEY)
            covered.update(prefix + name for name in (record.covered if record is not None else ()))
            continue
        if path in covered:
            continue
        found = _candidate(module, modules[path.rpartition(".")[0]])
        if found is None:
            continue
        found.path = path
        found.why_not = "not asked for" if KIND_TO_OP[found.kind] not in operations else _refusal(found, prober)
        if not found.why_not:
            covered.update(prefix + name for name in found.record.covered)
        yield found

"""Ranges around a model's stages and modules, by hooks that a block puts in and takes out again.

    with annotated(model):
        model.generate(**inputs)

Modules whose work a patched parent does itself get no hook: they do not run, and a hook would make the parent let them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vlmops.backends import ranges
from vlmops.patch.base import KEY, Record
from vlmops.patch.classes import original_class

__all__ = ["annotated", "covered", "stage_of"]

#: Stage -> names of the modules in which it happens, in transformers' models and in the reference stack.
STAGES = (
    ("connector", re.compile(r"(^|\.)(multi_modal_projector|connector|qformer|perceiver_resampler|merger)$")),
    ("vision", re.compile(r"(^|\.)(vision_tower|vision_model|visual|tower|image_encoder)$")),
    ("text", re.compile(r"(^|\.)(language_model|text_model|decoder)$")),
)


def stage_of(path: str) -> str | None:
    """ "vision", "connector" or "text" where a module of this path is a stage of its own, else None."""
    return next((stage for stage, pattern in STAGES if pattern.search(path)), None)


def covered(model: nn.Module) -> set[str]:
    """Paths of the modules whose work a patched parent does in their place."""
    found = set()
    for path, module in model.named_modules():
        record: Record | None = module.__dict__.get(KEY)
        if record is not None:
            inside = {*record.children, *record.others, *record.covered}
            found |= {f"{path}.{name}" if path else name for name in inside}
    return found


@contextlib.contextmanager
def annotated(
    model: nn.Module, *, nvtx: bool | None = None, record: bool = True, root: str = ""
) -> Iterator[ranges.Ranges]:
    """Ranges of ops, modules and stages inside the block.

    Args:
        model: patched or not, of transformers or of the reference stack.
        nvtx, record: as ``ranges.recording`` takes them.
        root: what the model itself is called; "": its own forward has no range. A patched one has none either.

    A language model's call is the stage "decode" where each sequence has one token, else "prefill".
    """
    skip = covered(model)
    named = [(path, module) for path, module in model.named_modules() if path]
    if root and original_class(model) is None:
        named.insert(0, (root, model))
    handles = []
    with ranges.recording(nvtx, record) as recorder:
        opened = _Open(recorder)
        try:
            for path, module in named:
                if any(path == p or path.startswith(p + ".") for p in skip):
                    continue
                if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    continue
                handles.append(module.register_forward_pre_hook(opened.enter(path), with_kwargs=True))
                handles.append(module.register_forward_hook(opened.leave, always_call=True))
            yield recorder
        finally:
            for handle in handles:
                handle.remove()


class _Open:
    """The ranges that are open, innermost last."""

    def __init__(self, recorder: ranges.Ranges) -> None:
        self.recorder = recorder
        self.open: list[contextlib.ExitStack] = []

    def enter(self, path: str) -> Any:
        """The hook that opens the ranges of a module."""
        stage = stage_of(path)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mine = contextlib.ExitStack()
            if stage is not None:
                name = stage if stage != "text" else _text_stage(args, kwargs)
                mine.enter_context(self.recorder.range("stage", name))
            mine.enter_context(self.recorder.range("module", f"{path} ({type(module).__name__})"))
            self.open.append(mine)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook that closes them."""
        if self.open:
            self.open.pop().close()


def _text_stage(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """ "decode" for one token a sequence, padded [B, L, ...] or packed [T, ...] with cu_seqlens [B + 1]."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    x = next((x for x in given if isinstance(x, torch.Tensor)), None)
    cu = kwargs.get("cu_seqlens", args[1] if len(args) > 1 else None)
    if x is None:
        return "prefill"
    if isinstance(cu, torch.Tensor) and cu.dim() == 1:
        return "decode" if x.shape[0] < cu.shape[0] else "prefill"
    return "decode" if x.dim() > 1 and x.shape[1] == 1 else "prefill"

"""What concerns a whole tower: Pixtral's block mask, and layers that LLaVA never reads."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from vlmops.patch.attention import ATTENTION_NAME, register_interface
from vlmops.patch.base import Patched, Record

__all__ = ["give_private_config", "restore_config", "skip_record", "take_back_config", "unused_layers"]

CONFIG = "_vlmops_config"


def pixtral_towers(model: nn.Module) -> list[nn.Module]:
    """Towers whose forward builds a dense mask unless packed attention is asked for."""
    return [m for m in model.modules() if type(m).__name__ == "PixtralVisionModel"]


def give_private_config(model: nn.Module) -> None:
    """Where every attention of a Pixtral tower is patched: packed attention on a private copy of its config.

    The config object may be shared by two models; only this tower and the modules in it get the copy.
    """
    for tower in pixtral_towers(model):
        attentions = [m for m in tower.modules() if type(m).__name__ == "PixtralAttention"]
        if CONFIG in tower.__dict__ or not attentions or not all(isinstance(m, Patched) for m in attentions):
            continue
        register_interface()
        original: Any = tower.config
        private = copy.copy(original)
        private._attn_implementation_internal = ATTENTION_NAME
        for module in tower.modules():
            if module.__dict__.get("config") is original:
                module.__dict__[CONFIG] = original
                module.config = private


def restore_config(model: nn.Module) -> None:
    """Undo ``give_private_config``: the original objects are put back."""
    for module in model.modules():
        original = module.__dict__.pop(CONFIG, None)
        if original is not None:
            module.config = original


def take_back_config(model: nn.Module) -> None:
    """Undo it for towers one of whose attentions is no longer patched: they get their dense mask again."""
    for tower in pixtral_towers(model):
        attentions = [m for m in tower.modules() if type(m).__name__ == "PixtralAttention"]
        if CONFIG in tower.__dict__ and not all(isinstance(m, Patched) for m in attentions):
            restore_config(tower)


def unused_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers at the end of a LLaVA tower that come after the one whose hidden states are used."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        tower, config = getattr(module, "vision_tower", None), getattr(module, "config", None)
        wanted = getattr(config, "vision_feature_layer", None)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or wanted is None:
            continue
        total = len(layers)
        picked = [wanted] if isinstance(wanted, int) else list(wanted)
        last = max(i if i >= 0 else total + 1 + i for i in picked)  # hidden_states[i] is the input of layer i
        prefix = f"{path}." if path else ""
        found += [(f"{prefix}vision_tower.encoder.layers.{i}", layers[i]) for i in range(last, total)]
    return found


def skip_record() -> Record:
    """The record of a skipped layer."""
    return Record("skip_unused_layers")

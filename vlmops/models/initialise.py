"""Random weights for a model that no checkpoint fills."""

from __future__ import annotations

import re

import torch
from torch import nn

from vlmops.models.language.block import HeadNorm
from vlmops.models.norm import Norm

__all__ = ["initialise"]

STD = 0.02  # of every matrix, token and position, whatever their size: GPT-2's, and transformers' default
BIAS = re.compile(r"(.*_)?bias|b\d|b_\w+")
SCALES = ("scale1", "scale2")  # LayerScale: a new tower passes all of its branches on
GATES = ("attention_gate", "mlp_gate")  # closed, so that training begins with the language model as it was


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int | None = None) -> None:
    """Fills all parameters in place: norms do nothing, biases and gates are 0, the rest is normal with a deviation of 0.02.

    Args:
        module: any model or part of the stack; parameters on the meta device are left alone.
        seed: the same numbers each time on the same kind of device, and torch's own generators stay as they are; None: drawn from
            those.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            if BIAS.fullmatch(name) or name in GATES:
                parameter.zero_()
            elif name in SCALES:
                parameter.fill_(1.0)
            elif isinstance(owner, (Norm, HeadNorm, nn.GroupNorm)):
                parameter.fill_(1.0 - getattr(owner, "offset", 0.0))
            else:
                device, generator = parameter.device, None
                if seed is not None:
                    if device not in generators:
                        generators[device] = torch.Generator(device).manual_seed(seed)
                    generator = generators[device]
                parameter.normal_(std=STD, generator=generator)

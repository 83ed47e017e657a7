"""The names of activations: transformers' and ours."""

from __future__ import annotations

__all__ = ["ours", "theirs"]

#: transformers' name -> ours, where they differ.
NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
WRITTEN = {"gelu_tanh": "gelu_pytorch_tanh"}


def ours(name: str) -> str:
    """Of transformers' name, as ``ops.mlp`` has it."""
    return NAMES.get(name, name)


def theirs(name: str) -> str:
    """Of our name, as a ``config.json`` has it."""
    return WRITTEN.get(name, name)

"""The operations. Each is a folder with its public face, its oracle and its backends."""

from vlmops.ops.cross_attention import cross_attention
from vlmops.ops.linear import linear
from vlmops.ops.linear_cross_entropy import linear_cross_entropy
from vlmops.ops.merge_tokens import merge_tokens
from vlmops.ops.mlp import mlp
from vlmops.ops.norms import layer_norm, rms_norm
from vlmops.ops.patchify import patchify
from vlmops.ops.perceiver_attention import perceiver_attention
from vlmops.ops.rotary import mrope_tables, pixtral_rotary_tables, rotary, vision_rotary_tables
from vlmops.ops.varlen_attention import varlen_attention

__all__ = [
    "cross_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_tokens",
    "mlp",
    "mrope_tables",
    "patchify",
    "perceiver_attention",
    "pixtral_rotary_tables",
    "rms_norm",
    "rotary",
    "varlen_attention",
    "vision_rotary_tables",
]

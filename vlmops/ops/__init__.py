"""The operations. Each is a folder with its public face, its oracle and its backends.

Each takes arrays of other libraries (CuPy, NumPy) in the place of tensors, by DLPack and without a copy, and returns tensors.
"""

from types import FunctionType as _FunctionType

from vlmops.ops._shared.dlpack import accepts_arrays as _accepts_arrays
from vlmops.ops._shared.quantisation import QuantizedWeight, quantize_weight
from vlmops.ops.cross_attention import cross_attention
from vlmops.ops.fp8_attention import fp8_attention
from vlmops.ops.linear import linear
from vlmops.ops.linear_cross_entropy import linear_cross_entropy
from vlmops.ops.merge_tokens import merge_tokens
from vlmops.ops.mlp import mlp
from vlmops.ops.norms import layer_norm, rms_norm
from vlmops.ops.patchify import patchify
from vlmops.ops.perceiver_attention import perceiver_attention
from vlmops.ops.quantized_linear import quantized_linear
from vlmops.ops.rotary import mrope_tables, pixtral_rotary_tables, rotary, vision_rotary_tables
from vlmops.ops.varlen_attention import varlen_attention

__all__ = [
    "QuantizedWeight",
    "cross_attention",
    "fp8_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_tokens",
    "mlp",
    "mrope_tables",
    "patchify",
    "perceiver_attention",
    "pixtral_rotary_tables",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "varlen_attention",
    "vision_rotary_tables",
]

for _name in __all__:
    if isinstance(globals()[_name], _FunctionType):
        globals()[_name] = _accepts_arrays(globals()[_name])

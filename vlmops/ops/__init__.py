"""The operations. Each is a folder with its public face, its oracle and its backends."""

from vlmops.ops.varlen_attention import varlen_attention

__all__ = ["varlen_attention"]

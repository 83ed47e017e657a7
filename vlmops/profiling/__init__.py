"""Measuring: interleaved timing, the stages of a model's forward, and the performance bars."""

from vlmops.profiling.timing import Comparison, Ratio, Timing, Work, WrongOutputError, compare

__all__ = ["Comparison", "Ratio", "Timing", "Work", "WrongOutputError", "compare"]

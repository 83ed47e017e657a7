"""Profiles of NVIDIA's tools, read and joined to the ops, modules and stages of vlmops (docs/profiling.md).

trace = nsys.read("profile.sqlite")
print(show.markdown(report.of_trace(trace, ncu.read("profile.csv"), budgets=budgets.load())))
"""

from vlmops.profiling.nsight.errors import ProfileFileError, ToolFailedError, ToolMissingError

__all__ = ["ProfileFileError", "ToolFailedError", "ToolMissingError"]

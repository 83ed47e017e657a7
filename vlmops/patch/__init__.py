"""Find a model's slow parts, replace them, verify, report, undo."""

from vlmops.patch.api import patch_model, patched, unpatch_model
from vlmops.patch.report import PatchReport, PatchRow, patch_report

__all__ = ["PatchReport", "PatchRow", "patch_model", "patch_report", "patched", "unpatch_model"]

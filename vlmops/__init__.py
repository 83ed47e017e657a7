"""vlmops: vision-language models, faster, with the same answers."""

import importlib
from types import ModuleType

from vlmops import ops
from vlmops.backends import use_backend
from vlmops.ops._shared.packing import packed_bytes, repack
from vlmops.patch import patch_model, patch_report, patched, unpatch_model
from vlmops.version import __version__

__all__ = [
    "__version__",
    "ops",
    "packed_bytes",
    "patch_model",
    "patch_report",
    "patched",
    "repack",
    "unpatch_model",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    """``vlmops.images`` and ``vlmops.models``, imported when they are first asked for: patching needs neither."""
    if name in ("images", "models"):
        return importlib.import_module(f"vlmops.{name}")
    raise AttributeError(f"module 'vlmops' has no attribute {name!r}")

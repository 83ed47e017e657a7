"""vlmops: vision-language models, faster, with the same answers."""

from vlmops import ops
from vlmops.backends import use_backend
from vlmops.version import __version__

__all__ = ["__version__", "ops", "use_backend"]

"""Language models: one decoder with options, its cache, and what the families' files call its tensors."""

from vlmops.models.language.cache import KVCache
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.families import from_json, keys
from vlmops.models.language.sizes import SIZES

__all__ = ["SIZES", "Decoder", "KVCache", "from_json", "keys"]

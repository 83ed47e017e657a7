"""What each family's checkpoints look like: ``config.json`` in both directions, tensor names, and how the parts are assembled.

One file a family. ``FORMATS[config.family]`` is what there is to know of one; ``checkpoint.py`` reads and writes folders with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from vlmops.models.formats.base import Format, Json

__all__ = ["FORMATS", "Format", "Json", "family_of"]

#: family -> the module that has it, as ``FORMAT``.
MODULES = {
    "llava": "llava", "llava_next": "llava_next", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl",
    "paligemma": "paligemma", "flamingo": "flamingo", "idefics": "idefics", "cogvlm2": "cogvlm2", "qwen_vl": "qwen_vl",
    "blip2": "blip2", "fuyu": "fuyu", "chameleon": "chameleon",
}  # fmt: skip


class _Formats(Mapping[str, Format]):
    """The table; a family's module is imported when it is asked for."""

    def __getitem__(self, family: str) -> Format:
        if family not in MODULES:
            raise KeyError(family)
        found: Format = importlib.import_module(f"vlmops.models.formats.{MODULES[family]}").FORMAT
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


FORMATS: Mapping[str, Format] = _Formats()


def family_of(json: Json) -> str:
    """The family of a ``config.json``: by its model type, or (CogVLM2's has none) by its architecture.

    Raises:
        ValueError: a model type that is not known here.
    """
    kind = json.get("model_type") or next(iter(json.get("architectures") or ()), "")
    for family, found in FORMATS.items():
        if kind in found.model_types:
            return family
    known = sorted({kind for found in FORMATS.values() for kind in found.model_types})
    raise ValueError(f"model_type: expected one of {', '.join(known)}, got {kind!r}")

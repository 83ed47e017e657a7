"""What each family's checkpoints look like: ``config.json`` in both directions, tensor names, and how the parts are assembled.

One file a family. ``FORMATS[config.family]`` is what there is to know of one; ``checkpoint.py`` reads and writes folders with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from vlmops.models.formats.base import Format, Json

__all__ = ["FORMATS", "Format", "Json", "family_of"]

#: Each a module of this name, which has it as ``FORMAT``.
FAMILIES = (
    "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "paligemma", "flamingo", "idefics", "cogvlm2", "qwen_vl", "blip2", "fuyu",
    "chameleon",
)  # fmt: skip


class _Formats(Mapping[str, Format]):
    """The table; a family's module is imported when it is asked for."""

    def __getitem__(self, family: str) -> Format:
        if family not in FAMILIES:
            raise KeyError(family)
        found: Format = importlib.import_module(f"vlmops.models.formats.{family}").FORMAT
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)


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

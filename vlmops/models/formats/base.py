"""What a family's file consists of, and the pieces that several share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmops.models.config import ConnectorConfig, VisionConfig, VLMConfig
from vlmops.models.keymap import Rule, prefixed
from vlmops.models.language import families as decoders
from vlmops.models.vision import keys as tower_keys
from vlmops.models.vlm import VLM

__all__ = ["Format", "Json", "Renamed", "decoder_rules", "parts", "text_part", "tower_rules"]

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A family.

    Args:
        model_types: ``model_type`` of its files.
        assembly: the class of its models.
        read: ``config.json`` -> ``VLMConfig``; ValueError for what the stack does not have.
        write: ``VLMConfig`` -> ``config.json``.
        rules: names of tensors.
        renames: (pattern, replacement) from the names of older and newer files to those of ``rules``; the first that fits counts.
    """

    model_types: Sequence[str]
    assembly: type[VLM]
    read: Callable[[Json], VLMConfig]
    write: Callable[[VLMConfig], dict[str, Any]]
    rules: Callable[[VLMConfig], list[Rule]]
    renames: Sequence[tuple[str, str]] = ()


class Renamed(Mapping[str, Tensor]):
    """A checkpoint whose tensors go by other names.

    Args:
        source: the checkpoint.
        renames: as ``Format`` has them.
    """

    def __init__(self, source: Mapping[str, Tensor], renames: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.names = {self._renamed(name, renames): name for name in source}

    @staticmethod
    def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
        for pattern, replacement in renames:
            new, found = re.subn(pattern, replacement, name, count=1)
            if found:
                return new
        return name

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.names[name]]

    def once(self, name: str) -> Tensor:
        """A tensor that is copied and let go at once: as ``Shards.once``, where the source has it."""
        read = getattr(self.source, "once", self.source.__getitem__)
        found: Tensor = read(self.names[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def text_part(json: Json) -> dict[str, Any]:
    """The language model's part of a ``config.json``: of its own, or (Qwen2-VL's older files) among the rest."""
    text = dict(json.get("text_config") or {k: v for k, v in json.items() if k != "vision_config"})
    if json.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = json["tie_word_embeddings"]
    return text


def parts(config: VLMConfig, kind: str, what: str) -> tuple[VisionConfig, ConnectorConfig]:
    """Tower and connector of a model that has both; ValueError where the connector is not of this kind (``what``, in words)."""
    if config.vision is None or config.connector is None or config.connector.kind != kind:
        raise ValueError(f"connector: expected a tower and {what} in a {config.family} checkpoint")
    return config.vision, config.connector


def tower_rules(config: VLMConfig, theirs: str) -> list[Rule]:
    """Of the tower, under their prefix."""
    assert config.vision is not None
    return prefixed(tower_keys(config.vision, config.vision_family), ours="tower.", theirs=theirs)


def decoder_rules(config: VLMConfig, base: str, head: str) -> list[Rule]:
    """Of the decoder, under their prefix and their name of the output projection."""
    return prefixed(decoders.keys(config.decoder, config.decoder_family, base=base, head=head), ours="decoder.")

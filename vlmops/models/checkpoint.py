"""Whole models from a transformers folder, and back.

    vlm = from_pretrained("llava-1.5-7b-hf")  # config.json and safetensors, sharded or not
    vlm.save_pretrained("mine")               # transformers reads it

Weights are memory-mapped: a tensor that is the same in both is not copied, one that is put together from several is, once. Names
and shapes are all checked before a model is returned; on any error there is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmops.models.config import VLMConfig
from vlmops.models.formats import FORMATS, family_of
from vlmops.models.formats.base import Renamed
from vlmops.models.keymap import KeyMapError, Rule, expand, load_into, save
from vlmops.models.shards import CheckpointError, Shards, read_json, save_shards
from vlmops.models.vlm import VLM

__all__ = ["assemble", "from_pretrained", "read_config", "save_pretrained"]


def assemble(config: VLMConfig) -> VLM:
    """The model of a config, its parameters allocated but not filled.

    Raises:
        ValueError: a family that does not exist.
    """
    if config.family not in FORMATS:
        raise ValueError(f"family: expected one of {', '.join(FORMATS)}, got {config.family!r}")
    return FORMATS[config.family].assembly(config)


def read_config(folder: str | os.PathLike[str]) -> VLMConfig:
    """The config of a checkpoint folder, with the end tokens of its ``generation_config.json`` if it has one.

    Raises:
        CheckpointError: no readable ``config.json``, or one of a model that the stack does not have; it says what is not there.
    """
    path = Path(folder) / "config.json"
    found = read_json(path)
    try:
        config = FORMATS[family_of(found)].read(found)
    except (KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{path}: {err}") from err
    says = Path(folder) / "generation_config.json"
    sources = [read_json(says) if says.exists() else {}, found, found.get("text_config") or {}]
    ends = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), ())
    pad = next((s["pad_token_id"] for s in sources if s.get("pad_token_id") is not None), 0)
    return replace(config, end_tokens=(ends,) if isinstance(ends, int) else tuple(ends), pad_token=pad)


def from_pretrained(folder: str | os.PathLike[str]) -> VLM:
    """A model from a folder, in the checkpoint's dtype, on the CPU, in eval mode.

    Args:
        folder: with ``config.json`` and safetensors; nothing is downloaded.

    Raises:
        CheckpointError: what ``read_config`` and ``Shards`` refuse (pickle among it); a tensor missing, unexpected, or of a
            wrong shape.
    """
    config = read_config(folder)
    found = FORMATS[config.family]
    with torch.device("meta"):
        vlm = assemble(config)
    try:
        load_into(vlm, Renamed(Shards(folder), found.renames), found.rules(config))
    except KeyMapError as err:
        raise CheckpointError(f"{folder}: {err}") from err
    return vlm.eval()


def save_pretrained(vlm: VLM, folder: str | os.PathLike[str], *, shard_bytes: int = 5 << 30) -> None:
    """Writes ``config.json``, ``generation_config.json`` and safetensors as transformers reads them; no tokenizer.

    Args:
        vlm: the model.
        folder: made if missing; a checkpoint in it is replaced.
        shard_bytes: most bytes of a file.

    Raises:
        ValueError: a config that the family's files cannot express.
    """
    config, found = vlm.config, FORMATS[vlm.config.family]
    values: dict[str, Any] = {**found.write(config), "dtype": str(vlm.dtype).removeprefix("torch.")}
    ends = {"eos_token_id": list(config.end_tokens), "pad_token_id": config.pad_token} if config.end_tokens else {}
    tensors = _Written(vlm.state_dict(), found.rules(config))
    save_shards(tensors, folder, shard_bytes=shard_bytes)
    for name, content in (("config.json", values), ("generation_config.json", ends)):
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Written(Mapping[str, Tensor]):
    """Their tensors out of ours, each made when it is asked for: only one shard is in memory twice."""

    def __init__(self, state: Mapping[str, Tensor], rules: list[Rule]) -> None:
        self.state = state
        self.rules: dict[str, list[Rule]] = {}
        flat = expand(rules)
        save(state, flat)  # checks the names
        parts: dict[str, list[Rule]] = {}
        for rule in flat:
            if rule.how.startswith("split:"):
                parts.setdefault(rule.theirs[0], []).append(rule)
        for rule in flat:
            if rule.how != "ignore":
                for name in rule.theirs:
                    self.rules[name] = parts.get(name, [rule])

    def __getitem__(self, name: str) -> Tensor:
        rules = self.rules[name]
        state = {rule.ours: self.state[rule.ours] for rule in rules}
        return dict(save(state, rules))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

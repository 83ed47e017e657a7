"""A folder of safetensors files as one mapping, read lazily; and the way back.

The layout is transformers': ``model.safetensors``, or shards and ``model.safetensors.index.json``. Names, files and headers are
checked before the first tensor is read. Pickle is never read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["CheckpointError", "Shards", "read_json", "save_shards"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_JSON = 64 << 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message says which file or tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: missing, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: larger than {LARGEST_JSON >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise CheckpointError(f"{path}: cannot be read as JSON: {err}") from err
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by name; each is read from its memory-mapped file when it is asked for.

    Args:
        folder: with ``model.safetensors`` or an index and its shards.

    Raises:
        CheckpointError: no safetensors there (pickle is refused), an index that names files outside the folder or tensors their
            files do not have, a file that is missing, cut short or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        self._file_of = self._index()
        self._open: dict[str, Any] = {}
        for name in sorted(set(self._file_of.values())):
            self._open[name] = self._checked(name)

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.exists():
            if not (self.folder / WHOLE).exists():
                raise CheckpointError(self._nothing())
            with self._checked(WHOLE) as file:
                return dict.fromkeys(file.keys(), WHOLE)
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise CheckpointError(f"{index}: expected a weight_map from tensors to files")
        for name in set(found.values()):
            if (
                name in ("", ".", "..")
                or "/" in name
                or "\\" in name
                or "\0" in name
                or not name.endswith(".safetensors")
            ):
                raise CheckpointError(f"{index}: {name!r} is no name of a safetensors file in this folder")
        return found

    def _nothing(self) -> str:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if not pickles:
            return f"{self.folder}: neither {WHOLE} nor {INDEX} there"
        return (
            f"{self.folder}: only {', '.join(pickles[:3])} there: pickle can run any code when it is read, so it is not; "
            "save the model as safetensors (transformers: save_pretrained)"
        )

    def _opened(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            return safe_open(str(path), framework="pt")  # checks the header against the file's length
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: damaged or cut short: {err}") from err

    def _checked(self, name: str) -> Any:
        """The file, which has every tensor that the index says."""
        file, path = self._opened(name), self.folder / name
        there = set(file.keys())
        missing = sorted(k for k, v in getattr(self, "_file_of", {}).items() if v == name and k not in there)
        if missing:
            raise CheckpointError(f"{path}: has no tensor {missing[0]!r}, though the index says so")
        return file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        return tensor

    def once(self, name: str) -> Tensor:
        """A tensor that is copied and let go at once: its pages leave memory with it, those of ``[...]`` stay with their file."""
        tensor: Tensor = self._opened(self._file_of[name]).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def save_shards(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], *, shard_bytes: int = 5 << 30) -> None:
    """Writes tensors as transformers would: one file, or shards and their index. Files appear whole or not at all.

    Args:
        tensors: by name; read one shard at a time.
        folder: made if missing; other checkpoints in it are replaced.
        shard_bytes: most bytes of a file, unless one tensor has more.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[str]] = [[]]
    sizes = {name: tensors[name].nbytes for name in tensors}
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    many = len(groups) > 1
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" if many else WHOLE for i in range(len(groups))]
    old = {p for p in folder.iterdir() if p.name == WHOLE or p.name == INDEX or p.name.startswith("model-")}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as work:
        for file, group in zip(names, groups, strict=True):
            save_file({n: tensors[n].contiguous() for n in group}, Path(work) / file, metadata={"format": "pt"})
        if many:
            where = {n: file for file, group in zip(names, groups, strict=True) for n in group}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            (Path(work) / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            names = [*names, INDEX]
        for path in old:
            path.unlink()
        for file in names:
            os.replace(Path(work) / file, folder / file)

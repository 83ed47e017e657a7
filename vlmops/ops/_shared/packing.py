"""Weights in a GEMM library's own layout, kept as long as the parameter they came from is unchanged.

An entry is valid while the parameter is the same object at the same address with the same version counter and the same
sampled values: ``p.data.mul_()`` changes values without bumping the version, inference tensors have no version at all.
The store is outside the parameters, so deepcopy and pickling never see it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["STORE", "PackedStore", "packed_bytes", "repack"]

SAMPLES = 64  # values compared at each look-up: one strided view of the parameter's own memory
_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Entry:
    owner: weakref.ref[Tensor]
    address: int
    version: int
    view: Any  # numpy view of sampled elements, on the parameter's memory
    sample: bytes
    packed: Any
    nbytes: int


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _sampled(x: Tensor) -> Any:
    flat = x.detach().view(_INT[x.element_size()]).reshape(-1).numpy()
    return flat[:: max(1, flat.size // SAMPLES)][:SAMPLES]


class PackedStore:
    """Packed forms of parameters, least recently used dropped first where a byte budget is exceeded.

    Args:
        budget: bytes all packed forms may take together; None: no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._entries: OrderedDict[tuple[int, Hashable], _Entry] = OrderedDict()
        self._lock = threading.RLock()
        self.bytes = 0

    def get(self, weight: Tensor, kind: Hashable, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """The packed form of ``weight``, packed now unless a valid one is kept.

        Args:
            weight: a contiguous CPU parameter.
            kind: what the packed form is for: one weight may have several.
            pack: makes it from the weight (detached).
        """
        key = (id(weight), kind)
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.owner() is weight
            and entry.address == weight.data_ptr()
            and entry.version == _version(weight)
            and entry.view.tobytes() == entry.sample
        ):
            if self.budget is not None:
                with self._lock:
                    if key in self._entries:
                        self._entries.move_to_end(key)
            return entry.packed
        return self._pack(weight, key, pack)

    def _pack(self, weight: Tensor, key: tuple[int, Hashable], pack: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            packed = pack(weight.detach())
        # a packed tensor is opaque: it says nothing about its own size, which is that of its logical elements
        nbytes = packed.numel() * packed.element_size()
        view = _sampled(weight)
        store = weakref.ref(self)

        def forget(_: object) -> None:
            found = store()
            if found is not None:
                found._drop(key)

        entry = _Entry(weakref.ref(weight, forget), weight.data_ptr(), _version(weight), view, view.tobytes(), packed, nbytes)
        with self._lock:
            self._drop(key)
            if self.budget is not None and nbytes > self.budget:
                return packed
            self._entries[key] = entry
            self.bytes += nbytes
            while self.budget is not None and self.bytes > self.budget:
                self._drop(next(iter(self._entries)))
        return packed

    def _drop(self, key: tuple[int, Hashable]) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes -= entry.nbytes

    def clear(self, params: set[int] | None = None) -> None:
        """Drop everything, or the entries of the parameters with these ids."""
        with self._lock:
            for key in [k for k in self._entries if params is None or k[0] in params]:
                self._drop(key)

    def size_of(self, params: set[int]) -> int:
        """Bytes kept for the parameters with these ids."""
        with self._lock:
            return sum(entry.nbytes for key, entry in self._entries.items() if key[0] in params)


def _budget() -> int | None:
    text = os.environ.get("VLMOPS_PACK_BUDGET_MB")
    return None if not text else int(float(text) * 2**20)


#: The process's store. ``VLMOPS_PACK_BUDGET_MB`` bounds it.
STORE = PackedStore(_budget())


def _ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters()}


def repack(model: nn.Module | None = None) -> None:
    """Forget packed weights (of one model, or all): the next call packs again.

    Changes through optimizers, ``load_state_dict`` and ``p.data`` are noticed by themselves; this is for code that
    writes single elements of a parameter behind torch's back.
    """
    STORE.clear(None if model is None else _ids(model))


def packed_bytes(model: nn.Module | None = None) -> int:
    """Memory that packed weights take, in bytes: of one model's parameters, or of all."""
    return STORE.bytes if model is None else STORE.size_of(_ids(model))

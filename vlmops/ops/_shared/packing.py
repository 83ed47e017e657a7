"""Weights in a GEMM library's own layout, kept as long as the parameter they came from is unchanged.

An entry is valid while the parameter is the same object at the same address with the same version counter and the same
sampled values: ``p.data.mul_()`` changes values without bumping the version, inference tensors have no version at all.
The store is outside the parameters, so deepcopy and pickling never see it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["STORE", "PackedStore", "packed_bytes", "repack"]

SAMPLES = 64  # values compared at each look-up: one strided view of the parameter's own memory
IDLE_S = 60.0  # how long an entry must lie unused before another may take its room
TRIM_BYTES = 16 << 20  # packed between two returns of free memory to the system
_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Entry:
    owner: weakref.ref[Tensor]
    owner_address: int
    address: int
    version: int
    view: Any  # numpy view of sampled elements, on the parameter's memory
    sample: bytes
    packed: Tensor
    nbytes: int
    used: float


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim; elsewhere nothing.

    The first forward packs weights between its temporaries. Those are freed, the packed copies stay, and the holes
    between them are of no use to larger temporaries: the resident set of a Pixtral tower of 4 layers grew by 430 MiB,
    130 of them packed weights; with the holes given back it grows by 285.
    """
    try:
        return ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else int
    except (OSError, AttributeError):  # musl
        return int


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _sampled(x: Tensor) -> Any:
    """A strided view of SAMPLES elements that runs across the columns of a matrix as well as down its rows."""
    flat = x.detach().view(_INT[x.element_size()]).reshape(-1).numpy()
    columns = x.shape[-1] if x.dim() > 1 else flat.size
    step = max(1, flat.size // SAMPLES)
    if step > 1 and step % columns == 0:
        step -= max(1, columns // SAMPLES)
    return flat[:: max(1, step)][:SAMPLES]


class PackedStore:
    """Packed forms of parameters.

    A look-up costs about a microsecond. Where the byte budget is full, the entry unused for longest makes room, if it
    has been unused for ``idle_s``: a model that does not fit would otherwise pack every weight anew in every forward.

    Args:
        budget: bytes all packed forms may take together, or a function that says it at the first need; None: no limit.
        idle_s: seconds.
    """

    def __init__(self, budget: int | Callable[[], int | None] | None = None, idle_s: float = IDLE_S) -> None:
        self._budget = budget
        self.idle_s = idle_s
        self._entries: dict[tuple[int, Hashable], _Entry] = {}
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._lock = threading.RLock()
        self._untrimmed = 0
        self.bytes = 0

    @property
    def budget(self) -> int | None:
        """Bytes, or None for no limit."""
        if callable(self._budget):
            self._budget = self._budget()
        return self._budget

    def get(self, weight: Tensor, kind: Hashable, pack: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The packed form of ``weight``, packed now unless a valid one is kept; None where it should be used as it is.

        That is so where the budget is full, and for a tensor that is no parameter (nor a view of one) and was never
        seen before: autocast casts a weight anew at every call, and packing costs more than one product wins.

        Args:
            weight: contiguous CPU tensor.
            kind: what the packed form is for: one weight may have several.
            pack: makes it from the weight (detached).
        """
        base = weight._base
        owner = weight if base is None else base
        key = (id(owner), kind if base is None else (kind, weight.shape, weight.storage_offset()))
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.owner() is owner
            and entry.address == weight.data_ptr()
            and entry.version == _version(weight)
            and entry.view.tobytes() == entry.sample
        ):
            entry.used = monotonic()
            return entry.packed
        if entry is None and not isinstance(owner, nn.Parameter) and not self._seen_before(owner):
            return None
        return self._pack(weight, owner, key, pack)

    def _seen_before(self, owner: Tensor) -> bool:
        key = id(owner)
        known = self._seen.get(key)
        if known is not None and known() is owner:
            return True
        seen = self._seen

        def forget(dead: weakref.ref[Tensor]) -> None:
            if seen.get(key) is dead:
                del seen[key]

        seen[key] = weakref.ref(owner, forget)
        return False

    def _pack(
        self, weight: Tensor, owner: Tensor, key: tuple[int, Hashable], pack: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        with self._lock:
            self._drop(key)
            if not self._make_room(weight.numel() * weight.element_size()):
                return None
        with torch.no_grad():
            packed = pack(weight.detach())
        # A packed tensor is opaque and says nothing about its own size: that of its elements, give or take padding.
        nbytes = packed.numel() * packed.element_size()
        view = _sampled(weight)
        store = weakref.ref(self)

        def forget(dead: weakref.ref[Tensor]) -> None:
            found = store()
            if found is not None:
                found._drop(key, dead)

        entry = _Entry(
            weakref.ref(owner, forget),
            owner.data_ptr(),
            weight.data_ptr(),
            _version(weight),
            view,
            view.tobytes(),
            packed,
            nbytes,
            monotonic(),
        )
        with self._lock:
            self._drop(key)  # another thread may have been faster
            if self._make_room(nbytes):
                self._entries[key] = entry
                self.bytes += nbytes
            self._untrimmed += nbytes
            trim = self._untrimmed >= TRIM_BYTES
            if trim:
                self._untrimmed = 0
        if trim:
            _trim()(0)
        return packed

    def _make_room(self, nbytes: int) -> bool:
        """Whether nbytes more fit, after dropping idle entries if need be."""
        budget = self.budget
        if budget is None or self.bytes + nbytes <= budget:
            return True
        self._sweep()
        before = monotonic() - self.idle_s
        idle = sorted((e.used, key, e.nbytes) for key, e in self._entries.items() if e.used <= before)
        if self.bytes + nbytes - sum(size for _, _, size in idle) > budget:
            return False
        for _, key, _ in idle:
            self._drop(key)
            if self.bytes + nbytes <= budget:
                break
        return True

    def _sweep(self) -> None:
        """Drop the entries of parameters that got other memory (``model.half()``, ``model.to(device)``) and never came back."""
        for key, entry in list(self._entries.items()):
            owner = entry.owner()
            if owner is None or owner.data_ptr() != entry.owner_address:
                self._drop(key)

    def _drop(self, key: tuple[int, Hashable], owner: weakref.ref[Tensor] | None = None) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and (owner is None or entry.owner is owner):
                del self._entries[key]
                self.bytes -= entry.nbytes

    def clear(self, params: set[int] | None = None) -> None:
        """Drop everything, or the entries of the parameters with these ids."""
        with self._lock:
            for key in [k for k in self._entries if params is None or k[0] in params]:
                self._drop(key)
            if params is None:
                self._seen.clear()

    def size_of(self, params: set[int] | None = None) -> int:
        """Bytes kept for the parameters with these ids, or for all."""
        with self._lock:
            self._sweep()
            return sum(entry.nbytes for key, entry in self._entries.items() if params is None or key[0] in params)


def _default_budget() -> int | None:
    """``VLMOPS_PACK_BUDGET_MB``, else half of the memory that is free at the first packing."""
    text = os.environ.get("VLMOPS_PACK_BUDGET_MB")
    if text:
        try:
            return int(float(text) * 2**20)
        except ValueError:
            raise ValueError(f"VLMOPS_PACK_BUDGET_MB: expected a number of MiB, got {text!r}") from None
    free = _available_memory()
    return None if free is None else free // 2


def _available_memory() -> int | None:
    """Bytes this process may still take (the machine's, or its control group's if less); None where nobody tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError, IndexError):
        pass
    return min(found) if found else None


#: The process's store.
STORE = PackedStore(_default_budget)


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
    return STORE.size_of(None if model is None else _ids(model))

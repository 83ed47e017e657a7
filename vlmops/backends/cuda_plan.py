"""A launch plan: which kernel, specialised how, on which grid, with which arguments. Plain data, the same for every executor."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CTYPE", "Kernel", "Out", "Plan", "Scalar", "TensorMap", "f32", "i32", "i64", "tensor_of", "vector"]

#: How a kernel's -D macros call a dtype (csrc/cuda/ptx/types.cuh).
CTYPE = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_VECTOR = 16  # bytes of the widest load
MAP_BYTES = 128


#: What is compiled: source, entry, defines, threads of a block, architecture.
Kernel = tuple[str, str, tuple[tuple[str, Any], ...], int, str]


class Scalar(NamedTuple):
    """A kernel argument by value: its ``struct`` code and the value."""

    code: str
    value: int | float


class Out(NamedTuple):
    """A tensor the kernel writes: the SIMT machine takes it for uninitialised, and writes to any other tensor for errors."""

    tensor: Tensor


class TensorMap(NamedTuple):
    """A tensor as TMA reads it (sm_90a), ``const __grid_constant__ TensorMap``. A kernel's maps are its first arguments.

    Args:
        tensor: 2 or 3 dimensions of 16-bit elements; ``why_not`` says which.
        box: what one copy brings, as the tensor's dimensions, each at most 256; the last is 64 elements, the 128 bytes of a
            row in the 128-byte swizzle. What is outside the tensor is zeros.
    """

    tensor: Tensor
    box: tuple[int, ...]

    @staticmethod
    def why_not(t: Tensor) -> str | None:
        """Why TMA cannot read a tensor; None if it can."""
        if t.dim() not in (2, 3) or t.element_size() != 2 or t.numel() == 0:
            return f"TMA reads 2 or 3 dimensions of 16-bit elements, not {str(t.dtype)[6:]}{list(t.shape)}"
        strides = [s * 2 for s in t.stride()[:-1]]
        if t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % 16 or not 0 < s < 1 << 40 for s in strides):
            return "TMA needs rows that lie together, 16-byte aligned"
        return None if max(t.shape) < 1 << 31 else f"TMA of {list(t.shape)}: 32-bit coordinates"

    def packed(self) -> bytes:
        """csrc/simt/hopper.cpp's and csrc/launch/library.cpp's form, the innermost dimension first; 128 bytes."""
        t, size = self.tensor, self.tensor.element_size()
        fill = (1,) * (3 - t.dim())
        sizes, box = (*t.shape[::-1], *fill), (*self.box[::-1], *fill)
        strides = (size, *(s * size for s in t.stride()[-2::-1]), *(0 for _ in fill))
        return struct.pack("<Q6q6I48x", t.data_ptr(), *sizes, *strides, *box, t.dim(), size, 3)


def tensor_of(arg: Any) -> Tensor | None:
    """The tensor of an argument; None: it has none."""
    found = arg.tensor if isinstance(arg, (Out, TensorMap)) else arg
    return found if isinstance(found, Tensor) else None


def i32(value: int) -> Scalar:
    """A 32-bit int argument. OverflowError unless it is one: strides and offsets are ``i64``."""
    if not -(1 << 31) <= value < 1 << 31:
        raise OverflowError(f"{value} is no 32-bit integer")
    return Scalar("i4x", value)


def i64(value: int) -> Scalar:
    """A 64-bit int argument."""
    return Scalar("q", value)


def f32(value: float) -> Scalar:
    """A float argument."""
    return Scalar("f4x", value)


@lru_cache(maxsize=4096)
def _name(entry: str, defines: tuple[tuple[str, Any], ...], block: int, arch: str) -> str:
    parts = [entry]
    for key, value in defines:
        if key in ("T", "UNIT"):
            parts.append(str(value))
        elif value is True:
            parts.append(key.lower())
        elif value is not False:
            parts.append(f"{key.lower()}{value}")
    parts.append(f"t{block}")
    if arch != "sm80":
        parts.append(arch)
    return "_".join(parts)


@lru_cache(maxsize=1024)
def _slots(codes: tuple[str, ...]) -> struct.Struct:
    return struct.Struct("<" + "".join(codes))


@dataclass(frozen=True)
class Plan:
    """One launch.

    Args:
        source: file in csrc/cuda, e.g. "rotary.cu".
        entry: its kernel, e.g. "rotary_heads".
        defines: the specialisation: (name, value) of each -DVLMOPS_<name> macro, always the same names for an entry.
        grid: blocks, three sizes.
        block: threads of a block.
        args: ``TensorMap``s, tensors (read), ``Out`` tensors (written), None (a null pointer), ``i32``/``i64``/``f32`` scalars.
        shared: bytes of dynamic shared memory.
        arch: least GPU, "sm80"; or the only one, "sm90a".
    """

    source: str
    entry: str
    defines: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    block: int
    args: tuple[Tensor | Out | Scalar | TensorMap | None, ...]
    shared: int = 0
    arch: str = "sm80"

    @property
    def kernel(self) -> Kernel:
        """What is compiled: everything but the launch."""
        return self.source, self.entry, self.defines, self.block, self.arch

    @classmethod
    def bare(cls, kernel: Kernel) -> Plan:
        """A plan to compile a kernel by, of one block without arguments."""
        source, entry, defines, block, arch = kernel
        return cls(source, entry, defines, (1, 1, 1), block, (), arch=arch)

    @property
    def name(self) -> str:
        """The kernel's own name in every build, e.g. "rotary_heads_bf16_d80_t128": readable, no two alike."""
        return _name(self.entry, self.defines, self.block, self.arch)

    @property
    def macros(self) -> list[str]:
        """The -D options that select and specialise this kernel."""
        found = [f"-DVLMOPS_ENTRY_{self.entry}=1", f"-DVLMOPS_NAME={self.name}", f"-DVLMOPS_THREADS={self.block}"]
        return found + [f"-DVLMOPS_{key}={int(v) if isinstance(v, bool) else v}" for key, v in self.defines]

    @property
    def empty(self) -> bool:
        """Whether the grid has no block: nothing to launch."""
        return 0 in self.grid

    @property
    def maps(self) -> int:
        """How many of the arguments, the first ones, are tensor maps."""
        return sum(isinstance(arg, TensorMap) for arg in self.args)

    def packed(self) -> bytes:
        """The arguments as the kernel gets them: 128 bytes for each map, then one 8-byte slot each, little endian, a short value
        in its first bytes."""
        maps = self.maps
        codes, values = [], []
        for arg in self.args[maps:]:
            if isinstance(arg, TensorMap):
                raise ValueError(f"{self.name}: tensor maps are a kernel's first arguments")
            if isinstance(arg, Scalar):
                codes.append(arg.code)
                values.append(arg.value)
            else:
                codes.append("Q")
                tensor = arg.tensor if isinstance(arg, Out) else arg
                values.append(0 if tensor is None else tensor.data_ptr())
        slots = _slots(tuple(codes)).pack(*values)
        return (
            b"".join(arg.packed() for arg in self.args[:maps] if isinstance(arg, TensorMap)) + slots if maps else slots
        )

    def check(self, shared: int) -> None:
        """ValueError where no GPU could launch it, or not one with ``shared`` bytes of shared memory for a block."""
        if self.shared > shared:
            raise ValueError(f"{self.name}: {self.shared} bytes of shared memory, where a block may have {shared}")
        sizes = zip(self.grid, MAX_GRID, strict=True)
        if any(n > most for n, most in sizes) or not 1 <= self.block <= 1024 or self.block % 32:
            raise ValueError(f"{self.name}: a grid of {self.grid} blocks of {self.block} threads cannot be launched")

    @property
    def device(self) -> torch.device:
        """Where it runs: the first tensor's device."""
        for arg in self.args:
            tensor = tensor_of(arg)
            if tensor is not None:
                return tensor.device
        raise ValueError(f"{self.name}: no tensor among the arguments")


def vector(tensors: Sequence[Tensor | None], sizes: Sequence[int] = (), most: int = MAX_VECTOR) -> int:
    """Elements of the widest access that every row of every tensor allows: a power of two, up to ``most`` bytes.

    Args:
        tensors: same item size, last dimension dense; None is left out. Base address and all other strides count.
        sizes: elements that must be whole accesses too, e.g. the row length.
        most: bytes.
    """
    size = next(t.element_size() for t in tensors if t is not None)
    common = most // size
    for t in tensors:
        if t is None or t.numel() == 0:
            continue
        strides = [s for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
        common = gcd(common, t.data_ptr() // size, *strides)  # a meta tensor's address is its storage offset
    return gcd(common, *sizes)

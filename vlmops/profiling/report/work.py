"""What the roofline needs: the machine's peaks, and the least work of the ops that a step runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from vlmops.backends import ranges
from vlmops.backends.probe import cpu_caches
from vlmops.ops._shared.cost import Cost, nbytes
from vlmops.profiling.bars import PEAK_SHAPE, dtype_name, random_tensor
from vlmops.profiling.peak import PEAK_WORK, peak_call
from vlmops.profiling.report.data import Peaks
from vlmops.profiling.roofline import stated

__all__ = ["WorkSeen", "measure_peaks"]

ROUNDS = 5
LEAST_COPY, MOST_COPY = 64 << 20, 512 << 20  # bytes: out of the caches, and not for ever


def _copy_size(device: torch.device) -> int:
    """Bytes of the tensor to copy: four times the largest cache, within bounds."""
    if device.type == "cuda":
        return MOST_COPY
    sizes = [0]
    for text in cpu_caches().values():
        with contextlib.suppress(ValueError):
            sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1))
    return min(MOST_COPY, max(LEAST_COPY, 4 * max(sizes)))


def _fastest(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    best = float("inf")
    for turn in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - begin)
    return best


def measure_peaks(
    dtype: torch.dtype, device: torch.device, *, rounds: int = ROUNDS, copied: int | None = None
) -> Peaks:
    """Bandwidth of a copy and FLOP/s of one large product, the best of some runs each.

    Args:
        dtype: of the product: float32 or 16 bits. A 16-bit type that the processor has no products of is measured in float32.
        device: CPU or a GPU.
        rounds: timed runs.
        copied: bytes of the copied tensor; None: four times the largest cache, 64 to 512 MiB.
    """
    size = copied or _copy_size(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        bandwidth = 2 * size / _fastest(lambda: target.copy_(source), device, rounds)
        if device.type == "cpu":
            product: Callable[[], Any] = peak_call(dtype)
            work = PEAK_WORK.flops
        else:
            m = 4 * PEAK_SHAPE[0]
            x = random_tensor(m, m, dtype=dtype, seed=1).to(device)
            product, work = lambda: F.linear(x, x), 2.0 * m**3
        flops = work / _fastest(product, device, rounds)
    return Peaks(bandwidth, flops, dtype_name(dtype), size)


def _attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


@lru_cache(maxsize=1)
def _counters() -> dict[Any, Any]:
    """torch's own FLOP formulas by op, and that of the CPU's attention, which torch's table lacks."""
    found = {op: count for op, count in flop_registry.items() if isinstance(op, torch._ops.OpOverloadPacket)}
    cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if cpu is not None:
        found.setdefault(cpu, _attention_on_cpu)
    return found


class WorkSeen(TorchDispatchMode):
    """Least work of what runs inside the block, without keeping a tensor.

    Attributes:
        ops: (op and backend, its tensors in words) -> (calls, work of them all), by the ops' own cost functions.
        stock: (aten op, shapes of its tensors) -> the same, FLOPs by torch's formulas, each operand moved once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[tuple[str, str], tuple[int, Cost]] = {}
        self.stock: dict[tuple[str, tuple[tuple[int, ...], ...]], tuple[int, Cost]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func.overloadpacket not in _counters():
            with self:  # in inference mode a composite op comes whole: see the ops it is made of
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func.namespace == "vlmops":
            name = func._schema.name.split("::")[1]
            cost = stated(name)
            if cost is not None:
                self._note(self.ops, (f"{name} {args[-1]}", ranges.describe(args[:-1])), cost(*args[:-1]))
        elif func.overloadpacket in _counters():
            flops = _counters()[func.overloadpacket](*args, **kwargs, out_val=out)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = nbytes(*[t for t in tree_leaves(out) if isinstance(t, Tensor)])
            key = (func._schema.name, tuple(tuple(t.shape) for t in tensors if t.dim()))
            self._note(self.stock, key, Cost(nbytes(*tensors), written, int(flops)))
        return out

    @staticmethod
    def _note(table: dict[Any, tuple[int, Cost]], key: Any, cost: Cost) -> None:
        calls, total = table.get(key, (0, Cost(0, 0)))
        table[key] = (calls + 1, total + cost)

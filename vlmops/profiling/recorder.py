"""Which of our ops a call runs, with which arguments and on which backend: read from torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OpRecorder", "backends_used"]


class OpRecorder(TorchDispatchMode):
    """Inside ``with OpRecorder() as seen:`` every call of a ``vlmops::`` op is kept in ``seen.calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "vlmops":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def backends(self) -> dict[str, list[str]]:
        """Operation -> backends it ran on (an op's last argument), in the order they were first seen."""
        found: dict[str, list[str]] = {}
        for func, args in self.calls:
            seen = found.setdefault(func._schema.name.split("::")[1], [])
            if args[-1] not in seen:
                seen.append(args[-1])
        return found


def backends_used(run: Callable[[], Any], op: str | None = None) -> str:
    """The backends one call uses, in words: "cpu", or "linear: cpu; mlp: cpu, torch" without ``op``."""
    with OpRecorder() as seen:
        run()
    if op is not None:
        return ", ".join(seen.backends.get(op, []))
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in seen.backends.items())

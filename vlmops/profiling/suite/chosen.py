"""What a run was asked for, checked against what there is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmops.backends import BACKENDS
from vlmops.ops._shared.registry import OPS
from vlmops.profiling.gpu_check.tasks import DTYPES
from vlmops.profiling.stacks import STACKS
from vlmops.profiling.timing import MIN_ROUNDS
from vlmops.profiling.towers import TOWERS

__all__ = ["DTYPES", "MODELS", "OURS", "PEERS", "PLAIN", "STACK", "Chosen"]

#: Ours; plain PyTorch as a user writes it; the reference stack of ``vlmops.models``.
OURS, PLAIN, STACK = "vlmops", "torch", "vlmops.models"
PEERS = (PLAIN, "compile", "openvino", "onnxruntime", "flash-attn", "liger")
QUICK_PEERS = (PLAIN, "compile")
MODELS = tuple(dict.fromkeys((*TOWERS, *STACKS)))


@dataclass(frozen=True)
class Chosen:
    """Options of a run.

    Args:
        ops, models: which are measured.
        dtypes: names of ``DTYPES``.
        peers: names of ``PEERS``.
        backend: forced on our side; "auto": measured choice, as users get it.
        device: "cpu" or "cuda".
        threads: of everybody, on a CPU.
        quick: small shapes and the fewest rounds.
        nvtx: ranges are open while it is timed.
        timed: False: outputs are checked and nothing is timed (``--benchmark-disable``).
    """

    ops: tuple[str, ...]
    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    backend: str = "auto"
    device: str = "cpu"
    threads: int = 2
    quick: bool = False
    nvtx: bool = False
    timed: bool = True

    @property
    def rounds(self) -> int:
        """Timed rounds of a group."""
        return MIN_ROUNDS if self.quick else MIN_ROUNDS + 2

    @property
    def longest_call(self) -> float:
        """Seconds that one call may take: a slower candidate is left out, and said."""
        return 2.5 if self.quick else 8.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the rounds."""
        return {**asdict(self), "rounds": self.rounds}

    @classmethod
    def of(
        cls, *, op: Sequence[str] = (), model: Sequence[str] = (), dtype: Sequence[str] = (), peers: Sequence[str] = (),
        backend: str = "", device: str = "", threads: int = 0, quick: bool = False, nvtx: bool = False, timed: bool = True,
    ) -> Chosen:  # fmt: skip
        """From what was typed; lists may hold commas. Neither op nor model: everything. No dtype: what every peer of the
        device computes in, fp32 on a CPU and bf16 on a GPU.

        Raises:
            ValueError: an unknown name, a missing GPU or package; the message names what is known.
        """
        everything = not op and not model
        if device not in ("", "cpu", "cuda"):
            raise ValueError(f"--device: {device!r} is none of cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU")
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if threads < 0:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        return cls(
            ops=_names("--op", op, sorted(OPS), sorted(OPS) if everything else ()),
            models=_names("--model", model, MODELS, MODELS if everything else ()),
            dtypes=_names("--dtype", dtype, DTYPES, ("bf16" if place == "cuda" else "fp32",)),
            peers=_names("--peers", peers, PEERS, QUICK_PEERS if quick else PEERS),
            backend=_names("--backend", [backend] if backend else [], ("auto", *BACKENDS), ("auto",))[0],
            device=place, threads=threads or min(2, cores), quick=quick, nvtx=nvtx, timed=timed,
        )  # fmt: skip


def _names(option: str, given: Iterable[str], known: Iterable[str], default: Iterable[str]) -> tuple[str, ...]:
    asked = [name.strip() for text in given for name in text.split(",") if name.strip()]
    known = tuple(known)
    for name in asked:
        if name not in known:
            raise ValueError(f"{option}: {name!r} is none of {', '.join(known)}")
    return tuple(dict.fromkeys(asked)) or tuple(default)

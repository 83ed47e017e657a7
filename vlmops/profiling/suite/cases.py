"""The cases of single operations: loads of `vlmops gpu-check`, in fewer rows on a CPU."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlmops
from vlmops.profiling import roofline
from vlmops.profiling.gpu_check import loads, parity
from vlmops.profiling.gpu_check.loads import Load
from vlmops.profiling.gpu_check.peers import Peer
from vlmops.profiling.recorder import backends_used
from vlmops.profiling.suite import peers, plain
from vlmops.profiling.suite.chosen import DTYPES, OURS, PLAIN, Chosen
from vlmops.profiling.suite.group import Candidate, LeftOut, Setting
from vlmops.profiling.timing import Work
from vlmops.profiling.tolerance import judge

__all__ = ["Case"]

COPIES = 3  # of the arguments on a GPU, so that no call finds what the last one left in a cache
PEER_FACTOR = 4.0  # a peer may round differently: it is refused only where it computes something else
#: Ops whose plain expression is exported: products, convolutions, SDPA and norms are in every exporter.
EXPORTED = ("cross_attention", "linear", "mlp", "norms", "patchify", "perceiver_attention", "varlen_attention")


@dataclass(frozen=True)
class Case:
    """One shape of an op.

    Args:
        op: name in the registry.
        title: what it is called; unique in its file.
        load: how the label of a load of ``gpu_check.loads`` begins; like the title where it is empty.
        cpu: sizes that differ from the load's on a CPU, by the names of the load's maker.
        quick: sizes that differ from ``cpu`` in a quick run; None: not in a quick run.
    """

    op: str
    title: str
    load: str = ""
    cpu: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """The title as an id: letters, digits and dashes."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.title).strip("-").lower()

    @property
    def kind(self) -> str:
        """An operation, in reports."""
        return "op"

    @property
    def what(self) -> str:
        """The op."""
        return self.op

    def chosen(self, chosen: Chosen) -> bool:
        """Whether the run measures it."""
        return self.op in chosen.ops and (self.quick is not None or not chosen.quick)

    def sized(self, chosen: Chosen) -> Load:
        """The load at the sizes of this run.

        Raises:
            ValueError: no load, or several, begin like ``load``; a size that its maker does not know.
        """
        mine = [load for load in loads.LOADS if load.op == self.op]
        begins = self.load or self.title
        found = [x for x in mine if x.label == begins] or [x for x in mine if x.label.startswith(begins)]
        if len(found) != 1:
            raise ValueError(f"load: expected the beginning of one label of {self.op}, {begins!r} is of {len(found)}")
        load = found[0]
        sizes = {} if chosen.device == "cuda" else dict(self.cpu)
        if chosen.device != "cuda" and chosen.quick:
            sizes.update(self.quick or {})
        assert isinstance(load.make, partial)  # every load is a maker with its sizes
        unknown = set(sizes) - set(load.make.keywords)
        if unknown:
            raise ValueError(
                f"sizes of {load.name}: {', '.join(sorted(unknown))} is none of {', '.join(load.make.keywords)}"
            )
        return replace(load, make=partial(load.make.func, *load.make.args, **{**load.make.keywords, **sizes}))

    def label(self, chosen: Chosen) -> str:
        """Title and sizes in words."""
        made = self.sized(chosen).make
        assert isinstance(made, partial)
        return f"{self.title}, {', '.join(_words(k, v) for k, v in made.keywords.items() if v is not False)}"

    def names(self, chosen: Chosen) -> tuple[str, ...]:
        """Candidates of the group, ours first."""
        return (OURS, *(name for name in chosen.peers if not self.absent(name)))

    def absent(self, peer: str) -> str:
        """Why there is no such peer of this op on any machine; "" if there is one."""
        has = peer in (PLAIN, "compile") or (peer in peers.EXPORTERS and self.op in EXPORTED)
        if has or (peer == "flash-attn" and self.op == "varlen_attention"):
            return ""
        if peer == "liger" and self.op in ("linear_cross_entropy", "mlp", "norms", "rotary"):
            return ""
        return "it has no such op" if peer not in peers.EXPORTERS else "no export is written for it"

    def build(self, dtype: str, chosen: Chosen) -> Setting:
        """Tensors, oracle and makers of the candidates."""
        return _Op(self.sized(chosen), dtype, chosen).setting()


def _words(name: str, value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
        return f"{name} {len(value)} x {value[0]}"
    if isinstance(value, tuple):
        return f"{name} {' '.join(map(str, value))}"
    return name if value is True else f"{name} {value}"


class _Op:
    """A load placed on the device."""

    def __init__(self, load: Load, dtype: str, chosen: Chosen) -> None:
        self.load, self.chosen, self.dtype = load, chosen, DTYPES[dtype]
        device = torch.device(chosen.device)
        made = parity.map_tensors(load.arguments(False), Tensor.detach)
        self.copies = [parity.place(made, device, self.dtype) for _ in range(COPIES if device.type == "cuda" else 1)]
        self.args, self.kwargs = self.copies[0]
        self.plain = plain.of(load, *self.copies[0])

    def setting(self) -> Setting:
        make: dict[str, Callable[[], Candidate]] = {OURS: self._ours, PLAIN: self._plain, "compile": self._compiled}
        for name, export in peers.EXPORTERS.items():
            make[name] = functools.partial(self._exported, export)
        make["flash-attn"] = lambda: self._gpu_peer("flash-attn")
        make["liger"] = lambda: self._gpu_peer("Liger")
        return Setting(make, self._check, self._work, lambda: backends_used(self._our_call, self.load.op))

    def _our_call(self) -> Any:
        return self.load.call(*self.args, **self.kwargs)

    def _ours(self) -> Candidate:
        weight = self.args[1] if self.load.op == "quantized_linear" else None
        precision = "fp8" if self.load.op == "fp8_attention" else f"{weight.kind} weight" if weight is not None else ""
        calls = [functools.partial(self.load.call, *args, **kwargs) for args, kwargs in self.copies]
        return Candidate(calls, precision)

    def _plains(self) -> list[plain.Plain]:
        return [self.plain, *(plain.of(self.load, *copy) for copy in self.copies[1:])]

    def _plain(self) -> Candidate:
        return self._as_plain(list[Callable[[], Any]](self._plains()))

    def _compiled(self) -> Candidate:
        if self.chosen.device == "cuda":  # the buffers rotate, so the weights are arguments
            call, note = peers.compiled(self.plain.call, (self.plain.args, self.plain.kwargs))
            return self._as_plain([functools.partial(call, *p.args, **p.kwargs) for p in self._plains()], note)
        call, note = peers.compiled(plain.Expression(self.plain).eval(), (self.plain.live, {}))
        return self._as_plain([functools.partial(call, *self.plain.live)], note)

    def _exported(self, export: peers.Exporter) -> Candidate:
        found = export(plain.Expression(self.plain).eval(), self.plain.live, self.chosen)
        return found

    def _as_plain(self, calls: list[Any], note: str = "") -> Candidate:
        notes = "; ".join(part for part in (self.plain.note, note) if part)
        return Candidate(calls, note=notes, compared=self.plain.compared)

    def _gpu_peer(self, begins: str) -> Candidate:
        found: list[Peer] = [p for p in self.load.peers(self.args, self.kwargs) if p.name.startswith(begins)]
        if not found:
            raise LeftOut("it has no kernel for this case")
        if found[0].missing:
            raise LeftOut(found[0].missing)
        if self.chosen.device != "cuda":
            raise LeftOut("it needs a GPU")
        return Candidate([functools.partial(found[0].call, *args, **kwargs) for args, kwargs in self.copies])

    def _work(self) -> Work:
        with vlmops.use_backend("torch"):
            return roofline.work_of(self._our_call)

    @functools.cached_property
    def _oracle(self) -> list[Tensor]:
        """The reference in float64, or plain PyTorch in float32 where a GPU has no room for it."""
        with torch.no_grad():
            try:
                with vlmops.use_backend("reference"):
                    args, kwargs = parity.to_dtype((self.args, self.kwargs), torch.float64)
                    return parity.tensors(self.load.call(*args, **kwargs))
            except torch.OutOfMemoryError:
                with vlmops.use_backend("torch"):
                    args, kwargs = parity.to_dtype((self.args, self.kwargs), torch.float32)
                    return parity.tensors(self.load.call(*args, **kwargs))

    @functools.cached_property
    def _plain_output(self) -> list[Tensor] | None:
        """Whose error is the measure of everybody's; None where it computes in another precision."""
        if not self.plain.compared:
            return None
        with torch.no_grad():
            return parity.tensors(self.plain())

    def _check(self, name: str, output: Any) -> str:
        found = parity.tensors(output)
        if len(found) != len(self._oracle):
            return f"{len(found)} results instead of {len(self._oracle)}"
        # an 8-bit rounding may fall on the other side of a tie, which a bound for the arguments' dtype does not know
        lowest = self.dtype if self.plain.compared else torch.bfloat16
        bad = []
        for i, (out, oracle) in enumerate(zip(found, self._oracle, strict=True)):
            low = None if name == PLAIN or self._plain_output is None else self._plain_output[i]
            judged = judge(out, low, oracle, f"result {i}", lowest)
            if not judged.error <= judged.bound * (1.0 if name == OURS or low is None else PEER_FACTOR):
                bad.append(str(judged))
        return "; ".join(bad)

"""The cases of whole models: vision towers, and models of the reference stack, at the widths of real checkpoints."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import vlmops
from vlmops.profiling import memory, roofline, stacks, towers
from vlmops.profiling.recorder import backends_used
from vlmops.profiling.stacks import Stack
from vlmops.profiling.suite import peers
from vlmops.profiling.suite.chosen import DTYPES, OURS, PLAIN, STACK, Chosen
from vlmops.profiling.suite.group import Candidate, Setting
from vlmops.profiling.timing import Work, WrongOutputError, agrees
from vlmops.profiling.towers import Tower

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """A whole model.

    Args:
        name: of ``towers.TOWERS`` or ``stacks.STACKS``.
        part: "tower": the vision tower; "model": image features, and the logits behind a prompt, of a model of one or two
            layers (`vlmops bench --stack` has larger ones).
        layers, patches: of a tower.
        quick: also in a quick run, a tower with one layer on few patches.
    """

    name: str
    part: str
    layers: int = 2
    patches: int | None = None
    quick: bool = False

    @property
    def kind(self) -> str:
        """A model, in reports."""
        return "model"

    @property
    def key(self) -> str:
        """The part."""
        return self.part

    @property
    def what(self) -> str:
        """The model."""
        return self.name

    def chosen(self, chosen: Chosen) -> bool:
        """Whether the run measures it."""
        return self.name in chosen.models and (self.quick or not chosen.quick)

    def label(self, chosen: Chosen) -> str:
        """The part; its size is known when it is built."""
        if self.part == "model":
            return "image features and prompt"
        layers, patches = self._size(chosen)
        return f"tower, {patches or towers.TOWERS[self.name].patches} patches, layers {layers}"

    def names(self, chosen: Chosen) -> tuple[str, ...]:
        """Candidates of the group, ours first."""
        own = (OURS, STACK) if self.part == "model" else (OURS,)
        return (*own, *(name for name in chosen.peers if not self.absent(name)))

    def absent(self, peer: str) -> str:
        """Why there is no such peer of this model on any machine; "" if there is one."""
        if peer in (PLAIN, "compile"):
            return ""
        if peer in peers.EXPORTERS:
            return "" if self.part == "tower" else "no export is written for it"
        return "it is no model"

    def _size(self, chosen: Chosen) -> tuple[int, int | None]:
        return (1, towers.TOWERS[self.name].quick) if chosen.quick else (self.layers, self.patches)

    def build(self, dtype: str, chosen: Chosen) -> Setting:
        """The model, and makers of the candidates."""
        if self.part == "model":
            return _Whole(stacks.build(self.name, DTYPES[dtype], quick=True), chosen).setting()
        layers, patches = self._size(chosen)
        return _Tower(
            towers.build(self.name, DTYPES[dtype], layers=layers, patches=patches), dtype, chosen, layers, patches
        ).setting()


def _agrees(name: str, outputs: dict[str, Any], oracle: Tensor | None) -> str:
    """What is wrong with an output, beside plain PyTorch's; that one only has to be of numbers that are not all 0."""
    try:
        agrees(name, PLAIN, oracle)({name: outputs[name], PLAIN: outputs[PLAIN]})
    except WrongOutputError as err:
        return str(err)
    return ""


def _to(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


# -- towers ------------------------------------------------------------------------------------------------------------


class _TowerOutput(nn.Module):
    """A tower as a function of its pixels alone, for exporters."""

    def __init__(self, module: nn.Module, tower: Tower, name: str) -> None:
        super().__init__()
        self.module, self.pooled, self.name = module, tower.name.startswith("qwen"), name
        self.rest = {k: v for k, v in tower.inputs.items() if k != name}

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.module(**{self.name: pixels, **self.rest})
        found: Tensor = out.pooler_output if self.pooled else out.last_hidden_state
        return found


class _Tower:
    def __init__(self, tower: Tower, dtype: str, chosen: Chosen, layers: int, patches: int | None) -> None:
        device = chosen.device
        self.tower = replace(tower, module=tower.module.to(device), inputs=_to(device, tower.inputs))
        self.dtype, self.chosen, self.layers, self.patches = dtype, chosen, layers, patches

    def setting(self) -> Setting:
        make: dict[str, Callable[[], Candidate]] = {OURS: self._ours, PLAIN: self._plain, "compile": self._compiled}
        for name, export in peers.EXPORTERS.items():
            make[name] = functools.partial(self._exported, export)
        tower = self.tower
        flops = float(sum(2 * m * k * n for m, k, n in tower.products)) + tower.attention.flops + tower.windows.flops
        moved = sum(
            p.numel() * p.element_size() for p in tower.module.parameters()
        )  # each weight is read once at least
        return Setting(make, self._check, lambda: Work(flops, float(moved)), self._backends, self._peak)

    @functools.cached_property
    def _patched(self) -> nn.Module:
        found: nn.Module = vlmops.patch_model(towers.shared_copy(self.tower.module))
        return found

    def _backends(self) -> str:
        return backends_used(lambda: self.tower.run(self._patched))

    def _ours(self) -> Candidate:
        return Candidate([lambda: self.tower.run(self._patched)], module=self._patched)

    def _plain(self) -> Candidate:
        return Candidate([self.tower.run], module=self.tower.module)

    def _compiled(self) -> Candidate:
        module, inputs = towers.shared_copy(self.tower.module), self.tower.inputs
        with torch.inference_mode():
            call, note = peers.compiled(module, ((), inputs), whole=False)
        return Candidate([lambda: self.tower.run(call)], note=note)

    def _exported(self, export: peers.Exporter) -> Candidate:
        name = next(k for k, v in self.tower.inputs.items() if v.is_floating_point())
        module = copy.deepcopy(self.tower.module)  # an exporter may change it
        return export(_TowerOutput(module, self.tower, name).eval(), (self.tower.inputs[name],), self.chosen)

    @functools.cached_property
    def _stock(self) -> tuple[Tensor, Tensor | None]:
        return self.tower.run(), towers.reference(self.tower)

    def _check(self, name: str, output: Any) -> str:
        out, oracle = self._stock
        return _agrees(name, {PLAIN: out, name: output}, oracle)

    def _peak(self) -> dict[str, int | str]:
        """Stock and patched, each in a process of its own; packed weights are counted."""
        if self.chosen.quick or self.chosen.device != "cpu":
            return {}
        job = {"tower": self.tower.name, "dtype": self.dtype, "threads": self.chosen.threads, "layers": self.layers}
        if self.patches:
            job["patches"] = self.patches
        found = memory.measure([{**job, "patched": patched} for patched in (False, True)])
        return {name: one.get("growth", one.get("error", "")) for name, one in zip((PLAIN, OURS), found, strict=True)}


# -- models of the reference stack -------------------------------------------------------------------------------------


class _Whole:
    """Image features and the logits of the prompt's last token."""

    def __init__(self, stack: Stack, chosen: Chosen) -> None:
        self.stack, self.chosen = stack, chosen
        if chosen.device != "cpu":
            for model in (stack.stock, stack.ours):
                model.to(chosen.device)
            self.stack = replace(stack, pixels=_to(chosen.device, stack.pixels), prompt=stack.prompt.to(chosen.device))

    def setting(self) -> Setting:
        make: dict[str, Callable[[], Candidate]] = {
            OURS: self._ours, STACK: self._reference_stack, PLAIN: self._plain, "compile": self._compiled,
        }  # fmt: skip
        return Setting(make, self._check, self._work, lambda: backends_used(lambda: self._run(self._patched)))

    def _run(self, model: Any) -> tuple[Tensor, Tensor]:
        return self.stack.encode(model), self.stack.logits(model)

    def _run_ours(self) -> tuple[Tensor, Tensor]:
        return self.stack.encode_ours(), self.stack.logits(self.stack.ours)

    @functools.cached_property
    def _patched(self) -> Any:
        return vlmops.patch_model(towers.shared_copy(self.stack.stock))

    def _ours(self) -> Candidate:
        return Candidate([lambda: self._run(self._patched)], module=self._patched)

    def _reference_stack(self) -> Candidate:
        return Candidate([self._run_ours], module=self.stack.ours)

    def _plain(self) -> Candidate:
        return Candidate([lambda: self._run(self.stack.stock)], module=self.stack.stock)

    def _compiled(self) -> Candidate:
        """Tower and decoder compiled in place in a copy: the glue between them is transformers' own."""
        import torch._inductor.config as inductor

        model = towers.shared_copy(self.stack.stock)
        for name in ("visual", "vision_tower", "language_model"):
            part = getattr(model.model, name, None)
            if part is not None:
                part.compile(dynamic=False)
        with inductor.patch(freezing=True):
            self._run(model)
        return Candidate([lambda: self._run(model)], note="tower and decoder, in several graphs where need be")

    def _work(self) -> Work:
        """Of the ops our stack runs."""
        return roofline.work_of(self._run_ours)

    @functools.cached_property
    def _stock(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        out = self._run(self.stack.stock)
        if self.stack.ours.dtype == torch.float32:
            return out, (None, None)
        wide = {k: x.float() if x.is_floating_point() else x for k, x in self.stack.pixels.items()}
        wider, model = replace(self.stack, pixels=wide), copy.deepcopy(self.stack.stock).float()
        return out, (wider.encode(model), wider.logits(model))

    def _check(self, name: str, output: Any) -> str:
        outs, oracles = self._stock
        found = (
            _agrees(name, {PLAIN: stock, name: mine}, oracle)
            for mine, stock, oracle in zip(output, outs, oracles, strict=True)
        )
        return "; ".join(
            f"{part}: {text}" for part, text in zip(("image features", "logits"), found, strict=True) if text
        )

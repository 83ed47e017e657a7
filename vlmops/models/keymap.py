"""Whose tensor is whose: a declarative map between our parameter names and a checkpoint's, read in both directions.

    rules = [Rule("blocks.{i}.qkv.weight", ["layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"], "cat",
                  layers=range(2))]
    load_into(module, checkpoint, rules)      # theirs -> ours
    theirs = dict(save(module.state_dict(), rules))  # ours -> theirs

A checkpoint is any ``Mapping[str, Tensor]``; a tensor is asked for when its turn comes, so it may read lazily. One that has a
method ``once`` is asked by it for tensors that are copied and then not needed any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["KeyMapError", "Rule", "affine", "expand", "layer", "load", "load_into", "prefixed", "save"]


#: Ways of ``Rule.how``: "" without a number, "1" with one, "*" either.
HOW = {"": "", "cat": "*", "split": "1", "squeeze": "1", "transpose": "", "heads": "1", "ignore": ""}


class KeyMapError(ValueError):
    """A checkpoint that does not fit the map: the message names the tensor and what was expected."""


@dataclass(frozen=True)
class Rule:
    """One of our tensors and where a checkpoint keeps it.

    Args:
        ours: our name; ``{i}`` stands for the number of a layer. Empty with "ignore".
        theirs: the checkpoint's name or names, ``{i}`` likewise.
        how: "": the same tensor.
            "cat": their tensors behind each other along dimension 0 are ours; of equal size, or "cat:a,b,c" of these sizes.
            "split:k": ours is the k-th part of theirs along dimension 0; the parts of one tensor are all rules that name it.
            "squeeze:k": theirs has k dimensions of size 1 in front that ours has not.
            "transpose": ours is their matrix transposed.
            "heads:h": rows of theirs are [h, 3, d] (query, key and value of each head together), of ours [3, h, d].
            "ignore": theirs is not used (and need not be there); ``save`` leaves it out.
        layers: the numbers ``{i}`` takes.

    Raises:
        ValueError: an unknown ``how``, or names that do not go with it.
    """

    ours: str
    theirs: Sequence[str]
    how: str = ""
    layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "theirs", (self.theirs,) if isinstance(self.theirs, str) else tuple(self.theirs))
        kind, colon, number = self.how.partition(":")
        if HOW.get(kind, "?") not in ("*", "1" if colon else "") or (colon and not re.fullmatch(r"\d+(,\d+)*", number)):
            raise ValueError(f"how: unknown {self.how!r} for {self.ours!r}")
        if colon and len(self.numbers) != (len(self.theirs) if kind == "cat" else 1):
            raise ValueError(f"how: expected a number for each name of {self.ours!r}, got {self.how!r}")
        if (len(self.theirs) != 1 and kind not in ("cat", "ignore")) or not self.theirs:
            raise ValueError(f"theirs: expected one name for {self.ours!r} with how {self.how!r}, got {self.theirs}")
        if bool(self.ours) == (kind == "ignore"):
            raise ValueError(f"ours: expected a name, and none with how 'ignore', got {self.ours!r} and {self.how!r}")

    @property
    def numbers(self) -> list[int]:
        """What stands behind the colon of ``how``."""
        return [int(n) for n in self.how.partition(":")[2].split(",") if n]


def expand(rules: Iterable[Rule]) -> list[Rule]:
    """One rule a tensor: ``{i}`` replaced by each layer's number."""
    found: list[Rule] = []
    for rule in rules:
        if not any("{i}" in name for name in (rule.ours, *rule.theirs)):
            found.append(rule)
            continue
        for i in rule.layers:
            ours, theirs = rule.ours.replace("{i}", str(i)), [name.replace("{i}", str(i)) for name in rule.theirs]
            found.append(Rule(ours, theirs, rule.how))
    return found


def prefixed(rules: Iterable[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """The rules of a module that is part of another: prefixes in front of our names and of theirs."""
    return [
        replace(rule, ours=ours + rule.ours if rule.ours else "", theirs=[theirs + name for name in rule.theirs])
        for rule in rules
    ]


def affine(ours: tuple[str, str], theirs: str, bias: bool = True, how: str = "") -> list[Rule]:
    """Weight and, where there is one, bias of one of their layers or norms, as our two names."""
    return [Rule(ours[0], f"{theirs}.weight", how), *([Rule(ours[1], f"{theirs}.bias", how)] if bias else [])]


def layer(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """``affine`` of a layer or norm that is a module here, too."""
    return affine((f"{ours}.weight", f"{ours}.bias"), theirs, bias)


def load(
    source: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, Sequence[int]], *, strict: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs out of a checkpoint, one at a time, in the checkpoint's dtype.

    Args:
        source: their tensors by name. A tensor that needs no change comes out as it went in (no copy).
        rules: the map; ``expand`` is done here.
        shapes: of every tensor of ours, by name.
        strict: a tensor of theirs that no rule names is an error.

    Raises:
        KeyMapError: a missing, unexpected or wrongly shaped tensor. Names are checked before anything is read; shapes when a
            tensor's turn comes.
    """
    flat = expand(rules)
    _check_names(source, flat, shapes, strict)
    return _load(source, flat, shapes)


def load_into(module: nn.Module, source: Mapping[str, Tensor], rules: Iterable[Rule], *, strict: bool = True) -> None:
    """Fills a module's parameters from a checkpoint; all of them or, on an error, none.

    A parameter on the meta device becomes the checkpoint's tensor (its device and dtype, its memory where no change was
    needed); any other keeps its device and dtype and is written to.

    Args:
        module: whose parameters and persistent buffers the rules name.
        source, rules, strict: as for ``load``.

    Raises:
        KeyMapError: as ``load``.
    """
    state = module.state_dict()
    found = dict(load(source, rules, {name: t.shape for name, t in state.items()}, strict=strict))
    meta = {name for name, t in state.items() if t.is_meta}
    module.load_state_dict({n: t for n, t in found.items() if n in meta}, strict=False, assign=True)
    module.load_state_dict({n: t for n, t in found.items() if n not in meta}, strict=False)


def save(source: Mapping[str, Tensor], rules: Iterable[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Their (name, tensor) pairs out of ours, one at a time: ``load``'s inverse.

    Args:
        source: our tensors by name, all of them.
        rules: the map.

    Raises:
        KeyMapError: a tensor of ours that is missing or that no rule names, or whose shape does not fit its rule.
    """
    flat = expand(rules)
    ours = {rule.ours for rule in flat if rule.ours}
    _complain("the model", "missing", [name for name in ours if name not in source])
    _complain("the model", "without a rule", [name for name in source if name not in ours])
    return _save(source, flat)


def _check_names(
    source: Mapping[str, Tensor], rules: list[Rule], shapes: Mapping[str, Sequence[int]], strict: bool
) -> None:
    """KeyMapError unless the rules name each of ours once and all they need of theirs is there."""
    ours = [rule.ours for rule in rules if rule.ours]
    known, wanted = set(ours), set(shapes)
    if len(known) != len(ours):
        _complain("the key map", "named twice", sorted({name for name in ours if ours.count(name) > 1}))
    _complain("the key map", "of the model without a rule", sorted(wanted - known))
    _complain("the key map", "the model does not have", sorted(known - wanted))
    needed = {name: None for rule in rules if rule.how != "ignore" for name in rule.theirs}
    _complain("the checkpoint", "missing", [name for name in needed if name not in source])
    if strict:
        ignored = {name for rule in rules if rule.how == "ignore" for name in rule.theirs}
        _complain("the checkpoint", "unexpected", [n for n in source if n not in needed and n not in ignored])


def _complain(where: str, what: str, names: list[str]) -> None:
    """KeyMapError with the first of the names, if there is one."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise KeyMapError(f"{where}: {len(names)} tensor{'s' * (len(names) > 1)} {what}: {', '.join(names[:5])}{more}")


def _load(
    source: Mapping[str, Tensor], rules: list[Rule], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    parts = _parts(rules)
    for rule in rules:
        if rule.how == "ignore":
            continue
        want, kind = tuple(shapes[rule.ours]), rule.how.partition(":")[0]
        copied = kind in ("cat", "transpose", "heads")
        read = getattr(source, "once", source.__getitem__) if copied else source.__getitem__
        theirs, what = [read(name) for name in rule.theirs], " + ".join(rule.theirs)
        if len({t.dtype for t in theirs}) > 1:
            raise KeyMapError(f"{what}: expected one dtype, got {', '.join(str(t.dtype) for t in theirs)}")
        t, shown = theirs[0], " + ".join(str(list(t.shape)) for t in theirs)
        fits = all(part.dim() == t.dim() and part.dim() and part.shape[1:] == t.shape[1:] for part in theirs[1:])
        if kind == "cat" and fits:
            if rule.numbers and [part.shape[0] for part in theirs] != rule.numbers:
                raise KeyMapError(f"{what}: expected {rule.numbers} rows for {rule.ours}, got {shown}")
            t = torch.cat(theirs)
        elif kind == "split" and t.dim():
            sizes = [next(iter(shapes[name]), 0) for name in parts[rule.theirs[0]]]
            fits = sum(sizes) == t.shape[0]
            t = t.split(sizes)[rule.numbers[0]] if fits else t
        elif kind == "squeeze":
            lead = rule.numbers[0]
            fits = t.shape[:lead] == (1,) * lead
            t = t.view(t.shape[lead:]) if fits else t
        elif kind == "transpose":
            fits = t.dim() == 2
            t = t.t().contiguous() if fits else t
        elif kind == "heads" and t.dim():
            t, fits = _heads(t, rule.numbers[0], first=True)
        if not fits or tuple(t.shape) != want:
            raise KeyMapError(f"{what}: expected {rule.how or 'a tensor'} to {list(want)} for {rule.ours}, got {shown}")
        yield rule.ours, t


def _save(source: Mapping[str, Tensor], rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    parts = _parts(rules)
    for rule in rules:
        kind = rule.how.partition(":")[0]
        if kind == "ignore":
            continue
        t, fits = source[rule.ours], True
        if kind == "cat":
            pieces, n = len(rule.theirs), t.shape[0] if t.dim() else 0
            sizes = rule.numbers or [n // pieces] * pieces
            if sum(sizes) != n:
                raise KeyMapError(
                    f"{rule.ours}: expected {sizes} rows for {', '.join(rule.theirs)}, got {list(t.shape)}"
                )
            yield from zip(rule.theirs, (part.contiguous() for part in t.split(sizes)), strict=True)
            continue
        if kind == "split":
            if rule.numbers[0] == 0:
                yield rule.theirs[0], torch.cat([source[name] for name in parts[rule.theirs[0]]])
            continue
        if kind == "squeeze":
            t = t.view(*(1,) * rule.numbers[0], *t.shape)
        elif kind == "transpose":
            t = t.t().contiguous()
        elif kind == "heads":
            t, fits = _heads(t, rule.numbers[0], first=False)
        if not fits:
            raise KeyMapError(f"{rule.ours}: {list(t.shape)} does not fit {rule.how}")
        yield rule.theirs[0], t


def _parts(rules: list[Rule]) -> dict[str, list[str]]:
    """Their name -> our names of its parts, in order; KeyMapError where a part is missing."""
    found: dict[str, dict[int, str]] = {}
    for rule in rules:
        if rule.how.startswith("split:"):
            found.setdefault(rule.theirs[0], {})[rule.numbers[0]] = rule.ours
    for theirs, names in found.items():
        if sorted(names) != list(range(len(names))):
            raise KeyMapError(f"the key map: {theirs}: expected parts 0, 1, ... each once, got {sorted(names)}")
    return {theirs: [names[i] for i in sorted(names)] for theirs, names in found.items()}


def _heads(t: Tensor, heads: int, *, first: bool) -> tuple[Tensor, bool]:
    """Rows [heads, 3, d] <-> [3, heads, d]; False where they cannot be divided so."""
    if t.shape[0] % (3 * heads):
        return t, False
    shape = (heads, 3, -1, *t.shape[1:]) if first else (3, heads, -1, *t.shape[1:])
    return t.reshape(shape).transpose(0, 1).reshape(t.shape), True

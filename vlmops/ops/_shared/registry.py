"""How an operation is registered and how its backend is picked. Written once, used by every op.

An op is a folder with one module per backend. Each module has

- ``forward(*args)``: the schema's arguments without the trailing ``backend``;
- ``supports(*args) -> str | None`` (optional): why it cannot run these arguments, or None;
- ``backward(grads, outputs, args, needs) -> list[Tensor | None]`` (optional): gradients of the op's
  differentiable arguments, in their order, computed where ``needs`` says so. A module without one gets
  the gradient of the ``torch`` module, and a ``torch`` or ``reference`` module without one is differentiated
  by recomputation.

``Op`` makes two dispatcher ops of it, ``vlmops::<name>`` and ``vlmops::<name>_backward``. The backend chosen at
forward travels as the last argument, so a backward that runs later, elsewhere, sees the same one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlmops import backends
from vlmops.backends import choice, ranges, triton_runtime

__all__ = ["OPS", "TRACED_BACKEND", "Op", "bucket"]

log = logging.getLogger("vlmops")

LIB = torch.library.Library("vlmops", "FRAGMENT")
OPS: dict[str, Op] = {}
#: Backend of the ops traced now: what ``torch.compile`` puts in its graph. Patched modules with a forced backend set it.
TRACED_BACKEND = ["auto"]

#: Module of each backend. "torch" lives in composition.py: a submodule named torch would replace the package's own
#: global ``torch`` the moment it is imported.
MODULE = {"reference": "reference", "torch": "composition", "cpu": "cpu", "triton": "triton", "cuda": "cuda"}

_PLAIN = (Tensor, torch.nn.Parameter)

#: Preference where nothing is measured, by device type. On a CPU Triton's interpreter runs only where it is forced.
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def bucket(n: int) -> int:
    """Lengths are bucketed to a power of two (at least 16), so that near lengths share one measurement."""
    return max(16, 1 << (n - 1).bit_length()) if n > 0 else 0


class Op:
    """One operation of ``vlmops.ops``.

    Args:
        package: the op's package, e.g. ``vlmops.ops.linear``; its last part is the op's name.
        schema: arguments and returns, e.g. ``"(Tensor x, Tensor weight) -> Tensor"``, no defaults, without ``backend``.
        differentiable: names of the arguments that get a gradient.
        fake: shapes and dtypes of the outputs from the arguments (meta tensors); returns a tensor or a tuple.
        autocast: names of the tensor arguments that autocast brings to its low precision.
        saved_outputs: positions of the outputs that the backward needs (e.g. out and lse of an attention).
        same_gradient: argument -> differentiable argument whose gradient it shares (both terms of a sum): the backward
            op cannot return one tensor twice.
        tiny: ``tiny(*args)`` is True where measuring would cost more than it can win (static order then).
        bucketed: tensor arguments all of whose sizes are bucketed (pictures: each has its own height and width).

    The tuning key holds every option and every size; the first size of each tensor (rows, tokens) is bucketed.
    """

    def __init__(
        self,
        package: str,
        schema: str,
        *,
        differentiable: Sequence[str],
        fake: Callable[..., Any],
        autocast: Sequence[str] = (),
        saved_outputs: Sequence[int] = (),
        same_gradient: Mapping[str, str] | None = None,
        tiny: Callable[..., bool] | None = None,
        bucketed: Sequence[str] = (),
    ) -> None:
        self.package = package
        self.name = package.rsplit(".", 1)[-1]
        args, returns = schema.split("->")
        self.schema = schema
        parts = re.findall(r"([\w?\[\]]+) (\w+)", args)
        self.arg_types = [kind for kind, _ in parts]
        self.arg_names = [name for _, name in parts]
        self.num_outputs = returns.count("Tensor")
        self.diff = [self.arg_names.index(name) for name in differentiable]
        self.cast = [self.arg_names.index(name) for name in autocast]
        self.saved_outputs = tuple(saved_outputs)
        self.same = {self.arg_names.index(a): self.arg_names.index(b) for a, b in (same_gradient or {}).items()}
        self.fake = fake
        self.tiny = tiny
        self.last = ""  # what ``auto`` picked at the latest call; patched modules remember it
        self.bucketed = frozenset(bucketed)
        self.backends = tuple(
            name for name in backends.BACKENDS if importlib.util.find_spec(f"{package}.{MODULE[name]}") is not None
        )
        self._tensor_args = [i for i, kind in enumerate(self.arg_types) if kind.startswith("Tensor")]
        self._modules: dict[str, ModuleType] = {}
        self._memory: dict[Any, str] = {}
        self._failed: set[str] = set()  # backends that could not start: ``auto`` leaves them out
        self._register(args.strip()[1:-1], returns.strip())
        OPS[self.name] = self

    # -- registration ------------------------------------------------------------------------------------------

    def _register(self, args: str, returns: str) -> None:
        name, back = self.name, f"{self.name}_backward"
        LIB.define(f"{name}({args}, str backend) -> {returns}")
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(self.num_outputs))
        outs = "".join(f", Tensor out_{i}" for i in self.saved_outputs)
        rets = ", ".join(["Tensor"] * len(self.diff))
        LIB.define(f"{back}({grads}{outs}, {args}, bool[] needs, str backend) -> ({rets})")
        LIB.impl(name, self._forward, "CompositeExplicitAutograd")
        LIB.impl(back, self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vlmops::{name}", lambda *a: self.fake(*a[:-1]), lib=LIB)
        torch.library.register_fake(f"vlmops::{back}", self._fake_backward, lib=LIB)
        torch.library.register_autograd(
            f"vlmops::{name}", self._autograd_backward, setup_context=self._setup_context, lib=LIB
        )
        if self.cast:
            for device, key in _AUTOCAST_KEYS.items():
                LIB.impl(name, self._autocast_kernel(device, key), key.name)
        self.raw = getattr(torch.ops.vlmops, name).default
        self.raw_backward = getattr(torch.ops.vlmops, back).default

    def _forward(self, *args: Any) -> Any:
        *rest, backend = args
        if backend == "auto":  # a compiled graph: the choice could not be made while tracing
            backend = self.resolve(rest)
        return self._run(backend, rest)

    def _backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        *rest, needs, backend = args
        n, m = self.num_outputs, len(self.saved_outputs)
        grads, outs, inputs = rest[:n], rest[n : n + m], rest[n + m :]
        if backend == "auto":
            backend = self.resolve(inputs)
        recorder = ranges.ACTIVE
        if recorder is None:
            result = self._try_gradients(backend, grads, outs, inputs, needs)
        else:
            with recorder.range("op", f"{self.name}.backward {backend}", ranges.describe(inputs)):
                result = self._try_gradients(backend, grads, outs, inputs, needs)
        found = tuple(
            torch.zeros_like(inputs[i], memory_format=torch.contiguous_format)
            if need and grad is None
            else grad.to(inputs[i].dtype).contiguous()
            if need and grad is not None
            else grads_placeholder(grads)
            for i, need, grad in zip(self.diff, needs, result, strict=True)
        )
        return found if len(found) > 1 else found[0]  # a schema of one return wants a tensor, not a tuple of one

    def _try_gradients(self, backend: str, *args: Any) -> Sequence[Tensor | None]:
        """``_gradients``, by plain PyTorch where the backend could not start."""
        try:
            return self._gradients(backend, *args)
        except backends.LaunchError as err:
            return self._gradients(self._instead(backend, err), *args)

    def _gradients(
        self, backend: str, grads: Sequence[Tensor | None], outs: Sequence[Tensor], inputs: Sequence[Any],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        module = self.module(backend)
        if not hasattr(module, "backward") and backend not in ("torch", "reference"):
            module = self.module("torch")
        if hasattr(module, "backward"):
            found: Sequence[Tensor | None] = module.backward(grads, outs, inputs, needs)
            return found
        return self._recompute(module, grads, inputs, needs)

    def _recompute(
        self, module: ModuleType, grads: Sequence[Tensor | None], inputs: Sequence[Any], needs: Sequence[bool]
    ):
        """Gradients by running the module's forward again under autograd."""
        inputs = list(inputs)
        wanted = [i for i, need in zip(self.diff, needs, strict=True) if need]
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            outputs = module.forward(*inputs)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = (
                torch.autograd.grad(
                    [o for o, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs], allow_unused=True
                )
                if pairs
                else [None] * len(wanted)
            )
        by_arg = dict(zip(wanted, found, strict=True))
        return [by_arg.get(i) for i in self.diff]

    def _fake_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        *rest, needs, _ = args
        inputs = rest[self.num_outputs + len(self.saved_outputs) :]
        found = tuple(
            torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            if need
            else grads_placeholder(rest[: self.num_outputs])
            for i, need in zip(self.diff, needs, strict=True)
        )
        return found if len(found) > 1 else found[0]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [inputs[i] for i in self._tensor_args]
        ctx.save_for_backward(*tensors, *(outputs[i] for i in self.saved_outputs))
        ctx.plain = [None if i in self._tensor_args else value for i, value in enumerate(inputs)]
        ctx.set_materialize_grads(False)

    def _autograd_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = list(ctx.plain)
        for i, tensor in zip(self._tensor_args, saved, strict=False):
            inputs[i] = tensor
        outs = saved[len(self._tensor_args) :]
        wanted = {self.same.get(i, i) for i, need in enumerate(ctx.needs_input_grad) if need and inputs[i] is not None}
        needs = [i in wanted for i in self.diff]
        result: list[Tensor | None] = [None] * len(inputs)
        if any(needs) and any(g is not None for g in grads):
            found = self.raw_backward(*grads, *outs, *inputs[:-1], needs, inputs[-1])
            found = found if isinstance(found, (tuple, list)) else (found,)
            for i, need, grad in zip(self.diff, needs, found, strict=True):
                result[i] = grad if need else None
            for i, other in self.same.items():
                result[i] = result[other] if inputs[i] is not None else None
        return tuple(result)

    def _autocast_kernel(self, device: str, key: Any) -> Callable[..., Any]:
        exclude = torch._C.DispatchKeySet(key)

        def kernel(*args: Any) -> Any:
            cast = self.autocast_args(list(args), device)
            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return self.raw(*cast)

        return kernel

    def autocast_args(self, args: list[Any], device: str) -> list[Any]:
        """The arguments in autocast's low precision where autocast is on (float64 stays, as in torch's own ops)."""
        dtype = torch.get_autocast_dtype(device)
        for i in self.cast:
            value = args[i]
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float64):
                args[i] = value.to(dtype)
        return args

    # -- choice ------------------------------------------------------------------------------------------------

    def module(self, backend: str) -> ModuleType:
        """The backend's module, imported at first use."""
        found = self._modules.get(backend)
        if found is None:
            if backend not in self.backends:
                have = ", ".join(self.backends)
                raise backends.BackendError(f"{self.name} has no backend {backend!r}; it has {have}")
            found = self._modules[backend] = importlib.import_module(f"{self.package}.{MODULE[backend]}")
        return found

    def why_not(self, backend: str, args: Sequence[Any]) -> str | None:
        """Why this backend cannot run these arguments; None if it can."""
        if backend == "triton" and backend in self.backends and triton_runtime.installed() is not None:
            return triton_runtime.installed()
        try:
            module = self.module(backend)
        except (ImportError, backends.BackendError) as err:
            return str(err)
        supports = getattr(module, "supports", None)
        return supports(*args) if supports is not None else None

    def resolve(self, args: Sequence[Any]) -> str:
        """The backend for these arguments: forced, remembered, measured, or the first that can run."""
        forced = backends.forced_backend()
        if forced is not None:
            reason = self.why_not(forced, args)
            if reason is not None:
                raise backends.BackendError(f"backend {forced!r} cannot run {self.name}: {reason}")
            return forced
        raw_key = self._raw_key(args)
        found = self._memory.get(raw_key)
        if found is None:
            if len(self._memory) > 4096:
                self._memory.clear()
            found = self._memory[raw_key] = self._decide(args)
        self.last = found
        return found

    def _raw_key(self, args: Sequence[Any]) -> Any:
        return (
            torch.get_num_threads(),
            *[
                (a.shape, a.dtype, a.device, a.stride())
                if isinstance(a, Tensor)
                else tuple(a)
                if isinstance(a, list)
                else a
                for a in args
            ],
        )

    def _decide(self, args: Sequence[Any]) -> str:
        device = next(a.device for a in args if isinstance(a, Tensor))
        able = (b for b in ORDER.get(device.type, ("torch",)) if b in self.backends and b not in self._failed)
        order = [b for b in able if self.why_not(b, args) is None]
        if not order:
            return "torch"
        if len(order) == 1 or (self.tiny is not None and self.tiny(*args)):
            return order[0]
        calls = {name: functools.partial(self.module(name).forward, *args) for name in order}
        return choice.decide(self.name, self._bucketed_key(args), calls, order, device)

    def _bucketed_key(self, args: Sequence[Any]) -> str:
        parts = []
        for name, a in zip(self.arg_names, args, strict=True):
            if isinstance(a, Tensor):
                last = a.dim() if name in self.bucketed else 1
                sizes = [*map(str, map(bucket, a.shape[:last])), *map(str, a.shape[last:])]
                dense = "" if a.is_contiguous() else "s"
                parts.append(f"{name}={str(a.dtype)[6:]}[{','.join(sizes)}]{dense}")
            elif isinstance(a, float):
                parts.append(f"{name}={a:.4g}")
            elif isinstance(a, int) and not isinstance(a, bool):
                parts.append(f"{name}={a if a < 64 else bucket(a)}")
            elif a is not None and a is not False:
                parts.append(f"{name}={a}")
        return " ".join(parts)

    # -- calls -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """Run the op on checked arguments (everything but ``backend``)."""
        if torch.compiler.is_compiling():
            return self.raw(*args, TRACED_BACKEND[0])
        if self.cast:
            device = args[self.cast[0]].device.type
            if torch.is_autocast_enabled(device):
                args = tuple(self.autocast_args(list(args), device))
        backend = self.resolve(args)
        recorder = ranges.ACTIVE
        if recorder is not None:
            with recorder.range("op", f"{self.name} {backend}", ranges.describe(args)):
                return self._run(backend, args) if self._plain_call(args) else self.raw(*args, backend)
        if self._plain_call(args):
            return self._run(backend, args)
        return self.raw(*args, backend)

    def _run(self, backend: str, args: Sequence[Any]) -> Any:
        try:
            return self.module(backend).forward(*args)
        except backends.LaunchError as err:
            return self.module(self._instead(backend, err)).forward(*args)

    def _instead(self, backend: str, err: backends.LaunchError) -> str:
        """The backend that takes over for one that could not start, now and from now on; raises where it was forced."""
        if backends.forced_backend() == backend:
            raise err
        log.warning("vlmops: %s: backend %s could not start, plain PyTorch takes over: %s", self.name, backend, err)
        self._failed.add(backend)
        self._memory = {key: chosen for key, chosen in self._memory.items() if chosen != backend}
        return "torch"

    def _plain_call(self, args: Sequence[Any]) -> bool:
        """Whether nobody would notice if the dispatcher were left out: it costs as much as all the rest of a small call.

        No gradient wanted, no tensor subclass (fake, vmapped, DTensor), no dispatch mode, no functorch transform, no profiler.
        """
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        if torch.autograd._profiler_enabled():
            return False
        grad = torch.is_grad_enabled()
        for i in self._tensor_args:
            a = args[i]
            if a is not None and (type(a) not in _PLAIN or (grad and a.requires_grad)):
                return False
        return True


def grads_placeholder(grads: Sequence[Tensor | None]) -> Tensor:
    """An empty tensor in the place of a gradient nobody asked for: a schema cannot return None."""
    like = next(g for g in grads if g is not None)
    return like.new_empty(0)

"""Peers that are made of plain PyTorch by somebody's compiler: torch.compile, OpenVINO, ONNX Runtime.

What making one ready takes is not timed. All get as many threads as everybody and compute in the precision of the group, or say
in which.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmops.profiling.suite.chosen import Chosen
from vlmops.profiling.suite.group import Candidate, LeftOut, first_line

__all__ = ["EXPORTERS", "Exporter", "compiled", "forget"]

OPSET = 18


class Exporter(Protocol):
    """Makes a candidate of a module and its inputs."""

    def __call__(self, module: nn.Module, live: Sequence[Tensor], chosen: Chosen) -> Candidate: ...


def compiled(
    call: Any, example: tuple[Sequence[Any], dict[str, Any]], whole: bool = True
) -> tuple[Callable[..., Any], str]:
    """torch.compile by inductor with folded weights, compiled for these arguments, and what there is to say of it.

    Args:
        call: a function or a module.
        example: its arguments.
        whole: in one graph if it can be; where it cannot, in several.
    """
    import torch._inductor.config as inductor

    args, kwargs = example
    with torch.no_grad(), warnings.catch_warnings(), inductor.patch(freezing=True):
        warnings.simplefilter("ignore")
        if whole:
            try:
                found = torch.compile(call, fullgraph=True, dynamic=False)
                found(*args, **kwargs)
                return found, ""
            except Exception as err:  # whatever dynamo cannot trace; what inductor cannot compile fails again below
                torch._dynamo.reset()
                note = f"not in one graph ({first_line(err)[:80]})"
        else:
            note = "in several graphs where need be"
        found = torch.compile(call, dynamic=False)
        found(*args, **kwargs)
        return found, note


def forget() -> None:
    """Drop what was compiled. Inductor's modules stay for as long as the process lives, and with them the weights they folded."""
    if "torch._dynamo" not in sys.modules:
        return
    torch._dynamo.reset()
    codecache = sys.modules.get("torch._inductor.codecache")
    cache = getattr(codecache, "PyCodeCache", None)
    for module in getattr(cache, "modules", ()):
        for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
            delattr(module, name)
    if cache is not None:
        cache.cache_clear()


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise LeftOut(f'{package} is not installed (pip install "vlmops[bench-peers]")')


def openvino(module: nn.Module, live: Sequence[Tensor], chosen: Chosen) -> Candidate:
    """OpenVINO's CPU plugin on the module.

    Weights and inputs are float32; for a bf16 group the plugin computes in bf16, on processors that have it.
    """
    _need("openvino")
    if chosen.device != "cpu":
        raise LeftOut("it is measured on CPUs only")
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import openvino as ov

    core, dtype = ov.Core(), _precision(live)
    hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    have = {name.lower().replace("fp", "f") for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}
    if dtype != torch.float32 and hint not in have:
        raise LeftOut(f"it has no {hint} on this processor")
    inputs = [x.float() if x.is_floating_point() else x for x in live]
    model, note = _openvino_model(ov, module.float(), inputs)
    for place, x in zip(model.inputs, inputs, strict=True):
        place.get_node().set_partial_shape(ov.PartialShape(list(x.shape)))
    model.validate_nodes_and_infer_types()
    options = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": chosen.threads,
        "INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    request = core.compile_model(model, "CPU", options).create_infer_request()
    for i, x in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(x.contiguous().numpy(), shared_memory=True))

    def call() -> tuple[Tensor, ...]:
        request.infer()
        return tuple(torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(model.outputs)))

    precision = "" if dtype == torch.float32 else f"{hint} between float32 inputs and outputs"
    return Candidate([call], precision, note, keeps=True)


def _openvino_model(ov: Any, module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, str]:
    """By OpenVINO's own PyTorch front end; what that cannot read, through ONNX, where torch's exporter folds indices."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ov.convert_model(module, example_input=tuple(inputs)), ""
    except Exception as err:  # it raises whatever its parts raise
        if importlib.util.find_spec("onnx") is None:
            raise LeftOut(
                f"its PyTorch front end cannot read it ({first_line(err)[:80]}), and onnx is not installed"
            ) from err
    with tempfile.TemporaryDirectory(prefix="vlmops-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        _export(module, inputs, [f"input_{i}" for i in range(len(inputs))], path)
        return ov.Core().read_model(str(path)), "through ONNX"


def onnxruntime(module: nn.Module, live: Sequence[Tensor], chosen: Chosen) -> Candidate:
    """ONNX Runtime's CPU provider on the module, exported by torch."""
    _need("onnx", "onnxruntime")
    if chosen.device != "cpu":
        raise LeftOut("it is measured on CPUs only")
    if _precision(live) != torch.float32:
        raise LeftOut("its CPU kernels have no 16-bit products")
    import onnxruntime as ort

    names = [f"input_{i}" for i in range(len(live))]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = chosen.threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # its pool must not spin into the next peer's time
    with tempfile.TemporaryDirectory(
        prefix="vlmops-onnx-"
    ) as folder:  # weights above 2 GB go into files beside the graph
        path = Path(folder) / "model.onnx"
        _export(module, live, names, path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {place.name for place in session.get_inputs()}  # an input that nothing reads is dropped by the exporter
    feeds = {name: x.contiguous().numpy() for name, x in zip(names, live, strict=True) if name in taken}
    return Candidate([lambda: tuple(torch.from_numpy(x) for x in session.run(None, feeds))], keeps=True)


def _export(module: nn.Module, live: Sequence[Tensor], names: list[str], path: Path) -> None:
    """torch's exporter by tracing, which needs no further package; its prints are dropped."""
    import contextlib

    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(live), str(path), input_names=names, opset_version=OPSET, dynamo=False)


def _precision(live: Sequence[Tensor]) -> torch.dtype:
    return next((x.dtype for x in live if x.is_floating_point()), torch.float32)


EXPORTERS: dict[str, Exporter] = {"openvino": openvino, "onnxruntime": onnxruntime}

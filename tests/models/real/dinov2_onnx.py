"""DINOv2-small out of an ONNX file: its tensors under the names of transformers' files, and the graph itself as the oracle.

Biases and norms kept their names. A matrix lost its own, and stands transposed in a product whose bias has one. The table of
positions is in two parts, class token and patches, that were constants of the exported program.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

BACKBONE = "backbone."
LAST = BACKBONE + "layernorm.bias"


def tensors(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors by name."""
    graph = onnx.load(path).graph
    values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {name[len(BACKBONE) :]: t for name, t in values.items() if name.startswith(BACKBONE)}
    makers = {name: node for node in graph.node for name in node.output}
    for add in graph.node:
        bias = _bias(add)
        product = makers.get(next((name for name in add.input if name != bias), "")) if bias else None
        if bias and product is not None and product.op_type == "MatMul" and product.input[1] in values:
            weight = bias[len(BACKBONE) :].removesuffix("bias") + "weight"
            found[weight] = values[product.input[1]].t().contiguous()
    parts = [t for name, t in values.items() if not name.startswith((BACKBONE, "decoder.")) and t.dim() == 3]
    found["embeddings.position_embeddings"] = torch.cat(sorted(parts, key=lambda t: t.shape[1]), 1)
    return found


def runtime(path: Path) -> Callable[[Tensor], Tensor]:
    """The backbone in ONNX Runtime: pixels [n, 3, H, W] -> [n, 1 + patches, 384], for any H and W.

    The file says 224 x 224, but nothing in the backbone depends on it; the parts behind it are left out.
    """
    model: Any = onnx.load(path)
    graph = model.graph
    for axis, name in ((2, "height"), (3, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    (last,) = (node.output[0] for node in graph.node if LAST in node.input)
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = graph.input[0].name

    def run(pixels: Tensor) -> Tensor:
        out: np.ndarray[Any, Any] = session.run(None, {name: pixels.numpy()})[0]
        return torch.from_numpy(out)

    return run


def _bias(node: Any) -> str:
    """The named bias that a node adds, or ""."""
    names = [name for name in node.input if name.startswith(BACKBONE) and name.endswith(".bias")]
    return names[0] if node.op_type == "Add" and len(names) == 1 else ""

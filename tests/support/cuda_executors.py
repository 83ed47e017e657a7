"""Stand-ins for what a machine with a GPU has, and launches to try them on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmops.backends import cuda_runtime, cuda_simt
from vlmops.backends.cuda_runtime import TARGETS, Plan
from vlmops.ops.merge_tokens import cuda as merge
from vlmops.ops.norms import cuda as norms
from vlmops.ops.rotary import cuda as rotary_cuda

GPU = torch.device("cuda", 0)
needs_compiler = pytest.mark.skipif(
    cuda_simt.why_not(torch.device("cpu")) is not None,
    reason=f"no native build: {cuda_simt.why_not(torch.device('cpu'))}",
)


def arguments(device="cpu", dtype=torch.float32):
    x = torch.randn(6, 2, 8, device=device).to(dtype)
    table = torch.randn(6, 8, device=device)
    return x, table, table


def some_plans() -> list[Plan]:
    """Launches of every op, on CPU tensors."""
    with cuda_runtime.record(TARGETS["sm_80"]) as plans:
        x, cos, sin = arguments()
        rotary_cuda.forward(x, x[:, :1], cos, sin, False)
        rows, w = torch.randn(5, 12), torch.randn(12)
        norms.forward(rows, rows, w, None, 1e-6, 0.0, False)
        norms.backward([rows, None], [], [rows, None, w, w, 1e-5, 0.0, True], [True, True, True])
        merge.forward(torch.tensor([1, 7, 7, 2, 7]), torch.randn(5, 4), torch.randn(3, 4), 7)
    return plans


class FakeLibrary:
    """A kernel library that writes down what it is asked to launch, or fails with a number."""

    def __init__(self, error: int = 0, prepare: int = 0, driver: int = 13000) -> None:
        self.error, self.failure, self.driver, self.seen = error, prepare, driver, []
        self.names: list[str] = []

    def find(self, name):
        self.names.append(name)
        return len(self.names)

    def versions(self):
        return 0, self.driver, 13000

    def devices(self):
        return 0, 1

    def error_text(self, error):
        return f"error {error}"

    def prepare(self, kernel, device, shared):
        return self.failure

    def launch(self, kernel, device, x, y, z, threads, shared, stream, slots):
        assert (device, stream) == (0, 77)
        self.seen.append((self.names[kernel - 1], (x, y, z), threads, shared, slots))
        return self.error


class FakeCupy:
    """CuPy, as far as the executor uses it."""

    def __init__(self) -> None:
        self.seen, self.options, self.streams = [], {}, []
        fake = self

        class Scope:
            def __init__(self, *args):
                fake.streams.append(args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return False

        class RawModule:
            def __init__(self, code, options, backend):
                assert backend == "nvrtc"
                self.code, self.options = code, options

            def get_function(self, name):
                fake.options[name] = (self.code, self.options)

                def kernel(grid, block, args, shared_mem):
                    fake.seen.append((name, grid, block[0], shared_mem, args))

                return kernel

        self.RawModule = RawModule
        self.cuda = SimpleNamespace(Device=Scope, ExternalStream=Scope)

"""What can go wrong with a CUDA kernel before it runs, each with what to do; ``auto`` then uses another backend."""

from __future__ import annotations

from vlmops.backends import BackendError, LaunchError

__all__ = ["ArchNotBuilt", "CudaError", "DriverTooOld", "LibraryDamaged", "NoDevice", "OutOfMemory", "cuda_error"]


class CudaError(LaunchError):
    """A CUDA kernel could not be launched."""


class NoDevice(CudaError):
    """There is no CUDA device, or this process may not use it."""


class DriverTooOld(CudaError):
    """The NVIDIA driver is older than the CUDA version the kernels were built with."""


class ArchNotBuilt(CudaError):
    """The kernel library has no code for this GPU."""


class LibraryDamaged(CudaError):
    """The kernel library's file is missing, cut short or changed."""


class OutOfMemory(CudaError):
    """The device has no memory left to load or run the kernel."""


#: By error number, which the runtime and the driver share (CUDA Runtime API, "cudaError").
_BY_CODE: dict[int, tuple[type[CudaError], str]] = {
    2: (OutOfMemory, "free some memory (torch.cuda.empty_cache()) or use smaller inputs"),
    3: (NoDevice, "CUDA does not start here: was this process forked after CUDA was used?"),
    35: (DriverTooOld, "update the NVIDIA driver, or use kernels built with an older CUDA (another nvcc, or cupy-cuda12x)"),
    98: (ArchNotBuilt, "build the kernels on this machine: put nvcc on the PATH, or pip install 'vlmops[cuda13]'"),
    100: (NoDevice, "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    101: (NoDevice, "the device number is out of range: check CUDA_VISIBLE_DEVICES"),
    209: (ArchNotBuilt, "build the kernels on this machine: put nvcc on the PATH, or pip install 'vlmops[cuda13]'"),
    218: (ArchNotBuilt, "the PTX does not compile for this GPU: build the kernels on this machine with its nvcc"),
    222: (DriverTooOld, "the driver is older than the kernels' PTX: update it, or build the kernels with an older nvcc"),
    803: (DriverTooOld, "the driver's parts do not fit each other: reboot after its update"),
}  # fmt: skip


def cuda_error(code: int, text: str, kernel: str) -> BackendError:
    """The typed error of a CUDA error number: which kernel, what CUDA says, what to do."""
    kind, advice = _BY_CODE.get(code, (CudaError, "forcing another backend (vlmops.use_backend) goes around it"))
    return kind(f"{kernel}: CUDA error {code} ({text}): {advice}")

#include "launch/library.h"

#include <cstring>

#include <cuda_runtime_api.h>

namespace {

constexpr int kMostArgs = 64;

// This library's runtime has its own idea of the current device.
int use_device(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  return error;
}

// The error, and none left behind for the next call to find.
int taken(int error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace

int vlmops_cuda_abi() { return vlmops::kAbi; }

int vlmops_cuda_num_kernels() { return vlmops::num_kernels; }

const char* vlmops_cuda_kernel_name(int i) {
  return i >= 0 && i < vlmops::num_kernels ? vlmops::kernels[i].name : nullptr;
}

const void* vlmops_cuda_find(const char* name) {
  int low = 0, high = vlmops::num_kernels - 1;
  while (low <= high) {
    const int middle = (low + high) / 2, order = std::strcmp(name, vlmops::kernels[middle].name);
    if (order == 0) return vlmops::kernels[middle].entry;
    if (order < 0) high = middle - 1;
    else low = middle + 1;
  }
  return nullptr;
}

const char* vlmops_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int vlmops_cuda_versions(int* driver, int* runtime) {
  const int error = cudaDriverGetVersion(driver);
  return taken(error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime));
}

int vlmops_cuda_devices(int* count) { return taken(cudaGetDeviceCount(count)); }

int vlmops_cuda_prepare(const void* kernel, int device, int shared_bytes) {
  int error = use_device(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;  // asking loads the kernel, so a launch under graph capture does not have to
    error = cudaFuncGetAttributes(&attributes, kernel);
  }
  if (error == cudaSuccess && shared_bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  return taken(error);
}

int vlmops_cuda_launch(const void* kernel, int device, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned threads, unsigned shared_bytes, void* stream, const void* slots, int num_args) {
  if (num_args < 0 || num_args > kMostArgs) return cudaErrorInvalidValue;
  const int error = use_device(device);
  if (error != cudaSuccess) return taken(error);
  void* args[kMostArgs];
  for (int i = 0; i < num_args; ++i) args[i] = const_cast<char*>(static_cast<const char*>(slots)) + 8 * i;
  return taken(cudaLaunchKernel(kernel, dim3{grid_x, grid_y, grid_z}, dim3{threads, 1, 1}, args, shared_bytes,
                                static_cast<cudaStream_t>(stream)));
}

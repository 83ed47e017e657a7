#include "launch/library.h"

#include <cstdint>
#include <cstring>

#include <cuda.h>  // types only: the driver is asked for its functions
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

constexpr int kMostMaps = 8, kMapBytes = 128;

// A map as the plan has it (cuda_plan.TensorMap.packed()): the innermost dimension first, sizes in elements, strides in
// bytes.
struct PlanMap {
  uint64_t base;
  int64_t sizes[3], strides[3];
  uint32_t box[3], rank, item, swizzle;
};

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return found;
}

int encode(CUtensorMap& to, const void* slot) {
  const Encode make = encoder();
  if (make == nullptr) return cudaErrorNotSupported;
  PlanMap map;
  std::memcpy(&map, slot, sizeof map);
  if (map.rank < 2 || map.rank > 3 || map.item != 2 || map.swizzle != 3) return cudaErrorInvalidValue;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3], steps[3] = {1, 1, 1};
  for (uint32_t i = 0; i < map.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(map.sizes[i]);
    box[i] = map.box[i];
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(map.strides[i]);
  }
  const CUresult result = make(&to, CU_TENSOR_MAP_DATA_TYPE_UINT16, map.rank, reinterpret_cast<void*>(map.base), sizes,
                               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
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
                       unsigned threads, unsigned shared_bytes, void* stream, const void* slots, int num_args,
                       int maps) {
  if (num_args < 0 || maps < 0 || maps > kMostMaps || num_args + maps > kMostArgs) return cudaErrorInvalidValue;
  const int error = use_device(device);
  if (error != cudaSuccess) return taken(error);
  void* args[kMostArgs];
  CUtensorMap made[kMostMaps];  // the launch copies them
  char* slot = const_cast<char*>(static_cast<const char*>(slots));
  for (int i = 0; i < maps; ++i, slot += kMapBytes) {
    const int bad = encode(made[i], slot);
    if (bad != cudaSuccess) return bad;
    args[i] = &made[i];
  }
  for (int i = 0; i < num_args; ++i) args[maps + i] = slot + 8 * i;
  return taken(cudaLaunchKernel(kernel, dim3{grid_x, grid_y, grid_z}, dim3{threads, 1, 1}, args, shared_bytes,
                                static_cast<cudaStream_t>(stream)));
}

// The C ABI of a kernel library: looked up by name, launched on a stream of the caller. No torch, no Python.
#pragma once

#define VLMOPS_EXPORT extern "C" __attribute__((visibility("default")))

namespace vlmops {

// The table a build generates, sorted by name.
struct Kernel {
  const char* name;
  const void* entry;
};
extern const Kernel kernels[];
extern const int num_kernels;

constexpr int kAbi = 2;

}  // namespace vlmops

// All int results but the first two's are cudaError_t: 0 is success.
VLMOPS_EXPORT int vlmops_cuda_abi();
VLMOPS_EXPORT int vlmops_cuda_num_kernels();
VLMOPS_EXPORT const char* vlmops_cuda_kernel_name(int i);      // null out of range
VLMOPS_EXPORT const void* vlmops_cuda_find(const char* name);  // null: not in this library
VLMOPS_EXPORT const char* vlmops_cuda_error_text(int error);
VLMOPS_EXPORT int vlmops_cuda_versions(int* driver, int* runtime);  // 1000 * major + 10 * minor; driver 0: none
VLMOPS_EXPORT int vlmops_cuda_devices(int* count);

// Loads the kernel on the device and allows it that much dynamic shared memory. Once per kernel, device and size.
VLMOPS_EXPORT int vlmops_cuda_prepare(const void* kernel, int device, int shared_bytes);

// slots: `maps` tensor maps of 128 bytes each, as cuda_plan.TensorMap.packed() has them, the first arguments; then
// `num_args` times 8 bytes, each argument in its slot's first bytes. Asynchronous on `stream` (a cudaStream_t).
VLMOPS_EXPORT int vlmops_cuda_launch(const void* kernel, int device, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                     unsigned threads, unsigned shared_bytes, void* stream, const void* slots,
                                     int num_args, int maps);

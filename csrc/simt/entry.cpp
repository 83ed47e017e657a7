// Compiled once per kernel unit, with the unit itself in front (-include cuda/<op>.cu): exports the kernel VLMOPS_NAME
// as <VLMOPS_NAME>_simt(void** args), args[i] pointing at the i-th argument, as cuLaunchKernel has it.
#include "simt/device.h"

#ifdef __SANITIZE_THREAD__
#define VLMOPS_SIMT_HOOKED 1
#else
#define VLMOPS_SIMT_HOOKED 0
#endif
#define VLMOPS_SIMT_PASTE_(a, b) a##b
#define VLMOPS_SIMT_PASTE(a, b)  VLMOPS_SIMT_PASTE_(a, b)

// The machine keeps no shadow memory for a unit without hooks (a build for AddressSanitizer).
VLMOPS_SIMT_API const int vlmops_simt_hooked;
const int vlmops_simt_hooked = VLMOPS_SIMT_HOOKED;

namespace vlmops::simt {

template <int... I>
struct Numbers {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Numbers<I...>;
};

// The arguments' own memory is the host's, so it is read without hooks; it may lie anywhere, as for cuLaunchKernel.
template <class T>
__attribute__((no_sanitize_thread)) static T argument(const void* from) {
  T found;
  __builtin_memcpy(&found, from, sizeof(T));
  return found;
}
template <class... Args, int... I>
__attribute__((no_sanitize_thread)) static void call(void (*kernel)(Args...), void** args, Numbers<I...>) {
  kernel(argument<Args>(args[I])...);
}
template <class... Args>
__attribute__((no_sanitize_thread)) static void call(void (*kernel)(Args...), void** args) {
  call(kernel, args, typename Count<sizeof...(Args)>::type{});
}

}  // namespace vlmops::simt

VLMOPS_SIMT_API __attribute__((no_sanitize_thread)) void VLMOPS_SIMT_PASTE(VLMOPS_NAME, _simt)(void** args) {
  using namespace vlmops;  // where kernels live
  vlmops::simt::call(&VLMOPS_NAME, args);
}

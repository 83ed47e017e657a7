// Vector loads and stores, cp.async, ldmatrix, atomics.
#pragma once

#include "platform.cuh"
#include "types.cuh"

namespace vlmops {

namespace detail {

template <int Bytes>
struct Raw;  // the builtin type of that many bytes: the compiler makes one load or store of it
#ifndef VLMOPS_SIMT
template <>
struct Raw<1> {
  using type = unsigned char;
};
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <>
struct Raw<4> {
  using type = unsigned int;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};
#endif

template <int Bytes>
VLMOPS_DEVICE constexpr bool vector_size() {
  return Bytes == 1 || Bytes == 2 || Bytes == 4 || Bytes == 8 || Bytes == 16;
}

#ifndef VLMOPS_SIMT
// An access whose elements are used one by one is split by the compiler into narrower ones. Passing its words through
// an empty instruction keeps it whole.
template <class Raw>
VLMOPS_DEVICE void keep_whole(Raw& raw) {
  if constexpr (sizeof(Raw) == 16) {
    asm("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
  } else if constexpr (sizeof(Raw) == 8) {
    asm("" : "+r"(raw.x), "+r"(raw.y));
  } else if constexpr (sizeof(Raw) == 4) {
    asm("" : "+r"(raw));
  }
}
#endif

}  // namespace detail

// Loads N elements as one access; p is aligned to their size (at most 16 bytes).
template <int N, class T>
VLMOPS_DEVICE Vec<T, N> load_vec(const T* p) {
  static_assert(detail::vector_size<sizeof(T) * N>(), "a vector access has 1, 2, 4, 8 or 16 bytes");
  Vec<T, N> value;
#ifdef VLMOPS_SIMT
  vlmops_simt_load(&value, p, sizeof(value));
#else
  using Raw = typename detail::Raw<sizeof(T) * N>::type;
  Raw raw = *reinterpret_cast<const Raw*>(p);
  detail::keep_whole(raw);
  *reinterpret_cast<Raw*>(&value) = raw;
#endif
  return value;
}

// The same through the read-only path (ld.global.nc): global memory nobody writes during the kernel.
template <int N, class T>
VLMOPS_DEVICE Vec<T, N> load_vec_readonly(const T* p) {
#ifdef VLMOPS_SIMT
  return load_vec<N>(p);
#else
  static_assert(detail::vector_size<sizeof(T) * N>(), "a vector access has 1, 2, 4, 8 or 16 bytes");
  using Raw = typename detail::Raw<sizeof(T) * N>::type;
  Vec<T, N> value;
  Raw raw = __ldg(reinterpret_cast<const Raw*>(p));
  detail::keep_whole(raw);
  *reinterpret_cast<Raw*>(&value) = raw;
  return value;
#endif
}

// Stores N elements as one access; p is aligned to their size.
template <int N, class T>
VLMOPS_DEVICE void store_vec(T* p, const Vec<T, N>& value) {
  static_assert(detail::vector_size<sizeof(T) * N>(), "a vector access has 1, 2, 4, 8 or 16 bytes");
#ifdef VLMOPS_SIMT
  vlmops_simt_store(p, &value, sizeof(value));
#else
  using Raw = typename detail::Raw<sizeof(T) * N>::type;
  Raw raw = *reinterpret_cast<const Raw*>(&value);
  detail::keep_whole(raw);
  *reinterpret_cast<Raw*>(p) = raw;
#endif
}

// One packed pair of T (bf16, fp16), 4-byte aligned.
template <class T>
VLMOPS_DEVICE void store_pair(T* p, uint32_t pair) {
  static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
#ifdef VLMOPS_SIMT
  vlmops_simt_store(p, &pair, 4);
#else
  *reinterpret_cast<uint32_t*>(p) = pair;
#endif
}
template <class T>
VLMOPS_DEVICE uint32_t load_pair(const T* p) {
  static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
#ifdef VLMOPS_SIMT
  uint32_t pair;
  vlmops_simt_load(&pair, p, 4);
  return pair;
#else
  uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
  detail::keep_whole(pair);
  return pair;
#endif
}

#ifndef VLMOPS_SIMT
VLMOPS_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// Starts copying Bytes (4, 8 or 16) from global to shared memory, or filling them with zero where `valid` is false: the
// source is not read then, but must be an aligned address. Both aligned to Bytes.
template <int Bytes>
VLMOPS_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef VLMOPS_SIMT
  vlmops_simt_cp_async(shared, global, Bytes, valid);
#else
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {  // past L1: a tile is read once per block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(bytes)
                 : "memory");
  }
#endif
}
VLMOPS_DEVICE void cp_async16(void* shared, const void* global, bool valid) { cp_async<16>(shared, global, valid); }

// Closes this thread's group of copies.
VLMOPS_DEVICE void cp_async_commit() {
#ifdef VLMOPS_SIMT
  vlmops_simt_cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are still being copied. Other threads see the data after a barrier.
template <int N>
VLMOPS_DEVICE void cp_async_wait_group() {
#ifdef VLMOPS_SIMT
  vlmops_simt_cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ldmatrix: 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8 (16-byte aligned, in
// shared memory); register m of lane l gets elements (l / 4, l % 4 * 2) and the one right of it of matrix m, or of its
// transpose.
VLMOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef VLMOPS_SIMT
  vlmops_simt_ldmatrix(r, row, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
VLMOPS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef VLMOPS_SIMT
  vlmops_simt_ldmatrix(r, row, 4, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
VLMOPS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef VLMOPS_SIMT
  vlmops_simt_ldmatrix(r, row, 2, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}
VLMOPS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef VLMOPS_SIMT
  vlmops_simt_ldmatrix(r, row, 2, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Relaxed atomic additions; the value before is returned.
VLMOPS_DEVICE float atomic_add(float* p, float x) {
#ifdef VLMOPS_SIMT
  return vlmops_simt_atomic_add_float(p, x);
#else
  return atomicAdd(p, x);
#endif
}
VLMOPS_DEVICE int atomic_add(int* p, int x) {
#ifdef VLMOPS_SIMT
  return vlmops_simt_atomic_add_int(p, x);
#else
  return atomicAdd(p, x);
#endif
}

// Orders this thread's earlier writes before its later ones, for every thread of the device.
VLMOPS_DEVICE void fence_device() {
#ifdef VLMOPS_SIMT
  vlmops_simt_fence();
#else
  __threadfence();
#endif
}

}  // namespace vlmops

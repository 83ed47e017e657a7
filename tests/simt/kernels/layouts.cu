// Register layouts as they are: one warp reads its registers from memory, or writes them there. See test_layouts.py.
#include "mma/sm80.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

using T = VLMOPS_T;

#ifdef VLMOPS_ENTRY_mma  // a [32 lanes, 4], b [32, 2], c [32, 4]: registers
VLMOPS_KERNEL(mma)(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = lane_id();
  uint32_t a_registers[4];
  float c_registers[4];
  for (int i = 0; i < 4; ++i) {
    a_registers[i] = a[lane * 4 + i];
    c_registers[i] = c[lane * 4 + i];
  }
  mma_m16n8k16<T>(c_registers, a_registers, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = c_registers[i];
}
#endif

#ifdef VLMOPS_ENTRY_ldmatrix  // tile [rows of 8 elements]; row [32 lanes]: the row a lane gives; r [32 lanes, 4]
VLMOPS_KERNEL(ldmatrix)(const T* tile, const int* row, uint32_t* r, int matrices, int transposed) {
  __shared__ T shared[32][8];
  const int lane = lane_id();
  store_vec(shared[lane], load_vec<8>(tile + 8 * lane));
  __syncthreads();
  const T* address = shared[row[lane]];
  uint32_t four[4] = {}, two[2] = {};
  if (matrices == 4 && transposed == 0) ldmatrix_x4(four, address);
  if (matrices == 4 && transposed != 0) ldmatrix_x4_trans(four, address);
  if (matrices == 2 && transposed == 0) ldmatrix_x2(two, address);
  if (matrices == 2 && transposed != 0) ldmatrix_x2_trans(two, address);
  for (int i = 0; i < matrices; ++i) r[lane * 4 + i] = matrices == 4 ? four[i] : two[i];
}
#endif

}  // namespace vlmops

// Attention inside packed sequences, forward: a block has a tile of query rows of one head, each of its warps 16 or 32
// of them, and walks over the keys some row sees (FlashAttention-2, Dao 2023). For sm_80 and newer: mma.sync, cp.async.
//
// Keys and values come through one ring of kStages tiles, K V K V ..., with one barrier for each: while a tile is
// worked on, the next kStages - 1 are on their way.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 query rows of a warp.
// VLMOPS_BN: keys of a tile. VLMOPS_STAGES: tiles of the ring. VLMOPS_SOFTCAP: whether scores are capped.
#include "mma/sm80.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/copy.cuh"
#include "tile/fragments.cuh"
#include "tile/segments.cuh"
#include "tile/softmax.cuh"
#include "tile/swizzled.cuh"

namespace vlmops {

using T = VLMOPS_T;

constexpr int kAtoms = VLMOPS_ATOMS, kKeys = VLMOPS_BN, kStages = VLMOPS_STAGES;
constexpr int kWarpRows = 16 * kAtoms, kRows = VLMOPS_THREADS / kWarp * kWarpRows;
constexpr int kChunks = VLMOPS_D / 8, kSteps = (kChunks + 1) / 2;  // of a head: 16-byte chunks, steps of mma
constexpr int kTiles = kKeys / 8;                                  // 8-wide accumulators of scores
constexpr bool kHoldQ = kAtoms * kSteps * 4 <= 32;                 // queries stay in registers

static_assert(VLMOPS_D % 8 == 0 && kKeys % 16 == 0 && kStages >= 2, "");

using Tile = SwizzledTile<T, kChunks>;

// Query row i sits at key position i + shift; it sees the keys in [i + shift - left, i + shift + right], and those
// before `prefix`. Here: what the rows [first, last) see.
struct Seen {
  int begin;       // first key of anyone's window
  int end;         // behind the last key anyone sees
  int full_begin;  // everyone's window has [full_begin, full_end)
  int full_end;

  VLMOPS_DEVICE_MEMBER Seen(int first, int last, int shift, int left, int right, int prefix, int keys) {
    begin = min_of(max_of(first + shift - left, 0), keys);
    end = max_of(min_of(max_of(last + shift + right, 0), keys), prefix);
    full_begin = last - 1 + shift - left;
    full_end = max_of(min_of(first + shift + right + 1, keys), prefix);
  }
};

// Lets only seen keys count. Scores are of keys at + 8 j + 2 (lane % 4) and the one behind it, and of two rows, the
// first at `position`.
VLMOPS_DEVICE void mask_scores(float (&s)[kTiles][4], int at, int position, int left, int right, int prefix, int keys) {
  const int key = at + lane_id() % 4 * 2;
  const uint32_t width = static_cast<uint32_t>(left) + static_cast<uint32_t>(right) + 1u;
  const uint32_t offset = static_cast<uint32_t>(key) - static_cast<uint32_t>(position) + static_cast<uint32_t>(left);
  VLMOPS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    VLMOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int step = 8 * j + i % 2;
      const bool in_window = offset + static_cast<uint32_t>(step - i / 2 * 8) < width;
      if (!(step < prefix - key || (in_window && step < keys - key))) s[j][i] = -kInfinity;
    }
  }
}

// out [total_q, heads, D], lse [heads, total_q]; q [total_q, heads, D], k and v [total_k, heads / group, D] with any
// token and head strides. Grid: (slots, heads). per_sequence: slots of each sequence, or 0: as segments.cuh has them.
// prefix_lens [n] or null; left and right: at most 2^30, which is no bound. Scores are scale * q k^T; with SOFTCAP
// `scale` is that times 2 log2(e) / cap, and `cap` in units of log2.
VLMOPS_KERNEL(varlen_attention_forward)
(const T* q, const T* k, const T* v, T* out, float* lse, const int* cu_q, const int* cu_k, const int* prefix_lens,
 int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head, int total_q,
 int total_k, int n, int group, int per_sequence, int left, int right, float scale, float cap) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int slot = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int heads = static_cast<int>(gridDim.y);
  const int sequence = per_sequence > 0 ? slot / per_sequence : find_segment<kRows>(cu_q, n, total_q, slot);
  const int own = per_sequence > 0 ? slot % per_sequence : slot - first_slot<kRows>(cu_q, sequence, total_q);
  const Segment rows = segment(cu_q, sequence, total_q), keys = segment(cu_k, sequence, total_k);
  const int tile = ceil_div(rows.length, kRows) - 1 - own;  // under a causal mask the last has the most keys
  if (tile < 0) return;
  const int prefix = prefix_lens == nullptr ? 0 : min_of(max_of(prefix_lens[sequence], 0), keys.length);
  const int shift = keys.length - rows.length, row0 = tile * kRows, row1 = min_of(row0 + kRows, rows.length);
  const Seen seen(row0, row1, shift, left, right, prefix, keys.length);
  const int warp_row = warp_id() * kWarpRows, count = rows.length - row0 - warp_row;  // rows of this warp, or less
  const Seen mine(row0 + warp_row, min_of(row0 + warp_row + kWarpRows, rows.length), shift, left, right, prefix,
                  keys.length);
  const int my_end = count > 0 ? mine.end : 0;

  // The keys walked over: [first, end), without what lies between the prefix and the window.
  const int first = prefix > 0 ? 0 : seen.begin, end = seen.end;
  const auto next = [&](int at) {
    at += kKeys;
    return at >= prefix && at < seen.begin ? seen.begin : at;
  };

  const Tile q_tile{dynamic};
  const auto ring = [&](int stage) { return Tile{dynamic + (kRows + stage * kKeys) * VLMOPS_D}; };
  const T* const k_at = k + keys.start * k_stride + head / group * k_head;
  const T* const v_at = v + keys.start * v_stride + head / group * v_head;
  int ahead = first, filled = 0;
  bool values = false;  // whether V is the next to come
  const auto copy_next = [&] {
    if (ahead < end) {
      const int64_t stride = values ? v_stride : k_stride;
      copy_rows_async<kKeys, VLMOPS_THREADS>(ring(filled), (values ? v_at : k_at) + ahead * stride, stride,
                                             end - ahead);
    }
    cp_async_commit();
    if (values) ahead = next(ahead);
    values = !values;
    filled = filled + 1 == kStages ? 0 : filled + 1;
  };
  int used = 0;
  const auto await_tile = [&] {  // returns a ring tile that has arrived, and starts the copy into the one before it
    cp_async_wait_group<kStages - 2>();
    __syncthreads();
    copy_next();
    const Tile found = ring(used);
    used = used + 1 == kStages ? 0 : used + 1;
    return found;
  };

  float acc[kAtoms][kChunks][4];
  RowState state[kAtoms];
  VLMOPS_UNROLL
  for (int a = 0; a < kAtoms; ++a) {
    state[a].clear();
    VLMOPS_UNROLL
    for (int j = 0; j < kChunks; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) acc[a][j][i] = 0.f;
    }
  }

  if (first < end) {
    copy_rows_async<kRows, VLMOPS_THREADS>(q_tile, q + (rows.start + row0) * q_stride + head * q_head, q_stride,
                                           row1 - row0);
    VLMOPS_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) copy_next();
  }
  uint32_t held[kHoldQ ? kAtoms : 1][kHoldQ ? kSteps : 1][4];

  VLMOPS_UNROLL_N(1)
  for (int at = first; at < end; at = next(at)) {
    // Rows past the sequence, and tiles only other warps see, are left out.
    const bool active = at < my_end && (at + kKeys > mine.begin || at < prefix);
    const Tile k_tile = await_tile();
    int lane = fresh_lane();
    if constexpr (kHoldQ) {
      if (at == first && my_end > 0) {
        VLMOPS_UNROLL
        for (int a = 0; a < kAtoms; ++a) {
          VLMOPS_UNROLL
          for (int step = 0; step < kSteps; ++step) load_a(held[a][step], q_tile, warp_row + 16 * a, step, lane);
        }
      }
    }
    uint32_t weights[kAtoms][kKeys / 16][4];
    if (active) {
      float s[kAtoms][kTiles][4];
      VLMOPS_UNROLL
      for (int a = 0; a < kAtoms; ++a) {
        VLMOPS_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          VLMOPS_UNROLL
          for (int i = 0; i < 4; ++i) s[a][j][i] = 0.f;
        }
      }
      VLMOPS_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t qs[kHoldQ ? 1 : kAtoms][4];
        if constexpr (!kHoldQ) {
          VLMOPS_UNROLL
          for (int a = 0; a < kAtoms; ++a) load_a(qs[a], q_tile, warp_row + 16 * a, step, lane);
        }
        VLMOPS_UNROLL
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t ks[2][2];
          load_b(ks, k_tile, 8 * j, step, lane);
          VLMOPS_UNROLL
          for (int a = 0; a < kAtoms; ++a) {
            VLMOPS_UNROLL
            for (int i = 0; i < 2; ++i) {
              if constexpr (kHoldQ) {
                mma_m16n8k16<T>(s[a][j + i], held[a][step], ks[i][0], ks[i][1]);
              } else {
                mma_m16n8k16<T>(s[a][j + i], qs[a], ks[i][0], ks[i][1]);
              }
            }
          }
        }
      }
      const bool full = (at >= mine.full_begin && at + kKeys <= mine.full_end) || at + kKeys <= prefix;
      VLMOPS_UNROLL
      for (int a = 0; a < kAtoms; ++a) {
        if constexpr (VLMOPS_SOFTCAP) {  // cap tanh(x / cap), from 1 - 2 / (1 + exp(2 x / cap))
          VLMOPS_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            VLMOPS_UNROLL
            for (int i = 0; i < 4; ++i) {
              s[a][j][i] = fma(reciprocal_fast(1.f + exp2_fast(s[a][j][i] * scale)), -2.f * cap, cap);
            }
          }
        }
        if (!full) {
          mask_scores(s[a], at, row0 + warp_row + 16 * a + lane / 4 + shift, left, right, prefix, keys.length);
        }
        take_scores(s[a], acc[a], state[a], VLMOPS_SOFTCAP ? 1.f : scale);
        VLMOPS_UNROLL
        for (int step = 0; step < kKeys / 16; ++step) weights_as_a<T>(weights[a][step], s[a], step);
      }
    }
    const Tile v_tile = await_tile();
    if (!active) continue;
    lane = fresh_lane();
    VLMOPS_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      VLMOPS_UNROLL
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        uint32_t vs[2][2];
        load_b_trans(vs, v_tile, 16 * step, chunk, lane);
        VLMOPS_UNROLL
        for (int a = 0; a < kAtoms; ++a) {
          mma_m16n8k16<T>(acc[a][chunk], weights[a][step], vs[0][0], vs[0][1]);
          if (chunk + 1 < kChunks) mma_m16n8k16<T>(acc[a][chunk + 1], weights[a][step], vs[1][0], vs[1][1]);
        }
      }
    }
  }

  if (count <= 0) return;
  // The warp's own rows of q_tile, which nobody reads any more, turn accumulators into rows.
  const int64_t token = rows.start + row0 + warp_row;
  VLMOPS_UNROLL
  for (int a = 0; a < kAtoms; ++a) {
    float row_lse[2];
    finish_rows(acc[a], row_lse, state[a], VLMOPS_SOFTCAP ? 1.f : scale);
    VLMOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int eight = 16 * a + 8 * r, row = eight + lane_id() / 4;
      VLMOPS_UNROLL
      for (int j = 0; j < kChunks; ++j) {
        store_pair(q_tile.at(warp_row + eight, lane_id() / 4, j) + lane_id() % 4 * 2,
                   pack2<T>(acc[a][j][2 * r], acc[a][j][2 * r + 1]));
      }
      if (lane_id() % 4 == 0 && row < count) lse[static_cast<int64_t>(head) * total_q + token + row] = row_lse[r];
    }
  }
  __syncwarp();
  const int64_t out_stride = static_cast<int64_t>(heads) * VLMOPS_D;
  store_rows<kWarpRows>(out + token * out_stride + static_cast<int64_t>(head) * VLMOPS_D, out_stride, q_tile, warp_row,
                        count);
}

}  // namespace vlmops

// Rows of 2 x 2 neighbouring tokens of pictures, read where the tokens lie: the gathers in front of a projector.
//
// Of tokens [pictures, height, width, C], row (picture, y, x) of [rows, 4 C] has the tokens (2 y, 2 x), (2 y, 2 x + 1),
// (2 y + 1, 2 x) and (2 y + 1, 2 x + 1).
#pragma once

#include "../ptx/platform.cuh"
#include "sources.cuh"

namespace vlmops {

// Where rows first .. begin.
template <class T>
struct BlockRows {
  const T* tokens;
  int64_t picture, token;   // elements from one to the next
  int of_picture, of_line;  // blocks
  int first, rows;

  VLMOPS_DEVICE_MEMBER RowStart<T> operator()(int slot) const {
    const int row = first + slot, in_picture = row % of_picture;
    const int64_t y = in_picture / of_line, x = in_picture % of_line;
    const int64_t offset = row / of_picture * picture + (4 * y * of_line + 2 * x) * token;
    return {tokens + (row < rows ? offset : 0), row < rows};
  }
};

// Where element k of a row is; those of one token lie together.
struct BlockColumns {
  int64_t line, token;  // elements from one to the next
  int channels;         // C

  VLMOPS_DEVICE_MEMBER int64_t operator()(int k) const {
    const int below = k >= 2 * channels ? 1 : 0, rest = k - below * 2 * channels;
    const int right = rest >= channels ? 1 : 0;
    return below * line + right * token + (rest - right * channels);
  }
};

}  // namespace vlmops

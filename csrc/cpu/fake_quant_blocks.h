// How the loops of the fake_quant family walk over a tensor: blocks that stay in the first-level cache, runs of
// elements whose parameters are known together, chunks of rows. Half-precision types pass through float32 buffers;
// float32 is read and written in place.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/common/fake_quant.h"
#include "csrc/cpu/lanes.h"

namespace quantrain::cpu {

constexpr int kBlock = 512;  // elements; 256 to 2048 measured alike, bench_fake_quant

// The parameters of consecutive elements: one set for all, or one per element where the scale varies along the last
// dimension.
struct BlockQParams {
  float scale[kBlock];
  float inv_scale[kBlock];
  float zero_point[kBlock];

  QUANTRAIN_INLINE QParams operator[](int i) const { return QParams{scale[i], inv_scale[i], zero_point[i]}; }

  QUANTRAIN_INLINE void load(const QParamTensors& t, int64_t first, int n, QuantRange range) {
    if (t.fraction_length)
      for (int i = 0; i < n; ++i) set(i, fixed_point_qparams(t.fraction_length[first + i], range));
    else
      for (int i = 0; i < n; ++i) set(i, load_scaled_qparams(t, first + i, range));
  }

  QUANTRAIN_INLINE void set(int i, QParams p) {
    scale[i] = p.scale;
    inv_scale[i] = p.inv_scale;
    zero_point[i] = p.zero_point;
  }
};

struct SameQParams {
  QParams p;
  QUANTRAIN_INLINE QParams operator[](int) const { return p; }
};

// Calls f(offset, length, params) for each run of elements in [begin, end) whose parameters are known together.
template <typename F>
QUANTRAIN_INLINE void for_each_run(const Grouping& g, const QParamTensors& t, QuantRange range, int64_t begin,
                                   int64_t end, BlockQParams& scratch, const F& f) {
  if (g.levels > 0 && g.inner == 1) {
    for (int64_t at = begin; at < end;) {
      const int64_t left = g.modulus[0] - at % g.modulus[0];
      const int n = static_cast<int>(std::min(left, end - at));
      scratch.load(t, g.scale_index(at), n, range);
      f(static_cast<int>(at - begin), n, scratch);
      at += n;
    }
    return;
  }
  int64_t row = begin / g.inner;
  for (int64_t at = begin; at < end; ++row) {
    const int n = static_cast<int>(std::min((row + 1) * g.inner, end) - at);
    f(static_cast<int>(at - begin), n, SameQParams{load_qparams(t, g.scale_index(row), range)});
    at += n;
  }
}

// Calls f(offset, n) for each block of [begin, end).
template <typename F>
QUANTRAIN_INLINE void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin; at < end; at += kBlock) f(at, static_cast<int>(std::min<int64_t>(kBlock, end - at)));
}

// Calls f(task, row, first element, end element) for each row chunk of [begin, end).
template <typename F>
QUANTRAIN_INLINE void for_each_chunk(const Grouping& g, int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = chunks_per_row(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / chunks, start = row * g.inner + task % chunks * kRowChunk;
    f(task, row, start, std::min(start + kRowChunk, (row + 1) * g.inner));
  }
}

}  // namespace quantrain::cpu

#include <algorithm>

#include "csrc/cpu/int8.h"
#include "csrc/cpu/lanes.h"

namespace quantrain::cpu {
namespace {

constexpr int kPiece = 256;  // elements of a row that are decoded at a time
constexpr int kMaxRows = 8;  // of x that share a decoded piece

QUANTRAIN_INLINE void add_products(LaneSum& sum, const float* a, const float* b, int n) {
  for (int i = 0; i < n; i += kLanes) {
    QUANTRAIN_LOAD_LANES(left, a, i, n, 0.0f)
    QUANTRAIN_LOAD_LANES(right, b, i, n, 0.0f)
    sum.lane += left * right;
  }
}

// A row of the weight against up to kMaxRows of x.
QUANTRAIN_INLINE void weight_row(const Int8WeightMmArgs& a, int64_t row, int64_t first_m, int rows) {
  const auto* x = static_cast<const float*>(a.x) + first_m * a.k;
  const int8_t* codes = a.codes + row * a.k;
  LaneSum sum[kMaxRows] = {};
  alignas(64) float decoded[kPiece];
  for (int64_t at = 0; at < a.k; at += kPiece) {
    const int count = static_cast<int>(std::min<int64_t>(kPiece, a.k - at));
    for (int i = 0; i < count; ++i) decoded[i] = static_cast<float>(codes[at + i]);
    for (int m = 0; m < rows; ++m) add_products(sum[m], x + m * a.k + at, decoded, count);
  }
  const float scale = a.scale[row * a.scale_stride], bias = a.bias ? a.bias[row] : 0.0f;
  auto* y = static_cast<float*>(a.y);
  for (int m = 0; m < rows; ++m) y[(first_m + m) * a.n + row] = sum[m].total() * scale + bias;
}

}  // namespace

void int8_weight_mm(const Int8WeightMmArgs& args, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t m = 0; m < args.m; m += kMaxRows)
      for (int64_t row = begin; row < end; ++row)
        weight_row(args, row, m, static_cast<int>(std::min<int64_t>(kMaxRows, args.m - m)));
  });
}

}  // namespace quantrain::cpu

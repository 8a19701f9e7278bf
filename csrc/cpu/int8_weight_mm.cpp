#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

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

#if defined(__x86_64__) && defined(__GNUC__)

#define QUANTRAIN_AVX2 __attribute__((target("avx2,fma")))

// kRows rows of x against a row of the weight, 32 elements at a time.
template <int kRows>
QUANTRAIN_AVX2 void weight_row_avx2(const Int8WeightMmArgs& a, int64_t row, int64_t first_m) {
  const auto* x = static_cast<const float*>(a.x) + first_m * a.k;
  const int8_t* codes = a.codes + row * a.k;
  __m256 total[kRows][2];  // two sums: one would wait for each addition
  float rest[kRows] = {};
  for (int m = 0; m < kRows; ++m) total[m][0] = total[m][1] = _mm256_setzero_ps();
  int64_t at = 0;
  for (; at + 32 <= a.k; at += 32) {
    __m256 value[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at + 8 * i));
      value[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    for (int m = 0; m < kRows; ++m)
      for (int i = 0; i < 4; ++i)
        total[m][i % 2] = _mm256_fmadd_ps(value[i], _mm256_loadu_ps(x + m * a.k + at + 8 * i), total[m][i % 2]);
  }
  for (; at < a.k; ++at)
    for (int m = 0; m < kRows; ++m) rest[m] += static_cast<float>(codes[at]) * x[m * a.k + at];
  const float scale = a.scale[row * a.scale_stride], bias = a.bias ? a.bias[row] : 0.0f;
  auto* y = static_cast<float*>(a.y);
  for (int m = 0; m < kRows; ++m) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, _mm256_add_ps(total[m][0], total[m][1]));
    const float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    y[(first_m + m) * a.n + row] = (sum + rest[m]) * scale + bias;
  }
}

void weight_rows_avx2(const Int8WeightMmArgs& a, int64_t row) {
  int64_t m = 0;
  for (; m + 4 <= a.m; m += 4) weight_row_avx2<4>(a, row, m);
  for (; m + 2 <= a.m; m += 2) weight_row_avx2<2>(a, row, m);
  if (m < a.m) weight_row_avx2<1>(a, row, m);
}

#endif

}  // namespace

int64_t int8_weight_mm_rows() {
#if defined(QUANTRAIN_AVX2)
  if (best_isa() != Isa::kBaseline) return 64;  // as four_bit_linear_rows
#endif
  return 8;
}

void int8_weight_mm(const Int8WeightMmArgs& args, int64_t begin, int64_t end) {
#if defined(QUANTRAIN_AVX2)
  if (best_isa() != Isa::kBaseline) {
    for (int64_t row = begin; row < end; ++row) weight_rows_avx2(args, row);
    return;
  }
#endif
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t m = 0; m < args.m; m += kMaxRows)
      for (int64_t row = begin; row < end; ++row)
        weight_row(args, row, m, static_cast<int>(std::min<int64_t>(kMaxRows, args.m - m)));
  });
}

}  // namespace quantrain::cpu

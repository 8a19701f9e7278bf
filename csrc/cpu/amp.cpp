#include "csrc/cpu/amp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "csrc/cpu/lanes.h"

// Plain loops over chunks; sixteen independent sums per chunk, added in a fixed order, so that results repeat whatever
// the threads.

namespace quantrain::cpu {
namespace {

// Calls visit(tensor, first element, elements, chunk) for the chunks from begin to end.
template <typename Visit>
void for_each_chunk(const ListTensor* tensors, int64_t count, int64_t begin, int64_t end, const Visit& visit) {
  int64_t first_chunk = 0;
  for (int64_t t = 0; t < count && first_chunk < end; ++t) {
    const int64_t chunks = chunks_of(tensors[t].numel);
    for (int64_t chunk = std::max(begin, first_chunk); chunk < std::min(end, first_chunk + chunks); ++chunk) {
      const int64_t first = (chunk - first_chunk) * kListChunk;
      visit(t, first, std::min(kListChunk, tensors[t].numel - first), chunk);
    }
    first_chunk += chunks;
  }
}

struct SumAndFinite {
  float sum;
  bool finite;
};

// Sum of (x inv_scale)^2. A product with 0 is 0 for what is finite and NaN for Inf and NaN: adding them up needs no
// branch. Vector types, because gcc does not reorder a float sum; two sums, because one would wait for its own
// addition.
template <typename T>
QUANTRAIN_INLINE SumAndFinite sum_squares(const T* __restrict__ x, int64_t size, float inv_scale) {
  constexpr int64_t kBlock = 512;
  Lanes sums[2] = {}, zeros[2] = {};
  float buffer[kBlock];
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t n = std::min(kBlock, size - first);
    const float* values = load_block(x + first, static_cast<int>(n), buffer);
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      Lanes a, b;
      std::memcpy(&a, values + i, sizeof(a));
      std::memcpy(&b, values + i + kLanes, sizeof(b));
      zeros[0] += a * 0.0f;
      zeros[1] += b * 0.0f;
      a *= inv_scale;
      b *= inv_scale;
      sums[0] += a * a;
      sums[1] += b * b;
    }
    for (int64_t j = i; j < n; ++j) {
      const float value = values[j] * inv_scale;
      zeros[0][(j - i) % kLanes] += values[j] * 0.0f;
      sums[0][(j - i) % kLanes] += value * value;
    }
  }
  float sum = 0.0f, zero = 0.0f;
  for (int j = 0; j < kLanes; ++j) {
    sum += sums[0][j] + sums[1][j];
    zero += zeros[0][j] + zeros[1][j];
  }
  return {sum, zero == 0.0f};
}

template <typename T>
QUANTRAIN_INLINE void scale_values(T* x, int64_t n, float inv_scale, float clip) {
  for (int64_t i = 0; i < n; ++i) x[i] = from_float<T>(to_float(x[i]) * inv_scale * clip);
}

template <typename T>
void round_stochastic_chunk(const ListTensor& tensor, int64_t first, int64_t n, int64_t first_number,
                            const PhiloxState& philox) {
  T* y = static_cast<T*>(tensor.data) + first;
  const float* x = tensor.source + first;
  for (int64_t i = 0; i < n; i += 4) {
    const Philox4 random =
        philox4x32_10(philox.seed, philox.offset, static_cast<uint64_t>(first_number + first + i) / 4);
    for (int64_t j = i; j < std::min(i + 4, n); ++j) y[j] = round_stochastic<T>(x[j], random.word[j - i]);
  }
}

}  // namespace

void check_norm(const CheckNormArgs& a, int64_t begin, int64_t end) {
  const float inv_scale = inverse_scale(*a.scale);
  for_each_chunk(a.tensors, a.count, begin, end, [&](int64_t t, int64_t first, int64_t n, int64_t chunk) {
    dispatch_float(a.tensors[t].dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = static_cast<const T*>(a.tensors[t].data) + first;
      SumAndFinite result{};
      vectorized([&]() QUANTRAIN_INLINE_LAMBDA { result = sum_squares(x, n, inv_scale); });
      a.partial[chunk] = result.sum;
      if (!result.finite)
        __atomic_store_n(reinterpret_cast<uint32_t*>(a.non_finite + t), 0x3f800000u, __ATOMIC_RELAXED);  // 1.0f
    });
  });
}

void finish_norm(const FinishNormArgs& a) {
  double sum = 0.0;
  for (int64_t i = 0; i < a.chunks; ++i) sum += static_cast<double>(a.partial[i]);
  float found_inf = 0.0f;
  for (int64_t t = 0; t < a.count; ++t) found_inf = std::max(found_inf, a.non_finite[t]);
  *a.found_inf = found_inf;
  *a.norm = static_cast<float>(std::sqrt(sum));
  *a.grad_scale = *a.scale / clip_coefficient(*a.norm, a.max_norm);
}

void scale_list(const ScaleArgs& a, int64_t begin, int64_t end) {
  const float inv_scale = inverse_scale(*a.scale);
  const float clip = a.norm ? clip_coefficient(*a.norm, a.max_norm) : 1.0f;
  for_each_chunk(a.tensors, a.count, begin, end, [&](int64_t t, int64_t first, int64_t n, int64_t) {
    dispatch_float(a.tensors[t].dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* x = static_cast<T*>(a.tensors[t].data) + first;
      vectorized([&]() QUANTRAIN_INLINE_LAMBDA { scale_values(x, n, inv_scale, clip); });
    });
  });
}

void round_stochastic_list(const StochasticRoundArgs& a, int64_t begin, int64_t end) {
  int64_t first_number = 0, counted = 0;
  for_each_chunk(a.tensors, a.count, begin, end, [&](int64_t t, int64_t first, int64_t n, int64_t) {
    for (; counted < t; ++counted) first_number += numbers_of(a.tensors[counted].numel);
    if (a.tensors[t].dtype == DType::kFloat16)
      round_stochastic_chunk<Half>(a.tensors[t], first, n, first_number, a.philox);
    else
      round_stochastic_chunk<BFloat16>(a.tensors[t], first, n, first_number, a.philox);
  });
}

}  // namespace quantrain::cpu

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "csrc/cpu/int8.h"
#include "csrc/cpu/simd.h"

// A row is made in float32 in a buffer of the thread, then quantized from there.

namespace quantrain::cpu {
namespace {

float* row_buffer(int64_t columns) {
  static thread_local std::vector<float> buffer;
  if (buffer.size() < static_cast<size_t>(columns)) buffer.resize(static_cast<size_t>(columns));
  return buffer.data();
}

// The sum of f(0) to f(n - 1), in sixteen parts that become one vector register.
template <typename F>
QUANTRAIN_INLINE float lane_sum(int64_t n, const F& f) {
  constexpr int kLanes = 16;
  alignas(64) float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += f(i + j);
  for (int j = 0; i + j < n; ++j) lane[j] += f(i + j);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

QUANTRAIN_INLINE void quantize_values(float* values, const float* factor, int64_t n, int8_t* codes, float* row_scale) {
  if (factor)
    for (int64_t c = 0; c < n; ++c) values[c] *= factor[c];
  int32_t largest = 0;  // of numbers that are not negative the order is that of their bits, and NaN is above Inf
  for (int64_t c = 0; c < n; ++c)
    largest = std::max(largest, static_cast<int32_t>(detail::float_to_bits(values[c]) & 0x7fffffffu));
  const float scale = int8_scale(detail::bits_to_float(static_cast<uint32_t>(largest)));
  *row_scale = scale;
  if (!(scale == scale)) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  const float inverse = int8_inverse(scale, false);
  for (int64_t c = 0; c < n; ++c)
    codes[c] = static_cast<int8_t>(static_cast<uint8_t>(int8_code(values[c] * inverse, 0.0f)));
}

// ---- norms ----------------------------------------------------------------------------------------------------------

template <typename T, typename Parameter>
QUANTRAIN_INLINE void norm_row(const Int8NormArgs& a, int64_t row, float* s) {
  const int64_t n = a.columns;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* carried = a.carried ? static_cast<T*>(a.carried) + row * n : nullptr;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * n;
    for (int64_t c = 0; c < n; ++c) s[c] = to_float(from_float<T>(to_float(x[c]) + to_float(residual[c])));
  } else {
    for (int64_t c = 0; c < n; ++c) s[c] = to_float(x[c]);
  }
  if (carried && !a.post_norm)
    for (int64_t c = 0; c < n; ++c) carried[c] = from_float<T>(s[c]);
  const auto count = static_cast<float>(n);
  if (!a.rms) {
    const float mean = lane_sum(n, [&](int64_t c) QUANTRAIN_INLINE_LAMBDA { return s[c]; }) / count;
    for (int64_t c = 0; c < n; ++c) s[c] -= mean;
  }
  const float variance = lane_sum(n, [&](int64_t c) QUANTRAIN_INLINE_LAMBDA { return s[c] * s[c]; }) / count;
  const float inverse = 1.0f / std::sqrt(variance + a.eps);
  const auto *weight = static_cast<const Parameter*>(a.weight), *bias = static_cast<const Parameter*>(a.bias);
  for (int64_t c = 0; c < n; ++c) s[c] *= inverse;
  if (weight)
    for (int64_t c = 0; c < n; ++c) s[c] *= to_float(weight[c]);
  if (bias)
    for (int64_t c = 0; c < n; ++c) s[c] += to_float(bias[c]);
  if (carried && a.post_norm)
    for (int64_t c = 0; c < n; ++c) carried[c] = from_float<T>(s[c]);
  if (a.values) {
    T* values = static_cast<T*>(a.values) + row * n;
    for (int64_t c = 0; c < n; ++c) values[c] = from_float<T>(s[c]);
    return;
  }
  quantize_values(s, a.column_factor, n, a.codes + row * n, a.scale + row);
}

template <typename T, typename Parameter>
void norm_typed(const Int8NormArgs& a, int64_t begin, int64_t end) {
  float* values = row_buffer(a.columns);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t row = begin; row < end; ++row) norm_row<T, Parameter>(a, row, values);
  });
}

// ---- activations ----------------------------------------------------------------------------------------------------

template <typename T>
void activation_typed(const Int8ActivationArgs& a, int64_t begin, int64_t end) {
  float* values = row_buffer(a.columns);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const int64_t n = a.columns;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.stride;
      if (a.activation == Int8Activation::kGeluErf) {
        for (int64_t c = 0; c < n; ++c) values[c] = gelu_erf(to_float(x[c]));
      } else if (a.activation == Int8Activation::kGeluTanh) {
        for (int64_t c = 0; c < n; ++c) values[c] = gelu_tanh(to_float(x[c]));
      } else if (a.activation == Int8Activation::kRelu) {
        for (int64_t c = 0; c < n; ++c) values[c] = relu(to_float(x[c]));
      } else {
        const T* up = static_cast<const T*>(a.up) + row * a.stride;
        for (int64_t c = 0; c < n; ++c) values[c] = silu(to_float(x[c])) * to_float(up[c]);
      }
      if (a.values) {
        T* result = static_cast<T*>(a.values) + row * n;
        for (int64_t c = 0; c < n; ++c) result[c] = from_float<T>(values[c]);
      } else {
        quantize_values(values, a.column_factor, n, a.codes + row * n, a.scale + row);
      }
    }
  });
}

}  // namespace

void int8_norm(const Int8NormArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.parameter_dtype == args.dtype)
      norm_typed<T, T>(args, begin, end);
    else
      norm_typed<T, float>(args, begin, end);
  });
}

void int8_activation(const Int8ActivationArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { activation_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace quantrain::cpu

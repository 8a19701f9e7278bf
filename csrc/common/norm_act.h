// The formulas of the norm_act family, once for host and device, and the arguments of its kernels: what lies before a
// linear layer, row by row, and the rounding of its input.
//
//   z = f(x)                                 identity, relu, silu, gelu (of erf or of tanh)
//   z = silu(x) other                        the gate of a gated feed-forward
//   z = (x - m) r weight + bias              layer_norm: m the row's mean, r = 1 / sqrt(variance + eps)
//   z = x r weight                           rms_norm: r = 1 / sqrt(mean(x^2) + eps)
//   q = clamp(rint(z / scale) + zero_point, quant_min, quant_max),  output = (q - zero_point) scale
//
// in float32 and without fused multiply-add; z is not rounded to the input's type in between.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/common/activations.h"
#include "csrc/common/fake_quant.h"

namespace quantrain {

enum class RowFunction { kIdentity, kRelu, kSilu, kGelu, kGeluTanh, kSiluMul, kLayerNorm, kRmsNorm };

QUANTRAIN_HOST_DEVICE constexpr bool is_norm(RowFunction f) {
  return f == RowFunction::kLayerNorm || f == RowFunction::kRmsNorm;
}

// f, of an element alone, and its derivative. kSiluMul: silu.
template <RowFunction kFunction>
QUANTRAIN_HOST_DEVICE ValueAndSlope function_at(float x) {
  if constexpr (kFunction == RowFunction::kRelu) {
    return ValueAndSlope{x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  } else if constexpr (kFunction == RowFunction::kSilu || kFunction == RowFunction::kSiluMul) {
    return silu_at(x);
  } else if constexpr (kFunction == RowFunction::kGelu) {
    return gelu_at(x);
  } else if constexpr (kFunction == RowFunction::kGeluTanh) {
    return gelu_tanh_at(x);
  } else {
    return ValueAndSlope{x, 1.0f};
  }
}

// Where a function that falls and then rises has its least value, so that its extremes over a row follow from four
// values of x, without the function's own cost for each. NaN: it is none.
QUANTRAIN_HOST_DEVICE constexpr float valley_of(RowFunction f) {
  return f == RowFunction::kGelu       ? -0.7517916f
         : f == RowFunction::kGeluTanh ? -0.7524614f
         : f == RowFunction::kSilu     ? -1.2784645f
                                       : std::numeric_limits<float>::quiet_NaN();
}

// The mask's bit of an element: its code does not clip, and relu does not bend there, so that its input is not kept.
QUANTRAIN_HOST_DEVICE bool gradient_passes(RowFunction function, float z, bool in_range) {
  return in_range & !((function == RowFunction::kRelu) & (z <= 0.0f));
}

// Calls f with the function as a constant; norms are kIdentity. constexpr: for host and device, with lambdas of either.
template <typename F>
constexpr void dispatch_function(RowFunction function, F&& f) {
  switch (function) {
    case RowFunction::kRelu:
      return f(std::integral_constant<RowFunction, RowFunction::kRelu>{});
    case RowFunction::kSilu:
      return f(std::integral_constant<RowFunction, RowFunction::kSilu>{});
    case RowFunction::kGelu:
      return f(std::integral_constant<RowFunction, RowFunction::kGelu>{});
    case RowFunction::kGeluTanh:
      return f(std::integral_constant<RowFunction, RowFunction::kGeluTanh>{});
    case RowFunction::kSiluMul:
      return f(std::integral_constant<RowFunction, RowFunction::kSiluMul>{});
    default:
      return f(std::integral_constant<RowFunction, RowFunction::kIdentity>{});
  }
}

// Calls f with null pointers of the input's type and the output's: one type, or float32 and a 16-bit one.
template <typename F>
void dispatch_types(DType dtype, DType output_dtype, const F& f) {
  dispatch_float(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (dtype == output_dtype) return f(static_cast<T*>(nullptr), static_cast<T*>(nullptr));
    if constexpr (std::is_same_v<T, float>) {
      if (output_dtype == DType::kFloat16) return f(static_cast<T*>(nullptr), static_cast<Half*>(nullptr));
      return f(static_cast<T*>(nullptr), static_cast<BFloat16*>(nullptr));
    }
  });
}

// What a norm takes from a row.
struct RowMoments {
  float mean;     // 0 for rms_norm
  float inverse;  // r above
};

QUANTRAIN_HOST_DEVICE float inverse_root(float mean_square, float eps) { return 1.0f / sqrtf(mean_square + eps); }

QUANTRAIN_HOST_DEVICE float row_normalized(float x, RowMoments m) { return (x - m.mean) * m.inverse; }

// The gradient of x from g, that of (x - m) r, given the row's means of g and of g (x - m) r.
QUANTRAIN_HOST_DEVICE float row_gradient(float g, float normalized, RowMoments m, float mean_g, float mean_product) {
  return m.inverse * (g - mean_g - normalized * mean_product);
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

struct NormActInput {
  const void* x;       // [rows, columns] of dtype
  const void* other;   // likewise; kSiluMul alone
  const void* weight;  // [columns] of parameter_dtype or null: 1
  const void* bias;    // [columns] of parameter_dtype or null: 0
  DType dtype;
  DType parameter_dtype;  // dtype or float32
  RowFunction function;
  int64_t rows;
  int64_t columns;
  float eps;
};

struct NormActArgs {
  NormActInput input;
  float* moments;           // [rows, 2]: mean and inverse of a norm; null where there is none
  float* extremes;          // [rows, 2]: minimum and maximum of z, and nothing else is written; or null
  void* output;             // [rows, columns] of output_dtype
  void* codes;              // [rows, columns] or null
  uint8_t* mask;            // or null; element i is bit i % 8 of byte i / 8: its gradient passes
  float* row_scale;         // [rows]: each row's own, computed; null: qparams is given
  int32_t* row_zero_point;  // [rows] or null: symmetric
  DType output_dtype;
  QParamTensors qparams;  // one group
  QuantRange range;
  bool symmetric;
};

// Of [rows, 2] to [2].
struct NormActRangeArgs {
  const float* extremes;
  float* range;
  int64_t rows;
};

struct NormActBackwardArgs {
  NormActInput input;       // without bias
  const void* grad_output;  // [rows, columns] of output_dtype
  const uint8_t* mask;      // or null: all pass
  const float* moments;     // [rows, 2] or null
  void* grad_input;         // [rows, columns] of dtype
  void* grad_other;         // likewise or null
  float* partial;  // [parts, 2, columns]: sums of g z' (z' without weight) and of g, g the gradient of z; or null
  DType output_dtype;
  int64_t parts;  // of the rows, each but the last of ceil(rows / parts); by the shape alone, so results repeat
};

struct NormActGradientArgs {
  const float* partial;  // [parts, 2, columns]
  float* grad_weight;    // [columns]
  float* grad_bias;      // [columns]
  int64_t columns;
  int64_t parts;
};

}  // namespace quantrain

// The formulas of the batch_norm family, once for host and device, and the arguments of its kernels.
//
// With y of channel c, its batch's mean m and biased variance v, the convolution's factor s (1 where absent):
//
//   r = sign(s) / sqrt(v + eps s^2)                  the batch norm of y / s, without the division
//   z = act((y - m) (weight r) + bias + residual)
//   q = clamp(rint(z / scale) + zero_point, quant_min, quant_max),  output = (q - zero_point) scale
//
// in float32 and without fused multiply-add. y / s has the mean m / s and the variance v / s^2, which is what running
// statistics follow.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/fake_quant.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

enum class Activation { kIdentity, kRelu, kRelu6, kHardswish, kSilu };

// Whether its derivative is 0 or 1, so that a bit holds it.
QUANTRAIN_HOST_DEVICE constexpr bool is_piecewise(Activation activation) { return activation <= Activation::kRelu6; }

// expf of the device and of the host differ by some units in the last place; this is one polynomial for both, within 2
// of them (e^f with f within half a ln 2, by its Taylor series to degree 7).
QUANTRAIN_HOST_DEVICE float exp_portable(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float steps = rintf(x * 1.44269504f);
  const float f = (x - steps * 0.693359375f) + steps * 2.12194440e-4f;  // ln 2 in two parts
  float series = 1.98412698e-4f;
  series = series * f + 1.38888889e-3f;
  series = series * f + 8.33333333e-3f;
  series = series * f + 4.16666667e-2f;
  series = series * f + 1.66666667e-1f;
  series = series * f + 0.5f;
  series = series * f + 1.0f;
  series = series * f + 1.0f;
  return series * detail::bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(steps) + 127) << 23);
}

// 0 where exp(-x) is too large for float32.
QUANTRAIN_HOST_DEVICE float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exp_portable(-x)); }

// NaN passes.
template <Activation kActivation>
QUANTRAIN_HOST_DEVICE float activated(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0f ? 0.0f : x;
  } else if constexpr (kActivation == Activation::kRelu6) {
    const float positive = x < 0.0f ? 0.0f : x;
    return positive > 6.0f ? 6.0f : positive;
  } else if constexpr (kActivation == Activation::kHardswish) {
    const float shifted = x + 3.0f, low = shifted < 0.0f ? 0.0f : shifted, gate = low > 6.0f ? 6.0f : low;
    return x * gate * (1.0f / 6.0f);
  } else if constexpr (kActivation == Activation::kSilu) {
    return x == x ? x * sigmoid(x) : x;  // the cast inside drops a NaN
  } else {
    return x;
  }
}

// PyTorch's: 0 at the ends of relu's and relu6's slope; hardswish has 0 up to -3 and 1 from 3 on.
template <Activation kActivation>
QUANTRAIN_HOST_DEVICE float activation_slope(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x <= 0.0f ? 0.0f : 1.0f;  // 1 for NaN
  } else if constexpr (kActivation == Activation::kRelu6) {
    return (x <= 0.0f) | (x >= 6.0f) ? 0.0f : 1.0f;
  } else if constexpr (kActivation == Activation::kHardswish) {
    const float inner = x * (1.0f / 3.0f) + 0.5f;
    const float within = x > -3.0f ? inner : 0.0f;
    return x < 3.0f ? within : 1.0f;
  } else if constexpr (kActivation == Activation::kSilu) {
    const float gate = sigmoid(x);
    return gate * (1.0f + x * (1.0f - gate));
  } else {
    return 1.0f;
  }
}

template <typename F>
void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu6:
      return f(std::integral_constant<Activation, Activation::kRelu6>{});
    case Activation::kHardswish:
      return f(std::integral_constant<Activation, Activation::kHardswish>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kIdentity>{});
  }
}

// An input in the order of its memory: element (o, c, i) at (o channels + c) inner + i. Contiguous [N, C, H, W]: outer
// N, inner H W; channels last: outer N H W, inner 1.
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  QUANTRAIN_HOST_DEVICE int64_t numel() const { return outer * channels * inner; }
  QUANTRAIN_HOST_DEVICE int64_t per_channel() const { return outer * inner; }
};

// What a channel's elements become.
struct ChannelNorm {
  float mean;
  float factor;  // weight r
  float bias;
};

struct BatchNormParams {
  const float* mean;        // [C]
  const float* variance;    // [C], biased; null: nothing is normalized
  const float* weight;      // [C] or null: 1
  const float* bias;        // [C] or null: 0
  const float* conv_scale;  // [C] or null: 1
  float eps;
};

// r above.
QUANTRAIN_HOST_DEVICE float inverse_deviation(float variance, float conv_scale, float eps) {
  const float r = 1.0f / sqrtf(variance + eps * (conv_scale * conv_scale));
  return conv_scale < 0.0f ? -r : r;
}

QUANTRAIN_HOST_DEVICE float conv_scale_of(const BatchNormParams& p, int64_t c) {
  return p.conv_scale ? load_parameter(p.conv_scale + c) : 1.0f;
}

QUANTRAIN_HOST_DEVICE ChannelNorm channel_norm(const BatchNormParams& p, int64_t c) {
  if (!p.variance) return ChannelNorm{0.0f, 1.0f, 0.0f};
  const float r = inverse_deviation(load_parameter(p.variance + c), conv_scale_of(p, c), p.eps);
  return ChannelNorm{load_parameter(p.mean + c), p.weight ? load_parameter(p.weight + c) * r : r,
                     p.bias ? load_parameter(p.bias + c) : 0.0f};
}

QUANTRAIN_HOST_DEVICE float normalized(float y, ChannelNorm n) { return (y - n.mean) * n.factor + n.bias; }

// ---- kernel arguments -----------------------------------------------------------------------------------------------

// Sums and extremes of parts of channels; the statistics follow from them. The parts depend on the shape alone, so
// results repeat.
struct BatchNormStatisticsArgs {
  const void* y;
  float* partial;  // [parts, 4, C]: sums of y - first and of its square, minimum, maximum
  DType dtype;
  ChannelLayout layout;
  int64_t parts;  // of `outer`, each but the last of ceil(outer / parts)
};

// From the parts, in their order, to [4, C]: mean, biased variance, minimum, maximum.
struct BatchNormFoldArgs {
  const void* y;         // whose first element of a channel is what its sums were taken from
  const float* partial;  // [parts, 4, C]
  float* statistics;     // [4, C]
  DType dtype;
  ChannelLayout layout;
  int64_t parts;
};

// What is moved by a batch beside its output: running statistics and the range of the output of an activation that
// rises.
struct BatchNormUpdateArgs {
  const float* statistics;  // [4, C]
  BatchNormParams params;
  float* running_mean;      // [C] or null
  float* running_variance;  // [C] or null
  float* range;             // [2] or null: minimum and maximum of the output
  int64_t channels;
  int64_t per_channel;
  float momentum;
  Activation activation;
};

struct BatchNormApplyArgs {
  const void* y;
  const void* residual;  // or null
  void* output;          // z, or where `scale` is given the fake-quantized z
  void* codes;           // [numel] or null
  uint8_t* mask;         // or null; element i is bit i % 8 of byte i / 8: passes its gradient
  DType dtype;
  ChannelLayout layout;
  BatchNormParams params;
  Activation activation;
  QParamTensors qparams;  // one group; scale null: nothing is quantized
  QuantRange range;
};

// Sums of parts of channels: of the gradient g at the norm's output, and of g (y - m).
struct BatchNormReduceArgs {
  const void* y;
  const void* grad_output;
  const uint8_t* mask;  // or null
  void* grad_residual;  // g, or null
  float* partial;       // [parts, sums(), C]
  DType dtype;
  ChannelLayout layout;
  BatchNormParams params;
  Activation activation;  // of which the mask does not hold the derivative, else kIdentity; all of it where `learned`
  int64_t parts;
  // Whether the output was fake-quantized with a learned scale, whose gradient is the third sum.
  bool learned;
  QParamTensors qparams;
  QuantRange range;

  QUANTRAIN_HOST_DEVICE int64_t sums() const { return learned ? 3 : 2; }
};

struct BatchNormGradientArgs {
  const float* partial;  // [parts, sums, C]
  float* grad_weight;    // [C]
  float* grad_bias;      // [C]
  float* grad_scale;     // [C]: of conv_scale
  float* grad_step;      // [C]: of the learned scale, from this channel; null: two sums
  float* terms;          // [2, C]: what is taken from g, and what from it per y - m
  BatchNormParams params;
  int64_t channels;
  int64_t per_channel;
  int64_t parts;
  bool batch_statistics;

  QUANTRAIN_HOST_DEVICE int64_t sums() const { return grad_step ? 3 : 2; }
};

struct BatchNormBackwardArgs {
  const void* y;
  const void* grad_output;
  const uint8_t* mask;  // or null
  const float* terms;   // [2, C]
  void* grad_input;
  DType dtype;
  ChannelLayout layout;
  BatchNormParams params;
  Activation activation;
};

// The weight of a convolution, folded with its batch norm and fake-quantized with a scale of its own per row.
struct FoldArgs {
  const void* weight;     // [O, K]
  const float* gamma;     // [O]: the batch norm's weight
  const float* variance;  // [O]: its running variance
  const float* step;      // [O]: a learned scale, or null: each row's own
  void* output;           // [O, K]
  uint8_t* mask;          // [O, ceil(K / 8)] or null
  float* conv_scale;      // [O]: s = gamma / sqrt(variance + eps), 1 where that is 0
  float* kept_variance;   // [O]: a copy, which stays as it is
  DType dtype;
  DType output_dtype;
  int64_t rows;
  int64_t columns;
  float eps;
  QuantRange range;
  bool symmetric;
};

struct FoldBackwardArgs {
  const void* grad_output;  // [O, K]
  const float* grad_scale;  // [O] or null: the gradient of conv_scale
  const void* weight;       // [O, K]
  const uint8_t* mask;      // [O, ceil(K / 8)]
  const float* gamma;       // [O]
  const float* variance;    // [O]
  const float* step;        // [O] or null
  void* grad_weight;        // [O, K]
  float* grad_gamma;        // [O]
  float* grad_step;         // [O], where step is given
  DType dtype;
  DType output_dtype;
  int64_t rows;
  int64_t columns;
  float eps;
  QuantRange range;
};

// s of a row; 0 counts as 1, so that nothing is lost where gamma is 0.
QUANTRAIN_HOST_DEVICE float folding_scale(float gamma, float variance, float eps) {
  const float s = gamma / sqrtf(variance + eps);
  return s == 0.0f ? 1.0f : s;
}

// The gradient of gamma from that of s.
QUANTRAIN_HOST_DEVICE float folding_gradient(float grad_scale, float gamma, float variance, float eps) {
  const float deviation = sqrtf(variance + eps);
  return gamma / deviation == 0.0f ? 0.0f : grad_scale / deviation;
}

// ---- channels -------------------------------------------------------------------------------------------------------

struct ChannelSums {
  double sum = 0.0, squares = 0.0;
  float min = detail::bits_to_float(0x7f800000u), max = detail::bits_to_float(0xff800000u);

  // NaN wins, from either side.
  QUANTRAIN_HOST_DEVICE void add(double part_sum, double part_squares, float part_min, float part_max) {
    sum += part_sum;
    squares += part_squares;
    min = part_min < min || part_min != part_min ? part_min : min;
    max = part_max > max || part_max != part_max ? part_max : max;
  }
};

QUANTRAIN_HOST_DEVICE void store_statistics(const BatchNormFoldArgs& a, int64_t c, const ChannelSums& s, float first) {
  const auto count = static_cast<double>(a.layout.per_channel());
  const double mean = s.sum / count, variance = s.squares / count - mean * mean;
  const int64_t channels = a.layout.channels;
  a.statistics[c] = static_cast<float>(static_cast<double>(first) + mean);
  a.statistics[channels + c] = static_cast<float>(variance < 0.0 ? 0.0 : variance);
  a.statistics[2 * channels + c] = s.min;
  a.statistics[3 * channels + c] = s.max;
}

struct Extremes {
  float min;
  float max;
};

// Of a channel's outputs: what is computed from its extremes, as every step is monotonic, its rounding too.
template <Activation kActivation>
QUANTRAIN_HOST_DEVICE Extremes output_extremes(const BatchNormUpdateArgs& a, int64_t c) {
  const ChannelNorm n = channel_norm(a.params, c);
  const float low = activated<kActivation>(normalized(a.statistics[2 * a.channels + c], n));
  const float high = activated<kActivation>(normalized(a.statistics[3 * a.channels + c], n));
  const bool rises = low < high || low != low;
  return rises ? Extremes{low, high} : Extremes{high, low};
}

QUANTRAIN_HOST_DEVICE void update_running(const BatchNormUpdateArgs& a, int64_t c) {
  const float s = conv_scale_of(a.params, c);
  const float mean = a.statistics[c] / s, variance = a.statistics[a.channels + c] / (s * s);
  const auto count = static_cast<float>(a.per_channel);
  const float unbiased = variance * (count / (count > 1.0f ? count - 1.0f : 1.0f));
  a.running_mean[c] += a.momentum * (mean - a.running_mean[c]);
  a.running_variance[c] += a.momentum * (unbiased - a.running_variance[c]);
}

QUANTRAIN_HOST_DEVICE void store_gradients(const BatchNormGradientArgs& a, int64_t c, double sum, double product) {
  const float s = conv_scale_of(a.params, c);
  const float r = inverse_deviation(load_parameter(a.params.variance + c), s, a.params.eps);
  const float weight = a.params.weight ? load_parameter(a.params.weight + c) : 1.0f;
  const auto count = static_cast<float>(a.per_channel);
  const auto total = static_cast<float>(sum), along = static_cast<float>(product);
  a.grad_bias[c] = total;
  a.grad_weight[c] = along * r;
  a.grad_scale[c] = -(weight * along * r) * (a.params.eps * s) * (r * r);
  a.terms[c] = a.batch_statistics ? total / count : 0.0f;
  a.terms[a.channels + c] = a.batch_statistics ? along / count * (r * r) : 0.0f;
}

// The gradient of y, from that of the norm's output.
QUANTRAIN_HOST_DEVICE float input_gradient(float g, float y, ChannelNorm n, float constant, float slope) {
  return n.factor * (g - constant - (y - n.mean) * slope);
}

}  // namespace quantrain

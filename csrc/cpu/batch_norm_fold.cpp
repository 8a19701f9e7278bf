#include <algorithm>
#include <cmath>

#include "csrc/cpu/batch_norm.h"
#include "csrc/cpu/fake_quant_blocks.h"
#include "csrc/cpu/mask_bits.h"

// A convolution's weight folded with its batch norm and fake-quantized, row by row.

namespace quantrain::cpu {
namespace {

template <typename T, typename Out>
void fold_typed(const FoldArgs& a, int64_t begin, int64_t end) {
  const int64_t bytes = (a.columns + 7) / 8;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float buffer[kBlock], out_buffer[kBlock], folded[kBlock];
    alignas(64) uint8_t passes[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const T* weight = static_cast<const T*>(a.weight) + row * a.columns;
      Out* output = static_cast<Out*>(a.output) + row * a.columns;
      const float scale = folding_scale(a.gamma[row], a.variance[row], a.eps);
      a.conv_scale[row] = scale;
      a.kept_variance[row] = a.variance[row];
      constexpr float kInf = std::numeric_limits<float>::infinity();
      Lanes lows = Lanes{} + kInf, highs = Lanes{} - kInf;
      LaneMask nans = {};
      for_each_block(0, a.columns, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
        const float* __restrict__ w = load_block(weight + at, n, buffer);
        for (int i = 0; i < n; ++i) folded[i] = w[i] * scale;
        for (int i = 0; i < n; i += kLanes) {
          QUANTRAIN_LOAD_LANES(next, folded, i, n, folded[0])
          lows = next < lows ? next : lows;
          highs = next > highs ? next : highs;
          nans |= next != next;
        }
      });
      float low = kInf, high = -kInf;
      int32_t nan = 0;
      for (int j = 0; j < kLanes; ++j) {
        low = std::min(low, lows[j]);
        high = std::max(high, highs[j]);
        nan |= nans[j];
      }
      const QParams p = a.step ? make_qparams(a.step[row], 0.0f)
                        : nan  ? qparams_from_range(NAN, NAN, a.range, a.symmetric)
                               : qparams_from_range(low, high, a.range, a.symmetric);
      for_each_block(0, a.columns, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
        const float* __restrict__ w = load_block(weight + at, n, buffer);
        float* __restrict__ out = store_target(output + at, out_buffer);
        const QParams params = p;  // copies, as in fake_quant.cpp
        const QuantRange range = a.range;
        const float factor = scale;
        for (int i = 0; i < n; ++i) {
          const float v = unclamped_code(w[i] * factor, params);
          passes[i] = code_in_range(v, range);
          out[i] = dequantized(clamp_code(v, range), params);
        }
        store_block(output + at, n, out_buffer);
        if (a.mask) pack_bits(passes, n, a.mask + row * bytes + at / 8);
      });
    }
  });
}

template <typename T, typename Out>
void fold_backward_typed(const FoldBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t bytes = (a.columns + 7) / 8;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float buffer[kBlock], grad_buffer[kBlock], out_buffer[kBlock], product[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const T* weight = static_cast<const T*>(a.weight) + row * a.columns;
      const Out* grad_output = static_cast<const Out*>(a.grad_output) + row * a.columns;
      T* grad_weight = static_cast<T*>(a.grad_weight) + row * a.columns;
      const uint8_t* mask = a.mask + row * bytes;
      const float scale = folding_scale(a.gamma[row], a.variance[row], a.eps);
      LaneSum along, of_step;
      const QParams p = a.step ? make_qparams(a.step[row], 0.0f) : QParams{};
      const QuantRange range = a.range;
      for_each_block(0, a.columns, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
        const float* __restrict__ w = load_block(weight + at, n, buffer);
        const float* __restrict__ grad = load_block(grad_output + at, n, grad_buffer);
        float* __restrict__ out = store_target(grad_weight + at, out_buffer);
        for (int i = 0; i < n; ++i) {
          const float g = mask[(at + i) / 8] >> ((at + i) % 8) & 1 ? grad[i] : 0.0f;
          product[i] = g * w[i];
          out[i] = g * scale;
        }
        store_block(grad_weight + at, n, out_buffer);
        along.add(product, n);
        if (!a.step) return;
        for (int i = 0; i < n; ++i) product[i] = grad[i] * learnable_gradient(w[i] * scale, p, range).scale;
        of_step.add(product, n);
      });
      if (a.step) a.grad_step[row] = of_step.total();
      const float of_scale = along.total() + (a.grad_scale ? a.grad_scale[row] : 0.0f);
      a.grad_gamma[row] = folding_gradient(of_scale, a.gamma[row], a.variance[row], a.eps);
    }
  });
}

template <typename Args, typename F>
void dispatch_types(const Args& a, const F& f) {
  dispatch_float(a.dtype, [&](auto* type) { dispatch_float(a.output_dtype, [&](auto* output) { f(type, output); }); });
}

}  // namespace

void fold_fake_quantize(const FoldArgs& args, int64_t begin, int64_t end) {
  dispatch_types(args, [&](auto* type, auto* output) {
    fold_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(output)>>(args, begin, end);
  });
}

void fold_fake_quantize_backward(const FoldBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_types(args, [&](auto* type, auto* output) {
    fold_backward_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(output)>>(args, begin,
                                                                                                        end);
  });
}

}  // namespace quantrain::cpu

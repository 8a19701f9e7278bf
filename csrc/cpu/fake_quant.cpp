#include "csrc/cpu/fake_quant.h"

#include "csrc/cpu/fake_quant_blocks.h"
#include "csrc/cpu/mask_bits.h"

// fake_quantize and its gradients.

namespace quantrain::cpu {
namespace {

template <typename T>
void fake_quantize_typed(const FakeQuantizeArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  T* __restrict__ y = static_cast<T*>(a.y);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], y_buffer[kBlock];
    alignas(64) uint8_t inside[kBlock];
    BlockQParams scratch;
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const float* __restrict__ xs = load_block(x + at, n, x_buffer);
      float* __restrict__ ys = store_target(y + at, y_buffer);
      for_each_run(a.grouping, a.qparams, a.range, at, at + n, scratch,
                   [&](int offset, int length, const auto& params) QUANTRAIN_INLINE_LAMBDA {
                     if (a.mask && !a.ends_pass) {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = unclamped_code(xs[offset + i], p);
                         inside[offset + i] = code_inside_range(v, a.range);
                         ys[offset + i] = dequantized(clamp_code(v, a.range), p);
                       }
                     } else if (a.mask) {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = unclamped_code(xs[offset + i], p);
                         inside[offset + i] = code_in_range(v, a.range);
                         ys[offset + i] = dequantized(clamp_code(v, a.range), p);
                       }
                     } else {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         ys[offset + i] = dequantized(clamp_code(unclamped_code(xs[offset + i], p), a.range), p);
                       }
                     }
                   });
      store_block(y + at, n, y_buffer);
      if (a.mask) pack_bits(inside, n, a.mask + at / 8);
    });
  });
}

// Works on the bits of an element, whatever its type: it is kept or becomes +0.
template <typename Bits>
void masked_copy(const FakeQuantizeBackwardArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    // Declared in here: through the lambda's captures __restrict__ is lost, and with it the vector loop.
    const Bits* __restrict__ grad_output = static_cast<const Bits*>(a.grad_output);
    Bits* __restrict__ grad_input = static_cast<Bits*>(a.grad_input);
    const uint8_t* __restrict__ mask = a.mask;
    alignas(64) Bits keep[kBlock];
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const Bits* __restrict__ in = grad_output + at;
      Bits* __restrict__ out = grad_input + at;
      for (int byte = 0; byte * 8 < n; ++byte) {
        const uint32_t bits = mask[at / 8 + byte];
        for (int j = 0; j < 8; ++j) keep[byte * 8 + j] = static_cast<Bits>(0u - (bits >> j & 1u));
      }
      for (int i = 0; i < n; ++i) out[i] = static_cast<Bits>(in[i] & keep[i]);
    });
  });
}

template <typename T>
void learnable_backward_typed(const LearnableBackwardArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ grad_output = static_cast<const T*>(a.grad_output);
  const T* __restrict__ x = static_cast<const T*>(a.x);
  T* __restrict__ grad_input = static_cast<T*>(a.grad_input);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], dy_buffer[kBlock], dx_buffer[kBlock], scale_term[kBlock],
        zero_point_term[kBlock];
    for_each_chunk(a.grouping, begin, end,
                   [&](int64_t task, int64_t row, int64_t first, int64_t last) QUANTRAIN_INLINE_LAMBDA {
                     const QParams p = load_qparams(a.qparams, a.grouping.scale_index(row), a.range);
                     LaneSum scale_sum, zero_point_sum;
                     for_each_block(first, last, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
                       const float* __restrict__ xs = load_block(x + at, n, x_buffer);
                       const float* __restrict__ dys = load_block(grad_output + at, n, dy_buffer);
                       float* __restrict__ dxs = store_target(grad_input + at, dx_buffer);
                       const QParams params = p;  // copies: through a reference the loop would stay scalar
                       const QuantRange range = a.range;
                       for (int i = 0; i < n; ++i) {
                         const LearnableGradient g = learnable_gradient(xs[i], params, range);
                         dxs[i] = select(g.inside, dys[i], 0.0f);
                         scale_term[i] = dys[i] * g.scale;
                         zero_point_term[i] = dys[i] * g.zero_point;
                       }
                       store_block(grad_input + at, n, dx_buffer);
                       scale_sum.add(scale_term, n);
                       zero_point_sum.add(zero_point_term, n);
                     });
                     a.partial_scale[task] = scale_sum.total();
                     if (a.partial_zero_point) a.partial_zero_point[task] = zero_point_sum.total();
                   });
  });
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { fake_quantize_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void fake_quantize_backward(const FakeQuantizeBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kFloat32)
    masked_copy<uint32_t>(args, begin, end);
  else
    masked_copy<uint16_t>(args, begin, end);
}

void fake_quantize_learnable_backward(const LearnableBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    learnable_backward_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

}  // namespace quantrain::cpu

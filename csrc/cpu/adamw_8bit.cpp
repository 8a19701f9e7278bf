#include "csrc/cpu/adamw_8bit.h"

#include <algorithm>
#include <type_traits>

#include "csrc/common/fake_quant.h"
#include "csrc/cpu/lanes.h"

// A block of 256 at a time, as float32 in buffers that stay in the first-level cache: plain loops, one for each thing
// that is done to all elements.

namespace quantrain::cpu {
namespace {

constexpr UnsignedBins kUnsignedBins = detail::make_unsigned_bins();
constexpr SignedBins kSignedBins = detail::make_signed_bins();

QUANTRAIN_INLINE uint32_t largest_magnitude(const float* values, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) most = std::max(most, magnitude_bits(values[i]));
  return most;
}

QUANTRAIN_INLINE float encode_signed(const float* m, int n, uint8_t* codes) {
  const float scale = dynamic_scale(largest_magnitude(m, n));
  if (scale != scale) {
    std::fill(codes, codes + n, static_cast<uint8_t>(kSignedZero));
    return scale;
  }
  const float inverse = dynamic_inverse(scale);
  for (int i = 0; i < n; ++i) {
    const uint32_t code = signed_state_code(m[i], inverse, kSignedBins.entry) >> 16;
    const uint32_t negative = detail::float_to_bits(m[i] + 0.0f) >> 31;
    codes[i] = static_cast<uint8_t>(code ^ negative * kSignedZero);  // a branch would be mispredicted half the time
  }
  return scale;
}

QUANTRAIN_INLINE float encode_unsigned(const float* v, int n, uint8_t* codes) {
  const float scale = dynamic_scale(largest_magnitude(v, n));
  if (scale != scale) {
    std::fill(codes, codes + n, uint8_t{0});
    return scale;
  }
  const float inverse = dynamic_inverse(scale);
  for (int i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(unsigned_state_code(v[i], inverse, kUnsignedBins.entry) >> 16);
  return scale;
}

QUANTRAIN_INLINE void decode(const DynamicMap& map, const uint8_t* codes, int n, float scale, float* values) {
  for (int i = 0; i < n; ++i) values[i] = map.value[codes[i]] * scale;
}

QUANTRAIN_INLINE void zero_dropped(const uint8_t* mask, int n, float* values) {
  for (int i = 0; i < n; ++i) values[i] = select(0u - static_cast<uint32_t>(is_kept(mask, i)), values[i], 0.0f);
}

// Moments and parameter of a block, apart from where the moments are: the compiler sees that nothing overlaps.
template <typename P, typename G>
QUANTRAIN_INLINE void update_values(const AdamW8bitFactors& f, P* __restrict__ param, const G* __restrict__ grad,
                                    float* __restrict__ m, float* __restrict__ v, int n, const uint8_t* mask,
                                    bool stochastic, const PhiloxState& philox, uint64_t first_draw) {
  float p_buffer[kStateBlock], g_buffer[kStateBlock];
  const float* g = load_block(grad, n, g_buffer);
  for (int i = 0; i < n; ++i) adamw_8bit_moments(f, g[i], m[i], v[i]);
  if (mask) {
    zero_dropped(mask, n, m);
    zero_dropped(mask, n, v);
  }
  const float* before = load_block(param, n, p_buffer);
  float* after = store_target(param, p_buffer);
  for (int i = 0; i < n; ++i) after[i] = adamw_8bit_param(f, before[i], m[i], v[i]);
  if (mask) zero_dropped(mask, n, after);
  if (stochastic && std::is_same_v<P, BFloat16>) {
    for (int i = 0; i < n; i += kElementsOfDraw) {
      const uint64_t index = first_draw + static_cast<uint64_t>(i / kElementsOfDraw);
      const Philox4 draw = philox4x32_10(philox.seed, philox.offset, index);
      for (int j = i; j < std::min(i + kElementsOfDraw, n); ++j)
        after[j] = to_float(round_stochastic<BFloat16>(after[j], random_of_element(draw, j - i)));
    }
  }
  store_block(param, n, after);
}

// Elements `first` to first + n of a tensor.
template <typename P, typename G>
QUANTRAIN_INLINE void update_block(const AdamW8bitTensor& t, const AdamW8bitFactors& f, int64_t first, int n,
                                   bool stochastic, const PhiloxState& philox, uint64_t first_draw) {
  P* param = static_cast<P*>(t.param) + first;
  const G* grad = static_cast<const G*>(t.grad) + first;
  const uint8_t* mask = t.mask ? t.mask + first / 8 : nullptr;
  if (!t.codes) {
    update_values(f, param, grad, static_cast<float*>(t.exp_avg) + first, static_cast<float*>(t.exp_avg_sq) + first, n,
                  mask, stochastic, philox, first_draw);
    return;
  }
  const int64_t block = first / kStateBlock;
  auto* m_codes = static_cast<uint8_t*>(t.exp_avg) + first;
  auto* v_codes = static_cast<uint8_t*>(t.exp_avg_sq) + first;
  float m[kStateBlock], v[kStateBlock];
  decode(kSignedMap, m_codes, n, t.exp_avg_scale[block], m);
  decode(kUnsignedMap, v_codes, n, t.exp_avg_sq_scale[block], v);
  update_values(f, param, grad, m, v, n, mask, stochastic, philox, first_draw);
  t.exp_avg_scale[block] = encode_signed(m, n, m_codes);
  t.exp_avg_sq_scale[block] = encode_unsigned(v, n, v_codes);
}

}  // namespace

void adamw_8bit(const AdamW8bitArgs& a, int64_t begin, int64_t end) {
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const float grad_factor = a.grad_scale ? inverse_scale(*a.grad_scale) : 1.0f;
  int64_t first_block = 0;
  for (int64_t i = 0; i < a.count && first_block < end; ++i) {
    const AdamW8bitTensor& t = a.tensors[i];
    const int64_t blocks = state_blocks_of(t.numel);
    const int64_t from = std::max(begin, first_block), to = std::min(end, first_block + blocks);
    if (from < to) {
      const AdamW8bitFactors factors =
          adamw_8bit_factors(a.beta1, a.beta2, a.eps, a.weight_decay, *a.lr, grad_factor, *t.step);
      dispatch_float(t.dtype, [&](auto* param_type) {
        using P = std::remove_pointer_t<decltype(param_type)>;
        dispatch_float(t.grad_dtype, [&](auto* grad_type) {
          using G = std::remove_pointer_t<decltype(grad_type)>;
          vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
            for (int64_t block = from; block < to; ++block) {
              const int64_t first = (block - first_block) * kStateBlock;
              const int n = static_cast<int>(std::min<int64_t>(kStateBlock, t.numel - first));
              update_block<P, G>(t, factors, first, n, a.stochastic, a.philox,
                                 static_cast<uint64_t>(block) * kDrawsOfBlock);
            }
          });
        });
      });
    }
    first_block += blocks;
  }
}

void count_steps(const AdamW8bitArgs& a) {
  if (a.found_inf && *a.found_inf != 0.0f) return;
  for (int64_t i = 0; i < a.count; ++i) *a.tensors[i].step += 1.0f;
}

void quantize_state(const StateCodesArgs& a, int64_t begin, int64_t end) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kStateBlock;
        const int n = static_cast<int>(std::min<int64_t>(kStateBlock, a.numel - first));
        float buffer[kStateBlock];
        const float* x = load_block(static_cast<const T*>(a.values) + first, n, buffer);
        a.scale[block] = a.with_sign ? encode_signed(x, n, a.codes + first) : encode_unsigned(x, n, a.codes + first);
      }
    });
  });
}

void dequantize_state(const StateCodesArgs& a, int64_t begin, int64_t end) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kStateBlock;
        const int n = static_cast<int>(std::min<int64_t>(kStateBlock, a.numel - first));
        float buffer[kStateBlock];
        T* y = static_cast<T*>(a.values) + first;
        float* values = store_target(y, buffer);
        decode(a.with_sign ? kSignedMap : kUnsignedMap, a.codes + first, n, a.scale[block], values);
        store_block(y, n, values);
      }
    });
  });
}

}  // namespace quantrain::cpu

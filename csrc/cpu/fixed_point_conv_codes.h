// What happens to the sums of the fixed-point convolution: a residual is added, a shift makes them codes, they are
// written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "csrc/common/fixed_point_conv.h"
#include "csrc/cpu/fixed_point_conv_tile.h"

namespace quantrain::cpu::conv {

// Shifts of every channel, [blocks * 16] each.
struct Shifts {
  const int32_t* shift;       // of sum and residual to the right, or the negative to the left
  const int32_t* below_half;  // 2^(shift - 1) - 1; 0 where shift <= 0
  const int32_t* residual;    // of the residual to the left, before it is added
  const int32_t* sum;         // of the sum to the left, likewise
  bool small;                 // everything stays inside int32, every shift is at least 1 and none of the sum is
};

// Elements i to i + n of the output, of channels o to o + n.
template <typename Residual, bool has_residual>
QUANTRAIN_INLINE void write_codes(const FixedPointConvArgs& args, const Shifts& shifts,
                                  const int32_t* __restrict__ sums, int64_t i, int64_t o, int64_t n) {
  const int32_t lo = args.output_signed ? -127 : 0, hi = args.output_signed ? 127 : 255;
  uint8_t* __restrict__ output = static_cast<uint8_t*>(args.output) + i;
  const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i : 0);
  const int32_t *shift = shifts.shift + o, *below_half = shifts.below_half + o, *left = shifts.residual + o;
  for (int64_t j = 0; j < n; ++j) {
    int32_t t = sums[j];
    if constexpr (has_residual) t += static_cast<int32_t>(residual[j]) << left[j];
    t = (t + below_half[j] + ((t >> shift[j]) & 1)) >> shift[j];
    output[j] = static_cast<uint8_t>(std::min(std::max(t, lo), hi));
  }
}

#if defined(QUANTRAIN_X86)
using Long8 = long long __attribute__((vector_size(64)));

#define QUANTRAIN_V4 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define QUANTRAIN_V4_LAMBDA __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))

template <typename Residual, bool has_residual, bool is_signed>
QUANTRAIN_V4 void write_codes_512(const FixedPointConvArgs& args, const Shifts& shifts, const int32_t* sums,
                                  int64_t stride, int64_t pixels, int64_t i, int64_t o, int64_t n) {
  for (int64_t j = 0; j < n; j += kBlock) {
    const auto mask = static_cast<__mmask16>(n - j >= kBlock ? 0xffff : (1 << (n - j)) - 1);
    Lanes16 shift, below_half, left;
    std::memcpy(&shift, shifts.shift + o + j, sizeof(shift));
    std::memcpy(&below_half, shifts.below_half + o + j, sizeof(below_half));
    std::memcpy(&left, shifts.residual + o + j, sizeof(left));
    uint8_t* output = static_cast<uint8_t*>(args.output) + i + j;
    const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i + j : 0);
    const int32_t* sum = sums + j;
    // Masked conversions alone: gcc 12 warns of the others' undefined lanes.
    const auto codes_of = [&](const __m128i& residuals) QUANTRAIN_V4_LAMBDA {
      Lanes16 t;
      std::memcpy(&t, sum, sizeof(t));
      if constexpr (has_residual)
        t += (Lanes16)(Residual(-1) < 0 ? _mm512_maskz_cvtepi8_epi32(0xffff, residuals)
                                        : _mm512_maskz_cvtepu8_epi32(0xffff, residuals))
             << left;
      t = (t + (below_half + ((t >> shift) & 1))) >> shift;
      const Lanes16 lo = Lanes16{} + (is_signed ? -127 : 0);
      t = t > lo ? t : lo;
      return is_signed ? _mm512_maskz_cvtsepi32_epi8(0xffff, (__m512i)t)
                       : _mm512_maskz_cvtusepi32_epi8(0xffff, (__m512i)t);
    };
    if (mask == 0xffff)  // a masked store of bytes is slow
      for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
        __m128i residuals{};
        if constexpr (has_residual) std::memcpy(&residuals, residual, sizeof(residuals));
        const __m128i codes = codes_of(residuals);
        std::memcpy(output, &codes, sizeof(codes));
      }
    else
      for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
        __m128i residuals{};
        if constexpr (has_residual) residuals = _mm_maskz_loadu_epi8(mask, residual);
        _mm_mask_storeu_epi8(output, mask, codes_of(residuals));
      }
  }
}

// The same for any shift and residual, in int64.
template <typename Residual, bool has_residual>
QUANTRAIN_V4 void write_codes_exact_512(const FixedPointConvArgs& args, const Shifts& shifts, const int32_t* sums,
                                        int64_t stride, int64_t pixels, int64_t i, int64_t o, int64_t n) {
  constexpr int64_t kLanes = 8;
  const Long8 lo = Long8{} + (args.output_signed ? -127 : 0), hi = Long8{} + (args.output_signed ? 127 : 255);
  const Long8 least = Long8{} + INT32_MIN, most = Long8{} + INT32_MAX;
  for (int64_t j = 0; j < n; j += kLanes) {
    const auto mask = static_cast<__mmask8>(n - j >= kLanes ? 0xff : (1 << (n - j)) - 1);
    const auto load = [&](const int32_t* from) QUANTRAIN_V4_LAMBDA {
      Lanes8 lanes;
      std::memcpy(&lanes, from, sizeof(lanes));
      return __builtin_convertvector(lanes, Long8);
    };
    const Long8 shift = load(shifts.shift + o + j), left = load(shifts.residual + o + j), up = load(shifts.sum + o + j);
    const Long8 right = shift > 0 ? shift : Long8{} + 1, back = shift < 0 ? -shift : Long8{};
    const Long8 below_half = ((Long8{} + 1) << (right - 1)) - 1;
    uint8_t* output = static_cast<uint8_t*>(args.output) + i + j;
    const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i + j : 0);
    const int32_t* sum = sums + j;
    for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
      Long8 t = load(sum) << up;
      if constexpr (has_residual) {
        __m512i r;
        if constexpr (sizeof(Residual) == 4)
          r = _mm512_maskz_cvtepi32_epi64(mask, _mm256_maskz_loadu_epi32(mask, residual));
        else if constexpr (Residual(-1) < 0)
          r = _mm512_maskz_cvtepi8_epi64(mask, _mm_maskz_loadu_epi8(mask, residual));
        else
          r = _mm512_maskz_cvtepu8_epi64(mask, _mm_maskz_loadu_epi8(mask, residual));
        t += (Long8)r << left;
      }
      const Long8 rounded = (t + (below_half + ((t >> right) & 1))) >> right;
      Long8 inside = t > least ? t : least;
      inside = inside < most ? inside : most;
      t = shift > 0 ? rounded : inside << back;
      t = t > lo ? t : lo;
      t = t < hi ? t : hi;
      const __m128i codes = _mm512_maskz_cvtepi64_epi8(mask, (__m512i)t);
      if (mask == 0xff)  // as above
        std::memcpy(output, &codes, kLanes);
      else
        _mm_mask_storeu_epi8(output, mask, codes);
    }
  }
}
#endif

// bound: no sum is larger.
inline Shifts shifts_of(const FixedPointConvArgs& args, int64_t blocks, int64_t bound, std::vector<int32_t>& memory) {
  const int64_t n = blocks * kBlock;
  if (static_cast<int64_t>(memory.size()) < 4 * n) memory.resize(static_cast<size_t>(4 * n));
  int32_t *shift = memory.data(), *below_half = shift + n, *residual = below_half + n, *sum = residual + n;
  Shifts shifts{shift, below_half, residual, sum, false};
  if (!args.shift) return shifts;
  int32_t least = 62, most = 0, most_residual = 0, most_sum = 0;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t o = 0; o < n; ++o) {
      const int64_t channel = std::min(o, args.o - 1);
      const int32_t d = fixed_point_residual_shift(args, channel);
      residual[o] = std::max(d, 0);
      sum[o] = std::max(-d, 0);
      shift[o] = args.shift[channel * args.shift_stride] + sum[o];
      below_half[o] = shift[o] > 0 ? static_cast<int32_t>((1u << ((shift[o] - 1) & 31)) - 1) : 0;
      least = std::min(least, shift[o]);
      most = std::max(most, shift[o]);
      most_residual = std::max(most_residual, residual[o]);
      most_sum = std::max(most_sum, sum[o]);
    }
  });
  if (least < 1 || most > 31 || most_sum > 0 || (args.residual && args.residual_type == DType::kInt32)) return shifts;
  const int64_t largest = bound + (args.residual ? int64_t{255} << most_residual : 0) + (int64_t{1} << most);
  shifts.small = largest <= INT32_MAX;
  return shifts;
}

// Neighbouring pixels of a row, of which the tile makes the sums at once.
struct Segment {
  const uint8_t* x;
  int64_t pixel;    // of the output
  int skip, count;  // pixels skip to count are written
};

// Calls f with a null pointer of the residual's type, and whether there is one.
template <typename F>
QUANTRAIN_INLINE void dispatch_residual(const FixedPointConvArgs& args, const F& f) {
  if (!args.residual) return f(static_cast<uint8_t*>(nullptr), std::false_type{});
  if (args.residual_type == DType::kInt32) return f(static_cast<int32_t*>(nullptr), std::true_type{});
  if (args.residual_type == DType::kInt8) return f(static_cast<int8_t*>(nullptr), std::true_type{});
  f(static_cast<uint8_t*>(nullptr), std::true_type{});
}

// Pixels of one segment from their sums [., stride], channels o to o + n.
inline void write_segment(const FixedPointConvArgs& args, const Shifts& shifts, const Segment& segment,
                          const int32_t* sums, int64_t stride, int64_t o, int64_t n) {
  const int64_t pixels = segment.count - segment.skip, i = (segment.pixel + segment.skip) * args.o + o;
  if (pixels <= 0) return;
  sums += segment.skip * stride;
  if (!args.shift) {
    for (int64_t p = 0; p < pixels; ++p)
      std::memcpy(static_cast<int32_t*>(args.output) + i + p * args.o, sums + p * stride, static_cast<size_t>(4 * n));
    return;
  }
#if defined(QUANTRAIN_X86)
  if (best_isa() == Isa::kV4)
    return dispatch_residual(args, [&](auto* type, auto has_residual) QUANTRAIN_INLINE_LAMBDA {
      using Residual = std::remove_pointer_t<decltype(type)>;
      if constexpr (sizeof(Residual) == 1)
        if (shifts.small)
          return args.output_signed
                     ? write_codes_512<Residual, has_residual(), true>(args, shifts, sums, stride, pixels, i, o, n)
                     : write_codes_512<Residual, has_residual(), false>(args, shifts, sums, stride, pixels, i, o, n);
      write_codes_exact_512<Residual, has_residual()>(args, shifts, sums, stride, pixels, i, o, n);
    });
#endif
  for (int64_t p = 0; p < pixels; ++p, sums += stride) {
    if (!shifts.small)
      for (int64_t j = 0; j < n; ++j) fixed_point_conv_output(args, sums[j], i + p * args.o + j, o + j);
    else
      vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
        dispatch_residual(args, [&](auto* type, auto has_residual) QUANTRAIN_INLINE_LAMBDA {
          write_codes<std::remove_pointer_t<decltype(type)>, has_residual()>(args, shifts, sums, i + p * args.o, o, n);
        });
      });
  }
}

#undef QUANTRAIN_V4
#undef QUANTRAIN_V4_LAMBDA

}  // namespace quantrain::cpu::conv

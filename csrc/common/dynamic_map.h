// The 8-bit dynamic maps (Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit optimizers via block-wise quantization",
// arXiv:2110.02861, section 1.3), in the values that bitsandbytes writes: 256 numbers of [-1, 1] or [0, 1], ascending,
// each decade 10^(i-6) with twice as many as the one below. And the search for the nearest, without a loop.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

constexpr int kDynamicCodes = 256;
constexpr uint32_t kSignedZero = 127;  // the code of 0 in the signed map; 0 is the unsigned map's

struct DynamicMap {
  float value[kDynamicCodes] = {};
};

namespace detail {

// Boundary j of [0.1, 1] in n parts as torch.linspace gives it: from the nearer end, product and sum rounded once.
constexpr float dynamic_boundary(int j, int n) {
  const float step = (1.0f - 0.1f) / static_cast<float>(n);
  return j < (n + 1) / 2 ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * j)
                         : static_cast<float>(1.0 - static_cast<double>(step) * (n - j));
}

// In decade i of 0..6 the middles of 2^i parts (with a sign) or 2^(i+1) parts, times 10^(i-6), and above them 1.
constexpr DynamicMap make_dynamic_map(bool with_sign) {
  constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  DynamicMap map;
  const int zero = with_sign ? static_cast<int>(kSignedZero) : 0;
  int code = zero + 1;
  for (int i = 0; i < 7; ++i) {
    const int parts = (with_sign ? 1 : 2) << i;
    for (int j = 0; j < parts; ++j) {
      const float middle = (dynamic_boundary(j, parts) + dynamic_boundary(j + 1, parts)) / 2.0f;
      map.value[code++] = middle * kDecades[i];
    }
  }
  map.value[code] = 1.0f;
  for (int k = 0; k < zero; ++k) map.value[k] = -map.value[2 * zero - k];
  return map;
}

}  // namespace detail

inline constexpr DynamicMap kSignedMap = detail::make_dynamic_map(true);
inline constexpr DynamicMap kUnsignedMap = detail::make_dynamic_map(false);

// The definition of the nearest code: the number of midpoints below r. On a midpoint it is the lower of the two.
constexpr uint32_t nearest_dynamic_code(const DynamicMap& map, float r) {
  uint32_t low = 0, high = kDynamicCodes - 1;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (r > (map.value[middle] + map.value[middle + 1]) * 0.5f)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// ---- codes of an optimizer's state ----------------------------------------------------------------------------------
//
// The nearest code, but for two rules. A positive second moment never takes the code of 0: the next step without a
// gradient would divide by eps alone. A negative first moment does not either, as in bitsandbytes: its sign stays.
//
// A bin holds the floats of one sign that agree in their upper 16 bits, so narrow that no bin holds two midpoints: one
// table entry and one addition give the code. With L the bin's lower end and t its midpoint's lower 16 bits,
//   entry = (code at L) * 2^16 + 0xffff - t - bits(L), so that (entry + bits(r)) >> 16 is one more where r is past t.

constexpr uint32_t kFirstBin = 0x3480;  // of 2^-22: below it r is next to 0
constexpr uint32_t kLastBin = 0x3f80;   // of 1, which a rounded r may pass by an ulp or two
constexpr int kBins = static_cast<int>(kLastBin - kFirstBin) + 1;

struct UnsignedBins {
  uint32_t entry[kBins] = {};
};

struct SignedBins {
  uint32_t entry[2 * kBins] = {};  // of each bin the positive r's, then the negative r's, which gives 127 ^ code
};

namespace detail {

// Entries of ascending magnitudes. A midpoint itself belongs to the lower code, which of negative numbers is the
// larger magnitude.
constexpr void fill_bins(const DynamicMap& map, uint32_t zero, bool negative, uint32_t least, uint32_t* entry,
                         int stride) {
  const uint32_t last = negative ? zero : kDynamicCodes - 1 - zero;  // steps from 0 to the end of the map
  const auto midpoint = [&](uint32_t step) {
    return std::bit_cast<uint32_t>((map.value[zero + step] + map.value[zero + step + 1]) * 0.5f);
  };
  uint32_t steps = 0;  // the midpoints below the bin
  for (uint32_t bin = kFirstBin; bin <= kLastBin; ++bin) {
    while (steps < last && midpoint(steps) >> 16 < bin) ++steps;
    const bool crossed = steps < last && midpoint(steps) >> 16 == bin && steps >= least;
    const uint32_t room = crossed ? 0xffffu - (midpoint(steps) & 0xffffu) + (negative ? 1 : 0) : 0;
    const uint32_t base = (steps < least ? least : steps) + (negative ? 0 : zero);
    entry[static_cast<int>(bin - kFirstBin) * stride] = (base << 16) + room - (bin << 16);
  }
}

constexpr UnsignedBins make_unsigned_bins() {
  UnsignedBins bins;
  fill_bins(kUnsignedMap, 0, false, 1, bins.entry, 1);
  return bins;
}

constexpr SignedBins make_signed_bins() {
  SignedBins bins;
  fill_bins(kSignedMap, kSignedZero, false, 0, bins.entry, 2);
  fill_bins(kSignedMap, kSignedZero, true, 1, bins.entry + 1, 2);
  return bins;
}

QUANTRAIN_HOST_DEVICE uint32_t bits_from_first_bin(float magnitude) {
  const uint32_t bits = float_to_bits(magnitude);
  return bits > (kFirstBin << 16) ? bits : kFirstBin << 16;
}

}  // namespace detail

// The scale of a block from the bits of its largest magnitude: NaN where the block holds NaN or Inf; 0 for a block of
// zeros, as bitsandbytes has it; else at least 2^-126, whose inverse is finite.
QUANTRAIN_HOST_DEVICE float dynamic_scale(uint32_t largest) {
  if (largest >= 0x7f800000u) return detail::bits_to_float(0x7fc00000u);
  return detail::bits_to_float(largest != 0 && largest < 0x00800000u ? 0x00800000u : largest);
}

// What the magnitudes are multiplied by, 0 without a scale to divide by.
QUANTRAIN_HOST_DEVICE float dynamic_inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// The code of v >= 0 in bits 16 to 23, zeros above. `inverse` is that of a block without NaN and Inf.
QUANTRAIN_HOST_DEVICE uint32_t unsigned_state_code(float v, float inverse, const uint32_t* __restrict__ bins) {
  const uint32_t bits = detail::bits_from_first_bin(v * inverse);
  const uint32_t code = bins[(bits >> 16) - kFirstBin] + bits;
  return v > 0.0f ? code : 0;
}

// The same of m: the code, or of negative m its exclusive or with 127. -0 counts as 0.
QUANTRAIN_HOST_DEVICE uint32_t signed_state_code(float m, float inverse, const uint32_t* __restrict__ bins) {
  const uint32_t bits = detail::bits_from_first_bin(fabsf(m) * inverse);
  const uint32_t negative = detail::float_to_bits(m + 0.0f) >> 31;
  return bins[2 * ((bits >> 16) - kFirstBin) + negative] + bits;
}

}  // namespace quantrain

// The formulas of the fixed_point family (F8Net, Jin et al., ICLR 2022), once for host and device, and the arguments of
// its kernels.
//
//   value = code * 2^-FL,  code in [-(2^(WL-1) - 1), 2^(WL-1) - 1] (signed) or [0, 2^WL - 1] (unsigned)
//
// with word length WL and fraction length 0 <= FL <= WL - signed. Codes are rounded half to even and rescaled by shifts
// alone. Simulated quantization runs on the kernels of fake_quant.h, with 2^-FL for a scale.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/common/fake_quant.h"
#include "csrc/common/grouping.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

// ---- shifts ---------------------------------------------------------------------------------------------------------

// acc / 2^shift rounded half to even, 0 < shift < bits of Int. Nothing is added before the shift, so nothing overflows.
template <typename Int>
QUANTRAIN_HOST_DEVICE Int shifted_half_even(Int acc, int shift) {
  using Unsigned = std::make_unsigned_t<Int>;
  const Int floor = acc >> shift;
  const Unsigned rest = static_cast<Unsigned>(acc) & ((Unsigned{1} << shift) - 1), half = Unsigned{1} << (shift - 1);
  return floor + static_cast<Int>(rest + static_cast<Unsigned>(floor & 1) > half);
}

// acc / 2^shift rounded half to even; for shift <= 0, acc * 2^-shift. Saturates at the ends of int32. Any acc, any
// shift.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_shift_round(int64_t acc, int shift) {
  constexpr int64_t kMin = INT32_MIN, kMax = INT32_MAX;
  if (shift > 0) {
    acc = shift < 64 ? shifted_half_even(acc, shift) : 0;
  } else {
    acc = acc < kMin ? kMin : acc > kMax ? kMax : acc;  // so that the product keeps to int64
    acc *= int64_t{1} << (shift > -31 ? -shift : 31);   // 2^31 already saturates whatever is not 0
  }
  return static_cast<int32_t>(acc < kMin ? kMin : acc > kMax ? kMax : acc);
}

// The same clamped to 8-bit codes: [-127, 127] or [0, 255].
QUANTRAIN_HOST_DEVICE int32_t fixed_point_requantized(int64_t acc, int shift, bool is_signed) {
  const int32_t code = fixed_point_shift_round(acc, shift), lo = is_signed ? -127 : 0, hi = is_signed ? 127 : 255;
  return code < lo ? lo : code > hi ? hi : code;
}

// The same of a 32-bit accumulator in 32-bit arithmetic, without a branch on the shift: for loops over one shift or
// many.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_requantized_int32(int32_t acc, int shift, bool is_signed) {
  const int32_t lo = is_signed ? -127 : 0, hi = is_signed ? 127 : 255;
  const int right = shift < 1 ? 1 : shift > 31 ? 31 : shift, left = shift > -8 ? shift < 0 ? -shift : 0 : 8;
  const int32_t rounded = shifted_half_even(acc, right);
  const int32_t near = acc < -256 ? -256 : acc > 256 ? 256 : acc;  // beyond it saturates without a shift
  // 2^-32 of any accumulator rounds to 0: of -2^31 the half goes to even.
  const int32_t code = shift > 31 ? 0 : shift > 0 ? rounded : near * (int32_t{1} << left);
  return code < lo ? lo : code > hi ? hi : code;
}

// FL of the accumulators less FL of the result, for values that nobody checked: an int32 difference may overflow.
QUANTRAIN_HOST_DEVICE int requantize_shift(int32_t accumulator_fraction_length, int fraction_length) {
  const int64_t shift = static_cast<int64_t>(accumulator_fraction_length) - fraction_length;
  return static_cast<int>(shift < -64 ? -64 : shift > 64 ? 64 : shift);
}

// ---- choice of a fraction length ------------------------------------------------------------------------------------

enum class FractionLengthMethod {
  kStd,  // unbiased standard deviation over all elements
  kRms,  // root mean square
  kMse,  // the least squared error of all fraction lengths
};

constexpr int kMaxWordLength = 16;

// FL is the number of f in 1..WL - signed with statistic <= c / 2^f. At c / 2^f a Gaussian is rounded equally well with
// f and with f - 1; c follows by numerical integration (benchmarks/fits/fixed_point_constants.py), for 8 bits it is the
// paper's: 40 for 39.2, 70 for 72.1. Unsigned words hold a Gaussian after a ReLU: "std" is for the tensor before it,
// "rms" after it (50 for 51.0).
inline double fraction_length_constant(FractionLengthMethod method, int word_length, bool is_signed) {
  static constexpr double kGaussian[] = {1.18862, 2.1361,  3.78574, 6.70404, 11.9572, 21.5431, 39.224,  72.1181,
                                         133.753, 249.931, 470.036, 888.857, 1688.81, 3221.75, 6167.82, 11844.2};
  const bool rms_after_relu = method == FractionLengthMethod::kRms && !is_signed;
  if (word_length == 8) return is_signed ? 40.0 : rms_after_relu ? 50.0 : 70.0;
  // An unsigned word has the codes of the positive half of a signed one that is a bit longer.
  const double c = kGaussian[word_length - (is_signed ? 2 : 1)];
  return rms_after_relu ? c * 0.70710678118654752 : c;
}

struct FractionLengthRule {
  FractionLengthMethod method = FractionLengthMethod::kStd;
  int largest = 7;     // WL - signed
  double c = 40.0;     // std and rms
  double slack = 1.0;  // 2^hysteresis
  QuantRange range;    // of the codes: mse
};

// statistic <= c / 2^f for how many f. 2^-f c is exact, so CPU and CUDA agree wherever the statistic does.
QUANTRAIN_HOST_DEVICE int fraction_length_of(double statistic, const FractionLengthRule& rule) {
  int count = 0;
  double threshold = rule.c;
  for (int f = 1; f <= rule.largest; ++f) {
    threshold *= 0.5;
    count += statistic <= threshold ? 1 : 0;
  }
  return count;
}

QUANTRAIN_HOST_DEVICE bool is_finite(double value) { return value - value == 0.0; }

// The sums that a statistic is made of, per chunk and then per group:
//   std: sum of x - x0, sum of (x - x0)^2, x0 the group's first element (a constant group then has exactly 0);
//   rms: nothing, sum of x^2;  mse: sum of squared errors of each fraction length 0..largest.
constexpr int kMaxFractionLengths = kMaxWordLength + 1;

QUANTRAIN_HOST_DEVICE int statistic_terms(const FractionLengthRule& rule) {
  return rule.method == FractionLengthMethod::kMse ? rule.largest + 1 : 2;
}

// The answer from a group's sums. NaN or an infinity in the group: 0. `previous` is -1 where there is none.
QUANTRAIN_HOST_DEVICE int chosen_fraction_length(const double* sums, int64_t elements, const FractionLengthRule& rule,
                                                 int previous) {
  if (rule.method == FractionLengthMethod::kMse) {
    int best = 0;
    for (int f = 0; f <= rule.largest; ++f) {
      if (!is_finite(sums[f])) return 0;
      best = sums[f] <= sums[best] ? f : best;  // ties to the longer fraction
    }
    const bool known = previous >= 0 && previous <= rule.largest && rule.slack > 1.0;
    return known && sums[previous] <= sums[best] * rule.slack * rule.slack ? previous : best;
  }
  const double n = static_cast<double>(elements);
  double square;
  if (rule.method == FractionLengthMethod::kRms)
    square = sums[1] / n;
  else
    square = elements == 1 ? sums[1] : (sums[1] - sums[0] * sums[0] / n) / (n - 1.0);
  if (!is_finite(square)) return 0;
  const double statistic = sqrt(square > 0.0 ? square : 0.0);
  const int longest = fraction_length_of(statistic / rule.slack, rule);
  const int shortest = fraction_length_of(statistic * rule.slack, rule);
  return previous >= shortest && previous <= longest ? previous : fraction_length_of(statistic, rule);
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

// Each group is cut into chunks of kRowChunk elements; partial sums are added in the order of the chunks, so results
// repeat.
struct FractionLengthArgs {
  const void* x;            // [groups, elements]
  double* partial;          // [groups, chunks, statistic_terms]
  const int32_t* previous;  // [groups] or null
  int32_t* result;          // [groups]
  DType dtype;
  int64_t groups;
  int64_t elements;
  FractionLengthRule rule;
};

inline int64_t chunks_per_group(const FractionLengthArgs& a) { return (a.elements + kRowChunk - 1) / kRowChunk; }

struct FixedPointRequantizeArgs {
  const int32_t* accumulator;                  // [numel]
  const int32_t* accumulator_fraction_length;  // one per group of `grouping`
  void* output;                                // [numel] uint8 or int8
  Grouping grouping;
  int fraction_length;
  bool is_signed;
};

}  // namespace quantrain

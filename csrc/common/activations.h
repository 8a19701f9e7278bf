// Activations and their derivatives, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/fake_quant.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

// Of the host's exponentials: 2^n e^r, |r| at most ln(2) / 2, n in the low bits of `shifted`.
QUANTRAIN_HOST_DEVICE float scaled_power(float r, float shifted) {
  float p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * detail::bits_to_float((detail::float_to_bits(shifted) << 23) + 0x3f800000u);
}

// 2^x, within a few units in the last place: what is made of it is rounded to few bits. On the device by its fast
// instruction, where results below 2^-126 are 0; on the host as 2^n e^r with |r| at most ln(2) / 2 and a Taylor
// polynomial, so that a loop around it becomes vector instructions, which a call of exp2f would prevent. Below 2^-125.5
// and above 2^127 it stays there.
QUANTRAIN_HOST_DEVICE float exponential2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  x = select(0u - static_cast<uint32_t>(x < -125.5f), -125.5f, x);  // NaN stays
  x = select(0u - static_cast<uint32_t>(x > 127.0f), 127.0f, x);
  const float shifted = x + 12582912.0f;  // 3 * 2^22: the integer n is in the low bits
  const float r = (x - (shifted - 12582912.0f)) * 0.69314718f;
  return scaled_power(r, shifted);
#endif
}

// e^x likewise; on the host it stays below e^-87 and above e^88.
QUANTRAIN_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return exponential2(x * 1.44269504f);
#else
  x = select(0u - static_cast<uint32_t>(x < -87.0f), -87.0f, x);  // NaN stays
  x = select(0u - static_cast<uint32_t>(x > 88.0f), 88.0f, x);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 3 * 2^22: the integer n is in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  return scaled_power(r, shifted);
#endif
}

// b of at least 1.
QUANTRAIN_HOST_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}

// An activation and its derivative at one place. NaN passes.
struct ValueAndSlope {
  float value;
  float slope;
};

// 0 where exp(-x) is too large for float32.
QUANTRAIN_HOST_DEVICE float sigmoid_of(float x) {
  const float gate = quotient(1.0f, 1.0f + exponential(-x));
  return select(0u - static_cast<uint32_t>(x < -88.0f), 0.0f, gate);
}

QUANTRAIN_HOST_DEVICE ValueAndSlope silu_at(float x) {
  const float gate = sigmoid_of(x);
  return ValueAndSlope{x * gate, gate * fmaf(x, 1.0f - gate, 1.0f)};
}

// x Phi(x), with Phi by Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26: within 1e-7.
QUANTRAIN_HOST_DEVICE ValueAndSlope gelu_at(float x) {
  const float half_square = 0.5f * (x * x);
  // Where exponential no longer falls: far out x times it would not be 0.
  const float bell = select(0u - static_cast<uint32_t>(half_square > 87.0f), 0.0f, exponential(-half_square));
  const float t = quotient(1.0f, fmaf(0.3275911f * 0.70710678f, fabsf(x), 1.0f));
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  const float tail = 0.5f * (p * t) * bell;  // Phi(-|x|)
  const float phi = select(0u - static_cast<uint32_t>(x < 0.0f), tail, 1.0f - tail);
  return ValueAndSlope{x * phi, fmaf(x * bell, 0.39894228f, phi)};
}

// Hendrycks and Gimpel, arXiv:1606.08415, section 2; (1 + tanh u) / 2 is the sigmoid of 2 u.
QUANTRAIN_HOST_DEVICE ValueAndSlope gelu_tanh_at(float x) {
  const float square = 0.044715f * x * x;
  const float gate = sigmoid_of(1.59576912f * fmaf(square, x, x));
  const float inner = 1.59576912f * fmaf(3.0f, square, 1.0f);
  const float bend = x * (gate * (1.0f - gate));  // 0 far out, where inner may be infinite
  return ValueAndSlope{x * gate, select(0u - static_cast<uint32_t>(bend == 0.0f), gate, fmaf(bend, inner, gate))};
}

}  // namespace quantrain

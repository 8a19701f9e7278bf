// Element types of the kernels: half-precision storage without a torch header, and a tag to pick a template at run
// time.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace quantrain {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt8, kUInt8, kInt16, kInt32 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace detail {

QUANTRAIN_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

QUANTRAIN_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Branch-free on purpose: the loop around it must vectorize without the F16C instructions of one instruction set.
QUANTRAIN_HOST_DEVICE float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // re-biases the exponent, subnormals too
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_to_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

QUANTRAIN_HOST_DEVICE uint16_t float_to_half_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // The addition rounds half to even at a half's subnormal step, 2^-24.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

QUANTRAIN_HOST_DEVICE uint16_t float_to_bfloat16_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace detail

QUANTRAIN_HOST_DEVICE float to_float(float value) { return value; }

QUANTRAIN_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return detail::half_bits_to_float(value.bits);
#endif
}

QUANTRAIN_HOST_DEVICE float to_float(BFloat16 value) {
  return detail::bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
QUANTRAIN_HOST_DEVICE T from_float(float value);

template <>
QUANTRAIN_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
QUANTRAIN_HOST_DEVICE Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  return Half{detail::float_to_half_bits(value)};
#endif
}

template <>
QUANTRAIN_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return BFloat16{detail::float_to_bfloat16_bits(value)};
#endif
}

// Calls f with a null pointer of the floating element type that `dtype` names; the operator has checked that it is one.
template <typename F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// The same for the types that hold codes.
template <typename F>
void dispatch_codes(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kUInt8:
      return f(static_cast<uint8_t*>(nullptr));
    case DType::kInt16:
      return f(static_cast<int16_t*>(nullptr));
    case DType::kInt32:
      return f(static_cast<int32_t*>(nullptr));
    default:
      return f(static_cast<int8_t*>(nullptr));
  }
}

}  // namespace quantrain

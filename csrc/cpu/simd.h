// Runs a plain loop in the widest vector instructions that this processor has, chosen once.
// The body is an always_inline lambda, compiled here for each instruction set; everything it calls must be inlined too.
// x86-64's baseline has no rounding instruction, so without this one call per element remains (PyTorch's own
// fake-quant: 48x a copy).
#pragma once

#include <cstdint>

namespace quantrain::cpu {

#define QUANTRAIN_INLINE inline __attribute__((always_inline))
#define QUANTRAIN_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)

enum class Isa { kBaseline, kV3, kV4 };

inline Isa best_isa() {
  static const Isa isa =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl")
          ? Isa::kV4
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")
          ? Isa::kV3
          : Isa::kBaseline;
  return isa;
}

template <typename F>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void run_v4(const F& body) {
  body();
}

template <typename F>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const F& body) {
  body();
}

template <typename F>
void run_baseline(const F& body) {
  body();
}

template <typename F>
void vectorized(const F& body) {
  switch (best_isa()) {
    case Isa::kV4:
      return run_v4(body);
    case Isa::kV3:
      return run_v3(body);
    default:
      return run_baseline(body);
  }
}

#else

template <typename F>
void vectorized(const F& body) {
  body();
}

#endif

}  // namespace quantrain::cpu

// Dropout whose mask is computed from random numbers by element wherever it is needed, and never stored.
//
//   y[i] = x[i] / (1 - p) where u[i] >= p, else 0;   u[i] the i-th number of the state, word i % 4 of block i / 4
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"

namespace quantrain {

struct DropoutArgs {
  const void* x;         // [numel] of dtype
  const int64_t* state;  // [2]: seed and offset
  void* y;               // [numel] of dtype
  DType dtype;
  int64_t numel;
  float p;
  float factor;  // 1 / (1 - p)
};

struct DropoutStateArgs {
  PhiloxState philox;
  int64_t* state;  // [2]
};

QUANTRAIN_HOST_DEVICE float dropped(float x, uint32_t word, const DropoutArgs& a) {
  return philox_uniform(word) >= a.p ? x * a.factor : 0.0f;
}

}  // namespace quantrain

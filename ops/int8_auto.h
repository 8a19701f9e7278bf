// "auto": which of a linear layer's three products run in int8. Private to the int8 family.
//
// An int8 product is faster, but its operands have to be quantized and transposed first, which costs passes over memory
// that narrow layers do not win back and that the products share. So the choice is made for all three at once: the
// combination with the least modelled time.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/SymInt.h>

#include <cstdint>

namespace quantrain {

enum class Int8Mode : uint8_t { kNone, kInt8, kAuto };

// One of Y = X W^T, dX = dY W, dW = dY^T X each; kNone also where nobody needs it.
template <typename T>
struct Int8Products {
  T output;
  T grad_input;
  T grad_weight;
};

// X [tokens, in] of input_type, W [out, in] of weight_type.
struct Int8LinearShape {
  int64_t tokens;
  int64_t in;
  int64_t out;
  at::ScalarType input_type;
  at::ScalarType weight_type;
};

// A number of tokens as the choice takes it: the power of two at or below. Of a symbolic size the guards are then
// ranges, and a compiled program chooses as an eager one. Unknown at compile time: 0.
int64_t int8_token_bucket(const c10::SymInt& tokens);

// Each kAuto decided: true for int8. On a GPU without int8 tensor cores (below sm_80) false; on CPU true.
Int8Products<bool> choose_int8(const Int8LinearShape& shape, const c10::Device& device,
                               const Int8Products<Int8Mode>& asked);

}  // namespace quantrain

// What the schema, the kernel and the derivative of linear_4bit_lora share.
#pragma once

#include <ATen/core/Generator.h>

#include <optional>
#include <string_view>
#include <utility>

#include "ops/four_bit_linear.h"

namespace quantrain {

struct Lora {
  at::Tensor a, b;
  double scaling, dropout;
};

// Where the dropout's random numbers come from: a generator, or a seed and an offset.
struct DropoutDraw {
  std::optional<at::Generator> generator;
  std::optional<std::pair<int64_t, int64_t>> seeded;
};

struct LoraForward {
  at::Tensor output;
  at::Tensor u;      // [M, r]: dropout(x) A^T
  at::Tensor state;  // of the dropout, or undefined
};

c10::SymInt check_linear_4bit_lora(const at::Tensor& input, const PackedWeight& weight,
                                   const std::optional<at::Tensor>& bias, const Lora& lora, std::string_view method,
                                   const std::optional<c10::SymInt>& out_features);

LoraForward linear_4bit_lora_forward(const at::Tensor& input, const PackedWeight& weight,
                                     const std::optional<at::Tensor>& bias, const Lora& lora, std::string_view method,
                                     const std::optional<c10::SymInt>& out_features, const DropoutDraw& draw);

// x where the state keeps it, times 1 / (1 - p); x itself where there is no state.
at::Tensor dropped_out(const at::Tensor& x, const at::Tensor& state, double p);

}  // namespace quantrain

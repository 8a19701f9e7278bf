// Attention of an inference step.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace quantrain::detail {

// softmax(scale q k^T + mask) v: q [B, Tq, H, D], k and v [B, Tk, Hk, D] -> [B, Tq, H, D]; query head h reads key head
// h / (H / Hk). mask: bool (true: attend) or floating (added), broadcast to [B, H, Tq, Tk]. causal: query i attends to
// keys 0 to i. A query that attends to nothing has the result 0. NaN passes, and may reach queries that do not attend
// to its key, whose value is multiplied by 0. Without gradients. Sums are float32.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& mask, bool causal, double scale);

// The same of one tensor, queries, keys and values [B, T, heads + 2 key_heads, D] -> [B, T, heads D]; the mask fits.
at::Tensor attention_of_heads(const at::Tensor& qkv, int64_t heads, int64_t key_heads,
                              const std::optional<at::Tensor>& mask, bool causal, double scale);

// cos and sin, or neither, of rotary embedding: [B or 1, T, size] for x [B, T, ...].
void check_angles(std::string_view op, const at::Tensor& x, const std::optional<at::Tensor>& cos,
                  const std::optional<at::Tensor>& sin, int64_t size);

// mask: of bool or a floating type on like's device, broadcast to sizes, which the message calls `shape`.
void check_mask(std::string_view op, const at::Tensor& mask, const at::Tensor& like,
                const std::array<c10::SymInt, 4>& sizes, std::string_view shape);

}  // namespace quantrain::detail

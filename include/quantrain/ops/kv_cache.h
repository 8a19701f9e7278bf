// Keys and values of attention kept as int8 codes of fixed capacity, one scale per token and key head, without
// calibration: absmax / 127 of the head's vector, as int8_quantize_rows has it. For decoding token by token, also as a
// CUDA graph: where new tokens go is read on the device.
//
// float32, float16 and bfloat16; no gradients. c10::ValueError for shapes, c10::TypeError for types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain {

struct QUANTRAIN_API Int8KvCache {
  at::Tensor key_codes;    // int8 [B, Hk, capacity, D], contiguous
  at::Tensor key_scale;    // float32 [B, Hk, capacity]
  at::Tensor value_codes;  // as key_codes
  at::Tensor value_scale;  // as key_scale

  // Empty: codes of 0 and scales of 1.
  static Int8KvCache zeros(int64_t batches, int64_t key_heads, int64_t capacity, int64_t size, at::Device device);
};

// Rotates queries and keys of qkv [B, T, heads + 2 Hk, D] in place, as rotate_heads_ does (not without cos and sin, [B
// or 1, T, D]), and keeps keys and values of its tokens from `position` on: int64, one element or B, on qkv's device.
// What lies past the capacity is not kept.
QUANTRAIN_API void kv_cache_append_(at::Tensor& qkv, Int8KvCache& cache, const at::Tensor& position,
                                    const std::optional<at::Tensor>& cos = std::nullopt,
                                    const std::optional<at::Tensor>& sin = std::nullopt);

// softmax(scale q k^T) v: token t of a sequence attends to what is kept up to position + t; q [B, T, H, D] -> the same
// shape. mask: bool [B, capacity], false where nothing attends to a token (left padding). Sums are float32; the number
// of thread blocks that share one depends on B and T.
QUANTRAIN_API at::Tensor kv_cache_attention(const at::Tensor& q, const Int8KvCache& cache, const at::Tensor& position,
                                            double scale, const std::optional<at::Tensor>& mask = std::nullopt);

}  // namespace quantrain

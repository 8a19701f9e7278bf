// Formulas and kernel arguments of keys and values that are kept as int8 codes, one scale per token and key head:
// scale = absmax / 127 of the head's vector, as int8_quantize_rows has it.
#pragma once

#include <cstdint>

#include "csrc/common/attention.h"
#include "csrc/common/int8.h"
#include "csrc/common/types.h"

namespace quantrain {

// Codes [batches, key_heads, capacity, size] and scales [batches, key_heads, capacity], contiguous.
template <typename Code, typename Scale>
struct KvCacheOf {
  Code* key_codes;
  Scale* key_scale;
  Code* value_codes;
  Scale* value_scale;
};

struct KvCacheShape {
  DType dtype;  // of what is not codes
  int64_t batches;
  int64_t tokens;  // new ones of a sequence
  int64_t heads;   // of queries
  int64_t key_heads;
  int64_t size;
  int64_t capacity;
  // Where a sequence's first new token goes: [batches], or [1] with position_stride 0.
  const int64_t* position;
  int64_t position_stride;
};

// Rotates queries and keys (rotary.h; not where cos is null), in place, rounded to dtype, and keeps keys and values.
// Tokens past the capacity are not kept.
struct KvAppendArgs {
  void* qkv;        // [batches, tokens, heads + 2 key_heads, size]
  const void* cos;  // [batches or 1, tokens, size] of angle_dtype, or null
  const void* sin;
  DType angle_dtype;
  bool one_sequence;  // of angles
  KvCacheOf<int8_t, float> cache;
  KvCacheShape shape;
};

// Token t of a sequence attends to what is kept up to position + t: y = softmax(scale q k^T) v.
struct CachedAttentionArgs {
  const void* q;  // [batches, tokens, heads, size], `token_stride` elements from token to token, heads side by side
  int64_t batch_stride, token_stride;
  KvCacheOf<const int8_t, const float> cache;
  void* y;              // [batches, tokens, heads, size]
  const uint8_t* mask;  // [batches, capacity] or null: 0 where nothing attends to a token
  int64_t mask_stride;  // from batch to batch
  float* parts;         // kv_cache_part_bytes: of each part of a split sum, size values, maximum and sum
  float scale;
  KvCacheShape shape;
};

}  // namespace quantrain

// Kernel arguments of attention: softmax(scale q k^T + mask) v of each head.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"

namespace quantrain {

// A tensor [batch, tokens, heads, size] whose heads are whole: elements from one to the next.
struct AttentionStrides {
  int64_t batch, token, head;
};

enum class AttentionMask { kNone, kBool, kAdded };

struct AttentionArgs {
  const void* q;  // [batches, queries, heads, size] of dtype
  const void* k;  // [batches, keys, heads / group, size] likewise
  const void* v;
  AttentionStrides q_strides, k_strides, v_strides;
  void* y;           // [batches, queries, heads, size], contiguous
  const void* mask;  // [batches, heads, queries, keys]: bytes, 0 where a key is not attended to, or of dtype, added
  AttentionMask mask_kind;
  int64_t mask_strides[4];  // 0 where it is the same for all
  DType dtype;
  int64_t batches;
  int64_t heads;
  int64_t group;  // query heads that share a key head
  int64_t queries;
  int64_t keys;
  int64_t size;
  float scale;
  bool causal;  // query i attends to keys 0 .. i
};

}  // namespace quantrain

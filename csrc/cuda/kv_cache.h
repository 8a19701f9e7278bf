// Kernels of keys and values kept as int8 codes, for a few new tokens.
#pragma once

#include <cstddef>

#include "csrc/common/kv_cache.h"

namespace quantrain::cuda {

// float16 or bfloat16, heads of an even size up to 256.
bool kv_append_suits(const KvAppendArgs& args);
int kv_append(const KvAppendArgs& args, void* stream);

// float16 or bfloat16, heads of 32, 64 or 128.
bool cached_attention_suits(const CachedAttentionArgs& args);
size_t cached_attention_part_bytes(const CachedAttentionArgs& args);
int cached_attention(const CachedAttentionArgs& args, void* stream);

}  // namespace quantrain::cuda

#include "quantrain/ops/kv_cache.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/common/kv_cache.h"
#include "ops/attention.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/int8_transformer.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/kv_cache.h"
#endif

// By kernels of their own where a few tokens come on a GPU, else composed: rows rounded and copied, all that is kept
// decoded and attended to.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kAppend = "kv_cache_append_";
constexpr std::string_view kAttention = "kv_cache_attention";

void check_cache(std::string_view op, const at::Tensor& x, const Int8KvCache& cache, const at::Tensor& position) {
  detail::check_float(op, "input", x.scalar_type());
  detail::check_type(op, "key_codes", cache.key_codes, at::kChar, "int8");
  detail::check_type(op, "value_codes", cache.value_codes, at::kChar, "int8");
  detail::check_type(op, "key_scale", cache.key_scale, at::kFloat, "float32");
  detail::check_type(op, "value_scale", cache.value_scale, at::kFloat, "float32");
  detail::check_type(op, "position", position, at::kLong, "int64");
  for (const auto& [name, tensor] : {std::pair("key_codes", cache.key_codes), std::pair("key_scale", cache.key_scale),
                                     std::pair("value_codes", cache.value_codes),
                                     std::pair("value_scale", cache.value_scale), std::pair("position", position)})
    detail::check_device(op, name, tensor, x, "input's");
  const at::Tensor& codes = cache.key_codes;
  bool fits = codes.dim() == 4 && cache.value_codes.dim() == 4 && cache.key_scale.dim() == 3 &&
              cache.value_scale.dim() == 3 && x.dim() == 4;
  for (int64_t d = 0; fits && d < 4; ++d) {
    fits = TORCH_GUARD_OR_TRUE(cache.value_codes.sym_size(d).sym_eq(codes.sym_size(d)));
    if (fits && d < 3)
      fits = TORCH_GUARD_OR_TRUE(cache.key_scale.sym_size(d).sym_eq(codes.sym_size(d))) &&
             TORCH_GUARD_OR_TRUE(cache.value_scale.sym_size(d).sym_eq(codes.sym_size(d)));
  }
  fits = fits && TORCH_GUARD_OR_TRUE(x.sym_size(0).sym_eq(codes.sym_size(0))) &&
         TORCH_GUARD_OR_TRUE(x.sym_size(3).sym_eq(codes.sym_size(3)));
  QUANTRAIN_CHECK_VALUE(fits,
                        "{}: expected codes [B, Hk, capacity, D] and scales [B, Hk, capacity] for input [B, T, heads, "
                        "D], got {}, {}, {}, {} and {}",
                        op, detail::shape_text(codes), detail::shape_text(cache.value_codes),
                        detail::shape_text(cache.key_scale), detail::shape_text(cache.value_scale),
                        detail::shape_text(x));
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_FALSE(position.sym_numel().sym_eq(1)) ||
                            TORCH_GUARD_OR_TRUE(position.sym_numel().sym_eq(x.sym_size(0))),
                        "{}: expected position of one element or one for each sequence, got {}", op,
                        detail::shape_text(position));
}

void check_append(const at::Tensor& qkv, const Int8KvCache& cache, const at::Tensor& position,
                  const OptionalTensor& cos, const OptionalTensor& sin) {
  check_cache(kAppend, qkv, cache, position);
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(qkv.sym_size(2).sym_gt(cache.key_codes.sym_size(1) * 2)),
                        "{}: expected qkv of more than twice the cache's {} heads, got {}", kAppend,
                        c10::str(cache.key_codes.sym_size(1)), detail::shape_text(qkv));
  detail::check_angles(kAppend, qkv, cos, sin, qkv.sym_size(3).guard_int(__FILE__, __LINE__));
  for (const at::Tensor* tensor :
       {&cache.key_codes, &cache.key_scale, &cache.value_codes, &cache.value_scale, &position})
    QUANTRAIN_CHECK_VALUE(tensor->is_contiguous(), "{}: expected a contiguous cache and position, got strides {}",
                          kAppend, c10::str(tensor->strides()));
}

void check_attention(const at::Tensor& q, const Int8KvCache& cache, const at::Tensor& position,
                     const OptionalTensor& mask, double scale) {
  check_cache(kAttention, q, cache, position);
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE((q.sym_size(2) % cache.key_codes.sym_size(1)).sym_eq(0)),
                        "{}: expected heads to be a multiple of the cache's {}, got {}", kAttention,
                        c10::str(cache.key_codes.sym_size(1)), detail::shape_text(q));
  QUANTRAIN_CHECK_VALUE(scale > 0, "{}: expected scale above 0, got {}", kAttention, scale);
  if (!mask) return;
  detail::check_type(kAttention, "mask", *mask, at::kBool, "bool");
  detail::check_device(kAttention, "mask", *mask, q, "q's");
  QUANTRAIN_CHECK_VALUE(mask->dim() == 2 && TORCH_GUARD_OR_TRUE(mask->sym_size(0).sym_eq(q.sym_size(0))) &&
                            TORCH_GUARD_OR_TRUE(mask->sym_size(1).sym_eq(cache.key_codes.sym_size(2))),
                        "{}: expected mask [B, capacity], got {}", kAttention, detail::shape_text(*mask));
}

// int64 [B, T]: where each new token goes.
at::Tensor places(const at::Tensor& position, int64_t batches, int64_t tokens) {
  const at::Tensor steps = at::arange(tokens, position.options());
  return (position.view({-1, 1}) + steps).expand({batches, tokens});
}

// The rows [B, T, Hk, D] into codes and scale; those past the capacity go nowhere.
void keep_rows(const at::Tensor& all, const at::Tensor& all_where, const at::Tensor& codes, const at::Tensor& scale) {
  const int64_t capacity = codes.size(2), tokens = std::min(all.size(1), capacity);
  const at::Tensor x = all.narrow(1, 0, tokens), where = all_where.narrow(1, 0, tokens);
  const Int8Codes rows = int8_quantize_rows(x.transpose(1, 2).contiguous());
  const at::Tensor inside = where.ge(0).logical_and(where.lt(capacity)).unsqueeze(1);  // [B, 1, T]
  // What is past the end rewrites what stands in a place of its own.
  const at::Tensor index = where.remainder(capacity).unsqueeze(1).expand({x.size(0), x.size(2), tokens});
  const at::Tensor wide = index.unsqueeze(3).expand(rows.codes.sizes());
  scale.scatter_(2, index, at::where(inside, rows.scale.squeeze(3), scale.gather(2, index)));
  codes.scatter_(2, wide, at::where(inside.unsqueeze(3), rows.codes, codes.gather(2, wide)));
}

KvCacheShape shape_of(const at::Tensor& x, const Int8KvCache& cache, const at::Tensor& position, int64_t heads) {
  return {dtype_of(x),
          x.size(0),
          x.size(1),
          heads,
          cache.key_codes.size(1),
          x.size(3),
          cache.key_codes.size(2),
          position.const_data_ptr<int64_t>(),
          int64_t{position.numel() != 1}};
}

void append(at::Tensor& qkv, Int8KvCache& cache, const at::Tensor& position, const OptionalTensor& cos,
            const OptionalTensor& sin) {
  check_append(qkv, cache, position, cos, sin);
  if (qkv.numel() == 0 || cache.key_codes.numel() == 0) return;
  const int64_t key_heads = cache.key_codes.size(1), heads = qkv.size(2) - 2 * key_heads;
#if defined(QUANTRAIN_WITH_CUDA)
  if (qkv.is_cuda() && qkv.is_contiguous() && (!cos || (cos->is_contiguous() && sin->is_contiguous()))) {
    const KvAppendArgs args{qkv.mutable_data_ptr(),
                            cos ? cos->const_data_ptr() : nullptr,
                            sin ? sin->const_data_ptr() : nullptr,
                            cos ? dtype_of(*cos) : DType::kFloat32,
                            cos && cos->size(0) == 1,
                            {cache.key_codes.mutable_data_ptr<int8_t>(), cache.key_scale.mutable_data_ptr<float>(),
                             cache.value_codes.mutable_data_ptr<int8_t>(), cache.value_scale.mutable_data_ptr<float>()},
                            shape_of(qkv, cache, position, heads)};
    if (cuda::kv_append_suits(args)) {
      run_on_cuda(args, qkv, &cuda::kv_append);
      return;
    }
  }
#endif
  if (cos) rotate_heads_(qkv, *cos, *sin, heads + key_heads);
  const at::Tensor where = places(position, qkv.size(0), qkv.size(1));
  keep_rows(qkv.narrow(2, heads, key_heads), where, cache.key_codes, cache.key_scale);
  keep_rows(qkv.narrow(2, heads + key_heads, key_heads), where, cache.value_codes, cache.value_scale);
}

#if defined(QUANTRAIN_WITH_CUDA)
// More tokens than these are a prompt, for tensor cores.
constexpr int64_t kFewTokens = 8;
#endif

at::Tensor attention(const at::Tensor& q, const Int8KvCache& cache, const at::Tensor& position,
                     const OptionalTensor& mask, double scale) {
  check_attention(q, cache, position, mask, scale);
  at::Tensor y = at::empty(q.sizes(), q.options());
  if (q.numel() == 0 || cache.key_codes.numel() == 0) return y.zero_();
#if defined(QUANTRAIN_WITH_CUDA)
  const bool whole = q.stride(3) == 1 && q.stride(2) == q.size(3) && cache.key_codes.is_contiguous() &&
                     cache.value_codes.is_contiguous() && cache.key_scale.is_contiguous() &&
                     cache.value_scale.is_contiguous() && position.is_contiguous() && (!mask || mask->stride(1) == 1);
  if (q.is_cuda() && q.size(1) <= kFewTokens && whole) {
    CachedAttentionArgs args{q.const_data_ptr(),
                             q.stride(0),
                             q.stride(1),
                             {cache.key_codes.const_data_ptr<int8_t>(), cache.key_scale.const_data_ptr<float>(),
                              cache.value_codes.const_data_ptr<int8_t>(), cache.value_scale.const_data_ptr<float>()},
                             y.mutable_data_ptr(),
                             mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                             mask ? mask->stride(0) : 0,
                             nullptr,
                             static_cast<float>(scale),
                             shape_of(q, cache, position, q.size(2))};
    if (cuda::cached_attention_suits(args)) {
      const c10::cuda::CUDAGuard guard(q.device());
      at::Tensor parts;
      if (const size_t bytes = cuda::cached_attention_part_bytes(args)) {
        parts = at::empty({static_cast<int64_t>(bytes)}, q.options().dtype(at::kByte));
        args.parts = static_cast<float*>(parts.mutable_data_ptr());
      }
      run_on_cuda(args, q, &cuda::cached_attention);
      return y;
    }
  }
#endif
  const auto decoded = [&](const at::Tensor& codes, const at::Tensor& scales) {
    return quantrain::dequantize(codes, scales.unsqueeze(3), std::nullopt, q.scalar_type()).transpose(1, 2);
  };
  const at::Tensor kept = at::arange(cache.key_codes.size(2), position.options());
  at::Tensor allowed =
      kept.le(places(position, q.size(0), q.size(1)).unsqueeze(2)).unsqueeze(1);  // [B, 1, T, capacity]
  if (mask) allowed = allowed.logical_and(mask->view({q.size(0), 1, 1, -1}));
  return detail::attention(q, decoded(cache.key_codes, cache.key_scale), decoded(cache.value_codes, cache.value_scale),
                           allowed, /*causal=*/false, scale);
}

// ---- as operators ---------------------------------------------------------------------------------------------------

void append_operator(at::Tensor& qkv, at::Tensor& key_codes, at::Tensor& key_scale, at::Tensor& value_codes,
                     at::Tensor& value_scale, const at::Tensor& position, const OptionalTensor& cos,
                     const OptionalTensor& sin) {
  Int8KvCache cache{key_codes, key_scale, value_codes, value_scale};
  append(qkv, cache, position, cos, sin);
}

void append_meta(at::Tensor& qkv, at::Tensor& key_codes, at::Tensor& key_scale, at::Tensor& value_codes,
                 at::Tensor& value_scale, const at::Tensor& position, const OptionalTensor& cos,
                 const OptionalTensor& sin) {
  check_append(qkv, {key_codes, key_scale, value_codes, value_scale}, position, cos, sin);
}

at::Tensor attention_operator(const at::Tensor& q, const at::Tensor& key_codes, const at::Tensor& key_scale,
                              const at::Tensor& value_codes, const at::Tensor& value_scale, const at::Tensor& position,
                              double scale, const OptionalTensor& mask) {
  return attention(q, {key_codes, key_scale, value_codes, value_scale}, position, mask, scale);
}

at::Tensor attention_meta(const at::Tensor& q, const at::Tensor& key_codes, const at::Tensor& key_scale,
                          const at::Tensor& value_codes, const at::Tensor& value_scale, const at::Tensor& position,
                          double scale, const OptionalTensor& mask) {
  check_attention(q, {key_codes, key_scale, value_codes, value_scale}, position, mask, scale);
  return at::empty_symint(q.sym_sizes(), q.options());
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

Int8KvCache Int8KvCache::zeros(int64_t batches, int64_t key_heads, int64_t capacity, int64_t size, at::Device device) {
  const auto codes = at::TensorOptions().dtype(at::kChar).device(device);
  const auto scales = at::TensorOptions().dtype(at::kFloat).device(device);
  return {at::zeros({batches, key_heads, capacity, size}, codes), at::ones({batches, key_heads, capacity}, scales),
          at::zeros({batches, key_heads, capacity, size}, codes), at::ones({batches, key_heads, capacity}, scales)};
}

void kv_cache_append_(at::Tensor& qkv, Int8KvCache& cache, const at::Tensor& position, const OptionalTensor& cos,
                      const OptionalTensor& sin) {
  static const auto op = find_operator<decltype(append_operator)>("kv_cache_append_");
  op.call(qkv, cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale, position, cos, sin);
}

at::Tensor kv_cache_attention(const at::Tensor& q, const Int8KvCache& cache, const at::Tensor& position, double scale,
                              const OptionalTensor& mask) {
  static const auto op = find_operator<decltype(attention_operator)>("kv_cache_attention");
  return op.call(q, cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale, position, scale, mask);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "kv_cache_append_(Tensor(a!) qkv, Tensor(b!) key_codes, Tensor(c!) key_scale, Tensor(d!) value_codes, Tensor(e!) "
      "value_scale, Tensor position, Tensor? cos=None, Tensor? sin=None) -> ()",
      fixed);
  m.def(
      "kv_cache_attention(Tensor q, Tensor key_codes, Tensor key_scale, Tensor value_codes, Tensor value_scale, Tensor "
      "position, *, float scale, Tensor? mask=None) -> Tensor",
      fixed);
}

#define QUANTRAIN_REGISTER_KV_CACHE(append, attention) \
  m.impl("kv_cache_append_", &quantrain::append);      \
  m.impl("kv_cache_attention", &quantrain::attention)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_KV_CACHE(append_operator, attention_operator); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_KV_CACHE(append_meta, attention_meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_KV_CACHE(append_operator, attention_operator); }
#endif

#include "ops/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "csrc/common/attention.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/attention.h"
#endif

// Attention by our kernel where it is the faster one, short sequences and masks, else by PyTorch's.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kName = "_attention";

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& mask, double scale) {
  detail::check_float(kName, "q", q.scalar_type());
  QUANTRAIN_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                       "{}: expected k and v of q's type {}, got {} and {}", kName, c10::toString(q.scalar_type()),
                       c10::toString(k.scalar_type()), c10::toString(v.scalar_type()));
  detail::check_device(kName, "k", k, q, "q's");
  detail::check_device(kName, "v", v, q, "q's");
  const bool shapes = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && TORCH_GUARD_OR_TRUE(k.sym_size(2).sym_gt(0)) &&
                      TORCH_GUARD_OR_TRUE(k.sym_size(0).sym_eq(q.sym_size(0))) &&
                      TORCH_GUARD_OR_TRUE(k.sym_size(3).sym_eq(q.sym_size(3))) &&
                      TORCH_GUARD_OR_TRUE((q.sym_size(2) % k.sym_size(2)).sym_eq(0));
  bool same = shapes;
  for (int64_t d = 0; same && d < 4; ++d) same = TORCH_GUARD_OR_TRUE(k.sym_size(d).sym_eq(v.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(
      shapes && same, "{}: expected q [B, Tq, H, D] and k, v [B, Tk, Hk, D] with Hk a divisor of H, got {}, {} and {}",
      kName, detail::shape_text(q), detail::shape_text(k), detail::shape_text(v));
  QUANTRAIN_CHECK_VALUE(scale > 0, "{}: expected scale above 0, got {}", kName, scale);
  if (mask)
    detail::check_mask(kName, *mask, q, {q.sym_size(0), q.sym_size(2), q.sym_size(1), k.sym_size(1)},
                       "that broadcasts to [B, H, Tq, Tk]");
}

#if defined(QUANTRAIN_WITH_CUDA)
// Up to so many multiplications of q k^T ours takes less time, from the host's call to the last byte; beyond, those of
// Hopper's own instructions, which PyTorch has (bench_transformer, section attention). With a mask PyTorch's time
// depends on its strides: as transformers makes it for a CUDA graph, expanded, it takes several times as long.
constexpr int64_t kFewProducts = int64_t{1} << 28, kFewMaskedProducts = int64_t{1} << 35;

// q, k and v without the bookkeeping of three tensors.
struct Heads {
  const void *q, *k, *v;
  AttentionStrides q_strides, k_strides, v_strides;
  int64_t batches, queries, keys, heads, key_heads, size;
};

// False where PyTorch's serves. like: of the type and the device; mask: of bool or a floating type.
bool run_on_tensor_cores(const Heads& h, const at::Tensor& like, const OptionalTensor& mask, bool causal, double scale,
                         const at::Tensor& y) {
  if (h.batches * h.queries * h.heads * h.size * h.keys > (mask ? kFewMaskedProducts : kFewProducts)) return false;
  AttentionArgs args{h.q,
                     h.k,
                     h.v,
                     h.q_strides,
                     h.k_strides,
                     h.v_strides,
                     y.mutable_data_ptr(),
                     nullptr,
                     AttentionMask::kNone,
                     {},
                     dtype_of(like),
                     h.batches,
                     h.heads,
                     h.heads / h.key_heads,
                     h.queries,
                     h.keys,
                     h.size,
                     static_cast<float>(scale),
                     causal};
  at::Tensor added;
  if (mask) {
    added = mask->scalar_type() == at::kBool || mask->scalar_type() == like.scalar_type()
                ? *mask
                : mask->to(like.scalar_type());
    args.mask = added.const_data_ptr();
    args.mask_kind = added.scalar_type() == at::kBool ? AttentionMask::kBool : AttentionMask::kAdded;
    for (int64_t d = 0; d < added.dim(); ++d) {
      const int64_t from_end = added.dim() - 1 - d;
      args.mask_strides[3 - d] = added.size(from_end) == 1 ? 0 : added.stride(from_end);
    }
  }
  if (!cuda::attention_suits(args)) return false;
  return run_on_cuda(args, like, &cuda::attention);
}

Heads heads_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const auto strides = [](const at::Tensor& t) { return AttentionStrides{t.stride(0), t.stride(1), t.stride(2)}; };
  return {q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), strides(q), strides(k), strides(v),
          q.size(0),          q.size(1),          k.size(1),          q.size(2),  k.size(2),  q.size(3)};
}

// Of one contiguous tensor.
Heads heads_of(const at::Tensor& qkv, int64_t heads, int64_t key_heads) {
  const int64_t all = qkv.size(2), size = qkv.size(3), tokens = qkv.size(1);
  const AttentionStrides strides{tokens * all * size, all * size, size};
  const auto* first = static_cast<const uint8_t*>(qkv.const_data_ptr());
  const auto at = [&](int64_t head) { return first + head * size * static_cast<int64_t>(qkv.element_size()); };
  return {at(0),     at(heads), at(heads + key_heads), strides, strides, strides, qkv.size(0), tokens, tokens, heads,
          key_heads, size};
}
#endif

// PyTorch's kernels on the CPU do not read expanded tensors right; those on a GPU read whole vectors, wherever they
// lie, and look at the strides of dimensions of one element too.
at::Tensor as_pytorch_reads(const at::Tensor& x) {
  const int64_t vector = 16 / x.element_size();
  bool well = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) well = well && x.stride(d) % vector == 0;
  if (x.is_cuda() && !well) return x.clone(at::MemoryFormat::Contiguous);
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.stride(d) == 0 && x.size(d) > 1) return x.contiguous();
  return x;
}

// As PyTorch takes it: of two dimensions at least, added ones of q's type, and with the causal one in it, which it does
// not take beside another.
OptionalTensor pytorch_mask(const OptionalTensor& given, bool causal, const at::Tensor& q, int64_t keys) {
  if (!given) return given;
  at::Tensor mask = given->is_floating_point() ? given->to(q.scalar_type()) : *given;
  while (mask.dim() < 2) mask = mask.unsqueeze(0);
  // Kernels on a GPU read a row of it as whole vectors.
  bool well = reinterpret_cast<uintptr_t>(mask.const_data_ptr()) % 16 == 0 && mask.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < mask.dim(); ++d) well = well && mask.stride(d) % 8 == 0;
  if (q.is_cuda() && (mask.size(-1) != keys || !well)) {
    std::vector<int64_t> sizes = mask.sizes().vec();
    sizes.back() = keys;
    mask = mask.expand(sizes).clone(at::MemoryFormat::Contiguous);
  }
  if (!causal) return mask;
  const at::Tensor below = at::ones({q.size(1), keys}, q.options().dtype(at::kBool)).tril();
  if (mask.scalar_type() == at::kBool) return mask.logical_and(below);
  return at::where(below, mask, at::full({}, -std::numeric_limits<double>::infinity(), mask.options()));
}

at::Tensor by_pytorch(const at::Tensor& given_q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& mask,
                      bool causal, double scale) {
  const at::Tensor q = as_pytorch_reads(given_q);
  const int64_t group = q.size(2) / k.size(2);
  at::Tensor keys = as_pytorch_reads(k).transpose(1, 2), values = as_pytorch_reads(v).transpose(1, 2);
  // Heads that share are known to PyTorch's CUDA kernels for queries without a mask alone.
  const bool shares = group > 1 && q.is_cuda() && !mask;
  if (group > 1 && !shares) {
    keys = keys.repeat_interleave(group, 1);
    values = values.repeat_interleave(group, 1);
  }
  const OptionalTensor added = pytorch_mask(mask, causal, q, k.size(1));
  at::Tensor y =
      at::scaled_dot_product_attention(q.transpose(1, 2), keys, values, added, 0.0, causal && !mask, scale, shares);
  // Some of PyTorch's kernels have NaN or a mean where nothing is attended to.
  if (added && q.is_cuda()) {
    const at::Tensor nothing = added->scalar_type() == at::kBool
                                   ? added->any(-1, /*keepdim=*/true).logical_not()
                                   : added->eq(-std::numeric_limits<double>::infinity()).all(-1, /*keepdim=*/true);
    y = y.masked_fill(nothing, 0);
  }
  return y.transpose(1, 2).contiguous();
}

at::Tensor attention_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& mask,
                          bool, double scale) {
  check(q, k, v, mask, scale);
  return at::empty_symint(q.sym_sizes(), q.options());
}

}  // namespace

void detail::check_angles(std::string_view op, const at::Tensor& x, const std::optional<at::Tensor>& cos,
                          const std::optional<at::Tensor>& sin, int64_t size) {
  QUANTRAIN_CHECK_VALUE(cos.has_value() == sin.has_value(), "{}: expected cos and sin together, got one", op);
  if (!cos) return;
  for (const auto& [name, angle] : {std::pair("cos", *cos), std::pair("sin", *sin)}) {
    detail::check_float(op, name, angle.scalar_type());
    detail::check_device(op, name, angle, x, "input's");
    QUANTRAIN_CHECK_VALUE(angle.dim() == 3 && TORCH_GUARD_OR_TRUE(angle.sym_size(1).sym_eq(x.sym_size(1))) &&
                              angle.size(2) == size && size % 2 == 0 &&
                              (TORCH_GUARD_OR_TRUE(angle.sym_size(0).sym_eq(x.sym_size(0))) ||
                               TORCH_GUARD_OR_FALSE(angle.sym_size(0).sym_eq(1))),
                          "{}: expected {} [B or 1, T, D] for heads of an even size D, got {} for heads of {}", op,
                          name, detail::shape_text(angle), size);
  }
  QUANTRAIN_CHECK_TYPE(cos->scalar_type() == sin->scalar_type(), "{}: expected cos and sin of one type, got {} and {}",
                       op, c10::toString(cos->scalar_type()), c10::toString(sin->scalar_type()));
}

void detail::check_mask(std::string_view op, const at::Tensor& mask, const at::Tensor& like,
                        const std::array<c10::SymInt, 4>& sizes, std::string_view shape) {
  detail::check_device(op, "mask", mask, like, "input's");
  QUANTRAIN_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.is_floating_point(),
                       "{}: expected mask of bool or a floating type, got {}", op, c10::toString(mask.scalar_type()));
  const int64_t dims = mask.dim();
  bool fits = dims <= 4;
  for (int64_t d = 0; fits && d < dims; ++d) {
    const c10::SymInt& size = mask.sym_size(dims - 1 - d);
    fits = TORCH_GUARD_OR_TRUE(size.sym_eq(sizes[3 - d])) || TORCH_GUARD_OR_FALSE(size.sym_eq(1));
  }
  QUANTRAIN_CHECK_VALUE(fits, "{}: expected mask {}, got {}", op, shape, detail::shape_text(mask));
}

at::Tensor detail::attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& mask,
                             bool causal, double scale) {
  check(q, k, v, mask, scale);
  if (q.numel() == 0) return at::empty(q.sizes(), q.options());
#if defined(QUANTRAIN_WITH_CUDA)
  if (q.is_cuda() && k.numel() > 0) {
    const at::Tensor y = at::empty(q.sizes(), q.options());
    const bool whole = q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1;
    if (whole && run_on_tensor_cores(heads_of(q, k, v), q, mask, causal, scale, y)) return y;
  }
#endif
  return by_pytorch(q, k, v, mask, causal, scale);
}

at::Tensor detail::attention_of_heads(const at::Tensor& qkv, int64_t heads, int64_t key_heads,
                                      const OptionalTensor& mask, bool causal, double scale) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (qkv.is_cuda() && qkv.is_contiguous()) {
    const at::Tensor y = at::empty({qkv.size(0), qkv.size(1), heads * qkv.size(3)}, qkv.options());
    if (run_on_tensor_cores(heads_of(qkv, heads, key_heads), qkv, mask, causal, scale, y)) return y;
  }
#endif
  const auto part = [&](int64_t first, int64_t count) { return qkv.narrow(2, first, count); };
  return attention(part(0, heads), part(heads, key_heads), part(heads + key_heads, key_heads), mask, causal, scale)
      .flatten(2);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def("_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool causal=False, *, float scale) -> Tensor",
        {at::Tag::needs_exact_strides});
}

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { m.impl("_attention", &quantrain::detail::attention); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { m.impl("_attention", &quantrain::attention_meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { m.impl("_attention", &quantrain::detail::attention); }
#endif

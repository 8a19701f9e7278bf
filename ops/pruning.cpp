#include "quantrain/ops/pruning.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/kthvalue.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <limits>

#include "csrc/cpu/pruning.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/inverse_factor.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/pruning.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kMask = "prune_mask";
constexpr std::string_view kMasks = "prune_masks";
constexpr std::string_view kUnpack = "unpack_mask";
constexpr std::string_view kApply = "apply_masks_";
constexpr std::string_view kSparseGpt = "sparsegpt_prune";
constexpr int64_t kColumnBlock = 128;  // of SparseGPT, as published

// ---- patterns -------------------------------------------------------------------------------------------------------

// What of which neighbours is kept; of == 0: of the whole weight, of == -1: of a row.
struct Pattern {
  int64_t kept = 0;
  int64_t of = 0;
};

constexpr int64_t kWhole = 0, kRow = -1;

Pattern pattern_of(std::string_view op, std::string_view text) {
  if (text == "layer") return {0, kWhole};
  if (text == "row") return {0, kRow};
  Pattern p;
  const size_t colon = text.find(':');
  const auto read = [](std::string_view digits, int64_t& value) {
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return !digits.empty() && error == std::errc() && end == digits.data() + digits.size();
  };
  const bool read_both =
      colon != std::string_view::npos && read(text.substr(0, colon), p.kept) && read(text.substr(colon + 1), p.of);
  QUANTRAIN_CHECK_VALUE(read_both && p.kept >= 1 && p.kept < p.of && p.of <= 64,
                        "{}: expected pattern layer, row or n:m with n below m (such as 2:4), got '{}'", op, text);
  return p;
}

void check_sparsity(std::string_view op, double sparsity) {
  QUANTRAIN_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "{}: expected sparsity in [0, 1), got {}", op, sparsity);
}

void check_weight(std::string_view op, const at::Tensor& weight) {
  QUANTRAIN_CHECK_TYPE(weight.is_floating_point() && weight.layout() == at::kStrided,
                       "{}: expected a dense weight of a floating type, got {}", op,
                       c10::toString(weight.scalar_type()));
  QUANTRAIN_CHECK_VALUE(weight.dim() >= 1, "{}: expected weight [O, ...], got a scalar", op);
}

c10::SymInt columns_of(const at::Tensor& weight) {
  c10::SymInt columns = 1;
  for (int64_t d = 1; d < weight.dim(); ++d) columns *= weight.sym_size(d);
  return columns;
}

void check_columns(std::string_view op, const Pattern& pattern, const c10::SymInt& columns) {
  QUANTRAIN_CHECK_VALUE(pattern.of <= 0 || TORCH_GUARD_OR_TRUE((columns % pattern.of).sym_eq(0)),
                        "{}: expected columns in groups of {}, got {}", op, pattern.of, c10::str(columns));
}

int64_t dropped_of(const Pattern& pattern, double sparsity, int64_t count) {
  if (pattern.of > 0) return pattern.of - pattern.kept;
  return static_cast<int64_t>(std::nearbyint(sparsity * static_cast<double>(count)));
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// bool [R, N]: all but the `dropped` lowest scores of each row; of equal ones the later goes first.
at::Tensor all_but_lowest(const at::Tensor& score, int64_t dropped) {
  if (dropped == 0 || score.numel() == 0) return at::ones(score.sizes(), score.options().dtype(at::kBool));
  const at::Tensor threshold = std::get<0>(at::kthvalue(score, dropped, 1, /*keepdim=*/true));
  const at::Tensor below = score.lt(threshold), equal = score.eq(threshold);
  const at::Tensor missing = dropped - below.sum(1, /*keepdim=*/true);
  const at::Tensor from_end = equal.to(at::kInt).flip({1}).cumsum(1).flip({1});
  return below.logical_or(equal.logical_and(from_end.le(missing))).logical_not();
}

// float32, NaN above all.
at::Tensor magnitudes(const at::Tensor& weight) {
  const at::Tensor score = weight.to(at::kFloat).abs();
  return at::where(score.isnan(), std::numeric_limits<double>::infinity(), score);
}

at::Tensor mask_of_scores(const at::Tensor& score, const Pattern& pattern, double sparsity) {
  const int64_t rows = score.size(0), columns = score.size(1);
  if (score.numel() == 0) return at::ones(score.sizes(), score.options().dtype(at::kBool));
  const int64_t group = pattern.of > 0 ? pattern.of : pattern.of == kRow ? columns : rows * columns;
  return all_but_lowest(score.reshape({-1, group}), dropped_of(pattern, sparsity, group)).view({rows, columns});
}

at::Tensor pack(const at::Tensor& mask) {
  const at::Tensor flat = mask.ne(0).reshape({-1}).to(at::kByte);
  const at::Tensor whole = at::constant_pad_nd(flat, {0, (8 - flat.numel() % 8) % 8}).view({-1, 8});
  const at::Tensor place = at::ones({}, whole.options()).bitwise_left_shift(at::arange(8, whole.options()));
  return whole.mul(place).sum(1, /*keepdim=*/false, at::kByte);
}

// ---- operators ------------------------------------------------------------------------------------------------------

at::Tensor mask_meta(const at::Tensor& weight, const OptionalTensor& input_norm, double sparsity,
                     std::string_view pattern) {
  check_weight(kMask, weight);
  const Pattern parsed = pattern_of(kMask, pattern);
  check_sparsity(kMask, sparsity);
  const c10::SymInt columns = columns_of(weight);
  check_columns(kMask, parsed, columns);
  if (input_norm) {
    detail::check_type(kMask, "input_norm", *input_norm, at::kFloat, "float32");
    detail::check_device(kMask, "input_norm", *input_norm, weight, "weight's");
    QUANTRAIN_CHECK_VALUE(input_norm->dim() == 1 && TORCH_GUARD_OR_TRUE(input_norm->sym_size(0).sym_eq(columns)),
                          "{}: expected input_norm of {} columns, got {}", kMask, c10::str(columns),
                          detail::shape_text(*input_norm));
  }
  return at::empty_symint({(weight.sym_numel() + 7) / 8}, weight.options().dtype(at::kByte).requires_grad(false));
}

at::Tensor mask_kernel(const at::Tensor& weight, const OptionalTensor& input_norm, double sparsity,
                       std::string_view pattern) {
  mask_meta(weight, input_norm, sparsity, pattern);
  const at::NoGradGuard no_grad;
  const at::Tensor w = weight.detach().reshape({weight.size(0), columns_of(weight).expect_int()});
  at::Tensor score = magnitudes(w);
  if (input_norm) {
    score = score * *input_norm;
    score = at::where(score.isnan(), std::numeric_limits<double>::infinity(), score);
  }
  return pack(mask_of_scores(score, pattern_of(kMask, pattern), sparsity));
}

std::vector<at::Tensor> masks_meta(at::TensorList weights, double sparsity) {
  check_sparsity(kMasks, sparsity);
  std::vector<at::Tensor> masks;
  for (const at::Tensor& weight : weights) {
    check_weight(kMasks, weight);
    detail::check_device(kMasks, "weights", weight, weights[0], "the first one's");
    masks.push_back(
        at::empty_symint({(weight.sym_numel() + 7) / 8}, weight.options().dtype(at::kByte).requires_grad(false)));
  }
  return masks;
}

std::vector<at::Tensor> masks_kernel(at::TensorList weights, double sparsity) {
  std::vector<at::Tensor> masks = masks_meta(weights, sparsity);
  if (weights.empty()) return masks;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> scores;
  for (const at::Tensor& weight : weights) scores.push_back(magnitudes(weight.detach()).reshape({1, -1}));
  const at::Tensor all = at::cat(scores, 1);
  const at::Tensor kept = all_but_lowest(all, dropped_of({}, sparsity, all.size(1)));
  int64_t first = 0;
  for (size_t i = 0; i < masks.size(); ++i) {
    masks[i] = pack(kept.narrow(1, first, weights[i].numel()));
    first += weights[i].numel();
  }
  return masks;
}

at::Tensor pack_meta(const at::Tensor& mask) {
  QUANTRAIN_CHECK_TYPE(!mask.is_complex() && mask.layout() == at::kStrided,
                       "pack_mask: expected a dense mask of bool or numbers, got {}",
                       c10::toString(mask.scalar_type()));
  return at::empty_symint({(mask.sym_numel() + 7) / 8}, mask.options().dtype(at::kByte));
}

at::Tensor pack_kernel(const at::Tensor& mask) {
  pack_meta(mask);
  return pack(mask);
}

void check_packed(std::string_view op, const at::Tensor& mask, const c10::SymInt& numel, std::string_view what) {
  detail::check_type(op, "mask", mask, at::kByte, "uint8");
  QUANTRAIN_CHECK_VALUE(mask.dim() == 1 && TORCH_GUARD_OR_TRUE(mask.sym_size(0).sym_eq((numel + 7) / 8)),
                        "{}: expected a mask of {} bytes for {} elements{}, got {}", op, c10::str((numel + 7) / 8),
                        c10::str(numel), what, detail::shape_text(mask));
}

at::Tensor unpack_meta(const at::Tensor& mask, c10::SymIntArrayRef shape) {
  c10::SymInt numel = 1;
  int64_t reach = 1;  // what PyTorch's strides come to, even where a size is 0
  for (const c10::SymInt& size : shape) {
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(size.sym_ge(0)), "{}: expected sizes of at least 0, got {}", kUnpack,
                          c10::str(shape));
    const int64_t known = size.maybe_as_int().value_or(1);
    QUANTRAIN_CHECK_VALUE(!__builtin_mul_overflow(reach, std::max<int64_t>(known, 1), &reach),
                          "{}: expected a shape of fewer than 2^63 elements, got {}", kUnpack, c10::str(shape));
    numel *= size;
  }
  check_packed(kUnpack, mask, numel, "");
  return at::empty_symint(shape, mask.options().dtype(at::kBool));
}

at::Tensor unpack(const at::Tensor& mask, at::IntArrayRef shape) {
  const at::Tensor bits = mask.unsqueeze(1).bitwise_right_shift(at::arange(8, mask.options())).bitwise_and(1);
  return bits.reshape({-1}).narrow(0, 0, c10::multiply_integers(shape)).to(at::kBool).view(shape);
}

at::Tensor unpack_kernel(const at::Tensor& mask, c10::SymIntArrayRef shape) {
  unpack_meta(mask, shape);
  return unpack(mask, C10_AS_INTARRAYREF_SLOW(shape));
}

void apply_meta(at::TensorList tensors, at::TensorList masks) {
  QUANTRAIN_CHECK_VALUE(tensors.size() == masks.size(), "{}: expected a mask for each tensor, got {} for {}", kApply,
                        masks.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    QUANTRAIN_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_complex(),
                         "{}: expected dense tensors of real numbers, got {} {} at index {}", kApply,
                         c10::str(tensor.layout()), c10::toString(tensor.scalar_type()), i);
    detail::check_device(kApply, "tensors", tensor, tensors[0], "the first one's");
    detail::check_device(kApply, "masks", masks[i], tensor, "the tensors'");
    check_packed(kApply, masks[i], tensor.sym_numel(), fmt::format(" of tensor {}", i));
  }
}

// Zero is all bits zero in every type, and not every type has masked_fill_.
at::Tensor as_integers(const at::Tensor& tensor) {
  constexpr std::array kIntegers = {at::kByte, at::kShort, at::kInt, at::kLong};  // of 1, 2, 4 and 8 bytes
  return tensor.view(kIntegers[std::countr_zero(static_cast<uint64_t>(tensor.element_size()))]);
}

void apply_kernel(at::TensorList tensors, at::TensorList masks) {
  apply_meta(tensors, masks);
  std::vector<MaskedTensor> list;
  std::vector<at::Tensor> held;
  int64_t chunks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (tensor.numel() == 0) continue;
    if (!tensor.is_contiguous()) {  // bits are in row-major order, which its memory is not
      const at::AutoDispatchBelowADInplaceOrView below;
      as_integers(tensor).masked_fill_(unpack(masks[i], tensor.sizes()).logical_not(), 0);
      continue;
    }
    held.push_back(masks[i].contiguous());
    list.push_back({tensor.mutable_data_ptr(), held.back().const_data_ptr<uint8_t>(), tensor.numel(),
                    static_cast<int32_t>(tensor.element_size())});
    chunks += mask_chunks_of(tensor.numel());
  }
  // Autograd falls through, and so leaves the versions alone; what is kept of a parameter would seem current.
  for (const at::Tensor& tensor : tensors)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  if (list.empty()) return;
  const ApplyMasksArgs args{list.data(), static_cast<int64_t>(list.size())};
  run_tasks(args, chunks, grain_of(kMaskChunk), tensors[0], QUANTRAIN_KERNELS(apply_masks));
}

// ---- SparseGPT ------------------------------------------------------------------------------------------------------

using Pair = std::tuple<at::Tensor, at::Tensor>;

void check_sparsegpt(const at::Tensor& weight, const at::Tensor& hessian, const SparseGptOptions& o) {
  check_weight(kSparseGpt, weight);
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "{}: expected weight [O, K], got {}", kSparseGpt,
                        detail::shape_text(weight));
  check_sparsity(kSparseGpt, o.sparsity);
  const Pattern pattern = pattern_of(kSparseGpt, o.pattern);
  check_columns(kSparseGpt, pattern, weight.sym_size(1));
  QUANTRAIN_CHECK_VALUE(pattern.of <= 0 || kColumnBlock % pattern.of == 0,
                        "{}: expected groups that divide {} columns, got '{}'", kSparseGpt, kColumnBlock, o.pattern);
  QUANTRAIN_CHECK_TYPE(hessian.scalar_type() == at::kFloat || hessian.scalar_type() == at::kDouble,
                       "{}: expected hessian of float32 or float64, got {}", kSparseGpt,
                       c10::toString(hessian.scalar_type()));
  detail::check_device(kSparseGpt, "hessian", hessian, weight, "weight's");
  QUANTRAIN_CHECK_VALUE(hessian.dim() == 2 && TORCH_GUARD_OR_TRUE(hessian.sym_size(0).sym_eq(weight.sym_size(1))) &&
                            TORCH_GUARD_OR_TRUE(hessian.sym_size(1).sym_eq(weight.sym_size(1))),
                        "{}: expected hessian [{}, {}], got {}", kSparseGpt, c10::str(weight.sym_size(1)),
                        c10::str(weight.sym_size(1)), detail::shape_text(hessian));
  QUANTRAIN_CHECK_VALUE(o.damping > 0 && std::isfinite(o.damping), "{}: expected damping above 0, got {}", kSparseGpt,
                        o.damping);
  if (!o.scale) return;
  detail::check_type(kSparseGpt, "scale", *o.scale, at::kFloat, "float32");
  detail::check_device(kSparseGpt, "scale", *o.scale, weight, "weight's");
  QUANTRAIN_CHECK_VALUE(o.scale->dim() == 2 && TORCH_GUARD_OR_TRUE(o.scale->sym_size(0).sym_eq(weight.sym_size(0))) &&
                            TORCH_GUARD_OR_TRUE(o.scale->sym_size(1).sym_eq(1)),
                        "{}: expected scale [{}, 1], got {}", kSparseGpt, c10::str(weight.sym_size(0)),
                        detail::shape_text(*o.scale));
  QUANTRAIN_CHECK_VALUE(o.quant_min <= 0 && o.quant_max >= 0 && o.quant_min < o.quant_max,
                        "{}: expected quant_min <= 0 <= quant_max, got {} and {}", kSparseGpt, o.quant_min,
                        o.quant_max);
}

// The kept weights' nearest values on the grid, or they themselves.
at::Tensor on_grid(const at::Tensor& w, const at::Tensor& scale, const SparseGptOptions& o) {
  if (!scale.defined()) return w;
  return at::round(w / scale).clamp(o.quant_min, o.quant_max) * scale;
}

SparseGptWeight sparsegpt(const at::Tensor& weight, const at::Tensor& hessian, const SparseGptOptions& o) {
  check_sparsegpt(weight, hessian, o);
  const at::NoGradGuard no_grad;
  const Pattern pattern = pattern_of(kSparseGpt, o.pattern);
  at::Tensor w = weight.detach().to(at::kDouble).clone(at::MemoryFormat::Contiguous),
             h = hessian.to(at::kDouble).clone();
  QUANTRAIN_CHECK_VALUE(w.isfinite().all().item<bool>() && h.isfinite().all().item<bool>(),
                        "{}: expected a finite weight and hessian, got NaN or Inf", kSparseGpt);
  const int64_t rows = w.size(0), k = w.size(1);
  at::Tensor kept = at::ones({rows, k}, w.options().dtype(at::kBool));
  if (w.numel() == 0) return {weight.clone(at::MemoryFormat::Contiguous), pack(kept)};
  const at::Tensor dead = h.diagonal() == 0;  // of inputs that were never there: dropped first
  w.masked_fill_(dead, 0);
  h.diagonal().masked_fill_(dead, 1);
  const at::Tensor upper =
      detail::inverse_factor(kSparseGpt, h, o.damping * h.diagonal().mean().item<double>(), o.damping);
  const at::Tensor scale = o.scale ? o.scale->to(at::kDouble).squeeze(1) : at::Tensor();
  for (int64_t begin = 0; begin < k; begin += kColumnBlock) {
    const int64_t count = std::min(kColumnBlock, k - begin), end = begin + count;
    at::Tensor block = w.narrow(1, begin, count), mask = kept.narrow(1, begin, count);
    const at::Tensor among = upper.narrow(0, begin, count).narrow(1, begin, count);
    const at::Tensor pivots = among.diagonal();
    const auto choose = [&](int64_t first, int64_t columns) {
      const at::Tensor score = (block.narrow(1, first, columns) / pivots.narrow(0, first, columns)).square();
      mask.narrow(1, first, columns).copy_(mask_of_scores(score, pattern, o.sparsity));
    };
    if (pattern.of <= 0) choose(0, count);
    const at::Tensor errors = at::zeros_like(block);
    for (int64_t i = 0; i < count; ++i) {
      if (pattern.of > 0 && i % pattern.of == 0) choose(i, pattern.of);
      at::Tensor column = block.select(1, i);
      const at::Tensor value = on_grid(column, scale, o).masked_fill(mask.select(1, i).logical_not(), 0);
      const at::Tensor error = (column - value) / pivots.select(0, i);
      column.copy_(value);
      errors.select(1, i).copy_(error);
      if (i + 1 < count)
        block.narrow(1, i + 1, count - i - 1).addr_(error, among.select(0, i).narrow(0, i + 1, count - i - 1), 1, -1);
    }
    // Not addmm_ into the view: cuBLAS refuses it for a single row (torch 2.11).
    if (end < k) w.narrow(1, end, k - end).sub_(errors.matmul(upper.narrow(0, begin, count).narrow(1, end, k - end)));
  }
  return {w.to(weight.scalar_type()), pack(kept)};
}

Pair sparsegpt_meta(const at::Tensor& weight, const at::Tensor& hessian, double sparsity, std::string_view pattern,
                    double damping, const OptionalTensor& scale, int64_t quant_min, int64_t quant_max) {
  check_sparsegpt(weight, hessian, {sparsity, pattern, damping, scale, quant_min, quant_max});
  return {at::empty_symint(weight.sym_sizes(), weight.options().requires_grad(false)),
          at::empty_symint({(weight.sym_numel() + 7) / 8}, weight.options().dtype(at::kByte).requires_grad(false))};
}

Pair sparsegpt_kernel(const at::Tensor& weight, const at::Tensor& hessian, double sparsity, std::string_view pattern,
                      double damping, const OptionalTensor& scale, int64_t quant_min, int64_t quant_max) {
  SparseGptWeight result = sparsegpt(weight, hessian, {sparsity, pattern, damping, scale, quant_min, quant_max});
  return {std::move(result.weight), std::move(result.mask)};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor prune_mask(const at::Tensor& weight, const OptionalTensor& input_norm, double sparsity,
                      std::string_view pattern) {
  static const auto op = find_operator<decltype(mask_kernel)>(kMask);
  return op.call(weight, input_norm, sparsity, pattern);
}

std::vector<at::Tensor> prune_masks(const std::vector<at::Tensor>& weights, double sparsity) {
  if (weights.empty()) return {};  // without a tensor there is no device to dispatch to
  static const auto op = find_operator<decltype(masks_kernel)>(kMasks);
  return op.call(weights, sparsity);
}

at::Tensor pack_mask(const at::Tensor& mask) {
  static const auto op = find_operator<decltype(pack_kernel)>("pack_mask");
  return op.call(mask);
}

at::Tensor unpack_mask(const at::Tensor& mask, at::IntArrayRef shape) {
  static const auto op = find_operator<decltype(unpack_kernel)>(kUnpack);
  return op.call(mask, c10::fromIntArrayRefSlow(shape));
}

void apply_masks_(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& masks) {
  if (tensors.empty() && masks.empty()) return;
  static const auto op = find_operator<decltype(apply_kernel)>(kApply);
  op.call(tensors, masks);
}

SparseGptWeight sparsegpt_prune(const at::Tensor& weight, const at::Tensor& hessian, const SparseGptOptions& options) {
  return sparsegpt(weight, hessian, options);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def("prune_mask(Tensor weight, Tensor? input_norm=None, *, float sparsity=0.5, str pattern=\"layer\") -> Tensor");
  m.def("prune_masks(Tensor[] weights, *, float sparsity) -> Tensor[]");
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor mask, SymInt[] shape) -> Tensor");
  m.def("apply_masks_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");
  m.def(
      "sparsegpt_prune(Tensor weight, Tensor hessian, *, float sparsity=0.5, str pattern=\"layer\", float "
      "damping=0.01, Tensor? scale=None, int quant_min=-128, int quant_max=127) -> (Tensor weight, Tensor mask)");
}

#define QUANTRAIN_REGISTER_PRUNING(kind)            \
  m.impl("prune_mask", &quantrain::mask_##kind);    \
  m.impl("prune_masks", &quantrain::masks_##kind);  \
  m.impl("pack_mask", &quantrain::pack_##kind);     \
  m.impl("unpack_mask", &quantrain::unpack_##kind); \
  m.impl("apply_masks_", &quantrain::apply_##kind); \
  m.impl("sparsegpt_prune", &quantrain::sparsegpt_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_PRUNING(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_PRUNING(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_PRUNING(kernel); }
#endif

#include "ops/common/layout.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "ops/common/check.h"

namespace quantrain {
namespace {

// Dimensions from the slowest to the fastest in memory; empty where that is the order they have.
std::vector<int64_t> memory_order(const at::Tensor& dense_input) {
  if (dense_input.is_contiguous()) return {};
  std::vector<int64_t> order(dense_input.dim());
  std::iota(order.begin(), order.end(), 0);
  // Dimensions of size 1 have strides without meaning; they may stand anywhere.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return dense_input.stride(a) > dense_input.stride(b); });
  return order;
}

std::vector<int64_t> permuted(at::IntArrayRef sizes, const std::vector<int64_t>& order) {
  if (order.empty()) return sizes.vec();
  std::vector<int64_t> result(order.size());
  for (size_t i = 0; i < order.size(); ++i) result[i] = sizes[order[i]];
  return result;
}

at::Tensor permuted_contiguous(const at::Tensor& tensor, const std::vector<int64_t>& order) {
  return order.empty() ? tensor.contiguous() : tensor.permute(order).contiguous();
}

// Scales are float32 and integers int32 in every kernel, whatever the caller wrote.
at::Tensor as_parameter(const at::Tensor& tensor) {
  return tensor.is_floating_point() ? tensor.to(at::kFloat) : as_int32(tensor);
}

std::vector<int64_t> inverse(const std::vector<int64_t>& order) {
  std::vector<int64_t> result(order.size());
  for (size_t i = 0; i < order.size(); ++i) result[order[i]] = static_cast<int64_t>(i);
  return result;
}

Grouping group(std::string_view op, at::IntArrayRef sizes, at::IntArrayRef scale_sizes) {
  Grouping grouping;
  const bool fits = make_grouping(sizes.data(), scale_sizes.data(), static_cast<int>(sizes.size()), grouping);
  QUANTRAIN_CHECK_VALUE(fits, "{}: expected scale to vary along at most {} separate dimensions, got shape {}", op,
                        kMaxLevels, scale_sizes);
  return grouping;
}

Grouping group_per_tensor(int64_t numel) {
  Grouping grouping;
  grouping.numel = numel;
  grouping.inner = std::max<int64_t>(numel, 1);
  grouping.rows = numel > 0 ? 1 : 0;
  return grouping;
}

// Each dimension cut in two: [scale size, elements that share it].
std::vector<int64_t> split_sizes(at::IntArrayRef sizes, at::IntArrayRef scale_shape) {
  std::vector<int64_t> result;
  for (size_t d = 0; d < sizes.size(); ++d) {
    result.push_back(scale_shape[d]);
    result.push_back(sizes[d] / scale_shape[d]);
  }
  return result;
}

// Scale indices first, then the elements of a group.
std::vector<int64_t> group_first(size_t rank) {
  std::vector<int64_t> result;
  for (size_t d = 0; d < rank; ++d) result.push_back(static_cast<int64_t>(2 * d));
  for (size_t d = 0; d < rank; ++d) result.push_back(static_cast<int64_t>(2 * d + 1));
  return result;
}

}  // namespace

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kChar:
      return DType::kInt8;
    case at::kByte:
      return DType::kUInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kInt:
      return DType::kInt32;
    default:
      return DType::kFloat32;
  }
}

c10::SymInt rows_of(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) rows *= tensor.sym_size(d);
  return rows;
}

QuantRange make_range(int64_t quant_min, int64_t quant_max) {
  return QuantRange{static_cast<float>(quant_min), static_cast<float>(quant_max)};
}

bool holds_integers(const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  return type == at::kInt || type == at::kLong || type == at::kShort || type == at::kChar || type == at::kByte;
}

void check_integers(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  QUANTRAIN_CHECK_TYPE(holds_integers(tensor), "{}: expected {} of an integer type, got {}", op, name,
                       c10::toString(tensor.scalar_type()));
}

at::Tensor as_int32(const at::Tensor& integers) {
  if (integers.scalar_type() != at::kLong) return integers.to(at::kInt);
  using Limits = std::numeric_limits<int32_t>;
  return at::clamp(integers, Limits::min(), Limits::max()).to(at::kInt);
}

at::Tensor regular(const at::Tensor& tensor) { return tensor.contiguous(tensor.suggest_memory_format()); }

at::Tensor empty_regular(const at::Tensor& tensor, at::ScalarType type) {
  return at::empty_like(tensor, tensor.options().dtype(type), tensor.suggest_memory_format());
}

at::Tensor strided_as(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.strides() == like.strides() ? tensor : at::empty_like(like, tensor.options()).copy_(tensor);
}

at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

QParamTensors Arranged::qparams() const {
  QParamTensors result{scale.const_data_ptr<float>(), nullptr, nullptr};
  if (!zero_point) return result;
  if (zero_point->scalar_type() == at::kInt)
    result.zero_point = zero_point->const_data_ptr<int32_t>();
  else
    result.float_zero_point = zero_point->const_data_ptr<float>();
  return result;
}

Arranged arrange(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                 const std::optional<at::Tensor>& zero_point) {
  if (zero_point && zero_point->sizes() != scale.sizes())  // one for all
    return arrange(op, input, scale, zero_point->reshape({1}).expand({scale.numel()}).reshape(scale.sizes()));
  Arranged result;
  result.input = dense(input);
  if (scale.numel() == 1) {
    result.scale = as_parameter(scale);
    if (zero_point) result.zero_point = as_parameter(*zero_point);
    result.grouping = group_per_tensor(input.numel());
    return result;
  }
  result.order = memory_order(result.input);
  result.scale = permuted_contiguous(as_parameter(scale), result.order);
  if (zero_point) result.zero_point = permuted_contiguous(as_parameter(*zero_point), result.order);
  result.grouping = group(op, permuted(input.sizes(), result.order), result.scale.sizes());
  return result;
}

ArrangedShape arrange_shape(std::string_view op, const at::Tensor& input, at::IntArrayRef scale_shape) {
  ArrangedShape result;
  result.input = dense(input);
  if (c10::multiply_integers(scale_shape) == 1) {
    result.scale_sizes = scale_shape.vec();
    result.grouping = group_per_tensor(input.numel());
    return result;
  }
  result.order = memory_order(result.input);
  result.scale_sizes = permuted(scale_shape, result.order);
  result.grouping = group(op, permuted(input.sizes(), result.order), result.scale_sizes);
  return result;
}

at::Tensor fold_partials(const at::Tensor& partial, const Grouping& g, at::IntArrayRef scale_sizes,
                         const std::vector<int64_t>& order, Fold fold) {
  // Rows as alternating dimensions, innermost first: what shares a scale index, then a level of scale indices.
  std::vector<int64_t> sizes{chunks_per_row(g)};
  std::vector<bool> shared{true};
  int64_t covered = 1;
  for (int level = 0; level < g.levels; ++level) {
    sizes.push_back(g.divisor[level] / covered);
    shared.push_back(true);
    sizes.push_back(g.modulus[level]);
    shared.push_back(false);
    covered = g.divisor[level] * g.modulus[level];
  }
  sizes.push_back(g.rows / covered);
  shared.push_back(true);
  const int64_t leading = partial.numel() / (g.rows * chunks_per_row(g));
  sizes.push_back(leading);
  shared.push_back(false);
  std::reverse(sizes.begin(), sizes.end());
  std::reverse(shared.begin(), shared.end());
  std::vector<int64_t> reduced;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (shared[d] && sizes[d] > 1) reduced.push_back(static_cast<int64_t>(d));
  at::Tensor result = partial.view(sizes);
  if (!reduced.empty())
    result = fold == Fold::kSum   ? at::sum(result, reduced)
             : fold == Fold::kMin ? at::amin(result, reduced)
                                  : at::amax(result, reduced);
  std::vector<int64_t> result_sizes = scale_sizes.vec();
  result_sizes.insert(result_sizes.begin(), leading);
  result = result.reshape(result_sizes);
  if (!order.empty()) {
    std::vector<int64_t> back{0};
    for (int64_t d : inverse(order)) back.push_back(d + 1);
    result = result.permute(back).contiguous();
  }
  return leading == 1 ? result.squeeze(0) : result;
}

bool wants_regrouping(const Grouping& grouping) {
  int64_t groups = 1;
  for (int level = 0; level < grouping.levels; ++level) groups *= grouping.modulus[level];
  return grouping.inner < 8 && grouping.inner * groups < grouping.numel;
}

at::Tensor regroup(const at::Tensor& input, at::IntArrayRef scale_shape) {
  const int64_t groups = c10::multiply_integers(scale_shape);
  if (groups == 1) return input.reshape({1, input.numel()}).contiguous();  // the shapes' ranks may differ
  return input.reshape(split_sizes(input.sizes(), scale_shape))
      .permute(group_first(scale_shape.size()))
      .reshape({groups, groups > 0 ? input.numel() / groups : 0})
      .contiguous();
}

at::Tensor ungroup(const at::Tensor& grouped, at::IntArrayRef sizes, at::IntArrayRef scale_shape) {
  const std::vector<int64_t> order = group_first(scale_shape.size());
  return grouped.view(permuted(split_sizes(sizes, scale_shape), order)).permute(inverse(order)).reshape(sizes);
}

}  // namespace quantrain

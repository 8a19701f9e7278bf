#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include "nn/four_bit_formats/common.h"

// AWQ, layout "gemm": qweight int32 [K, N / 8], nibble i of a word is row [0, 2, 4, 6, 1, 3, 5, 7][i] of the weight's
// eight; scales [G, N]; qzeros int32 [G, N / 8] in the same order. The value is (q - z) * scale. Layout: AutoAWQ 0.2.9,
// modules/linear/gemm.py.

namespace quantrain::nn {
namespace {

constexpr int64_t kRowOfNibble[] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t kNibbleOfRow[] = {0, 4, 1, 5, 2, 6, 3, 7};

// Within each eight of the last dimension.
at::Tensor reordered(const at::Tensor& nibbles, at::IntArrayRef order) {
  const at::Tensor index = at::tensor(order, at::TensorOptions().dtype(at::kLong).device(nibbles.device()));
  return nibbles.unflatten(-1, {nibbles.size(-1) / 8, 8}).index_select(-1, index).flatten(-2);
}

}  // namespace

FourBitWeight from_awq(const FourBitTensors& tensors, const std::string& prefix, int64_t group_size) {
  const detail::LayerTensors layer("from_awq", tensors, prefix);
  const at::Tensor qweight = layer.get_matrix("qweight", {at::kInt});
  const at::Tensor scales = layer.get_matrix("scales", detail::kFloatTypes);
  const int64_t columns = qweight.size(0);
  const int64_t rows = qweight.size(1) * 8;
  const int64_t groups = scales.size(0);
  layer.check_sizes("scales", scales, {groups, rows});
  const at::Tensor qzeros = layer.get("qzeros", {at::kInt}, {groups, rows / 8});

  detail::IntegerCodes parts;
  parts.group = detail::even_groups(layer, columns, groups, group_size);
  parts.codes = reordered(detail::unpack_words(qweight), kNibbleOfRow).t();
  parts.scale = scales.t();
  parts.zero_point = reordered(detail::unpack_words(qzeros), kNibbleOfRow).t().to(at::kInt);
  if (parts.zero_point.eq(8).all().item<bool>()) parts.zero_point = at::Tensor();
  const at::Tensor bias = layer.bias(rows);
  FourBitWeight weight = detail::pack_integers(parts);
  weight.bias = bias;
  return weight;
}

FourBitTensors to_awq(const FourBitWeight& weight, const std::string& prefix, int64_t group_size, bool round_scale) {
  if (weight.permutation.defined())
    detail::fail_format("to_awq", "a weight whose columns are in order", "one with a permutation");
  const detail::IntegerCodes parts = detail::unpack_integers("to_awq", weight, group_size, round_scale);
  if (weight.size[0] % 8 != 0)
    detail::fail_format("to_awq", "a weight of a multiple of 8 rows", detail::sizes_text(weight.size));
  const at::Tensor zero_point =
      parts.zero_point.defined() ? parts.zero_point : at::full(parts.scale.sizes(), 8, parts.codes.options());
  FourBitTensors tensors;
  tensors[detail::layer_key(prefix, "qweight")] = detail::pack_words(reordered(parts.codes.t(), kRowOfNibble));
  tensors[detail::layer_key(prefix, "qzeros")] =
      detail::pack_words(reordered(zero_point.to(at::kByte).t(), kRowOfNibble));
  tensors[detail::layer_key(prefix, "scales")] = parts.scale.t().contiguous();
  if (weight.bias.defined()) tensors[detail::layer_key(prefix, "bias")] = weight.bias.detach();
  return tensors;
}

}  // namespace quantrain::nn

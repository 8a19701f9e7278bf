#include <ATen/ops/tensor.h>

#include "nn/four_bit_formats/common.h"

// compressed-tensors, "pack-quantized": weight_packed int32 [N, ceil(K / 8)], codes plus 8, from the lowest bits up,
// zeros after the last; weight_scale [N, G], [N, 1] or one element; weight_zero_point, for asymmetric codes, int32
// [ceil(N / 8), G] packed along N likewise (files of early releases: int8 [N, G]); weight_shape [2]; weight_g_idx [K].
// Layout: compressed-tensors 0.20.0, compressors/pack_quantized.

namespace quantrain::nn {
namespace {

constexpr std::initializer_list<at::ScalarType> kSizeTypes = {at::kLong, at::kInt};

std::vector<int64_t> weight_size(const detail::LayerTensors& layer, const at::Tensor& packed) {
  std::vector<int64_t> size = detail::integers_of(layer.get("weight_shape", kSizeTypes, {2}));
  detail::checked_numel(layer.function(), detail::in_quotes(layer.key("weight_shape")), size);
  layer.check_sizes("weight_packed", packed, {size[0], (size[1] - 1) / 8 + 1});
  return size;
}

// int32 [N, G], or undefined for symmetric codes.
at::Tensor zero_points(const detail::LayerTensors& layer, int64_t rows, int64_t groups) {
  if (!layer.has("weight_zero_point")) return {};
  const at::Tensor stored = layer.get("weight_zero_point", {at::kInt, at::kChar});
  if (stored.scalar_type() == at::kChar) {
    layer.check_sizes("weight_zero_point", stored, {rows, groups});
    const at::Tensor zero_point = stored.to(at::kInt).add(8);
    if (zero_point.lt(0).logical_or(zero_point.gt(15)).any().item<bool>())
      layer.fail(detail::in_quotes(layer.key("weight_zero_point")) + " within -8 and 7", "others");
    return zero_point;
  }
  layer.check_sizes("weight_zero_point", stored, {(rows - 1) / 8 + 1, groups});
  return detail::unpack_words(stored.t()).t().narrow(0, 0, rows).to(at::kInt);
}

}  // namespace

FourBitWeight from_compressed_tensors(const FourBitTensors& tensors, const std::string& prefix) {
  const detail::LayerTensors layer("from_compressed_tensors", tensors, prefix);
  const at::Tensor packed = layer.get_matrix("weight_packed", {at::kInt});
  const std::vector<int64_t> size = weight_size(layer, packed);
  at::Tensor scale = layer.get("weight_scale", detail::kFloatTypes);
  if (scale.numel() == 1) scale = scale.reshape({1, 1}).expand({size[0], 1});  // one of the whole tensor
  if (scale.dim() != 2 || scale.size(0) != size[0] || scale.size(1) < 1)
    layer.fail(detail::in_quotes(layer.key("weight_scale")) + " of shape [" + std::to_string(size[0]) + ", groups]",
               detail::sizes_text(scale.sizes()));

  detail::IntegerCodes parts;
  parts.scale = scale;
  parts.group = detail::listed_groups(layer, "weight_g_idx", size[1], scale.size(1));
  if (!parts.group.defined()) parts.group = detail::even_groups(layer, size[1], scale.size(1), 0);
  parts.zero_point = zero_points(layer, size[0], scale.size(1));
  if (size[1] % 2 == 0) {
    parts.packed = detail::bytes_as(packed, at::kByte).narrow(1, 0, size[1] / 2);
  } else {
    parts.codes = detail::unpack_words(packed).narrow(1, 0, size[1]);
  }
  const at::Tensor bias = layer.bias(size[0]);
  FourBitWeight weight = detail::pack_integers(parts);
  weight.bias = bias;
  return weight;
}

FourBitTensors to_compressed_tensors(const FourBitWeight& weight, const std::string& prefix, int64_t group_size,
                                     bool round_scale) {
  const detail::IntegerCodes parts = detail::unpack_integers("to_compressed_tensors", weight, group_size, round_scale);
  const auto key = [&prefix](std::string_view name) { return detail::layer_key(prefix, name); };
  FourBitTensors tensors;
  tensors[key("weight_packed")] = detail::pack_words(parts.codes);
  tensors[key("weight_scale")] = parts.scale.contiguous();
  tensors[key("weight_shape")] = at::tensor(weight.size, at::kLong);
  if (parts.zero_point.defined())
    tensors[key("weight_zero_point")] = detail::pack_words(parts.zero_point.to(at::kByte).t()).t().contiguous();
  if (weight.permutation.defined()) tensors[key("weight_g_idx")] = parts.group.to(at::kInt);
  if (weight.bias.defined()) tensors[key("bias")] = weight.bias.detach();
  return tensors;
}

}  // namespace quantrain::nn

#include <ATen/ops/full.h>

#include "nn/four_bit_formats/common.h"

// GPTQ: qweight int32 [K / 8, N], eight consecutive columns of the weight in a word from the lowest bits up; scales
// [G, N]; qzeros int32 [G, N / 8], packed along the rows of the weight; g_idx int32 [K]. The value is
// scales[g_idx[k]] * (q - z). Layout: AutoGPTQ 0.7.1 and GPTQModel 7.7.0, modules qlinear.

namespace quantrain::nn {
namespace {

// One in every nibble of a word. Version 1 stores whole words less this, so that a zero point of 0 borrows from the
// next one (GPTQModel, utils/model.py: convert_gptq_v1_to_v2_format_module).
constexpr int64_t kOnes = 0x11111111;
constexpr int64_t kWord = 0xffffffff;

at::Tensor add_to_words(const at::Tensor& words, int64_t value) {
  return words.to(at::kLong).add(value).bitwise_and(kWord).to(at::kInt);
}

void check_version(std::string_view function, int64_t version) {
  if (version != 1 && version != 2) detail::fail_format(function, "a version of 1 or 2", std::to_string(version));
}

}  // namespace

FourBitWeight from_gptq(const FourBitTensors& tensors, const std::string& prefix, int64_t version, int64_t group_size) {
  const detail::LayerTensors layer("from_gptq", tensors, prefix);
  check_version("from_gptq", version);
  const at::Tensor qweight = layer.get_matrix("qweight", {at::kInt});
  const at::Tensor scales = layer.get_matrix("scales", detail::kFloatTypes);
  const int64_t rows = qweight.size(1);
  const int64_t columns = qweight.size(0) * 8;
  const int64_t groups = scales.size(0);
  layer.check_sizes("scales", scales, {groups, rows});
  if (rows % 8 != 0)
    layer.fail(detail::in_quotes(layer.key("qweight")) + " of a multiple of 8 columns", std::to_string(rows));
  at::Tensor qzeros = layer.get("qzeros", {at::kInt}, {groups, rows / 8});
  if (version == 1) qzeros = add_to_words(qzeros, kOnes);

  detail::IntegerCodes parts;
  parts.group = detail::listed_groups(layer, "g_idx", columns, groups);
  if (!parts.group.defined()) parts.group = detail::even_groups(layer, columns, groups, group_size);
  parts.packed = detail::bytes_as(qweight.t(), at::kByte);  // as int4 and uint4 have it
  parts.scale = scales.t();
  parts.zero_point = detail::unpack_words(qzeros).t().to(at::kInt);
  if (parts.zero_point.eq(8).all().item<bool>()) parts.zero_point = at::Tensor();
  const at::Tensor bias = layer.bias(rows);
  FourBitWeight weight = detail::pack_integers(parts);
  weight.bias = bias;
  return weight;
}

FourBitTensors to_gptq(const FourBitWeight& weight, const std::string& prefix, int64_t version, int64_t group_size,
                       bool round_scale) {
  check_version("to_gptq", version);
  const detail::IntegerCodes parts = detail::unpack_integers("to_gptq", weight, group_size, round_scale);
  if (weight.size[0] % 8 != 0 || weight.size[1] % 8 != 0)
    detail::fail_format("to_gptq", "a weight whose sizes are multiples of 8", detail::sizes_text(weight.size));
  const at::Tensor zero_point =
      parts.zero_point.defined() ? parts.zero_point : at::full(parts.scale.sizes(), 8, parts.codes.options());
  at::Tensor qzeros = detail::pack_words(zero_point.to(at::kByte).t());
  if (version == 1) qzeros = add_to_words(qzeros, -kOnes);
  FourBitTensors tensors;
  tensors[detail::layer_key(prefix, "qweight")] = detail::pack_words(parts.codes).t().contiguous();
  tensors[detail::layer_key(prefix, "qzeros")] = qzeros;
  tensors[detail::layer_key(prefix, "scales")] = parts.scale.t().contiguous();
  tensors[detail::layer_key(prefix, "g_idx")] = parts.group.to(at::kInt);
  if (weight.bias.defined()) tensors[detail::layer_key(prefix, "bias")] = weight.bias.detach();
  return tensors;
}

}  // namespace quantrain::nn

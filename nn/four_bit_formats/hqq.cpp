#include <ATen/ops/cat.h>

#include "nn/four_bit_formats/common.h"

// HQQ: the weight's elements in row-major order as a matrix of one group a row (axis 1). W_q uint8, or its bytes as
// floats: the high nibbles are the upper half of that matrix's rows, the low ones the lower half. scale and zero are
// floats [groups, 1]; nbits, group_size, axis int32 []; shape int64 [2]; packing and compute_dtype text as uint8. The
// value is (q - zero) * scale. Layout: hqq 0.2.8, core/quantize.py (HQQLinear.state_dict) and core/bitpack.py.

namespace quantrain::nn {
namespace {

int64_t integer(const detail::LayerTensors& layer, std::string_view name) {
  const at::Tensor value = layer.get(name, {at::kInt, at::kLong, at::kByte});
  if (value.numel() != 1)
    layer.fail(detail::in_quotes(layer.key(name)) + " of one element", detail::sizes_text(value.sizes()));
  return value.item<int64_t>();
}

std::string text(const detail::LayerTensors& layer, std::string_view name) {
  std::string value;
  for (const int64_t byte : detail::integers_of(layer.get(name, {at::kByte})))
    value.push_back(byte >= ' ' && byte <= '~' ? static_cast<char>(byte) : '?');
  return value;
}

at::ScalarType compute_type(const detail::LayerTensors& layer) {
  if (!layer.has("compute_dtype")) return at::kHalf;  // HQQ's default
  const std::string name = text(layer, "compute_dtype");
  if (name == "torch.float16") return at::kHalf;
  if (name == "torch.bfloat16") return at::kBFloat16;
  if (name == "torch.float32") return at::kFloat;
  layer.fail(detail::in_quotes(layer.key("compute_dtype")) + " torch.float16, torch.bfloat16 or torch.float32",
             detail::in_quotes(name));
}

// What this reader does not decode, said before anything else can go wrong.
void check_kind(const detail::LayerTensors& layer) {
  const auto check = [&layer](std::string_view name, int64_t wanted) {
    if (layer.has(name) && integer(layer, name) != wanted)
      layer.fail(detail::in_quotes(layer.key(name)) + " of " + std::to_string(wanted),
                 std::to_string(integer(layer, name)));
  };
  check("nbits", 4);
  check("axis", 1);
  check("channel_wise", 1);
  check("quant_scale", 0);
  check("quant_zero", 0);
  if (layer.has("packing") && text(layer, "packing") != "4bit_u8")
    layer.fail(detail::in_quotes(layer.key("packing")) + " of 4bit_u8", detail::in_quotes(text(layer, "packing")));
}

}  // namespace

FourBitWeight from_hqq(const FourBitTensors& tensors, const std::string& prefix) {
  const detail::LayerTensors layer("from_hqq", tensors, prefix);
  const at::Tensor packed = layer.get("W_q", {at::kByte, at::kHalf, at::kBFloat16, at::kFloat, at::kInt});
  check_kind(layer);
  FourBitWeight weight;
  weight.format = "uint4";
  weight.dtype = compute_type(layer);
  weight.size = detail::integers_of(layer.get("shape", detail::kIndexTypes, {2}));
  weight.block_size = integer(layer, "group_size");
  const int64_t numel = detail::checked_numel("from_hqq", detail::in_quotes(layer.key("shape")), weight.size);
  if (weight.block_size < 1 || numel % weight.block_size != 0 || numel / weight.block_size % 2 != 0)
    layer.fail(detail::in_quotes(layer.key("group_size")) + " that makes an even number of groups of a weight " +
                   detail::sizes_text(weight.size),
               std::to_string(weight.block_size));
  const int64_t groups = numel / weight.block_size;
  if (packed.dim() == 0 || static_cast<int64_t>(packed.nbytes()) != numel / 2)
    layer.fail(detail::in_quotes(layer.key("W_q")) + " of " + std::to_string(numel / 2) + " bytes",
               std::to_string(packed.nbytes()));
  const auto per_group = [&](std::string_view name) {
    const at::Tensor values = layer.get(name, detail::kFloatTypes);
    if (values.numel() != groups)
      layer.fail(detail::in_quotes(layer.key(name)) + " of " + std::to_string(groups) + " elements",
                 detail::sizes_text(values.sizes()));
    return values.to(at::kFloat);
  };
  const at::Tensor scale = per_group("scale");
  const at::Tensor zero = per_group("zero");
  weight.bias = layer.bias(weight.size[0]);
  const at::Tensor bytes = detail::bytes_as(packed, at::kByte).reshape({-1});
  const at::Tensor codes = at::cat({bytes.bitwise_right_shift(4), bytes.bitwise_and(15)});
  detail::lay_out(weight, detail::pack_elements(codes, zero), scale, zero);
  return weight;
}

}  // namespace quantrain::nn

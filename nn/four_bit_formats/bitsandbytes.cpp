#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <nlohmann/json.hpp>

#include "nn/four_bit_formats/common.h"
#include "nn/json.h"
#include "quantrain/ops/adamw_8bit.h"
#include "quantrain/ops/four_bit.h"

// bitsandbytes: X.weight, the packed codes, high nibble first, [bytes, 1]; X.weight.absmax; X.weight.quant_map [16];
// where absmax is compressed ("nested") X.weight.nested_absmax and X.weight.nested_quant_map [256]; and
// X.weight.quant_state.bitsandbytes__nf4 (or __fp4), JSON as bytes. Layout: bitsandbytes 0.50.2, functional.QuantState.

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kNestedBlock = 256;

// float32 [16]: the values of codes 0 to 15, which the operator has.
at::Tensor table_of(const std::string& format) {
  const at::Tensor every = at::arange(0, 16, at::kByte).view({8, 2});
  const at::Tensor codes = every.select(1, 0) * 16 + every.select(1, 1);        // the first code in the high nibble
  return quantrain::dequantize_4bit(codes, at::ones({1}), {16}, format) + 0.0;  // its 0 of code 8 has no sign
}

// float32 [256], the signed dynamic map.
at::Tensor dynamic_map() {
  return quantrain::dequantize_8bit_blockwise(at::arange(0, 256, at::kByte), at::ones({1}), /*is_signed=*/true);
}

struct TypeName {
  at::ScalarType type;
  const char* name;
};
constexpr TypeName kTypeNames[] = {{at::kFloat, "float32"}, {at::kHalf, "float16"}, {at::kBFloat16, "bfloat16"}};

const char* type_name(at::ScalarType type) {
  for (const TypeName& known : kTypeNames) {
    if (known.type == type) return known.name;
  }
  return nullptr;
}

// As Python's json writes a float.
std::string number_text(double value) {
  char buffer[64];
  const auto written = [&buffer](std::to_chars_result result) { return std::string(buffer, result.ptr); };
  const std::string scientific = written(std::to_chars(buffer, std::end(buffer), value, std::chars_format::scientific));
  const int exponent = std::stoi(scientific.substr(scientific.find('e') + 1));
  if (exponent < -4 || exponent >= 16) return scientific;
  const std::string fixed = written(std::to_chars(buffer, std::end(buffer), value, std::chars_format::fixed));
  return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
}

// The parts of a layer, under their own names or under flattened ones.
class Parts : public detail::LayerTensors {
 public:
  using LayerTensors::LayerTensors;

  std::string name(std::string_view part) const {
    const std::string dotted = "weight." + std::string(part);
    const std::string flat = "weight_" + std::string(part);
    return !has(dotted) && has(flat) ? flat : dotted;
  }
  bool has_part(std::string_view part) const { return has(name(part)); }

  // The name of the quant_state: one, of one type.
  std::string state_name() const {
    std::vector<std::string> found;
    for (const char* name :
         {"weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
          "weight_quant_state.bitsandbytes__nf4", "weight_quant_state.bitsandbytes__fp4", "weight_quant_state"}) {
      if (has(name)) found.push_back(name);
    }
    if (found.size() != 1)
      fail("one tensor " + detail::in_quotes(key("weight.quant_state.bitsandbytes__nf4")) + " or __fp4",
           found.empty() ? "none" : std::to_string(found.size()));
    return found.front();
  }
};

// The JSON of a layer, field by field.
class State {
 public:
  explicit State(const Parts& parts) : parts_(parts), key_(parts.key(parts.state_name())) {
    const at::Tensor bytes = parts.get(parts.state_name(), {at::kByte}).cpu();
    const std::string text(static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes());
    json_ = detail::parse_json(text);
    if (!json_.is_object()) parts.fail(detail::in_quotes(key_) + " to be a JSON object", "other text");
  }

  std::string text(const char* field) const {
    return of(field, "text", [](const Json& value) { return value.is_string(); }).get<std::string>();
  }
  double number(const char* field) const {
    return of(field, "a number", [](const Json& value) { return value.is_number(); }).get<double>();
  }
  int64_t integer(const char* field) const { return of(field, "an integer", is_size).get<int64_t>(); }
  std::vector<int64_t> sizes(const char* field) const {
    const Json value = of(field, "sizes", [](const Json& list) {
      return list.is_array() && std::all_of(list.begin(), list.end(), is_size);
    });
    return value.get<std::vector<int64_t>>();
  }
  std::string rule(const char* field) const { return std::string(field) + " of " + detail::in_quotes(key_); }

 private:
  static bool is_size(const Json& value) {
    return value.is_number_unsigned() && value.get<uint64_t>() <= uint64_t{1} << 62;
  }
  template <typename Check>
  Json of(const char* field, const char* kind, const Check& check) const {
    const auto found = json_.find(field);
    if (found == json_.end()) parts_.fail(rule(field) + " to be " + kind, "no such field");
    if (!check(*found)) parts_.fail(rule(field) + " to be " + kind, "'" + std::string(found->type_name()) + "'");
    return *found;
  }

  const Parts& parts_;
  std::string key_;
  Json json_;
};

void read_table(const Parts& parts, FourBitWeight& weight) {
  const at::Tensor map = parts.get(parts.name("quant_map"), {at::kFloat}, {16});
  const at::Tensor values = map.cpu();
  if (values.equal(table_of("nf4"))) {
    weight.format = "nf4";
  } else if (values.equal(table_of("fp4"))) {
    weight.format = "fp4";
  } else {
    weight.format = "table";
    weight.table = map;
  }
}

// scale_scale and scale_offset, for `blocks` compressed scales.
void read_nested(const Parts& parts, const State& state, int64_t blocks, FourBitWeight& weight) {
  const int64_t block = state.integer("nested_blocksize");
  if (block != kNestedBlock) parts.fail(state.rule("nested_blocksize") + " to be 256", std::to_string(block));
  if (state.text("nested_dtype") != "float32")
    parts.fail(state.rule("nested_dtype") + " to be float32", detail::in_quotes(state.text("nested_dtype")));
  const std::string name = parts.name("nested_quant_map");
  const at::Tensor map = parts.get(name, {at::kFloat}, {256}).cpu();
  // Releases differ in the last bit of the map. No scale moves by more than this share of scale_scale.
  if (!map.allclose(dynamic_map(), /*rtol=*/1e-6, /*atol=*/0))
    parts.fail(detail::in_quotes(parts.key(name)) + " to be the signed dynamic map", "other values");
  weight.scale_scale = parts.get(parts.name("nested_absmax"), {at::kFloat}, {(blocks - 1) / kNestedBlock + 1});
  weight.scale_offset = at::scalar_tensor(state.number("nested_offset"), weight.scale_scale.options());
}

at::Tensor packed_codes(const Parts& parts, int64_t numel) {
  const at::Tensor packed = parts.get("weight", {});
  const int64_t bytes = numel / 2 + numel % 2;
  if (packed.dim() == 0 || packed.is_complex() || static_cast<int64_t>(packed.nbytes()) != bytes)
    parts.fail(detail::in_quotes(parts.key("weight")) + " of " + std::to_string(bytes) + " bytes",
               std::to_string(packed.nbytes()));
  return detail::bytes_as(packed, at::kByte).reshape({-1});
}

}  // namespace

FourBitWeight load_bitsandbytes(const FourBitTensors& tensors, const std::string& prefix) {
  const Parts parts("load_bitsandbytes", tensors, prefix);
  const State state(parts);
  FourBitWeight weight;
  const std::string type = state.text("quant_type");
  if (type != "nf4" && type != "fp4")
    parts.fail(state.rule("quant_type") + " to be nf4 or fp4", detail::in_quotes(type));
  const std::string dtype = state.text("dtype");
  const auto* known = std::find_if(std::begin(kTypeNames), std::end(kTypeNames),
                                   [&dtype](const TypeName& name) { return dtype == name.name; });
  if (known == std::end(kTypeNames))
    parts.fail(state.rule("dtype") + " to be float32, float16 or bfloat16", detail::in_quotes(dtype));
  weight.dtype = known->type;
  weight.block_size = state.integer("blocksize");
  if (weight.block_size < 32 || weight.block_size > 4096 ||
      !std::has_single_bit(static_cast<uint64_t>(weight.block_size)))
    parts.fail(state.rule("blocksize") + " to be a power of two from 32 to 4096", std::to_string(weight.block_size));
  weight.size = state.sizes("shape");
  const int64_t numel = detail::checked_numel(parts.function(), state.rule("shape"), weight.size);
  const at::Tensor codes = packed_codes(parts, numel);
  const int64_t blocks = (numel - 1) / weight.block_size + 1;
  read_table(parts, weight);
  const bool nested = parts.has_part("nested_absmax");
  const at::Tensor scale = parts.get(
      parts.name("absmax"), nested ? std::initializer_list<at::ScalarType>{at::kByte} : detail::kFloatTypes, {blocks});
  if (nested) read_nested(parts, state, blocks, weight);
  weight.bias = parts.bias(weight.size.front());

  std::vector<int64_t> sizes = weight.size;
  const int64_t columns = sizes.back();
  const bool rows = columns % weight.block_size == 0;
  sizes.back() = columns / 2;
  weight.codes = rows ? codes.view(sizes) : codes;
  sizes.back() = columns / weight.block_size;
  weight.scale = (rows ? scale.view(sizes) : scale).to(nested ? at::kByte : at::kFloat);
  return weight;
}

FourBitTensors to_bitsandbytes(const FourBitWeight& weight, const std::string& prefix, at::ScalarType quant_storage) {
  const std::string function = "to_bitsandbytes";
  if (weight.format != "nf4" && weight.format != "fp4")
    detail::fail_format(function, "a weight of format nf4 or fp4", detail::in_quotes(weight.format));
  detail::check_weight(function, weight);
  const char* dtype = type_name(weight.dtype);
  if (!dtype) detail::fail_format(function, "a dtype of Float, Half or BFloat16", c10::toString(weight.dtype));
  const auto storage_bytes = static_cast<int64_t>(c10::elementSize(quant_storage));
  if (weight.codes.numel() % storage_bytes != 0)
    detail::fail_format(function,
                        "a quant_storage whose elements fill " + std::to_string(weight.codes.numel()) + " bytes",
                        c10::toString(quant_storage));
  const auto key = [&prefix](std::string_view name) { return detail::layer_key(prefix, name); };
  FourBitTensors tensors;
  tensors[key("weight")] = detail::bytes_as(weight.codes.detach().reshape({-1}), quant_storage).unsqueeze(-1);
  tensors[key("weight.absmax")] = weight.scale.detach().reshape({-1});
  tensors[key("weight.quant_map")] = table_of(weight.format);
  // As Python's json writes it, for the same bytes.
  std::string state = R"({"quant_type": ")" + weight.format + R"(", "blocksize": )" +
                      std::to_string(weight.block_size) + R"(, "dtype": ")" + dtype + R"(", "shape": )" +
                      detail::sizes_text(weight.size);
  if (weight.scale_scale.defined()) {
    const double offset = weight.scale_offset.item<double>();
    if (!std::isfinite(offset)) detail::fail_format(function, "a finite scale_offset", std::to_string(offset));
    tensors[key("weight.nested_absmax")] = weight.scale_scale.detach().reshape({-1});
    tensors[key("weight.nested_quant_map")] = dynamic_map();
    state += R"(, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": )" + number_text(offset);
  }
  state += "}";
  at::Tensor blob = at::empty({static_cast<int64_t>(state.size())}, at::kByte);
  std::copy(state.begin(), state.end(), blob.data_ptr<uint8_t>());
  tensors[key("weight.quant_state.bitsandbytes__" + weight.format)] = blob;
  if (weight.bias.defined()) tensors[key("bias")] = weight.bias.detach();
  return tensors;
}

}  // namespace quantrain::nn

#include "support.h"

#include <cstring>
#include <limits>
#include <string>

using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;
using namespace quantrain::nn;
using support::same_bits;
using support::TemporaryFolder;
using support::value_error;
using support::write_file;

namespace {

void require_same(const FourBitTensors& given, const FourBitTensors& expected) {
  REQUIRE(given.size() == expected.size());
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    REQUIRE(given.count(name) == 1);
    REQUIRE(same_bits(given.at(name), tensor));
  }
}

at::Tensor random_codes(at::IntArrayRef sizes) { return at::randint(0, 256, sizes, at::kByte); }

// uint4 [N, K] with one scale and zero point for 32 columns.
FourBitWeight affine_weight(int64_t rows, int64_t columns) {
  FourBitWeight weight;
  weight.codes = random_codes({rows, columns / 2});
  weight.scale = at::rand({rows, columns / 32}).to(at::kHalf).to(at::kFloat);
  weight.zero_point = at::randint(0, 16, {rows, columns / 32}, at::kInt);
  weight.format = "uint4";
  weight.size = {rows, columns};
  weight.block_size = 32;
  weight.dtype = at::kHalf;
  weight.bias = at::rand({rows}).to(at::kHalf);
  return weight;
}

void require_same(const FourBitWeight& given, const FourBitWeight& expected) {
  REQUIRE(given.format == expected.format);
  REQUIRE(given.size == expected.size);
  REQUIRE(given.block_size == expected.block_size);
  REQUIRE(given.dtype == expected.dtype);
  REQUIRE(same_bits(given.codes, expected.codes));
  REQUIRE(same_bits(given.scale, expected.scale));
  REQUIRE(given.zero_point.defined() == expected.zero_point.defined());
  if (given.zero_point.defined()) REQUIRE(same_bits(given.zero_point, expected.zero_point));
  REQUIRE(same_bits(given.bias, expected.bias));
}

}  // namespace

TEST_CASE("a weight goes through every file of integer codes and back", "[four_bit_formats]") {
  torch::manual_seed(3);
  const FourBitWeight weight = affine_weight(16, 64);
  for (const int64_t version : {1, 2}) require_same(from_gptq(to_gptq(weight, "up", version), "up", version), weight);
  require_same(from_awq(to_awq(weight, "up"), "up"), weight);
  require_same(from_compressed_tensors(to_compressed_tensors(weight, ""), ""), weight);
}

TEST_CASE("symmetric codes become int4 and permuted columns stay permuted", "[four_bit_formats]") {
  torch::manual_seed(4);
  FourBitWeight weight = affine_weight(8, 64);
  weight.zero_point.fill_(8);
  weight.permutation = at::randperm(64, at::kLong);
  const FourBitTensors file = to_gptq(weight, "", 2);
  const FourBitWeight read = from_gptq(file, "", 2);
  REQUIRE(read.format == "int4");
  REQUIRE(!read.zero_point.defined());
  REQUIRE(read.permutation.defined());
  REQUIRE(!read.permutation.equal(at::arange(64)));
  require_same(to_gptq(read, "", 2), file);
}

TEST_CASE("bitsandbytes through a safetensors file, nested and not, even and odd", "[four_bit_formats]") {
  torch::manual_seed(5);
  const TemporaryFolder folder;
  for (const bool nested : {false, true}) {
    for (const int64_t columns : {1, 63, 65, 128, 3420}) {
      INFO(columns);
      const int64_t blocks = (3 * columns - 1) / 64 + 1;
      FourBitWeight weight;
      weight.format = "nf4";
      weight.size = {3, columns};
      weight.block_size = 64;
      weight.dtype = at::kBFloat16;
      weight.codes = random_codes({(3 * columns + 1) / 2});
      weight.scale = nested ? random_codes({blocks}) : at::rand({blocks});
      if (nested) {
        weight.scale_scale = at::rand({(blocks - 1) / 256 + 1});
        weight.scale_offset = at::rand({});
      }
      const std::string path = folder.file("model.safetensors");
      const FourBitTensors file = to_bitsandbytes(weight, "model.up");
      write_safetensors(path, {file, {}});
      const FourBitTensors read = read_safetensors(path).tensors;
      require_same(read, file);
      const FourBitWeight back = load_bitsandbytes(read, "model.up");
      REQUIRE(back.codes.dim() == (columns == 128 ? 2 : 1));
      require_same(to_bitsandbytes(back, "model.up"), file);
      REQUIRE(load_four_bit_layers(read).at("model.up").format == "nf4");
    }
  }
}

TEST_CASE("a layer that is wrong is named", "[four_bit_formats]") {
  torch::manual_seed(6);
  const FourBitTensors gptq = to_gptq(affine_weight(8, 64), "up", 1);
  const auto error_of = [](FourBitTensors tensors, const std::string& name, const at::Tensor& tensor) {
    tensors.erase(name);
    if (tensor.defined()) tensors[name] = tensor;
    return value_error([&] { from_gptq(tensors, "up", 1); });
  };
  REQUIRE(error_of(gptq, "up.scales", {}) == "from_gptq: expected a tensor 'up.scales', got none");
  REQUIRE(error_of(gptq, "up.scales", at::ones({3, 8})) ==
          "from_gptq: expected 'up.qzeros' of shape [3, 1], got [2, 1]");
  REQUIRE(error_of(gptq, "up.qweight", at::ones({8, 8})) == "from_gptq: expected 'up.qweight' of type Int, got Float");
  REQUIRE(error_of(gptq, "up.g_idx", at::full({64}, 2, at::kInt)) ==
          "from_gptq: expected 'up.g_idx' within 0 and 1, got 2");
  REQUIRE(value_error([&] { from_gptq(gptq, "up", 3); }) == "from_gptq: expected a version of 1 or 2, got 3");
  REQUIRE_THAT(value_error([&] { load_four_bit_layers(gptq); }), Contains("a config for the GPTQ layer 'up'"));
  FourBitWeight weight = affine_weight(8, 64);
  weight.codes = at::Tensor();
  REQUIRE(value_error([&] { to_awq(weight, ""); }) == "to_awq: expected a weight with codes, got none");
}

TEST_CASE("a GGUF file is read, and refused wherever it is cut", "[four_bit_formats]") {
  const auto little = [](auto value) {
    std::string bytes(sizeof(value), '\0');
    std::memcpy(bytes.data(), &value, sizeof(value));
    return bytes;
  };
  const auto text = [&little](const std::string& value) { return little(uint64_t{value.size()}) + value; };
  // One key, and one tensor [2, 32] of Q4_0: scale 0.5, codes 0..15 in the low nibbles and 15..0 in the high ones.
  std::string bytes = "GGUF" + little(uint32_t{3}) + little(uint64_t{1}) + little(uint64_t{1});
  bytes += text("general.name") + little(uint32_t{8}) + text("tiny");
  bytes += text("w") + little(uint32_t{2}) + little(uint64_t{32}) + little(uint64_t{2}) + little(uint32_t{2}) +
           little(uint64_t{0});
  bytes.resize((bytes.size() + 31) / 32 * 32);
  for (int row = 0; row < 2; ++row) {
    bytes += little(uint16_t{0x3800});
    for (int i = 0; i < 16; ++i) bytes.push_back(static_cast<char>(i | (15 - i) << 4));
  }
  const TemporaryFolder folder;
  const std::string path = folder.file("tiny.gguf");
  write_file(path, bytes);
  const GgufFile file = read_gguf(path);
  REQUIRE(std::get<std::string>(file.metadata.at("general.name")) == "tiny");
  const FourBitWeight& weight = file.four_bit.at("w");
  REQUIRE(weight.size == std::vector<int64_t>{2, 32});
  REQUIRE(weight.scale.equal(at::full({2, 1}, 0.5f)));
  const at::Tensor low = weight.codes.bitwise_and(15);
  const at::Tensor high = weight.codes.bitwise_right_shift(4);
  const at::Tensor values = at::stack({low, high}, -1).flatten(1).bitwise_xor(8).to(at::kLong).sub(8);
  const at::Tensor ramp = at::arange(16).sub(8);
  REQUIRE(values[1].equal(at::cat({ramp, ramp.flip(0)})));
  for (size_t size = 0; size < bytes.size(); ++size) {
    write_file(path, bytes.substr(0, size));
    REQUIRE_THAT(value_error([&] { read_gguf(path); }), StartsWith(path + ": expected "));
  }
}

TEST_CASE("an adapter comes back from PEFT's files", "[four_bit_formats]") {
  torch::manual_seed(7);
  const TemporaryFolder folder;
  LoraAdapter adapter;
  adapter.layers["model.up"] = {at::rand({4, 16}), at::rand({8, 4})};
  adapter.r = 4;
  adapter.lora_alpha = 16;
  adapter.target_modules = {"up"};
  save_lora_adapter(folder.file("adapter"), adapter);
  const LoraAdapter read = load_lora_adapter(folder.file("adapter"));
  REQUIRE(same_bits(read.layers.at("model.up").a, adapter.layers["model.up"].a));
  REQUIRE(same_bits(read.layers.at("model.up").b, adapter.layers["model.up"].b));
  REQUIRE(read.scaling("model.up") == 4);
  REQUIRE(read.target_modules == adapter.target_modules);
  adapter.layers["model.up"].b = at::rand({8, 5});
  REQUIRE_THAT(value_error([&] { save_lora_adapter(folder.file("adapter"), adapter); }),
               Contains("of 4 columns, the rank of A, got 5"));
}

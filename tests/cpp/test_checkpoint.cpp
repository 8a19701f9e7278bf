#include "support.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <quantrain/nn/checkpoint.h>
#include <quantrain/nn/layers.h>

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::read_file;
using support::same_bits;
using support::TemporaryFolder;
using support::value_error;
using support::write_file;

namespace {

struct NetImpl : torch::nn::Module {
  explicit NetImpl(const Recipe& recipe, int64_t width = 6)
      : conv(register_module("conv", QuantConvBn2d(torch::nn::Conv2dOptions(2, width, 3).bias(false), recipe))),
        head(register_module("head", QuantLinear(width, 3, recipe))) {}

  at::Tensor forward(const at::Tensor& x) { return head->forward(at::relu(conv->forward(x)).mean({2, 3})); }

  QuantConvBn2d conv;
  QuantLinear head;
};
TORCH_MODULE(Net);

Net trained_net(const Recipe& recipe) {
  Net net(recipe);
  const at::Tensor x = at::randn({4, 2, 7, 7});
  net->forward(x);
  const Calibration calibration(*net);
  net->forward(x);
  return net;
}

at::Tensor logits(Net& net, const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  net->eval();
  return net->forward(x);
}

std::map<std::string, at::Tensor> state(const Net& net) {
  std::map<std::string, at::Tensor> all;
  for (const auto& item : net->named_parameters()) all[item.key()] = item.value().detach().clone();
  for (const auto& item : net->named_buffers()) all[item.key()] = item.value().clone();
  return all;
}

bool unchanged(const Net& net, const std::map<std::string, at::Tensor>& before) {
  for (const auto& [name, tensor] : state(net)) {
    if (!same_bits(tensor, before.at(name))) return false;
  }
  return true;
}

std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(header.size() >> 8 * i & 0xff);
  return bytes + header + data;
}

}  // namespace

TEST_CASE("a prepared model comes back from its checkpoint bit for bit", "[checkpoint]") {
  torch::manual_seed(11);
  const TemporaryFolder folder;
  const at::Tensor x = at::randn({3, 2, 7, 7});
  for (const std::string& name : Recipe::names()) {
    INFO(name);
    const Recipe recipe = Recipe::from_name(name);
    if (recipe.linear_only() || recipe.scheme_as<quantrain::nn::FixedPointSpec>()) continue;
    if (recipe.scheme && recipe.scheme->packs_weight()) continue;  // test_four_bit_layers
    Net net = trained_net(recipe);
    save_checkpoint(folder.file("a.safetensors"), *net, recipe);
    Net other(recipe);
    const CheckpointInfo info = load_checkpoint(folder.file("a.safetensors"), *other);
    CHECK(info.recipe == recipe);
    CHECK_FALSE(info.converted);
    CHECK(unchanged(other, state(net)));
    CHECK(same_bits(logits(other, x), logits(net, x)));
  }
}

TEST_CASE("a converted model comes back into a skeleton bit for bit", "[checkpoint]") {
  torch::manual_seed(12);
  const TemporaryFolder folder;
  const std::string path = folder.file("converted.safetensors");
  const at::Tensor x = at::randn({3, 2, 7, 7});
  for (const std::string& name : Recipe::names()) {
    INFO(name);
    const Recipe recipe = Recipe::from_name(name);
    if (recipe.linear_only() || recipe.scheme_as<quantrain::nn::FixedPointSpec>()) continue;
    if (recipe.scheme && recipe.scheme->packs_weight()) continue;  // test_four_bit_layers
    if (recipe.prune) continue;                                    // which rounds nothing
    Net net = trained_net(recipe);
    convert(*net);
    save_checkpoint(path, *net, recipe);
    CHECK(read_checkpoint_info(path).converted);
    Net other(recipe);
    convert(*other, /*check_observed=*/false);
    load_checkpoint(path, *other);
    CHECK(same_bits(logits(other, x), logits(net, x)));
  }
}

TEST_CASE("every dtype, a scalar, an empty tensor and odd names survive a file", "[checkpoint]") {
  const TemporaryFolder folder;
  SafeTensors content;
  int index = 0;
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                                    at::kChar, at::kByte, at::kBool}) {
    content.tensors["t" + std::to_string(index++)] = at::randint(0, 2, {3, 5}, at::kLong).to(type);
  }
  content.tensors["scalar"] = at::tensor(3.5);
  content.tensors["empty"] = at::empty({0, 4});
  content.tensors["transposed"] = at::arange(6).reshape({2, 3}).t();
  content.tensors["\"quoted\" \xc3\xa9"] = at::ones({1});
  content.metadata["note"] = "two\nlines";
  write_safetensors(folder.file("a"), content);
  const SafeTensors back = read_safetensors(folder.file("a"));
  CHECK(back.metadata == content.metadata);
  REQUIRE(back.tensors.size() == content.tensors.size());
  for (const auto& [name, tensor] : content.tensors) {
    INFO(name);
    CHECK(back.tensors.at(name).equal(tensor));
    CHECK(back.tensors.at(name).scalar_type() == tensor.scalar_type());
  }
}

TEST_CASE("a file cut anywhere raises, names the file, and changes nothing", "[checkpoint]") {
  torch::manual_seed(13);
  const TemporaryFolder folder;
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  const std::string path = folder.file("cut.safetensors");
  save_checkpoint(folder.file("whole"), *trained_net(recipe), recipe);
  const std::string bytes = read_file(folder.file("whole"));
  Net net(recipe);
  const auto before = state(net);
  const std::vector<size_t> lengths = {0, 1, 7, 8, 9, 100, 1000, bytes.size() / 2, bytes.size() - 1};
  for (const size_t length : lengths) {
    INFO(length);
    write_file(path, bytes.substr(0, length));
    CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }),
               Contains(path) && Contains("expected") && Contains("got"));
  }
  write_file(path, bytes + "x");
  CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }), Contains("bytes of tensors"));
  CHECK(unchanged(net, before));
}

TEST_CASE("files that are not checkpoints raise with the rule", "[checkpoint]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("foreign.safetensors");
  Net net(Recipe::from_name("qat-w8a8"));
  const auto before = state(net);
  const auto refused = [&](const std::string& bytes, const std::string& rule) {
    write_file(path, bytes);
    CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }), Contains(path) && Contains(rule));
  };
  refused("PK\x03\x04 some zip archive of a pickled model", "header of at most");
  refused(std::string(64, '\xff'), "header of at most");
  refused(safetensors_bytes("not json", ""), "a JSON object");
  refused(safetensors_bytes("[]", ""), "a JSON object");
  refused(safetensors_bytes(R"({"a": 3})", ""), "dtype, shape and data_offsets");
  refused(safetensors_bytes(R"({"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}})", "x"), "a dtype of F64");
  refused(safetensors_bytes(R"({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}})", "x"), "dtype, shape");
  refused(safetensors_bytes(R"({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}})", "x"),
          "2 bytes for the tensor 'a'");
  refused(
      safetensors_bytes(R"({"a": {"dtype": "F64", "shape": [4611686018427387904, 8], "data_offsets": [0, 0]}})", ""),
      "2^64");
  refused(safetensors_bytes(R"({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}})", "xx"),
          "to start at byte 0");
  refused(safetensors_bytes(R"({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}})",
                            "xyz"),
          "to start at byte 2");
  refused(safetensors_bytes(R"({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})", "x"),
          "metadata 'format'");
  refused(safetensors_bytes(R"({"__metadata__": {"format": "pt"}})", ""), "metadata format 'quantrain', got 'pt'");
  refused(safetensors_bytes(R"({"__metadata__": {"format": 1}})", ""), "an object of strings");
  refused(safetensors_bytes(R"({"__metadata__": {"format": "quantrain", "version": "2"}})", ""),
          "metadata version '1', got '2'");
  refused(safetensors_bytes(R"({"__metadata__": {"format": "quantrain", "version": "1", "converted": "maybe"}})", ""),
          "got 'maybe'");
  refused(
      safetensors_bytes(
          R"({"__metadata__": {"format": "quantrain", "version": "1", "converted": "false", "recipe": "{\"bits\": 3}"}})",
          ""),
      "a valid recipe in the metadata");
  CHECK_THROWS_WITH(load_checkpoint(folder.file("absent"), *net), Contains("absent: expected a file that can be read"));
  CHECK_THROWS_WITH(load_checkpoint(folder.file("."), *net), Contains("a folder"));
  CHECK(unchanged(net, before));
}

TEST_CASE("a checkpoint of another model raises and changes nothing", "[checkpoint]") {
  torch::manual_seed(14);
  const TemporaryFolder folder;
  const std::string path = folder.file("other.safetensors");
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  Net net(recipe);
  const auto before = state(net);
  const auto refused = [&](const std::string& rule) {
    CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }), Contains(path) && Contains(rule));
  };
  save_checkpoint(path, *Net(recipe, /*width=*/8), recipe);
  refused("of shape [6]");
  for (const char* other : {"qat-w8a8-token", "qat-w4a4"}) {
    save_checkpoint(path, *Net(Recipe::from_name(other)), Recipe::from_name(other));
    refused("expected the layer 'conv' with weight int8 per_channel, input uint8 per_tensor, got weight int");
    SafeTensors unlabelled = read_safetensors(path);  // a file that does not say what its layers are
    unlabelled.metadata.erase("layer_recipes");
    unlabelled.metadata["recipe"] = "";
    write_safetensors(path, unlabelled);
    refused(other == std::string("qat-w4a4")
                ? "only names of the module, got 'conv.weight_fake_quant.observer.frozen'"
                : "a tensor for every name of the module, got none for 'conv.input_fake_quant.observer.max_val'");
  }

  const std::map<std::string, std::string> metadata = {
      {"format", "quantrain"}, {"version", "1"}, {"recipe", ""}, {"converted", "false"}, {"layers", "{}"}};
  std::map<std::string, at::Tensor> tensors = state(net);
  tensors["conv.bn.num_batches_tracked"] = at::zeros({}, at::kFloat);
  write_safetensors(path, {tensors, metadata});
  refused("'conv.bn.num_batches_tracked' of dtype Long, got Float");

  Net converted = trained_net(recipe);
  convert(*converted);
  save_checkpoint(path, *converted, recipe);
  refused("expected a checkpoint that is not converted");
  CHECK(unchanged(net, before));
}

TEST_CASE("a converted checkpoint of other bits or shapes raises", "[checkpoint]") {
  torch::manual_seed(15);
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  Net net = trained_net(recipe);
  save_checkpoint(path, *net, recipe);
  convert(*net);
  const auto before = state(net);
  CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }), Contains("expected a converted checkpoint"));
  Recipe fewer = recipe;
  fewer.weight->bits = 6;
  Net other = trained_net(fewer);
  convert(*other);
  save_checkpoint(path, *other, fewer);
  CHECK_THAT(value_error([&] { load_checkpoint(path, *net); }),
             Contains("the layer 'conv' to be") && Contains("\"bits\":6"));
  CHECK(unchanged(net, before));
}

TEST_CASE("a converted file whose codes are called weight, as they once were, loads", "[checkpoint]") {
  torch::manual_seed(16);
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  const Recipe recipe = Recipe::from_name(GENERATE(as<std::string>{}, "qat-w8a8", "qat-w4a8"));
  Net net = trained_net(recipe);
  convert(*net);
  save_checkpoint(path, *net, recipe);
  SafeTensors content = read_safetensors(path);
  for (const char* layer : {"conv", "head"}) {
    const std::string name = std::string(layer) + ".weight";
    content.tensors[name] = content.tensors.at(name + "_codes");
    content.tensors.erase(name + "_codes");
  }
  write_safetensors(path, content);
  Net other(recipe);
  convert(*other, /*check_observed=*/false);
  load_checkpoint(path, *other);
  const at::Tensor x = at::randn({4, 2, 7, 7});
  CHECK(same_bits(logits(other, x), logits(net, x)));

  content.tensors["head.weight"] = at::zeros({3, 6});  // a float weight is no code
  write_safetensors(path, content);
  CHECK_THAT(value_error([&] { load_checkpoint(path, *other); }), Contains("got none for 'head.weight_codes'"));
}

TEST_CASE("half-precision tensors load into a float32 module", "[checkpoint]") {
  const TemporaryFolder folder;
  const Recipe recipe = Recipe::from_name("qat-w8a8-token");
  Net net(recipe);
  for (int batch = 0; batch < 257; ++batch) net->forward(at::zeros({2, 2, 3, 3}));  // bfloat16 has no 257
  net->to(at::kBFloat16);
  save_checkpoint(folder.file("a"), *net, recipe);
  Net other(recipe);
  load_checkpoint(folder.file("a"), *other);
  CHECK(other->head->weight.scalar_type() == at::kFloat);
  CHECK(other->conv->bn->num_batches_tracked.item<int64_t>() == 257);
  CHECK(same_bits(other->head->weight.detach(), net->head->weight.detach().to(at::kFloat)));
}

TEST_CASE("a failed write raises, and an earlier file stays", "[checkpoint]") {
  const TemporaryFolder folder;
  const Recipe recipe = Recipe::from_name("qat-w8a8-token");
  Net net(recipe);
  CHECK_THROWS_WITH(save_checkpoint(folder.file("no/such/folder"), *net, recipe),
                    Contains("expected a file that can be written"));
  const std::string path = folder.file("a");
  save_checkpoint(path, *net, recipe);
  const std::string bytes = read_file(path);
  CHECK_THROWS(write_safetensors(path, {{{"complex", at::zeros({2}, at::kComplexFloat)}}, {}}));
  CHECK(read_file(path) == bytes);
  CHECK_FALSE(std::filesystem::exists(path + ".tmp"));
}

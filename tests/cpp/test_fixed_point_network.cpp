#include "support.h"

#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <ATen/TensorOperators.h>
#include <quantrain/nn/fixed_point/network.h>

using Catch::Matchers::Contains;
using quantrain::nn::FixedPointNetwork;
using support::read_file;
using support::TemporaryFolder;
using support::value_error;
using support::write_file;

namespace {

using Tensors = std::map<std::string, at::Tensor>;

// What every test starts from: a residual block, a shortcut of accumulators, depthwise, pools, slice_pad, add, flatten,
// linear.
const char* const kGraph = R"({
  "format": "quantrain.fixed_point", "version": 1, "recipe": "",
  "input": {"name": "input", "channels": 3, "signed": false, "fraction_length": 8, "scale": 0.00392156862745098},
  "nodes": [
    {"name": "conv1", "op": "conv2d", "inputs": ["input"], "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "groups": 1,
     "channels": 8, "weight_fraction_length": [7, 6, 5, 7, 6, 5, 7, 6], "output": "codes", "signed": false, "fraction_length": 5},
    {"name": "conv2", "op": "conv2d", "inputs": ["conv1", "conv1"], "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1],
     "groups": 1, "channels": 8, "weight_fraction_length": 6, "output": "codes", "signed": false, "fraction_length": 5},
    {"name": "shortcut", "op": "conv2d", "inputs": ["conv2"], "kernel": [1, 1], "stride": [2, 2], "padding": [0, 0], "groups": 1,
     "channels": 12, "weight_fraction_length": 7, "output": "accumulators"},
    {"name": "conv3", "op": "conv2d", "inputs": ["conv2", "shortcut"], "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1],
     "groups": 1, "channels": 12, "weight_fraction_length": 5, "output": "codes", "signed": true, "fraction_length": 3},
    {"name": "depthwise", "op": "conv2d", "inputs": ["conv3"], "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1],
     "groups": 12, "channels": 12, "weight_fraction_length": 6, "output": "codes", "signed": false, "fraction_length": 4},
    {"name": "maxpool", "op": "max_pool2d", "inputs": ["depthwise"], "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]},
    {"name": "slice", "op": "slice_pad", "inputs": ["conv3"], "stride": [2, 2], "pad": [0, 0]},
    {"name": "add", "op": "add", "inputs": ["maxpool", "slice"], "signed": false, "fraction_length": 3},
    {"name": "padded", "op": "slice_pad", "inputs": ["add"], "stride": [1, 1], "pad": [1, 3]},
    {"name": "pool", "op": "avg_pool2d", "inputs": ["padded"], "size": [2, 2], "shift": 2, "fraction_length": 4},
    {"name": "flatten", "op": "flatten", "inputs": ["pool"]},
    {"name": "fc", "op": "linear", "inputs": ["flatten"], "features": 5, "weight_fraction_length": 7, "output": "accumulators"}],
  "output": {"name": "fc", "scale": 0.00048828125}})";

Tensors random_tensors() {
  torch::manual_seed(5);
  Tensors tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    tensors[name + ".bias"] = at::randint(-3000, 3000, {shape[0]}, at::kInt);
    tensors[name + ".weight"] = at::randint(-127, 128, shape, at::kChar);
  };
  add("conv1", {8, 3, 3, 3});
  add("conv2", {8, 8, 3, 3});
  add("shortcut", {12, 8, 1, 1});
  add("conv3", {12, 8, 3, 3});
  add("depthwise", {12, 1, 3, 3});
  add("fc", {5, 16});
  return tensors;
}

at::Tensor random_codes(int64_t n = 2, int64_t size = 8) { return at::randint(0, 256, {n, 3, size, size}, at::kByte); }

// The same in float64, which holds these integers exactly: an interpreter that shares nothing with the network.
struct Interpreter {
  const Tensors& tensors;
  std::map<std::string, at::Tensor> values;  // float64 integers

  static at::Tensor requantized(const at::Tensor& sums, const at::Tensor& shift, bool is_signed) {
    // Half to even, as at::round.
    return at::round(sums * at::pow(2.0, -shift.to(at::kDouble))).clamp(is_signed ? -127 : 0, is_signed ? 127 : 255);
  }
  at::Tensor conv(const std::string& name, const std::string& from, int64_t stride, int64_t groups = 1) const {
    const at::Tensor& weight = tensors.at(name + ".weight");
    return at::conv2d(values.at(from), weight.to(at::kDouble), tensors.at(name + ".bias").to(at::kDouble), stride,
                      weight.size(2) / 2, 1, groups);
  }
  static at::Tensor scalar(int64_t value) { return at::full({1}, value, at::kLong); }

  void run(const at::Tensor& codes) {
    values["input"] = codes.to(at::kDouble);
    const at::Tensor lengths = at::tensor({7, 6, 5, 7, 6, 5, 7, 6}, at::kLong).reshape({1, 8, 1, 1});
    values["conv1"] = requantized(conv("conv1", "input", 1), lengths + 8 - 5, false);
    values["conv2"] = requantized(conv("conv2", "conv1", 1) + values["conv1"] * 64, scalar(11 - 5), false);
    values["shortcut"] = conv("shortcut", "conv2", 2);
    // FL 10 meets FL 12: the sums are shifted to the residual.
    values["conv3"] = requantized(conv("conv3", "conv2", 2) * 4 + values["shortcut"], scalar(12 - 3), true);
    values["depthwise"] = requantized(conv("depthwise", "conv3", 1, 12), scalar(9 - 4), false);
    values["maxpool"] = at::max_pool2d(values["depthwise"], 3, 2, 1);
    values["slice"] = values["conv3"].slice(2, 0, c10::nullopt, 2).slice(3, 0, c10::nullopt, 2);
    values["add"] = requantized(values["maxpool"] + values["slice"] * 2, scalar(4 - 3), false);
    values["padded"] = at::constant_pad_nd(values["add"], {0, 0, 0, 0, 1, 3});
    values["pool"] = requantized(values["padded"].sum({2, 3}, true), scalar(3 + 2 - 4), false);
    values["flatten"] = values["pool"].flatten(1);
    values["fc"] =
        at::linear(values["flatten"], tensors.at("fc.weight").to(at::kDouble), tensors.at("fc.bias").to(at::kDouble));
  }
};

std::string changed(const std::string& from, const std::string& to) {
  std::string text = kGraph;
  const size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::string refusal(const std::string& from, const std::string& to) {
  const Tensors tensors = random_tensors();
  return value_error([&] { FixedPointNetwork(changed(from, to), tensors); });
}

}  // namespace

TEST_CASE("every node's integers are those of a float64 interpreter", "[fixed_point_network]") {
  const Tensors tensors = random_tensors();
  const at::Tensor codes = random_codes();
  Interpreter interpreter{tensors, {}};
  interpreter.run(codes);
  std::vector<at::Device> devices{at::kCPU};
  if (support::has_cuda()) devices.emplace_back(at::kCUDA, 0);
  const FixedPointNetwork made(kGraph, tensors);
  for (const at::Device& device : devices) {
    const FixedPointNetwork network = made.to(device);
    const auto found = network.forward_all(codes.to(device));
    CHECK(found.size() == interpreter.values.size() - 1);
    for (const auto& [name, value] : found) {
      INFO(name);
      CHECK(value.cpu().to(at::kDouble).equal(interpreter.values.at(name)));
    }
    const at::Tensor output = network.forward(codes.to(device));
    CHECK(output.scalar_type() == at::kInt);
    CHECK(output.equal(found.at("fc")));
    CHECK(network.forward(codes.contiguous(at::MemoryFormat::ChannelsLast).to(device)).equal(output));
    CHECK(network.dequantize_output(output).equal(output.to(at::kFloat) * 0x1p-11f));
    const at::Tensor images = codes.to(at::kFloat).div(255);
    CHECK(network.quantize_input(images).equal(codes));
  }
}

TEST_CASE("a network serves any batch, and threads one after another", "[fixed_point_network]") {
  const FixedPointNetwork network(kGraph, random_tensors());
  const at::Tensor codes = random_codes(12);
  const at::Tensor whole = network.forward(codes);
  for (const int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 12}) {
    CHECK(network.forward(codes.narrow(0, 0, batch)).equal(whole.narrow(0, 0, batch)));
  }
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 30; ++i)
        wrong[t] += !network.forward(codes.narrow(0, t, 2 + t)).equal(whole.narrow(0, t, 2 + t));
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("inputs that are not the graph's codes are refused", "[fixed_point_network]") {
  const FixedPointNetwork network(kGraph, random_tensors());
  const at::Tensor codes = random_codes();
  CHECK_THROWS_WITH(network.forward(codes.to(at::kFloat)), Contains("expected uint8 or int8 codes, got float32"));
  CHECK_THROWS_AS(network.forward(codes.to(at::kFloat)), c10::TypeError);
  CHECK_THROWS_WITH(network.forward(codes.to(at::kChar)), Contains("expected uint8 codes"));
  CHECK_THROWS_WITH(network.forward(codes.narrow(1, 0, 2)), Contains("expected codes [N, 3, H, W]"));
  CHECK_THROWS_WITH(network.forward(random_codes(1, 16)), Contains("pool: expected an image of [2,2], got [4,4]"));
}

TEST_CASE("a graph that does not fit is refused with the layer's name", "[fixed_point_network]") {
  CHECK_THAT(refusal("\"version\": 1", "\"version\": 2"), Contains("expected version 1, got 2"));
  CHECK_THAT(refusal("\"groups\": 12", "\"groups\": 3"), Contains("depthwise: expected groups 1, or as many"));
  CHECK_THAT(refusal("[\"depthwise\"]", "[\"nothing\"]"), Contains("maxpool: expected inputs that are names"));
  CHECK_THAT(refusal("[\"depthwise\"]", "[\"pool\"]"), Contains("maxpool: expected inputs that come before it"));
  CHECK_THAT(refusal("[\"conv1\", \"conv1\"]", "[\"conv1\", \"input\"]"), Contains("conv2: expected 8 channels"));
  CHECK_THAT(refusal("\"shift\": 2", "\"shift\": 2.5"), Contains("pool: expected shift to be an integer"));
  CHECK_THAT(refusal("\"shift\": 2", "\"shift\": 2, \"mode\": 1"),
             Contains("pool: expected only known fields, got 'mode'"));
  CHECK_THAT(refusal("\"features\": 5", "\"features\": 6"), Contains("'fc.weight' of shape [6,16], got [5,16]"));
  CHECK_THAT(refusal("\"name\": \"conv2\"", "\"name\": \"conv1\""),
             Contains("expected every name once, got 'conv1' twice"));
  Tensors tensors = random_tensors();
  tensors["fc.bias"][2] = int64_t{2'147'483'647};
  CHECK_THAT(value_error([&] { FixedPointNetwork(kGraph, tensors); }),
             Contains("fc: expected its sum to stay below 2^31 = 2147483648, got a bound of 21"));
  tensors = random_tensors();
  tensors["shortcut.bias"][2] = int64_t{2'147'000'000};
  CHECK_THAT(value_error([&] { FixedPointNetwork(kGraph, tensors); }),
             Contains("conv3: expected its sum with 'shortcut' to stay below 2^31"));
}

TEST_CASE("the audit names integer operations alone", "[fixed_point_network]") {
  const auto rows = FixedPointNetwork(kGraph, random_tensors()).audit();
  REQUIRE(rows.size() == 12);
  CHECK(rows[0].operands == "uint8 x int8");
  CHECK(rows[3].operands == "uint8 x int8 + int32");
  CHECK(rows[3].operations == "multiply, add, shift");
  CHECK(rows[4].operands == "int8 x int8");
  CHECK(rows[5].operations == "compare");
  CHECK(rows[11].result == "int32");
  for (const auto& row : rows) CHECK(row.bound < int64_t{1} << 31);
}

TEST_CASE("a network comes back from its file, and no changed byte passes", "[fixed_point_network]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("net.safetensors");
  const FixedPointNetwork network(kGraph, random_tensors());
  network.save(path);
  const at::Tensor codes = random_codes();
  const FixedPointNetwork again = FixedPointNetwork::load(path);
  CHECK(again.graph() == network.graph());
  CHECK(again.forward(codes).equal(network.forward(codes)));
  const std::string whole = read_file(path);
  for (size_t i = 0; i < whole.size(); i += 5) {
    std::string bytes = whole;
    bytes[i] = static_cast<char>(bytes[i] ^ (1 << i % 8));
    write_file(path, bytes);
    REQUIRE_THROWS_AS(FixedPointNetwork::load(path), c10::ValueError);
  }
  write_file(path, whole.substr(0, whole.size() - 1));
  CHECK_THAT(value_error([&] { FixedPointNetwork::load(path); }), Contains("truncated"));
  write_file(path, "");
  CHECK_THROWS_AS(FixedPointNetwork::load(path), c10::ValueError);
  write_file(path, whole);
  CHECK_NOTHROW(FixedPointNetwork::load(path));
  CHECK_THROWS_WITH(FixedPointNetwork::load(folder.file("gone.safetensors")),
                    Contains("expected a file that can be read"));
}

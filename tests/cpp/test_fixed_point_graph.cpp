#include "support.h"

#include <string>
#include <vector>

#include <quantrain/nn/fixed_point/graph.h>
#include <quantrain/nn/layers.h>
#include <torch/optim/sgd.h>

#include "../../examples/cpp/fixed_point_models.h"

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::same_bits;
using support::value_error;

namespace {

using Conv = torch::nn::Conv2dOptions;

Conv conv3x3(int64_t from, int64_t to, int64_t stride = 1) {
  return Conv(from, to, 3).stride(stride).padding(1).bias(false);
}

FixedPointGraph small(const std::string& recipe) {
  FixedPointGraph g(Recipe::from_name(recipe), 3);
  FixedPointValue x = g->conv2d("conv1", g->input(), conv3x3(3, 8), {.batch_norm = true, .relu = true});
  x = g->max_pool2d("pool1", x, {3, 3}, {2, 2}, {1, 1});
  FixedPointValue y = g->conv2d("layer1.0.conv1", x, conv3x3(8, 8), {.batch_norm = true, .relu = true});
  x = g->conv2d("layer1.0.conv2", y, conv3x3(8, 8), {.batch_norm = true, .relu = true, .residual = x});
  const FixedPointValue cut = g->slice_pad("layer2.0.shortcut", x, {2, 2}, 4, 4);
  y = g->conv2d("layer2.0.conv1", x, conv3x3(8, 16, 2), {.batch_norm = true, .relu = true});
  x = g->conv2d("layer2.0.conv2", y, conv3x3(16, 16), {.batch_norm = true, .relu = true, .residual = cut});
  const FixedPointValue down = g->conv2d("layer3.0.downsample.0", x, Conv(16, 24, 1).stride(2).bias(false),
                                         {.batch_norm = true, .shortcut = true});
  y = g->conv2d("layer3.0.conv1", x, conv3x3(16, 24, 2), {.batch_norm = true, .relu = true});
  y = g->conv2d("layer3.0.dw", y, Conv(24, 24, 3).padding(1).groups(24), {.relu = true});
  x = g->conv2d("layer3.0.conv2", y, conv3x3(24, 24), {.batch_norm = true, .relu = true, .residual = down});
  g->linear("linear", g->avg_pool2d("pool", x), 10);
  return g;
}

void calibrate(FixedPointGraph& graph, const at::Tensor& images) {
  const Calibration calibration(*graph);
  graph->forward(images);
}

}  // namespace

TEST_CASE("a fixed-point graph trains, and evaluation follows training", "[fixed_point_graph]") {
  const std::string recipe = GENERATE("f8net", "f8net-tiny");
  torch::manual_seed(1);
  FixedPointGraph g = small(recipe);
  const at::Tensor images = at::rand({16, 3, 20, 20});
  const at::Tensor labels = at::randint(0, 10, {16}, at::kLong);
  calibrate(g, images);
  torch::optim::SGD optimizer(g->parameters(), torch::optim::SGDOptions(0.02).momentum(0.9));
  g->train();
  double first = 0;
  double last = 0;
  for (int step = 0; step < 30; ++step) {
    const at::Tensor loss = at::cross_entropy_loss(g->forward(images), labels);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  CHECK(last < 0.7 * first);
  for (int i = 0; i < 40; ++i) g->forward(images);
  g->eval();
  const at::NoGradGuard no_grad;
  const double evaluated = at::cross_entropy_loss(g->forward(images), labels).item<double>();
  CHECK(evaluated < first);
  const FixedPointNetwork network = convert(*g);
  CHECK(same_bits(network.dequantize_output(network.forward(network.quantize_input(images))), g->forward(images)));
  const FixedPointProgram program = g->program();
  CHECK(program.tensors.at("layer1.0.conv1.weight").scalar_type() == at::kChar);
  CHECK(program.tensors.at("linear.bias").scalar_type() == at::kInt);
}

TEST_CASE("names are those of the Python model, and residual chains share one activation", "[fixed_point_graph]") {
  FixedPointGraph g = small("f8net");
  const auto parameters = g->named_parameters();
  const auto buffers = g->named_buffers();
  for (const char* name : {"conv1.weight", "conv1.bn.weight", "conv1.activation.alpha",
                           "layer1.0.conv1.activation.alpha", "layer3.0.downsample.0.bn.bias", "layer3.0.dw.bias",
                           "layer3.0.conv2.activation.alpha", "linear.weight", "linear.bias"}) {
    CAPTURE(name);
    CHECK(parameters.contains(name));
  }
  for (const char* name : {"input_activation.alpha", "input_activation.is_signed", "input_activation.fraction_length",
                           "conv1.weight_fraction_length", "conv1.activation.fraction_length", "conv1.bn.running_mean",
                           "pool.size", "pool.activation.fraction_length", "linear.weight_fraction_length"}) {
    CAPTURE(name);
    CHECK(buffers.contains(name));
  }
  // One chain: the first convolution, through the pool and the slice, to the two sums.
  CHECK_FALSE(parameters.contains("layer1.0.conv2.activation.alpha"));
  CHECK_FALSE(parameters.contains("layer2.0.conv2.activation.alpha"));
  CHECK_FALSE(parameters.contains("layer3.0.downsample.0.activation.alpha"));
  CHECK_FALSE(small("f8net-tiny")->named_parameters().contains("conv1.activation.alpha"));
}

TEST_CASE("without quantizing a fixed-point graph is the float network", "[fixed_point_graph]") {
  torch::manual_seed(2);
  FixedPointGraph g(Recipe::from_name("f8net"), 3);
  const FixedPointValue x = g->conv2d("conv", g->input(), conv3x3(3, 4), {.batch_norm = true, .relu = true});
  g->linear("linear", g->avg_pool2d("pool", x), 5);
  enable_fake_quant(*g, false);
  const at::Tensor images = at::randn({4, 3, 6, 6});
  const auto parameters = g->named_parameters();
  const auto reference = [&] {
    const at::Tensor y =
        at::batch_norm(at::conv2d(images, parameters["conv.weight"], {}, 1, 1), parameters["conv.bn.weight"],
                       parameters["conv.bn.bias"], at::zeros(4), at::ones(4), /*training=*/true, 0.1, 1e-5, true);
    return at::linear(at::relu(y).mean({2, 3}), parameters["linear.weight"], parameters["linear.bias"]);
  };
  CHECK(support::largest_difference(g->forward(images), reference()) < 1e-6);
}

TEST_CASE("evaluation computes codes, near the float network after calibration", "[fixed_point_graph]") {
  const std::string recipe = GENERATE("f8net", "f8net-tiny");
  torch::manual_seed(3);
  FixedPointGraph g = small(recipe);
  const at::Tensor images = at::randn({16, 3, 20, 20});
  g->train();
  enable_fake_quant(*g, false);
  for (int i = 0; i < 50; ++i) g->forward(images);  // running statistics
  enable_fake_quant(*g, true);
  calibrate(g, images);
  CHECK(g->is_training());
  g->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor rounded = g->forward(images);
  enable_fake_quant(*g, false);
  const at::Tensor exact = g->forward(images);
  enable_fake_quant(*g, true);
  CHECK(support::largest_difference(rounded, exact) < 0.15 * exact.abs().max().item<double>());
  CHECK(g->input_activation->is_signed());
  for (const auto& [name, value] : g->forward_all(images)) {
    CAPTURE(name);
    const at::Tensor codes = value.to(at::kDouble) * 1073741824.0;  // 2^30, more than any fraction length
    CHECK(codes.equal(codes.round()));
  }
  CHECK(same_bits(g->forward_all(images).at("linear"), rounded));
  const FixedPointNetwork network = convert(*g);
  CHECK(same_bits(network.dequantize_output(network.forward(network.quantize_input(images))), rounded));
}

TEST_CASE("a checkpoint restores the graph, its sign and its pool's size", "[fixed_point_graph][checkpoint]") {
  const support::TemporaryFolder folder;
  torch::manual_seed(4);
  FixedPointGraph g = small("f8net");
  const at::Tensor images = at::randn({4, 3, 20, 20});
  calibrate(g, images);
  g->eval();
  save_checkpoint(folder.file("a.safetensors"), *g, g->recipe());
  FixedPointGraph other = small("f8net");
  other->eval();
  CHECK(load_checkpoint(folder.file("a.safetensors"), *other).recipe == g->recipe());
  CHECK(same_bits(other->forward(images), g->forward(images)));
  const FixedPointProgram a = g->program();
  FixedPointGraph third = small("f8net");
  load_checkpoint(folder.file("a.safetensors"), *third);
  third->eval();
  const FixedPointProgram b = third->program();  // without a forward pass
  CHECK(a.graph == b.graph);
  for (const auto& [name, tensor] : a.tensors) CHECK(tensor.equal(b.tensors.at(name)));
}

TEST_CASE("the published double forward and fraction lengths of channels train too", "[fixed_point_graph]") {
  Recipe recipe = Recipe::from_name("f8net");
  SECTION("double forward") { recipe.scheme_as<FixedPointSpec>()->double_forward = true; }
  SECTION("per channel") { recipe.weight->granularity = Granularity::kPerChannel; }
  SECTION("least squares and hysteresis") {
    recipe.scheme_as<FixedPointSpec>()->fraction_length = "mse";
    recipe.scheme_as<FixedPointSpec>()->hysteresis = 0.25;
  }
  torch::manual_seed(5);
  FixedPointGraph g(recipe, 3);
  const FixedPointValue x = g->conv2d("conv", g->input(), conv3x3(3, 4), {.batch_norm = true, .relu = true});
  const FixedPointValue y = g->conv2d("second", x, Conv(4, 4, 1), {.batch_norm = true, .residual = std::nullopt});
  g->linear("linear", g->avg_pool2d("pool", y), 5);
  const at::Tensor images = at::rand({8, 3, 6, 6});
  calibrate(g, images);
  g->train();
  g->forward(images).square().sum().backward();
  for (const auto& item : g->named_parameters()) {
    CAPTURE(item.key());
    CHECK(item.value().grad().isfinite().all().item<bool>());
  }
  if (recipe.weight->granularity == Granularity::kPerChannel) {
    CHECK(g->named_buffers()["conv.weight_fraction_length"].sizes().vec() == std::vector<int64_t>{4, 1, 1, 1});
    CHECK(g->named_buffers()["linear.weight_fraction_length"].sizes().vec() == std::vector<int64_t>{1});
  }
}

TEST_CASE("a fixed-point graph refuses what has no integer form, by name", "[fixed_point_graph]") {
  CHECK_THAT(value_error([] { FixedPointGraph(Recipe::from_name("qat-w8a8"), 3); }),
             Contains("FixedPointGraph: expected a recipe with fixed_point, got 'qat-w8a8'"));
  FixedPointGraph g(Recipe::from_name("f8net"), 4);
  const auto refused = [&](const Conv& options, const FixedPointConvArguments& arguments = {}) {
    return value_error([&] { g->conv2d("bad", g->input(), options, arguments); });
  };
  CHECK_THAT(refused(Conv(4, 8, 3).groups(2)),
             Contains("expected groups of 1 or a depthwise convolution, got groups=2"));
  CHECK_THAT(refused(Conv(4, 8, 3).dilation(2)), Contains("expected dilation 1"));
  CHECK_THAT(refused(Conv(4, 8, 3).padding_mode(torch::kReflect)), Contains("expected padding_mode zeros"));
  CHECK_THAT(refused(Conv(3, 8, 3)), Contains("'bad': expected 4 input channels, got 3"));
  CHECK_THAT(refused(Conv(4, 4, 1), {.max_alpha = 6.0}), Contains("'bad': expected max_alpha with relu"));
  const FixedPointValue x = g->conv2d("a", g->input(), Conv(4, 4, 1), {.relu = true});
  CHECK_THAT(value_error([&] { g->conv2d("a", x, Conv(4, 4, 1)); }), Contains("expected a name that is new, got 'a'"));
  CHECK_THAT(value_error([&] { g->conv2d("b", x, Conv(4, 4, 1), {.residual = x}); }),
             Contains("'b': expected the sum to be clipped as"));
  const FixedPointValue shortcut = g->conv2d("c", x, Conv(4, 4, 1), {.shortcut = true});
  CHECK_THAT(value_error([&] { g->conv2d("d", shortcut, Conv(4, 4, 1)); }),
             Contains("'d': expected an input of 8-bit codes, got the accumulators of 'c'"));
  CHECK_THAT(value_error([&] { g->program(); }), Contains("expected"));
}

TEST_CASE("the networks that the examples declare convert to integers exactly", "[fixed_point_graph]") {
  torch::manual_seed(6);
  const Recipe recipe = Recipe::from_name("f8net");
  const int model = GENERATE(range(0, 5));
  FixedPointGraph g = model == 0   ? example::fixed_point_resnet20(10, 3, recipe)
                      : model == 1 ? example::fixed_point_resnet18(10, recipe)
                      : model == 2 ? example::fixed_point_resnet50(10, recipe)
                      : model == 3 ? example::fixed_point_mobilenet_v1(10, recipe, 0.25)
                                   : example::fixed_point_mobilenet_v2(10, recipe, 0.5);
  CAPTURE(model);
  const at::Tensor images = at::randn({2, 3, 32, 32});
  calibrate(g, images);
  g->eval();
  const at::NoGradGuard no_grad;
  const FixedPointNetwork network = convert(*g);
  const at::Tensor integers = network.dequantize_output(network.forward(network.quantize_input(images)));
  CHECK(same_bits(integers, g->forward(images)));
  CHECK(integers.std().item<double>() > 0);
  network.audit();
}

// int8_linear and Int8Linear: outputs and gradients against the family's own operators, the weight's kept codes,
// conversion.

#include <optional>
#include <string>
#include <vector>

#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include "support.h"

using Catch::Matchers::Contains;
using quantrain::Int8LinearOptions;
using quantrain::nn::Int8Spec;
using quantrain::nn::Recipe;
namespace qnn = quantrain::nn;

namespace {

// Leaves that need a gradient; the values are the same on every device.
at::Tensor leaf(at::IntArrayRef shape, at::Device device, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(seed);
  return at::randn(shape, at::kFloat).to(device, dtype).requires_grad_();
}

std::vector<at::Tensor> gradients(const at::Tensor& output, const std::vector<at::Tensor>& leaves,
                                  const at::Tensor& grad_output, uint64_t seed = 7) {
  torch::manual_seed(seed);
  return torch::autograd::grad({output}, leaves, {grad_output}, /*retain_graph=*/true);
}

// The three products of the header's formulas, one draw of both gradients from `seed`.
void check_int8_linear(at::Device device, at::ScalarType dtype) {
  const at::Tensor x = leaf({4, 9, 24}, device, 0, dtype), w = leaf({40, 24}, device, 1, dtype);
  const at::Tensor b = leaf({40}, device, 2, dtype);
  const at::Tensor y = quantrain::int8_linear(x, w, b);
  const quantrain::Int8Codes xq = quantrain::int8_quantize_rows(x.detach());
  const quantrain::Int8Codes wq = quantrain::int8_quantize_rows(w.detach());
  CHECK(support::same_bits(y.detach(), quantrain::int8_mm(xq.codes, wq.codes, xq.scale, wq.scale, b.detach(), dtype)));
  const at::Tensor g = leaf({4, 9, 40}, device, 3, dtype).detach();
  const auto found = gradients(y, {x, w, b}, g);
  const quantrain::Int8WeightTranspose wt = quantrain::int8_weight_transpose(w.detach(), wq.scale);
  quantrain::Int8QuantizeOptions options;
  options.stochastic = true;
  options.column_factor = wt.column_factor;
  options.row_factor = xq.scale;
  torch::manual_seed(7);
  const quantrain::Int8RowsAndColumns gq = quantrain::int8_quantize_rows_and_columns(g, options);
  CHECK(support::same_bits(found[0],
                           quantrain::int8_mm(gq.rows.codes, wt.codes, gq.rows.scale, wt.scale, std::nullopt, dtype)));
  const at::Tensor xt = quantrain::int8_transpose(xq.codes.flatten(0, 1));
  CHECK(support::same_bits(
      found[1], quantrain::int8_mm(gq.columns.codes, xt, gq.columns.scale, std::nullopt, std::nullopt, dtype)));
  CHECK(at::allclose(found[2], g.flatten(0, 1).sum(0)));
}

// No product in int8 is at::linear, simulated products are those of the same codes.
void check_modes(at::Device device) {
  const at::Tensor x = leaf({36, 24}, device, 0), w = leaf({40, 24}, device, 1), b = leaf({40}, device, 2);
  const at::Tensor g = leaf({36, 40}, device, 3).detach();
  const Int8LinearOptions none{"none", "none", "none"};
  const at::Tensor exact = at::linear(x, w, b);
  CHECK(support::same_bits(quantrain::int8_linear(x, w, b, none).detach(), exact.detach()));
  Int8LinearOptions simulated;
  simulated.simulate = true;
  const at::Tensor integer = quantrain::int8_linear(x, w, b), other = quantrain::int8_linear(x, w, b, simulated);
  CHECK(at::allclose(integer, other, 1e-5, 1e-5));
  const auto mine = gradients(integer, {x, w}, g), theirs = gradients(other, {x, w}, g);
  const auto unrounded = gradients(exact, {x, w}, g);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(at::allclose(mine[i], theirs[i], 1e-4, 1e-4));
    const double error = (mine[i] - unrounded[i]).norm().item<double>();
    CHECK(error > 0);
    CHECK(error < 0.05 * unrounded[i].norm().item<double>());
  }
}

Recipe simulated_recipe() {
  Recipe recipe = Recipe::from_name("int8-training");
  recipe.scheme_as<Int8Spec>()->simulate = true;
  return recipe;
}

qnn::Int8Linear layer(at::Device device, const Recipe& recipe = Recipe::from_name("int8-training")) {
  torch::manual_seed(0);
  qnn::Int8Linear layer(24, 40, recipe);
  layer->to(device);
  return layer;
}

// What a layer that keeps its weight's codes gives is what one that makes them anew gives.
void check_current(qnn::Int8Linear& keeping, const at::Tensor& x, const std::string& after) {
  INFO("after " << after);
  const at::Tensor anew = quantrain::int8_linear(x, keeping->weight, keeping->bias, {"int8", "int8", "int8"});
  CHECK(support::same_bits(keeping->forward(x).detach(), anew.detach()));
}

void check_converted(at::Device device, const std::string& name) {
  Recipe recipe = Recipe::from_name(name);
  const bool trains = recipe.scheme_as<Int8Spec>()->training;
  if (trains) recipe.scheme_as<Int8Spec>()->output = "int8";  // "auto" may prefer floating point for so small a layer
  const at::Tensor x = leaf({3, 12, 24}, device, 5).detach();
  torch::manual_seed(0);
  const std::shared_ptr<qnn::QuantModule> module =
      trains ? std::shared_ptr<qnn::QuantModule>(qnn::Int8Linear(24, 40, recipe).ptr())
             : std::shared_ptr<qnn::QuantModule>(qnn::QuantLinear(24, 40, recipe).ptr());
  module->to(device);
  const auto forward = [&module](const at::Tensor& input) {
    if (auto* int8 = dynamic_cast<qnn::Int8LinearImpl*>(module.get())) return int8->forward(input);
    return dynamic_cast<qnn::QuantLinearImpl*>(module.get())->forward(input);
  };
  if (!trains) {
    const qnn::Calibration calibrating(*module);
    forward(x);
  }
  module->eval();
  const at::Tensor before = forward(x).detach();
  qnn::convert(*module);
  CHECK(module->converted());
  CHECK(module->weight_codes.scalar_type() == at::kChar);
  const at::Tensor after = forward(x);
  CHECK(support::largest_difference(after, before) < 1e-5);
  if (trains) CHECK(support::same_bits(after, before));
  CHECK(forward(x.to(at::kHalf)).scalar_type() == at::kHalf);
  const quantrain::amp::AutocastGuard autocast(device.type(), at::kBFloat16);
  CHECK(forward(x).scalar_type() == at::kBFloat16);
}

}  // namespace

TEST_CASE("int8_linear follows its formulas", "[int8_layers]") {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) check_int8_linear(at::kCPU, dtype);
  check_modes(at::kCPU);
}

TEST_CASE("int8_linear follows its formulas on a GPU", "[int8_layers][cuda]") {
  if (!support::has_cuda()) return;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) check_int8_linear(at::kCUDA, dtype);
  check_modes(at::kCUDA);
}

TEST_CASE("int8_linear refuses what it cannot compute", "[int8_layers]") {
  const at::Tensor x = leaf({4, 24}, at::kCPU, 0), w = leaf({40, 24}, at::kCPU, 1);
  const auto error = [&](const Int8LinearOptions& options) {
    return support::value_error([&] { quantrain::int8_linear(x, w, {}, options); });
  };
  CHECK_THAT(error({"int4"}), Contains("int8_linear: expected output to be one of int8, none, auto, got 'int4'"));
  CHECK_THAT(error({"int8", "int8", "int8", "rows"}), Contains("weight_scheme to be one of auto, fold, columns"));
  CHECK_THAT(support::value_error([&] { quantrain::int8_linear(x, w.t()); }),
             Contains("expected input [..., K] for weight [O, K], got [4, 24] and [24, 40]"));
  CHECK_THROWS_AS(quantrain::int8_linear(x.to(at::kDouble), w), c10::TypeError);
}

TEST_CASE("gradients of int8_linear have no derivative", "[int8_layers]") {
  const at::Tensor x = leaf({4, 24}, at::kCPU, 0).detach(), w = leaf({40, 24}, at::kCPU, 1);
  const at::Tensor loss = quantrain::int8_linear(x, w).sin().sum();
  const at::Tensor gradient = torch::autograd::grad({loss}, {w}, {}, true, /*create_graph=*/true)[0];
  CHECK_THROWS_WITH(gradient.square().sum().backward(), Contains("int8_linear: expected one derivative"));
}

TEST_CASE("recipes of integer products", "[int8_layers][recipe]") {
  const Recipe training = Recipe::from_name("int8-training"), fixed = Recipe::from_name("int8-static");
  CHECK(*training.scheme == Int8Spec());
  CHECK(training.training);
  CHECK_FALSE(fixed.scheme_as<Int8Spec>()->training);
  CHECK_FALSE(fixed.training);
  for (const Recipe& recipe : {training, fixed}) {
    CHECK(recipe.scheme->integer_products());
    CHECK(recipe.linear_only());
    CHECK(Recipe::from_json(recipe.to_json()) == recipe);
  }
  CHECK(Recipe::from_name("qat-w8a8").to_json().find("scheme") == std::string::npos);
  Recipe changed = training;
  changed.scheme_as<Int8Spec>()->grad_weight = "int4";
  CHECK_THROWS_WITH(changed.validate(), Contains("grad_weight to be one of int8, none, auto, got 'int4'"));
  changed = training;
  changed.input = Recipe::from_name("qat-w8a8").input;
  CHECK_THROWS_WITH(changed.validate(), Contains("input of 8 bits, symmetric, with int8, got 8 bits, affine"));
  CHECK_THROWS_WITH(Int8Spec::from_json(R"({"outputs": "int8"})"), Contains("only fields of an Int8Spec"));

  CHECK_THAT(support::value_error([&] { qnn::QuantLinear(4, 2, training); }), Contains("Int8Linear trains with it"));
  CHECK_THAT(support::value_error([&] { qnn::Int8Linear(4, 2, fixed); }), Contains("expected a recipe with int8"));
  CHECK_THAT(support::value_error([&] { qnn::QuantEmbedding(4, 2, training); }), Contains("without integer products"));
  CHECK_THAT(support::value_error([&] { qnn::QuantConv2d(torch::nn::Conv2dOptions(3, 4, 3), fixed); }),
             Contains("without integer products"));
}

TEST_CASE("Int8Linear: parameters, switches, simulation", "[int8_layers]") {
  qnn::Int8Linear linear = layer(at::kCPU), simulated = layer(at::kCPU, simulated_recipe());
  CHECK(linear->named_parameters().keys() == std::vector<std::string>{"weight", "bias"});
  CHECK(linear->named_buffers().is_empty());
  const at::Tensor x = leaf({36, 24}, at::kCPU, 0), g = leaf({36, 40}, at::kCPU, 3).detach();
  const at::Tensor y = linear->forward(x);
  CHECK(at::allclose(simulated->forward(x), y, 1e-5, 1e-5));
  const at::Tensor exact = at::linear(x, linear->weight, linear->bias);
  const auto expected = gradients(exact, {x, linear->weight}, g);
  qnn::enable_gradient_quant(*linear, false);
  const auto found = gradients(linear->forward(x), {x, linear->weight}, g);
  for (size_t i = 0; i < 2; ++i) CHECK(at::allclose(found[i], expected[i], 1e-4, 1e-4));
  CHECK_FALSE(support::same_bits(linear->forward(x).detach(), exact.detach()));
  qnn::enable_fake_quant(*linear, false);
  CHECK(support::same_bits(linear->forward(x).detach(), exact.detach()));
}

TEST_CASE("a weight cache keeps codes while it lives, of the weight as it is", "[int8_layers]") {
  qnn::Int8Linear linear = layer(at::kCPU);
  const at::Tensor x = leaf({36, 24}, at::kCPU, 0).detach();
  {
    const qnn::WeightCache cache(*linear);
    CHECK(linear->cache_weight());
    for (int i = 0; i < 3; ++i) linear->forward(x).square().mean().backward();
    check_current(linear, x, "backward passes");
    // What is kept is what is used: written past its version, the weight seems the same.
    const at::Tensor kept = linear->forward(x).detach();
    linear->weight.data().mul_(2);
    CHECK(support::same_bits(linear->forward(x).detach(), kept));
  }
  CHECK_FALSE(linear->cache_weight());
  check_current(linear, x, "the cache's end");
  torch::optim::SGD(linear->parameters(), 0.5).step();
  const qnn::WeightCache cache(*linear);
  check_current(linear, x, "a step");
  quantrain::optim::FusedAdamW fused(linear->parameters(), torch::optim::AdamWOptions(0.5));
  fused.step();
  check_current(linear, x, "a fused step");
  {
    const at::NoGradGuard no_grad;
    linear->weight.mul_(-2);
  }
  check_current(linear, x, "an operator in place");
  linear->to(at::kBFloat16);
  linear->to(at::kFloat);
  check_current(linear, x, "two changes of type");
  const support::TemporaryFolder folder;
  qnn::save_checkpoint(folder.file("a"), *layer(at::kCPU));
  qnn::load_checkpoint(folder.file("a"), *linear);
  check_current(linear, x, "a checkpoint");
}

TEST_CASE("converted layers multiply integers", "[int8_layers]") {
  for (const char* name : {"int8-training", "int8-static"}) check_converted(at::kCPU, name);
  qnn::Int8Linear simulated = layer(at::kCPU, simulated_recipe());
  const at::Tensor x = leaf({36, 24}, at::kCPU, 0).detach();
  const at::Tensor before = simulated->forward(x).detach();
  qnn::convert(*simulated);
  CHECK(support::largest_difference(simulated->forward(x), before) < 1e-5);
}

TEST_CASE("converted layers multiply integers on a GPU", "[int8_layers][cuda]") {
  if (!support::has_cuda()) return;
  for (const char* name : {"int8-training", "int8-static"}) check_converted(at::kCUDA, name);
}

TEST_CASE("a converted Int8Linear is saved and loaded", "[int8_layers]") {
  const support::TemporaryFolder folder;
  const Recipe recipe = Recipe::from_name("int8-training");
  torch::nn::Sequential model(layer(at::kCPU)), skeleton(qnn::Int8Linear(24, 40, recipe));
  const at::Tensor x = leaf({36, 24}, at::kCPU, 0).detach();
  qnn::convert(*model);
  qnn::save_checkpoint(folder.file("a"), *model, recipe);
  CHECK(qnn::read_checkpoint_info(folder.file("a")).converted);
  qnn::convert(*skeleton, /*check_observed=*/false);
  CHECK(qnn::load_checkpoint(folder.file("a"), *skeleton).recipe == recipe);
  CHECK(support::same_bits(model->forward(x), skeleton->forward(x)));
}

TEST_CASE("a small network learns in int8", "[int8_layers]") {
  torch::manual_seed(2);
  torch::nn::Sequential model(qnn::Int8Linear(16, 32), torch::nn::Functional(at::relu), qnn::Int8Linear(32, 2));
  const at::Tensor x = at::randn({256, 16}), target = (x.sum(1) > 0).to(at::kLong);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(0.01));
  for (int i = 0; i < 60; ++i) {
    optimizer.zero_grad();
    at::cross_entropy_loss(model->forward(x), target).backward();
    optimizer.step();
  }
  qnn::convert(*model);
  CHECK((model->forward(x).argmax(1) == target).to(at::kFloat).mean().item<double>() > 0.95);
}

// A scheme that the library does not know (tests/toy_scheme/ternary.cpp): prepares, trains, converts, saves and loads.
#include "support.h"

#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/sgd.h>

using namespace quantrain::nn;
using Catch::Matchers::Contains;
using support::same_bits;
using support::value_error;

namespace {

torch::nn::Sequential net(const Recipe& recipe) {
  torch::manual_seed(0);
  return torch::nn::Sequential(QuantLinear(16, 32, recipe), torch::nn::Functional(at::relu),
                               QuantLinear(32, 4, recipe));
}

}  // namespace

TEST_CASE("a scheme from outside prepares, trains, converts, saves and loads", "[scheme]") {
  const Recipe recipe = Recipe::from_name("ternary-w2");
  CHECK(Recipe::from_json(recipe.to_json()) == recipe);
  CHECK_THAT(recipe.to_json(), Contains("\"scheme\":{\"kind\":\"ternary\",\"threshold\":0.7}"));
  CHECK_THROWS_WITH(make_scheme("ternary", "{\"threshold\": 2}"), Contains("threshold in (0, 1)"));
  CHECK_THAT(value_error([&] { QuantEmbedding(4, 2, recipe); }), Contains("another scheme than ternary"));

  torch::nn::Sequential model = net(recipe);
  const at::Tensor x = at::randn({64, 16}), y = at::randint(4, {64}, at::kLong);
  torch::optim::SGD optimizer(model->parameters(), 0.5);
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    const at::Tensor loss = at::cross_entropy_loss(model->forward(x), y);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  CHECK(last < 0.7 * first);

  model->eval();
  const at::Tensor simulated = model->forward(x);
  convert(*model);
  CHECK(same_bits(model->forward(x), simulated));
  const auto* layer = model[0]->as<QuantLinearImpl>();
  CHECK(layer->weight_codes.sizes() == at::IntArrayRef({32, 8}));  // two codes in a byte
  const at::Tensor unit = layer->dequantized_weight() / layer->weight_scale;
  CHECK(at::logical_or(unit == 0, unit.abs() == 1).all().item<bool>());

  const support::TemporaryFolder folder;
  save_checkpoint(folder.file("ternary"), *model, recipe);
  torch::nn::Sequential other = net(recipe);
  convert(*other, /*check_observed=*/false);
  load_checkpoint(folder.file("ternary"), *other);
  CHECK(same_bits(other->forward(x), simulated));
  CHECK_THAT(value_error([&] { register_scheme({"ternary", nullptr}); }), Contains("a kind that is new"));
}

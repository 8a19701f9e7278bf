// QuantLinear's training step as one node, its input kept as codes and shared by several layers, against the same layer
// run operator by operator (one with second derivatives is) and against compositions by hand.

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <quantrain/amp/autocast.h>
#include <quantrain/nn/checkpoint.h>
#include <quantrain/nn/layers.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/sgd.h>

#include "recomputed.h"
#include "support.h"

using Catch::Matchers::Contains;
using support::largest_difference;
using support::same_bits;
using support::value_error;
using namespace quantrain::nn;

namespace {

constexpr const char* kNode = "QuantLinearStep";

bool made_by(const at::Tensor& y, const std::string& node) {
  return y.grad_fn() && y.grad_fn()->name().find(node) != std::string::npos;
}

// qat-w8a8-token with a weight of 4 bits in groups of 32.
Recipe grouped() {
  Recipe recipe = Recipe::from_name("qat-w8a8-token");
  recipe.weight->bits = 4;
  recipe.weight->granularity = Granularity::kPerGroup;
  recipe.weight->group_size = 32;
  recipe.name = "groups of 32";
  return recipe;
}

Recipe symmetric_rows() {
  Recipe recipe = Recipe::from_name("qat-w8a8-token");
  recipe.input->symmetric = true;
  recipe.name = "symmetric rows";
  return recipe;
}

Recipe named(const std::string& name) {
  return name == "groups of 32" ? grouped() : name == "symmetric rows" ? symmetric_rows() : Recipe::from_name(name);
}

QuantLinear layer_of(const Recipe& recipe, int64_t in = 64, int64_t out = 12, bool bias = true) {
  torch::manual_seed(0);
  return QuantLinear(torch::nn::LinearOptions(in, out).bias(bias), recipe);
}

QuantLinear copy_of(const QuantLinear& layer) {
  return QuantLinear(std::dynamic_pointer_cast<QuantLinearImpl>(layer->clone()));
}

// The same layer, operator by operator.
QuantLinear long_way(const QuantLinear& layer) {
  QuantLinear copy = copy_of(layer);
  copy->enable_second_derivatives();
  return copy;
}

void check_state(const torch::nn::Module& found, const torch::nn::Module& wanted, double tolerance = 1e-6) {
  const auto check = [tolerance](const auto& a, const auto& b) {
    REQUIRE(a.keys() == b.keys());
    for (const auto& item : a) {
      INFO(item.key());
      CHECK(largest_difference(item.value(), b[item.key()]) <= tolerance);
    }
  };
  check(found.named_parameters(), wanted.named_parameters());
  check(found.named_buffers(), wanted.named_buffers());
}

void check_gradients(const torch::nn::Module& found, const torch::nn::Module& wanted, double tolerance = 1e-5) {
  const auto others = wanted.named_parameters();
  for (const auto& item : found.named_parameters()) {
    INFO(item.key());
    const at::Tensor& other = others[item.key()].grad();
    REQUIRE(item.value().grad().defined() == other.defined());
    if (other.defined())
      CHECK(largest_difference(item.value().grad(), other) <= tolerance * (1 + other.abs().max().item<double>()));
  }
}

struct Step {
  at::Tensor output, grad_input;
};

// Draws the same quantized gradients each time.
Step step(QuantLinear layer, const at::Tensor& x) {
  const at::Tensor input = x.detach().requires_grad_();
  const at::Tensor y = layer->forward(input);
  layer->zero_grad();
  torch::manual_seed(5);
  y.backward(at::randn(y.sizes()).to(y.scalar_type()));
  return {y, input.grad()};
}

void check_steps(QuantLinear layer, QuantLinear other, const at::Tensor& x) {
  const Step found = step(layer, x), wanted = step(other, x);
  CHECK(made_by(found.output, kNode));
  CHECK_FALSE(made_by(wanted.output, kNode));
  CHECK(largest_difference(found.output, wanted.output) < 1e-6);
  CHECK(largest_difference(found.grad_input, wanted.grad_input) < 1e-5);
  check_gradients(*layer, *other);
  check_state(*layer, *other);
}

// A layer before another's rounding, written out or in one pass.
struct FeedForwardImpl : torch::nn::Module {
  FeedForwardImpl(const Recipe& recipe, bool joined) : joined_(joined) {
    torch::manual_seed(1);
    norm = register_parameter("norm", at::rand(64) + 0.5);
    gate = register_module("gate", QuantLinear(torch::nn::LinearOptions(64, 96).bias(false), recipe));
    up = register_module("up", QuantLinear(torch::nn::LinearOptions(64, 96).bias(false), recipe));
    down = register_module("down", QuantLinear(torch::nn::LinearOptions(96, 64).bias(false), recipe));
  }

  at::Tensor forward(const at::Tensor& x) {
    if (!joined_) {
      const at::Tensor h = at::rms_norm(x, {64}, norm, 1e-5);
      const at::Tensor g = gate->forward(h);
      return down->forward(at::silu(g) * up->forward(h));
    }
    const Quantized h = gate->quantize_input(x, {.function = "rms_norm", .weight = norm, .eps = 1e-5});
    const at::Tensor g = gate->forward_quantized(h), u = up->forward_quantized(h);
    between = down->quantize_input(g, {.function = "silu_mul", .other = u});
    return down->forward_quantized(between);
  }

  at::Tensor norm;
  QuantLinear gate{nullptr}, up{nullptr}, down{nullptr};
  Quantized between;

 private:
  bool joined_;
};
TORCH_MODULE(FeedForward);

}  // namespace

TEST_CASE("a training step of QuantLinear is one node, equal to its operators one by one", "[linear]") {
  const std::string recipe = GENERATE(as<std::string>{}, "qat-w8a8", "qat-w8a8-token", "qat-w4a8", "groups of 32",
                                      "symmetric rows", "fqt-8", "fqt-psq4", "fqt-psq4-paper", "fqt-bhq5");
  const bool bias = GENERATE(true, false);
  INFO(recipe << ' ' << bias);
  QuantLinear layer = layer_of(named(recipe), 64, 12, bias), other = long_way(layer);
  for (const at::Tensor& x : {at::randn({6, 64}), at::randn({2, 5, 64}), at::randn({64, 7}).t(), at::randn({1, 64})})
    check_steps(layer, other, x);
  enable_observer(*layer, false);
  enable_observer(*other, false);
  check_steps(layer, other, 2 * at::randn({6, 64}));
  enable_gradient_quant(*layer, false);
  enable_gradient_quant(*other, false);
  check_steps(layer, other, at::randn({6, 64}));
}

TEST_CASE("QuantLinear trains to the same losses on the node and the long way", "[linear]") {
  const std::string recipe =
      GENERATE(as<std::string>{}, "qat-w8a8", "qat-w8a8-token", "groups of 32", "fqt-psq4", "fqt-bhq5");
  INFO(recipe);
  torch::manual_seed(0);
  const auto model = [&](bool node) {
    torch::manual_seed(0);
    torch::nn::Sequential layers(QuantLinear(64, 32, named(recipe)), QuantLinear(32, 8, named(recipe)));
    for (const auto& child : layers->children()) child->as<QuantLinearImpl>()->enable_second_derivatives(!node);
    return layers;
  };
  torch::nn::Sequential one = model(true), other = model(false);
  torch::optim::SGD first(one->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9)),
      second(other->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  double start = 0, last = 0;
  for (int batch = 0; batch < 8; ++batch) {
    torch::manual_seed(batch);
    const at::Tensor x = at::randn({16, 64}), target = x.narrow(1, 0, 8);
    const auto loss_of = [&](torch::nn::Sequential& layers, torch::optim::SGD& optimizer) {
      const at::Tensor loss = (layers->forward(x) - target).square().mean();
      optimizer.zero_grad();
      torch::manual_seed(3);
      loss.backward();
      optimizer.step();
      return loss.item<double>();
    };
    last = loss_of(one, first);
    if (batch == 0) start = last;
    CHECK(last == Approx(loss_of(other, second)).epsilon(1e-5));
  }
  CHECK(last < start);
  check_state(*one, *other, 1e-4);
}

TEST_CASE("what a linear layer's node does not do goes the long way", "[linear]") {
  const at::Tensor x = at::randn({6, 64});
  const auto in_one = [&](QuantLinear layer, const at::Tensor& input) {
    const at::Tensor y = layer->forward(input);
    CHECK(y.isfinite().all().item<bool>());
    return made_by(y, kNode);
  };
  const Recipe token = Recipe::from_name("qat-w8a8-token");
  CHECK(in_one(layer_of(token), x));
  CHECK_FALSE(in_one(layer_of(token), x[0]));
  CHECK_FALSE(in_one(layer_of(token), x.narrow(0, 0, 0)));
  CHECK_FALSE(in_one(layer_of(Recipe::from_name("qat-w4a4")), x));
  Recipe recipe = token;
  recipe.weight->symmetric = false;
  CHECK_FALSE(in_one(layer_of(recipe), x));
  recipe = token;
  recipe.weight->granularity = Granularity::kPerTensor;
  CHECK_FALSE(in_one(layer_of(recipe), x));
  recipe = token;
  recipe.weight->bits = 12;
  CHECK_FALSE(in_one(layer_of(recipe), x));
  QuantLinear layer = layer_of(token);
  layer->weight.set_requires_grad(false);
  CHECK_FALSE(in_one(layer, x));
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
  layer = layer_of(token);
  layer->eval();
  CHECK_FALSE(in_one(layer, x));
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
  layer = layer_of(token);
  layer->to(at::kDouble);
  CHECK_FALSE(in_one(layer, x.to(at::kDouble)));
  layer = layer_of(token);
  enable_fake_quant(*layer, false);
  CHECK_FALSE(in_one(layer, x));
  const at::NoGradGuard no_grad;
  CHECK_FALSE(in_one(layer_of(token), x));
}

TEST_CASE("a linear layer whose weight has no node of its own keeps its input as codes", "[linear]") {
  Recipe recipe = Recipe::from_name("qat-w8a8-token");
  recipe.weight->symmetric = false;
  QuantLinear layer = layer_of(recipe), other = long_way(layer);
  const at::Tensor x = at::randn({6, 64});
  const Step found = step(layer, x), wanted = step(other, x);
  CHECK(made_by(found.output, "QuantLinearFunction"));
  CHECK(same_bits(found.output.detach(), wanted.output.detach()));
  CHECK(largest_difference(found.grad_input, wanted.grad_input) < 1e-6);
  check_gradients(*layer, *other);
}

TEST_CASE("gradients of a linear layer have gradients where asked for", "[linear]") {
  QuantLinear layer = layer_of(Recipe::from_name("qat-w8a8-token"));
  const auto penalty = [&] {
    const at::Tensor x = at::randn({6, 64}).requires_grad_();
    const at::Tensor grad = torch::autograd::grad({layer->forward(x).square().sum()}, {x}, {}, true, true)[0];
    grad.square().sum().backward();
  };
  CHECK_THROWS_WITH(penalty(), Contains("expected one derivative"));
  CHECK_FALSE(layer->second_derivatives());
  layer->enable_second_derivatives();
  penalty();
  CHECK(layer->weight.grad().isfinite().all().item<bool>());
  CHECK(copy_of(layer)->second_derivatives());
}

TEST_CASE("layers share an input that is rounded with the norm or the gate before it", "[linear]") {
  const std::string recipe =
      GENERATE(as<std::string>{}, "qat-w8a8", "qat-w8a8-token", "groups of 32", "fqt-psq4", "qat-w4a4");
  INFO(recipe);
  FeedForward joined(named(recipe), true), apart(named(recipe), false);
  for (int batch = 0; batch < 3; ++batch) {
    torch::manual_seed(batch);
    const at::Tensor x = at::randn({3, 5, 64});
    joined->zero_grad();
    apart->zero_grad();
    const at::Tensor y = joined->forward(x), want = apart->forward(x);
    // A code where float32 lies beside a midpoint.
    CHECK((y - want).abs().mean().item<double>() < 1e-3 * (1 + want.abs().mean().item<double>()));
    CHECK(joined->between.codes.defined() == (recipe != "qat-w4a4"));
    for (const at::Tensor& result : {y, want}) {
      torch::manual_seed(5);
      result.backward(at::randn(result.sizes()));
    }
    if (recipe != "qat-w4a4") check_gradients(*joined, *apart, 0.02);
  }
}

TEST_CASE("a shared input calibrates, evaluates and converts", "[linear]") {
  const std::string recipe = GENERATE(as<std::string>{}, "qat-w8a8", "qat-w8a8-token");
  INFO(recipe);
  FeedForward model(named(recipe), true);
  if (recipe == "qat-w8a8") {
    model->up->share_input(*model->gate);
    CHECK(model->up->input_fake_quant.ptr() == model->gate->input_fake_quant.ptr());
  }
  const at::Tensor x = at::randn({3, 5, 64});
  {
    const Calibration calibration(*model);
    model->forward(x);
  }
  model->forward(x).sum().backward();
  model->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor before = model->forward(x);
  CHECK_FALSE(model->between.codes.defined());
  const support::TemporaryFolder folder;
  save_checkpoint(folder.file("shared.safetensors"), *model, named(recipe));
  FeedForward other(named(recipe), false);  // a file has every layer's names
  load_checkpoint(folder.file("shared.safetensors"), *other);
  other->eval();
  CHECK(largest_difference(other->forward(x), before) < 1e-5);
  convert(*model);
  CHECK(model->up->converted());
  CHECK(same_bits(model->forward(x), before));
}

TEST_CASE("layers share what rounds their input where they are alike", "[linear]") {
  QuantLinear first = layer_of(Recipe::from_name("qat-w8a8")), second = layer_of(Recipe::from_name("qat-w8a8-token")),
              learned = layer_of(Recipe::from_name("qat-w4a4"));
  CHECK_THAT(value_error([&] { second->share_input(*first); }), Contains("share_input: expected"));
  CHECK_THAT(value_error([&] { learned->share_input(*copy_of(learned)); }), Contains("share_input: expected"));
}

TEST_CASE("the node of a linear layer runs in autocast's type", "[linear]") {
  for (const char* recipe : {"qat-w8a8", "qat-w8a8-token", "fqt-psq4"}) {
    INFO(recipe);
    QuantLinear layer = layer_of(Recipe::from_name(recipe)), other = long_way(layer);
    const at::Tensor x = at::randn({6, 64});
    at::Tensor found, wanted;
    {
      const quantrain::amp::AutocastGuard autocast(at::kCPU, at::kBFloat16);
      CHECK(layer->quantize_input(x).values.scalar_type() == at::kBFloat16);
      found = layer->forward(x);
      other->quantize_input(x);
      wanted = other->forward(x);
    }
    CHECK(made_by(found, kNode));
    CHECK(found.scalar_type() == at::kBFloat16);
    CHECK(same_bits(found.detach(), wanted.detach()));
    for (const at::Tensor& y : {found, wanted}) {
      torch::manual_seed(5);
      y.backward(at::randn(y.sizes()).to(at::kBFloat16));
    }
    CHECK(layer->weight.grad().scalar_type() == at::kFloat);
    check_gradients(*layer, *other, 1e-2);
  }
}

TEST_CASE("a linear layer in bfloat16 trains on the node", "[linear]") {
  QuantLinear layer = layer_of(Recipe::from_name("qat-w8a8-token"));
  layer->to(at::kBFloat16);
  QuantLinear other = long_way(layer);
  const at::Tensor x = at::randn({6, 64}).to(at::kBFloat16);
  const Step found = step(layer, x), wanted = step(other, x);
  CHECK(made_by(found.output, kNode));
  CHECK(same_bits(found.output.detach(), wanted.output.detach()));
  CHECK(layer->weight.grad().scalar_type() == at::kBFloat16);
  check_gradients(*layer, *other, 1e-2);
}

TEST_CASE("NaN passes a linear layer's node, and stops where a range is observed", "[linear]") {
  at::Tensor x = at::ones({3, 64});
  x[1][2] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = layer_of(Recipe::from_name("qat-w8a8-token"))->forward(x);
  CHECK(made_by(y, kNode));
  CHECK(y.isnan().any(1).equal(at::tensor({0, 1, 0}).to(at::kBool)));
  QuantLinear layer = layer_of(Recipe::from_name("qat-w8a8"));
  CHECK_THAT(value_error([&] { layer->forward(x); }), Contains("expected a batch without NaN"));
  CHECK_THAT(value_error([&] { layer->quantize_input(x, {.function = "relu"}); }), Contains("expected a finite batch"));
}

TEST_CASE("a recomputed linear layer moves its range once", "[linear]") {
  QuantLinear layer = layer_of(Recipe::from_name("qat-w8a8")), other = copy_of(layer);
  for (int batch = 0; batch < 2; ++batch) {
    const at::Tensor x = at::randn({6, 64});
    layer->zero_grad();
    other->zero_grad();
    support::Recomputed<QuantLinear>::apply(x.clone().requires_grad_(), &layer).square().sum().backward();
    other->forward(x.clone().requires_grad_()).square().sum().backward();
    check_gradients(*layer, *other);
    check_state(*layer, *other);
  }
}

TEST_CASE("what a linear layer trained converts to what its evaluation gives", "[linear]") {
  for (const char* recipe : {"qat-w8a8", "qat-w8a8-token", "groups of 32", "fqt-8"}) {
    INFO(recipe);
    QuantLinear layer = layer_of(named(recipe));
    const at::Tensor x = at::randn({6, 64});
    step(layer, x);
    layer->eval();
    const at::NoGradGuard no_grad;
    const at::Tensor before = layer->forward(x);
    CHECK(same_bits(layer->forward_quantized(layer->quantize_input(x)), before));
    layer->convert_();
    CHECK(same_bits(layer->forward(x), before));
    CHECK(same_bits(layer->forward_quantized(layer->quantize_input(x)), before));
  }
}

TEST_CASE("on a GPU a linear layer's node equals its operators", "[linear][cuda]") {
  if (!support::has_cuda()) {
    WARN("skipped: no GPU");
    return;
  }
  at::globalContext().setAllowTF32CuBLAS(false);
  for (const char* recipe : {"qat-w8a8", "qat-w8a8-token", "groups of 32", "fqt-psq4"}) {
    INFO(recipe);
    QuantLinear layer = layer_of(named(recipe));
    layer->to(at::kCUDA);
    QuantLinear other = long_way(layer);
    const at::Tensor x = at::randn({6, 64}).cuda();
    const auto run = [&](QuantLinear& of) {
      const at::Tensor y = of->forward(x);
      torch::manual_seed(5);
      y.square().sum().backward();
      return y;
    };
    const at::Tensor y = run(layer), want = run(other);
    CHECK(made_by(y, kNode));
    CHECK(largest_difference(y, want) < 1e-4);
    check_gradients(*layer, *other, 1e-3);
    check_state(*layer, *other, 1e-5);
  }
}

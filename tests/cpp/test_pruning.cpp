// Pruning in a process without Python: masks, and optimizers and schedules that keep what was dropped at zero.
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim.h>

#include <functional>

#include "support.h"

using quantrain::nn::PruneSchedule;
using quantrain::nn::PruneScope;
using quantrain::nn::PruneScore;
using quantrain::nn::PruneSpec;
using quantrain::prune::Pruner;

namespace {

torch::nn::Sequential make_model(at::Device device = at::kCPU) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(96, 80), torch::nn::GELU(), torch::nn::Linear(80, 4));
  model->to(device);
  return model;
}

at::Tensor dropped(const at::Tensor& weight, const at::Tensor& mask) {
  return weight.masked_select(quantrain::unpack_mask(mask, weight.sizes()).logical_not());
}

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

std::map<std::string, MakeOptimizer> optimizers() {
  return {
      {"SGD",
       [](auto p) { return std::make_unique<torch::optim::SGD>(p, torch::optim::SGDOptions(0.05).momentum(0.9)); }},
      {"Adam", [](auto p) { return std::make_unique<torch::optim::Adam>(p, torch::optim::AdamOptions(1e-2)); }},
      {"AdamW", [](auto p) { return std::make_unique<torch::optim::AdamW>(p, torch::optim::AdamWOptions(1e-2)); }},
      {"RMSprop",
       [](auto p) { return std::make_unique<torch::optim::RMSprop>(p, torch::optim::RMSpropOptions(1e-3)); }},
      {"Adagrad",
       [](auto p) { return std::make_unique<torch::optim::Adagrad>(p, torch::optim::AdagradOptions(1e-2)); }},
      {"FusedAdamW",
       [](auto p) { return std::make_unique<quantrain::optim::FusedAdamW>(p, torch::optim::AdamWOptions(1e-2)); }},
      {"AdamW8bit",
       [](auto p) {
         return std::make_unique<quantrain::optim::AdamW8bit>(p, quantrain::optim::AdamW8bitOptions(1e-2));
       }},
  };
}

void train(torch::nn::Sequential& model, torch::optim::Optimizer& optimizer, Pruner& pruner, int steps) {
  const at::Device device = model->parameters()[0].device();
  for (int step = 1; step <= steps; ++step) {
    optimizer.zero_grad();
    model->forward(at::randn({8, 96}).to(device)).square().mean().backward();
    optimizer.step();
    pruner.step(step, optimizer);
  }
}

void check_zeros(const std::string& name, at::Device device, int steps) {
  INFO(name);
  auto model = make_model(device);
  PruneSpec spec;
  Pruner pruner(*model, spec, steps);
  std::map<std::string, at::Tensor> before;
  for (const auto& [layer, mask] : pruner.masks()) before[layer] = mask.clone();
  const auto optimizer = optimizers().at(name)(model->parameters());
  pruner.keep_zeros(*optimizer);
  train(model, *optimizer, pruner, steps);
  REQUIRE(before.size() == 2);
  for (const auto& item : model->named_buffers()) {
    const std::string layer = item.key().substr(0, item.key().find('.'));
    const at::Tensor weight = model->named_parameters()[layer + ".weight"];
    REQUIRE(item.value().equal(before.at(layer)));
    REQUIRE(dropped(weight, item.value()).eq(0).all().item<bool>());
    REQUIRE(weight.ne(0).sum().item<int64_t>() == weight.numel() / 2);
  }
}

}  // namespace

TEST_CASE("Masks drop what they should", "[pruning][cuda]") {
  for (const at::Device device : support::has_cuda() ? std::vector<at::Device>{at::kCPU, at::Device(at::kCUDA, 0)}
                                                     : std::vector<at::Device>{at::kCPU}) {
    const at::Tensor weight = at::tensor({3.f, -1.f, 2.f, 0.5f, -4.f, 0.f, 1.f, 6.f}).view({2, 4}).to(device);
    const auto kept = [&](const at::Tensor& mask) { return quantrain::unpack_mask(mask, weight.sizes()).cpu(); };
    const auto expect = [](std::vector<int64_t> bits) { return at::tensor(bits).view({2, 4}).to(at::kBool); };
    REQUIRE(kept(quantrain::prune_mask(weight)).equal(expect({1, 0, 1, 0, 1, 0, 0, 1})));
    REQUIRE(kept(quantrain::prune_mask(weight, std::nullopt, 0.75, "row")).equal(expect({1, 0, 0, 0, 0, 0, 0, 1})));
    REQUIRE(kept(quantrain::prune_mask(weight, std::nullopt, 0.0, "1:2")).equal(expect({1, 0, 1, 0, 1, 0, 0, 1})));
    const at::Tensor norm = at::tensor({0.f, 10.f, 1.f, 1.f}).to(device);
    REQUIRE(kept(quantrain::prune_mask(weight, norm, 0.5, "row")).equal(expect({0, 1, 1, 0, 0, 0, 1, 1})));
    at::Tensor copy = weight.clone();
    quantrain::apply_masks_({copy}, {quantrain::prune_mask(weight)});
    REQUIRE(copy.ne(0).cpu().equal(expect({1, 0, 1, 0, 1, 0, 0, 1})));
  }
  REQUIRE(support::value_error([] { quantrain::prune_mask(at::zeros({2, 4}), std::nullopt, 1.0); }) ==
          "prune_mask: expected sparsity in [0, 1), got 1");
}

TEST_CASE("SparseGPT drops half and adjusts the rest", "[pruning]") {
  torch::manual_seed(0);
  const at::Tensor weight = at::randn({8, 32}),
                   x = at::randn({100, 8}).matmul(at::randn({8, 32})) + at::randn({100, 32});
  const auto result = quantrain::sparsegpt_prune(weight, x.t().matmul(x));
  REQUIRE(dropped(result.weight, result.mask).eq(0).all().item<bool>());
  at::Tensor plain = weight.clone();
  quantrain::apply_masks_({plain}, {quantrain::prune_mask(weight)});
  const auto error = [&](const at::Tensor& w) { return x.matmul((w - weight).t()).square().sum().item<double>(); };
  REQUIRE(error(result.weight) < 0.7 * error(plain));
}

TEST_CASE("What was dropped stays at zero under every optimizer", "[pruning]") {
  for (const auto& item : optimizers()) check_zeros(item.first, at::kCPU, 1000);
}

TEST_CASE("What was dropped stays at zero on a GPU", "[pruning][cuda]") {
  if (!support::has_cuda()) return;
  for (const auto& item : optimizers()) check_zeros(item.first, at::Device(at::kCUDA, 0), 1000);
}

TEST_CASE("FusedAdamW with a mask is AdamW on what is kept", "[pruning][cuda]") {
  for (const at::Device device : support::has_cuda() ? std::vector<at::Device>{at::kCPU, at::Device(at::kCUDA, 0)}
                                                     : std::vector<at::Device>{at::kCPU}) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      torch::manual_seed(1);
      const at::Tensor start = at::randn({40, 33}).to(device, type);
      const at::Tensor kept = at::rand({40, 33}).to(device) < 0.5;
      const at::Tensor one = start.clone().requires_grad_(), two = (start * kept).requires_grad_();
      quantrain::optim::FusedAdamW masked(std::vector<at::Tensor>{one}), plain(std::vector<at::Tensor>{two});
      masked.set_mask(one, quantrain::pack_mask(kept));
      for (int step = 0; step < 5; ++step) {
        const at::Tensor grad = at::randn({40, 33}).to(device, type);
        one.mutable_grad() = grad;
        two.mutable_grad() = grad * kept;
        masked.step();
        plain.step();
      }
      REQUIRE(one.masked_select(kept.logical_not()).eq(0).all().item<bool>());
      // One kernel has moments of the parameter's type, the other float32.
      REQUIRE(support::largest_difference(one * kept, two * kept) < (type == at::kFloat ? 1e-6 : 3e-2));
      REQUIRE(masked.state_tensors()[0].exp_avg.scalar_type() == at::kFloat);
      masked.set_mask(one, {});
      masked.step();
      REQUIRE(one.masked_select(kept.logical_not()).ne(0).any().item<bool>());
    }
  }
}

TEST_CASE("A cubic schedule goes up and stays", "[pruning]") {
  PruneSpec spec;
  spec.sparsity = 0.8;
  spec.schedule = PruneSchedule::kCubic;
  spec.end = 0.5;
  spec.every = 5;
  auto model = make_model();
  Pruner pruner(*model, spec, 100);
  REQUIRE(pruner.sparsity() == 0.0);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.01).momentum(0.9));
  double before = 0.0;
  at::Tensor last;
  for (int step = 1; step <= 100; ++step) {
    optimizer.zero_grad();
    model->forward(at::randn({8, 96})).square().mean().backward();
    optimizer.step();
    pruner.step(step, optimizer);
    REQUIRE(pruner.sparsity() >= before);
    before = pruner.sparsity();
    const double share = std::min(1.0, (step / 5 * 5) / 50.0);
    REQUIRE(std::abs(before - 0.8 * (1 - std::pow(1 - share, 3))) < 0.01);
    if (step == 50) last = pruner.masks().at("0").clone();
  }
  REQUIRE(pruner.masks().at("0").equal(last));
}

TEST_CASE("Masks of one threshold, of skipped layers, of a checkpoint", "[pruning]") {
  auto model = make_model();
  PruneSpec spec;
  spec.scope = PruneScope::kGlobal;
  spec.sparsity = 0.6;
  {
    Pruner pruner(*model, spec, 1);
    REQUIRE(std::abs(pruner.sparsity() - 0.6) < 1e-3);
  }
  const support::TemporaryFolder folder;
  quantrain::nn::save_checkpoint(folder.file("pruned.safetensors"), *model);
  auto other = make_model();
  quantrain::nn::load_checkpoint(folder.file("pruned.safetensors"), *other);  // which gets the masks
  for (const auto& item : model->named_buffers()) REQUIRE(other->named_buffers()[item.key()].equal(item.value()));
  Pruner again(*other, spec, 1, {"2"});
  REQUIRE(again.masks().size() == 1);
  REQUIRE(support::value_error([&] { Pruner(*other, spec, 1, {"head"}); }) ==
          "Pruner: expected the name of a module in skip, got 'head'");
  spec.scope = PruneScope::kLayer;
  spec.pattern = "7:9";
  auto third = make_model();
  REQUIRE(support::value_error([&] { Pruner(*third, spec, 1); }) ==
          "Pruner: expected columns in groups for pattern 7:9, got 0 (96 columns), 2 (80 columns)");
  REQUIRE(third->named_buffers().is_empty());
  spec.pattern = "row";
  spec.score = PruneScore::kWanda;
  REQUIRE(support::value_error([&] { Pruner(*third, spec, 1); }) ==
          "Pruner: expected inputs of layer '0' for score wanda, got none");
  Pruner wanda(*third, spec, 1, {}, {{"0", at::ones({96})}, {"2", at::ones({80})}});
  REQUIRE(std::abs(wanda.sparsity() - 0.6) < 0.01);
}

TEST_CASE("A pruned layer is cloned, converted and loaded with its mask", "[pruning]") {
  torch::manual_seed(0);
  const auto recipe = quantrain::nn::Recipe::from_name("qat-w8a8-token");
  quantrain::nn::QuantLinear layer(64, 32, recipe);
  PruneSpec spec;
  Pruner pruner(*layer, spec, 1);
  const at::Tensor mask = layer->named_buffers()["weight_mask"];
  const auto copy = layer->clone();
  REQUIRE(copy->named_buffers()["weight_mask"].equal(mask));
  REQUIRE(!copy->named_buffers()["weight_mask"].is_same(mask));
  const at::Tensor input = at::randn({3, 64});
  layer->eval();
  const at::Tensor simulated = layer->forward(input);
  quantrain::nn::convert(*layer);
  const support::TemporaryFolder folder;
  const std::string path = folder.file("converted.safetensors");
  quantrain::nn::save_checkpoint(path, *layer, recipe);
  const auto tensors = quantrain::nn::read_safetensors(path).tensors;
  REQUIRE(tensors.count("weight_codes") == 0);
  REQUIRE(tensors.at("weight_codes_kept").numel() == 64 * 32 / 2);
  REQUIRE(tensors.at("weight_mask").equal(mask));
  quantrain::nn::QuantLinear other(64, 32, recipe);
  quantrain::nn::convert(*other, /*check_observed=*/false);
  quantrain::nn::load_checkpoint(path, *other);
  REQUIRE(other->forward(input).equal(simulated));
  REQUIRE(other->named_buffers()["weight_mask"].equal(mask));
}

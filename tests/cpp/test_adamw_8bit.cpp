// 8-bit AdamW in a process without Python: the operators and the optimizer.
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim.h>
#include <torch/serialize.h>

#include <limits>

#include "support.h"

using quantrain::AdamW8bitArguments;
using quantrain::AdamW8bitTensors;
using quantrain::amp::GradScaler;
using quantrain::optim::AdamW8bit;
using quantrain::optim::AdamW8bitOptions;

namespace {

at::Tensor map_of(bool is_signed) {
  return quantrain::dequantize_8bit_blockwise(at::arange(256).to(at::kByte), at::ones({1}), is_signed);
}

// A weight with 8-bit moments, biases and a weight without.
torch::nn::Sequential make_model(at::Device device = at::kCPU, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(96, 80), torch::nn::GELU(), torch::nn::Linear(80, 4));
  model->to(device, dtype);
  return model;
}

void train(torch::nn::Sequential& model, AdamW8bit& optimizer, int from, int to) {
  for (int step = from; step < to; ++step) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(100 + step));
    for (auto& parameter : model->parameters())
      parameter.mutable_grad() =
          at::randn(parameter.sizes(), generator, at::kFloat).to(parameter.device(), parameter.scalar_type());
    optimizer.step();
  }
}

void copy_parameters(torch::nn::Sequential& to, torch::nn::Sequential& from) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < to->parameters().size(); ++i) to->parameters()[i].copy_(from->parameters()[i]);
}

bool equal(torch::nn::Sequential& a, torch::nn::Sequential& b) {
  for (size_t i = 0; i < a->parameters().size(); ++i)
    if (!a->parameters()[i].equal(b->parameters()[i])) return false;
  return true;
}

AdamW8bitTensors golden(at::Device device) {
  const at::Tensor i = at::arange(512);
  AdamW8bitTensors tensors;
  tensors.params = {(((i * 29).remainder(97) - 48).to(at::kFloat) / 256).to(device)};
  tensors.grads = {(((i * 53).remainder(89) - 44).to(at::kFloat) / 1024).to(device)};
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(device);
  const auto floats = at::TensorOptions().dtype(at::kFloat).device(device);
  tensors.exp_avg = {at::full({512}, 127, bytes)};
  tensors.exp_avg_scale = {at::zeros({2}, floats)};
  tensors.exp_avg_sq = {at::zeros({512}, bytes)};
  tensors.exp_avg_sq_scale = {at::zeros({2}, floats)};
  tensors.steps = {at::zeros({}, floats)};
  return tensors;
}

}  // namespace

TEST_CASE("dynamic maps", "[adamw_8bit]") {
  const at::Tensor with_sign = map_of(true).to(at::kDouble), without = map_of(false).to(at::kDouble);
  REQUIRE(with_sign.sum().item<double>() == Approx(1.0).margin(1e-9));
  REQUIRE(with_sign.abs().sum().item<double>() == Approx(75.10526317).epsilon(1e-9));
  REQUIRE(with_sign.square().sum().item<double>() == Approx(48.59583767).epsilon(1e-9));
  REQUIRE(without.sum().item<double>() == Approx(75.10526324).epsilon(1e-9));
  REQUIRE(without.square().sum().item<double>() == Approx(48.59745211).epsilon(1e-9));
  for (const bool is_signed : {true, false}) {
    const auto [codes, scale] = quantrain::quantize_8bit_blockwise(map_of(is_signed), is_signed);
    REQUIRE(codes.equal(at::arange(256).to(at::kByte)));
    REQUIRE(scale.equal(at::ones({1})));
  }
}

TEST_CASE("the golden steps of 8-bit AdamW", "[adamw_8bit]") {
  AdamW8bitTensors tensors = golden(at::kCPU);
  const at::Tensor grad = tensors.grads[0];
  AdamW8bitArguments arguments;
  arguments.lr = at::full({}, 1e-3);
  const std::vector<double> factors{1.0, -0.5, 1.0}, first{-0.18649813, -0.18623414, -0.18565603};
  for (size_t step = 0; step < 3; ++step) {
    tensors.grads = {grad * factors[step]};
    quantrain::adamw_8bit_(tensors, arguments);
    REQUIRE(tensors.params[0][0].item<double>() == Approx(first[step]).margin(2e-8));
  }
  REQUIRE(tensors.params[0].to(at::kDouble).sum().item<double>() == Approx(0.2131760322).margin(2e-6));
  REQUIRE(tensors.exp_avg[0].slice(0, 0, 4).equal(at::tensor({0, 198, 27, 225}, at::kByte)));
  REQUIRE(tensors.exp_avg_sq[0].slice(0, 0, 4).equal(at::tensor({255, 85, 166, 162}, at::kByte)));
  REQUIRE(tensors.steps[0].item<float>() == 3.0f);
}

TEST_CASE("errors of 8-bit AdamW name rule and value", "[adamw_8bit]") {
  AdamW8bitTensors tensors = golden(at::kCPU);
  AdamW8bitArguments arguments;
  arguments.lr = at::full({}, 1e-3);
  arguments.beta2 = 1.0;
  REQUIRE(support::value_error([&] { quantrain::adamw_8bit_(tensors, arguments); }) ==
          "adamw_8bit_: expected beta2 in [0, 1), got 1");
  arguments.beta2 = 0.999;
  tensors.exp_avg_scale = {at::zeros({3})};
  REQUIRE(support::value_error([&] { quantrain::adamw_8bit_seeded_(tensors, arguments, 1, 2); }) ==
          "adamw_8bit_: expected exp_avg_scale of 2 elements, one for 256 of the parameter, got shape [3] at index 0");
  auto model = make_model();
  REQUIRE(support::value_error([&] { AdamW8bit(model->parameters(), AdamW8bitOptions(-1.0)); }) ==
          "AdamW8bit: expected lr >= 0, got -1");
  REQUIRE(support::value_error([&] { AdamW8bit(model->parameters(), AdamW8bitOptions().bits(4)); }) ==
          "AdamW8bit: expected bits of 8 or 32, got 4");
  REQUIRE(support::value_error([] { AdamW8bit(std::vector<at::Tensor>{}); }) ==
          "AdamW8bit: expected at least one parameter, got none");
}

TEST_CASE("AdamW8bit stays near AdamW and keeps a quarter of its state", "[adamw_8bit]") {
  auto model = make_model();
  auto twin = make_model();
  AdamW8bit ours(model->parameters(), AdamW8bitOptions(1e-3).weight_decay(0.1));
  torch::optim::AdamW plain(twin->parameters(), torch::optim::AdamWOptions(1e-3).weight_decay(0.1));
  const auto& states = ours.state_tensors();
  REQUIRE(states[0].exp_avg.scalar_type() == at::kByte);
  REQUIRE(states[0].exp_avg_scale.numel() == 30);
  REQUIRE(states[1].exp_avg.scalar_type() == at::kFloat);
  REQUIRE(states[1].exp_avg_scale.numel() == 0);
  const at::Tensor before = model->parameters()[0].detach().clone();
  for (int step = 0; step < 20; ++step) {
    train(model, ours, step, step + 1);
    for (size_t i = 0; i < twin->parameters().size(); ++i)
      twin->parameters()[i].mutable_grad() = model->parameters()[i].grad();
    plain.step();
  }
  const auto size = [](const at::Tensor& tensor) { return tensor.square().mean().sqrt().item<double>(); };
  const at::Tensor a = model->parameters()[0].detach(), b = twin->parameters()[0].detach();
  REQUIRE(size(a - b) < 0.02 * size(b - before));
  REQUIRE(at::allclose(model->parameters()[1], twin->parameters()[1], 1e-5, 1e-6));
}

TEST_CASE("a resumed AdamW8bit is the uninterrupted one", "[adamw_8bit]") {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const support::TemporaryFolder folder;
    auto whole = make_model(at::kCPU, dtype);
    AdamW8bit through(whole->parameters(), AdamW8bitOptions(1e-2));
    train(whole, through, 0, 6);
    auto first = make_model(at::kCPU, dtype);
    AdamW8bit optimizer(first->parameters(), AdamW8bitOptions(1e-2));
    train(first, optimizer, 0, 3);
    torch::save(optimizer, folder.file("optimizer.pt"));
    auto second = make_model(at::kCPU, dtype);
    copy_parameters(second, first);
    AdamW8bit resumed(second->parameters(), AdamW8bitOptions(0.5).bits(32));
    resumed.state_tensors();
    torch::load(resumed, folder.file("optimizer.pt"));
    train(second, resumed, 3, 6);
    REQUIRE(equal(whole, second));
    REQUIRE(resumed.state_tensors()[0].step.item<float>() == 6.0f);
  }
}

TEST_CASE("a state of other parameters is refused", "[adamw_8bit]") {
  auto model = make_model();
  AdamW8bit optimizer(model->parameters());
  AdamW8bit smaller(std::vector<at::Tensor>{at::zeros({5})});
  REQUIRE(support::value_error([&] { smaller.load_state_(optimizer.state_tensors()); }) ==
          "AdamW8bit.load_state_: expected the state of 1 parameters, got 4");
  AdamW8bit wide(model->parameters(), AdamW8bitOptions().bits(32));
  REQUIRE(support::value_error([&] { wide.load_state_(optimizer.state_tensors()); }) ==
          "AdamW8bit.load_state_: expected exp_avg of parameter 0 to be Float [80, 96], got Byte [80, 96]");
}

TEST_CASE("AdamW8bit takes the scale and skips on the device", "[adamw_8bit]") {
  auto model = make_model();
  auto twin = make_model();
  AdamW8bit scaled(model->parameters()), plain(twin->parameters());
  GradScaler scaler;
  const at::Tensor x = at::ones({3, 96});
  for (int step = 0; step < 6; ++step) {
    const bool bad = step == 2 || step == 3;
    scaled.zero_grad();
    plain.zero_grad();
    const float factor = bad ? std::numeric_limits<float>::infinity() : 1.0f;
    scaler.scale(model->forward(x).square().mean() * factor).backward();
    REQUIRE(scaler.step(scaled));
    scaler.update();
    twin->forward(x).square().mean().backward();
    if (!bad) plain.step();
  }
  REQUIRE(scaled.state_tensors()[0].step.item<float>() == 4.0f);
  REQUIRE(equal(model, twin));
}

TEST_CASE("groups of AdamW8bit have their own options, and set_lr reaches all", "[adamw_8bit]") {
  auto model = make_model();
  const auto parameters = model->parameters();
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<at::Tensor>{parameters[0]},
                      std::make_unique<AdamW8bitOptions>(AdamW8bitOptions(0.0).bits(32)));
  groups.emplace_back(std::vector<at::Tensor>{parameters[1], parameters[2], parameters[3]});
  AdamW8bit optimizer(groups, AdamW8bitOptions(1e-2).min_8bit_size(0));
  const at::Tensor before = parameters[0].detach().clone();
  train(model, optimizer, 0, 1);
  REQUIRE(parameters[0].equal(before));
  REQUIRE(optimizer.state_tensors()[0].exp_avg.scalar_type() == at::kFloat);
  REQUIRE(optimizer.state_tensors()[1].exp_avg.scalar_type() == at::kByte);
  optimizer.set_lr(1e-2);
  train(model, optimizer, 1, 2);
  REQUIRE_FALSE(parameters[0].equal(before));
}

TEST_CASE("stochastic rounding of bfloat16 parameters", "[adamw_8bit]") {
  std::vector<double> means;
  for (const bool stochastic : {false, true}) {
    at::Tensor weight = at::ones({4096}, at::kBFloat16).set_requires_grad(true);
    AdamW8bit optimizer({weight}, AdamW8bitOptions(1e-4).weight_decay(0.0).stochastic_rounding(stochastic));
    for (int step = 0; step < 100; ++step) {
      weight.mutable_grad() = at::ones({4096}, at::kBFloat16);
      optimizer.step();
    }
    means.push_back(weight.detach().to(at::kDouble).mean().item<double>());
  }
  REQUIRE(means[0] == 1.0);
  REQUIRE(means[1] == Approx(0.99).margin(1e-3));  // ten standard deviations
}

TEST_CASE("8-bit AdamW on CUDA is that of the CPU", "[adamw_8bit][cuda]") {
  if (!support::has_cuda()) return;
  AdamW8bitTensors on_cpu = golden(at::kCPU), on_cuda = golden(at::kCUDA);
  for (int step = 0; step < 3; ++step)
    for (AdamW8bitTensors* tensors : {&on_cpu, &on_cuda}) {
      AdamW8bitArguments arguments;
      arguments.lr = at::full({}, 1e-3, tensors->params[0].options());
      quantrain::adamw_8bit_(*tensors, arguments);
    }
  REQUIRE(on_cuda.params[0].cpu().equal(on_cpu.params[0]));
  REQUIRE(on_cuda.exp_avg[0].cpu().equal(on_cpu.exp_avg[0]));
  REQUIRE(on_cuda.exp_avg_sq[0].cpu().equal(on_cpu.exp_avg_sq[0]));
  REQUIRE(on_cuda.exp_avg_scale[0].cpu().equal(on_cpu.exp_avg_scale[0]));
  REQUIRE(on_cuda.exp_avg_sq_scale[0].cpu().equal(on_cpu.exp_avg_sq_scale[0]));
  REQUIRE(on_cuda.steps[0].item<float>() == 3.0f);
  auto a = make_model(), b = make_model(at::kCUDA);
  AdamW8bit first(a->parameters()), second(b->parameters());
  train(a, first, 0, 4);
  train(b, second, 0, 4);
  for (size_t i = 0; i < a->parameters().size(); ++i) REQUIRE(b->parameters()[i].cpu().equal(a->parameters()[i]));
}

TEST_CASE("a state on the host takes the same steps", "[adamw_8bit][cuda]") {
  for (const at::Device device : {at::Device(at::kCPU), at::Device(at::kCUDA, 0)}) {
    if (device.is_cuda() && !support::has_cuda()) continue;
    torch::nn::Sequential plain = make_model(device), paged = make_model(device);
    AdamW8bit first(plain->parameters(), AdamW8bitOptions(1e-2));
    AdamW8bit second(paged->parameters(), AdamW8bitOptions(1e-2).state_on_host(true));
    train(plain, first, 0, 4);
    train(paged, second, 0, 4);
    REQUIRE(equal(plain, paged));
    const auto& held = second.state_tensors();
    for (size_t i = 0; i < held.size(); ++i) {
      REQUIRE(support::same_bits(held[i].exp_avg.cpu(), first.state_tensors()[i].exp_avg.cpu()));
      REQUIRE(support::same_bits(held[i].exp_avg_sq.cpu(), first.state_tensors()[i].exp_avg_sq.cpu()));
      if (device.is_cuda()) REQUIRE(held[i].exp_avg.is_pinned());
    }
  }
}

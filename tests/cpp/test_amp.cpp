// AutocastGuard, GradScaler, FusedAdamW and MasterWeights in a process without Python.
#include <ATen/autocast_mode.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim.h>
#include <torch/serialize.h>

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <thread>

#include "support.h"

using quantrain::amp::AutocastGuard;
using quantrain::amp::GradScaler;
using quantrain::amp::GradScalerOptions;
using quantrain::amp::MasterWeights;
using quantrain::optim::FusedAdamW;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

torch::nn::Sequential make_model(at::Device device = at::kCPU) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(12, 32), torch::nn::GELU(), torch::nn::Linear(32, 4));
  model->to(device);
  return model;
}

at::Tensor product(const at::Tensor& a) { return at::matmul(a, a); }

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

// PyTorch's loss scaling written out on its own operators: what Python's torch.amp.GradScaler does.
struct PlainScaler {
  at::Tensor scale = at::full({}, 32768.0f), tracker = at::zeros({}, at::kInt);

  bool step(torch::optim::Optimizer& optimizer, const std::vector<at::Tensor>& parameters) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> grads;
    for (const auto& parameter : parameters) grads.push_back(parameter.grad());
    at::Tensor found_inf = at::zeros({});
    at::_amp_foreach_non_finite_check_and_unscale_(grads, found_inf, scale.to(at::kDouble).reciprocal().to(at::kFloat));
    const bool good = found_inf.item<float>() == 0.0f;
    if (good) optimizer.step();
    at::_amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 25);
    return good;
  }
};

struct Course {
  std::vector<double> scales;
  std::vector<bool> made;
  std::vector<at::Tensor> parameters;
};

const std::set<int> kBadSteps = {3, 4, 57, 58, 59, 130, 131, 300, 301, 488};

template <typename MakeOptimizer, typename Step>
Course train(at::ScalarType dtype, const MakeOptimizer& make_optimizer, const Step& step_with) {
  auto model = make_model();
  auto optimizer = make_optimizer(model->parameters());
  auto generator = at::make_generator<at::CPUGeneratorImpl>(7);
  Course course;
  for (int step = 0; step < 500; ++step) {
    const at::Tensor x = at::randn({16, 12}, generator, at::kFloat);
    optimizer->zero_grad();
    at::Tensor loss;
    {
      const AutocastGuard autocast(at::kCPU, dtype);
      loss = model->forward(x).to(at::kFloat).square().mean();
    }
    if (kBadSteps.count(step)) loss = loss * (step % 2 ? kInf : std::nanf(""));
    step_with(loss, *optimizer, model->parameters(), course);
  }
  for (const auto& parameter : model->parameters()) course.parameters.push_back(parameter.detach());
  return course;
}

}  // namespace

TEST_CASE("autocast guard sets, nests and restores", "[amp]") {
  const at::Tensor a = at::randn({4, 4});
  REQUIRE(product(a).scalar_type() == at::kFloat);
  {
    const AutocastGuard outer(at::kCPU, at::kBFloat16);
    REQUIRE(product(a).scalar_type() == at::kBFloat16);
    {
      const AutocastGuard off(at::kCPU, at::kBFloat16, false);
      REQUIRE(product(a).scalar_type() == at::kFloat);
      const AutocastGuard half(at::kCPU, at::kHalf);
      REQUIRE(product(a).scalar_type() == at::kHalf);
    }
    REQUIRE(product(a).scalar_type() == at::kBFloat16);
    REQUIRE(at::mse_loss(a.to(at::kBFloat16), a.to(at::kBFloat16)).scalar_type() == at::kFloat);
  }
  REQUIRE(product(a).scalar_type() == at::kFloat);
  REQUIRE_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST_CASE("autocast guard is exception-safe, thread-local, and refuses other types", "[amp]") {
  const at::Tensor a = at::randn({4, 4});
  try {
    const AutocastGuard autocast(at::kCPU, at::kHalf);
    throw std::runtime_error("out of the scope");
  } catch (const std::runtime_error&) {
  }
  REQUIRE_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  const AutocastGuard autocast(at::kCPU, at::kBFloat16);
  at::ScalarType elsewhere = at::kBFloat16;
  std::thread([&] { elsewhere = product(a).scalar_type(); }).join();
  REQUIRE(elsewhere == at::kFloat);
  REQUIRE(support::value_error([] { AutocastGuard(at::kCPU, at::kFloat); }) ==
          "AutocastGuard: expected dtype float16 or bfloat16, got Float");
  REQUIRE(support::value_error([] { AutocastGuard(at::kMeta); }).find("expected device type cpu or cuda, got meta") !=
          std::string::npos);
}

TEST_CASE("autocast clears its cache of weights at the outermost exit", "[amp]") {
  at::Tensor weight = at::randn({4, 4}).set_requires_grad(true);
  const at::Tensor x = at::randn({4, 4});
  {
    const AutocastGuard outer(at::kCPU, at::kBFloat16);
    const at::Tensor before = at::matmul(x, weight);
    {
      const AutocastGuard inner(at::kCPU, at::kBFloat16);
      const at::NoGradGuard no_grad;
      weight.mul_(2.0);
    }
    REQUIRE(at::matmul(x, weight).equal(before));  // still the cached cast: the inner exit kept it
  }
  const AutocastGuard again(at::kCPU, at::kBFloat16);
  REQUIRE(at::matmul(x, weight).equal(at::matmul(x.to(at::kBFloat16), weight.detach().to(at::kBFloat16))));
}

TEMPLATE_TEST_CASE("500 steps equal PyTorch's rule bit for bit", "[amp]", torch::optim::SGD, torch::optim::Adam,
                   torch::optim::AdamW, torch::optim::RMSprop, torch::optim::Adagrad) {
  const auto make = [](std::vector<at::Tensor> parameters) {
    return std::make_unique<TestType>(std::move(parameters), 0.01);
  };
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    GradScalerOptions options;
    options.init_scale = 32768.0;
    options.growth_interval = 25;
    GradScaler scaler(options);
    const Course ours = train(dtype, make, [&](const at::Tensor& loss, auto& optimizer, const auto&, Course& course) {
      scaler.scale(loss).backward();
      course.made.push_back(scaler.step(optimizer));
      scaler.update();
      course.scales.push_back(scaler.get_scale());
    });
    PlainScaler plain;
    const Course theirs =
        train(dtype, make, [&](const at::Tensor& loss, auto& optimizer, const auto& parameters, Course& course) {
          (loss * plain.scale).backward();
          course.made.push_back(plain.step(optimizer, parameters));
          course.scales.push_back(plain.scale.template item<float>());
        });
    REQUIRE(ours.scales == theirs.scales);
    REQUIRE(ours.made == theirs.made);
    REQUIRE(std::count(ours.made.begin(), ours.made.end(), false) >= static_cast<int64_t>(kBadSteps.size()));
    for (size_t i = 0; i < ours.parameters.size(); ++i) REQUIRE(ours.parameters[i].equal(theirs.parameters[i]));
  }
}

TEST_CASE("fused clipping is unscale and clip_grad_norm_", "[amp]") {
  std::vector<std::vector<at::Tensor>> grads;
  std::vector<double> norms;
  for (const bool fused : {false, true}) {
    auto model = make_model();
    torch::optim::SGD optimizer(model->parameters(), 0.1);
    GradScaler scaler;
    scaler.scale(model->forward(at::ones({3, 12})).square().sum() * 100).backward();
    if (fused) {
      norms.push_back(scaler.clip_grad_norm_(optimizer, 1.0).item<double>());
    } else {
      scaler.unscale_(optimizer);
      norms.push_back(torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0));
    }
    grads.emplace_back();
    for (const auto& parameter : model->parameters()) grads.back().push_back(parameter.grad());
  }
  REQUIRE(norms[1] == Approx(norms[0]).epsilon(1e-6));
  for (size_t i = 0; i < grads[0].size(); ++i) REQUIRE(at::allclose(grads[0][i], grads[1][i], 1e-6, 0.0));
}

TEST_CASE("FusedAdamW takes the scale and skips on the device", "[amp]") {
  auto model = make_model();
  auto twin = make_model();
  const auto options = torch::optim::AdamWOptions(0.01).weight_decay(0.1);
  FusedAdamW fused(model->parameters(), options);
  torch::optim::AdamW plain(twin->parameters(), options);
  GradScaler scaler;
  const at::Tensor x = at::ones({3, 12});
  for (int step = 0; step < 20; ++step) {
    fused.zero_grad();
    plain.zero_grad();
    const bool bad = step == 5 || step == 6;
    scaler.scale(model->forward(x).square().sum() * (bad ? kInf : 1.0f)).backward();
    REQUIRE(scaler.step(fused));
    scaler.update();
    twin->forward(x).square().sum().backward();
    if (!bad) plain.step();
  }
  REQUIRE(scaler.get_scale() == 65536.0 / 4);
  REQUIRE(fused.state_tensors()[0].step.item<float>() == 18.0f);
  for (size_t i = 0; i < model->parameters().size(); ++i)
    REQUIRE(at::allclose(model->parameters()[i], twin->parameters()[i], 1e-5, 1e-6));
  const auto report = scaler.overflow_report(*model);
  REQUIRE(report.size() == 4);
  REQUIRE(report[0].name == "2.bias");
  REQUIRE(report[0].count == 2);
  REQUIRE(report[0].first_step == 5);
}

TEST_CASE("FusedAdamW is saved, loaded and checked", "[amp]") {
  auto model = make_model();
  FusedAdamW optimizer(model->parameters(), torch::optim::AdamWOptions(0.01).amsgrad(true));
  const auto step = [](auto& net, auto& with) {
    with.zero_grad();
    net->forward(at::ones({3, 12})).square().sum().backward();
    with.step();
  };
  step(model, optimizer);
  const support::TemporaryFolder folder;
  torch::save(optimizer, folder.file("optimizer.pt"));
  auto twin = make_model();
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < twin->parameters().size(); ++i) twin->parameters()[i].copy_(model->parameters()[i]);
  }
  FusedAdamW loaded(twin->parameters(), torch::optim::AdamWOptions(0.5).amsgrad(true));
  torch::load(loaded, folder.file("optimizer.pt"));
  step(model, optimizer);
  step(twin, loaded);
  for (size_t i = 0; i < model->parameters().size(); ++i) REQUIRE(model->parameters()[i].equal(twin->parameters()[i]));

  auto other = torch::nn::Linear(3, 3);
  FusedAdamW smaller(other->parameters());
  REQUIRE(support::value_error([&] { smaller.load_state_(optimizer.state_tensors()); }) ==
          "FusedAdamW.load_state_: expected the state of 2 parameters, got 4");
  REQUIRE(support::value_error([&] { FusedAdamW(other->parameters(), torch::optim::AdamWOptions(-1.0)); }) ==
          "FusedAdamW: expected lr >= 0, got -1");
}

TEST_CASE("wrong order of calls, closures, and bad gradients", "[amp]") {
  auto model = make_model();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  GradScaler scaler;
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  REQUIRE(has(message_of([&] { scaler.step(optimizer); }), "expected scale(loss) to be called before"));
  scaler.scale(model->forward(at::ones({2, 12})).sum()).backward();
  scaler.unscale_(optimizer);
  REQUIRE(has(message_of([&] { scaler.unscale_(optimizer); }), "got a second"));
  REQUIRE(has(message_of([&] { scaler.step(optimizer, [] { return at::ones({}); }); }), "expected no closure"));
  REQUIRE(scaler.step(optimizer));
  REQUIRE(has(message_of([&] { scaler.step(optimizer); }), "expected update() between two steps"));
  scaler.update();
  REQUIRE(has(message_of([&] { scaler.update(); }), "GradScaler.update: expected a step()"));
  optimizer.zero_grad();
  REQUIRE(has(message_of([&] { scaler.step(optimizer); }), "expected an optimizer with gradients, got none"));
  GradScalerOptions bad;
  bad.growth_factor = 1.0;
  REQUIRE(support::value_error([&] { GradScaler{bad}; }) == "GradScaler: expected growth_factor > 1, got 1");
  GradScalerOptions capturable;
  capturable.capturable = true;
  GradScaler graph_scaler(capturable);
  graph_scaler.scale(model->forward(at::ones({2, 12})).sum()).backward();
  REQUIRE(has(message_of([&] { graph_scaler.step(optimizer); }), "in capturable mode"));
}

TEST_CASE("state, a given scale, and a scaler that is not enabled", "[amp]") {
  GradScaler scaler;
  scaler.scale(at::ones({}));
  scaler.load_state_dict({128.0, 4.0, 0.25, 7, 3});
  const auto state = scaler.state_dict();
  REQUIRE(state.scale == 128.0);
  REQUIRE(state.growth_factor == 4.0);
  REQUIRE(state.backoff_factor == 0.25);
  REQUIRE(state.growth_interval == 7);
  REQUIRE(state.growth_tracker == 3);
  scaler.update(2.0);
  REQUIRE(scaler.get_scale() == 2.0);
  REQUIRE(scaler.scale({at::ones({}), at::full({2}, 3.0f)})[1].equal(at::full({2}, 6.0f)));
  REQUIRE(scaler.scale(at::ones({2}, at::kHalf)).scalar_type() == at::kHalf);
  GradScalerOptions off;
  off.enabled = false;
  GradScaler none(off);
  auto model = make_model();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  none.scale(model->forward(at::ones({2, 12})).sum()).backward();
  REQUIRE(none.step(optimizer));
  none.update();
  REQUIRE(none.get_scale() == 1.0);
}

TEST_CASE("master weights keep updates that 16 bits would lose", "[amp]") {
  at::Tensor weight = at::ones({1000}, at::kHalf).set_requires_grad(true);
  for (const bool stochastic : {false, true}) {
    weight.data().fill_(1.0);
    MasterWeights masters({weight}, stochastic);
    torch::optim::SGD optimizer(masters.parameters(), 1.0);
    for (int step = 0; step < 64; ++step) {
      weight.mutable_grad() = at::full({1000}, std::ldexp(1.0, -12), at::kHalf);
      masters.copy_gradients_();
      optimizer.step();
      masters.write_back_();
    }
    REQUIRE(weight.detach().equal(at::full({1000}, 1.0 - std::ldexp(1.0, -6), at::kHalf)));
  }
}

TEST_CASE("scaled step on CUDA", "[amp][cuda]") {
  if (!support::has_cuda()) return;
  auto model = make_model(at::kCUDA);
  FusedAdamW optimizer(model->parameters(), torch::optim::AdamWOptions(0.01));
  GradScalerOptions options;
  options.capturable = true;
  GradScaler scaler(options);
  const at::Tensor x = at::ones({3, 12}, at::kCUDA);
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    at::Tensor loss;
    {
      const AutocastGuard autocast(at::kCUDA, at::kHalf);
      loss = model->forward(x).to(at::kFloat).square().mean();
    }
    scaler.scale(loss * (step == 4 ? kInf : 1.0f)).backward();
    scaler.clip_grad_norm_(optimizer, 1.0);
    scaler.step(optimizer);
    scaler.update();
  }
  REQUIRE(scaler.get_scale() == 32768.0);
  REQUIRE(optimizer.state_tensors()[0].step.item<float>() == 9.0f);
  REQUIRE(scaler.overflow_report(*model)[0].first_step == 4);
  for (const auto& parameter : model->parameters()) REQUIRE(parameter.isfinite().all().item<bool>());
}

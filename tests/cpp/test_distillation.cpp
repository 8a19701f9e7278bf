// Distillation in a process without Python: losses of rows, and layers trained on a teacher's.
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>

#include <cmath>

#include "support.h"

namespace distill = quantrain::distill;

namespace {

std::vector<at::Device> devices() {
  std::vector<at::Device> all{at::kCPU};
  if (support::has_cuda()) all.emplace_back(at::kCUDA, 0);
  return all;
}

at::Tensor kl_in_double(const at::Tensor& student, const at::Tensor& teacher, double temperature) {
  const at::Tensor s = (student.to(at::kDouble) / temperature).log_softmax(-1);
  const at::Tensor t = (teacher.to(at::kDouble) / temperature).log_softmax(-1);
  return (t.exp() * (t - s)).sum(-1) * temperature * temperature;
}

}  // namespace

TEST_CASE("distillation_kl and its gradient are float64's", "[distillation][cuda]") {
  torch::manual_seed(0);
  for (const at::Device device : devices()) {
    for (const int64_t columns : {3, 100, 2048, 9001}) {
      const at::Tensor student = (at::randn({4, columns}) * 3).to(device).requires_grad_();
      const at::Tensor teacher = (at::randn({4, columns}) * 3).to(device);
      const at::Tensor mask = at::tensor({1, 0, 1, 1}, at::kInt).to(device);
      const at::Tensor loss = quantrain::distillation_kl(student, teacher, 2.0, mask);
      loss.backward();
      const at::Tensor exact = student.detach().to(at::kDouble).requires_grad_();
      const at::Tensor want = (kl_in_double(exact, teacher, 2.0) * mask).sum() / 3;
      want.backward();
      REQUIRE(std::abs(loss.item<double>() - want.item<double>()) < 1e-5 * (1 + want.item<double>()));
      REQUIRE(support::largest_difference(student.grad(), exact.grad()) < 1e-6);
      REQUIRE(student.grad().select(0, 1).eq(0).all().item<bool>());
    }
  }
}

TEST_CASE("Losses of hidden states and of attention", "[distillation][cuda]") {
  torch::manual_seed(1);
  for (const at::Device device : devices()) {
    const at::Tensor student = at::randn({2, 3, 65}).to(device), teacher = at::randn({2, 3, 65}).to(device);
    const at::Tensor gap = (student - teacher).to(at::kDouble);
    const double mse = gap.square().mean().item<double>();
    REQUIRE(std::abs(quantrain::hidden_mse(student, teacher).item<double>() - mse) < 1e-5);
    const at::Tensor cosine = (student * teacher).sum(-1) / (student.norm(2, -1) * teacher.norm(2, -1));
    const at::Tensor rows = quantrain::hidden_cosine(student, teacher, std::nullopt, "none");
    REQUIRE(support::largest_difference(rows, 1 - cosine) < 1e-5);
    const at::Tensor p = student.softmax(-1), q = teacher.softmax(-1);
    const double attention = (q * (q.log() - p.log())).sum(-1).mean().item<double>();
    REQUIRE(std::abs(quantrain::attention_kl(p, q).item<double>() - attention) < 1e-5);
    const auto [values, indices] = teacher.log_softmax(-1).topk(65, -1);
    const double stored = quantrain::distillation_kl_topk(student, values, indices).item<double>();
    REQUIRE(std::abs(stored - kl_in_double(student, teacher, 1.0).mean().item<double>()) < 1e-5);
  }
}

TEST_CASE("The errors of distillation name rule and value", "[distillation]") {
  const at::Tensor x = at::zeros({2, 4});
  REQUIRE(support::value_error([&] { quantrain::distillation_kl(x, at::zeros({2, 5})); }) ==
          "distillation_kl: expected teacher of student's shape [2, 4], got [2, 5]");
  REQUIRE(support::value_error([&] { quantrain::distillation_kl(x, x, -1.0); }) ==
          "distillation_kl: expected temperature above 0, got -1");
  REQUIRE(support::value_error([&] { quantrain::hidden_mse(x, x, at::ones({3})); }) ==
          "hidden_mse: expected mask [2] for student's rows, got [3]");
}

TEST_CASE("Layers trained on a teacher's come nearer to it", "[distillation]") {
  torch::manual_seed(2);
  std::vector<torch::nn::Linear> teacher, student;
  std::vector<distill::Layer> teacher_layers, student_layers;
  std::vector<at::Tensor> parameters;
  const quantrain::nn::Recipe recipe = quantrain::nn::Recipe::from_name("w8a16");
  for (int i = 0; i < 3; ++i) {
    teacher.emplace_back(16, 16);
    student.emplace_back(16, 16);
    const at::NoGradGuard no_grad;
    student.back()->weight.copy_(teacher.back()->weight + 0.05 * at::randn({16, 16}));
    for (const at::Tensor& parameter : student.back()->parameters()) parameters.push_back(parameter);
  }
  for (int i = 0; i < 3; ++i) {
    teacher_layers.emplace_back([&, i](const at::Tensor& h) { return teacher[i]->forward(h).tanh(); });
    student_layers.emplace_back([&, i](const at::Tensor& h) { return student[i]->forward(h).tanh(); });
  }
  const std::vector<at::Tensor> inputs{at::randn({4, 5, 16}), at::randn({4, 5, 16})};
  const std::vector<at::Tensor> masks{at::ones({4, 5}), at::ones({4, 5})};
  distill::LayerOptions options;
  options.steps = 200;
  options.lr = 2e-3;
  const auto results = distill::distill_layers(teacher_layers, student_layers, parameters, inputs, masks, options);
  REQUIRE(results.size() == 3);
  for (const auto& result : results) REQUIRE(result.after < 0.2 * result.before);
  REQUIRE(support::value_error([&] { distill::distill_layers(teacher_layers, {}, parameters, inputs); }) ==
          "distill_layers: expected as many student layers as the teacher has, got 0 and 3");
}

TEST_CASE("A loss of parts is their weighted sum", "[distillation]") {
  torch::manual_seed(3);
  const at::Tensor s = at::randn({2, 3, 10}), t = at::randn({2, 3, 10}), task = at::tensor(0.5f);
  distill::LossOptions options;
  options.hidden = 2.0;
  const std::vector<at::Tensor> mine{at::randn({2, 3, 4}), at::randn({2, 3, 4})};
  const std::vector<at::Tensor> theirs{at::randn({2, 3, 4}), at::randn({2, 3, 4})};
  const double found = distill::loss(s, t, task, options, {}, mine, theirs).item<double>();
  const double hidden =
      (quantrain::hidden_mse(mine[0], theirs[0]) + quantrain::hidden_mse(mine[1], theirs[1])).item<double>();
  const double want = 0.5 + quantrain::distillation_kl(s, t, 2.0).item<double>() + hidden;
  REQUIRE(std::abs(found - want) < 1e-5);
}

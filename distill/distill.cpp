#include "quantrain/distill/distill.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cmath>

#include "ops/common/check.h"
#include "quantrain/ops/distillation.h"

namespace quantrain::distill {
namespace {

constexpr std::string_view kLayers = "distill_layers";
constexpr size_t kMeasured = 4;  // batches that the losses before and after are means over

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// The teacher's hidden states: before each layer, and after the last.
std::vector<at::Tensor> states_of(const std::vector<Layer>& teacher, const at::Tensor& input) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> states{input.detach()};
  for (const Layer& layer : teacher) states.push_back(layer(states.back()).detach());
  return states;
}

std::vector<double> losses(const std::vector<Layer>& teacher, const std::vector<Layer>& student,
                           const at::Tensor& input, const at::Tensor& mask, bool normalize, bool train) {
  const std::vector<at::Tensor> states = states_of(teacher, input);
  const at::AutoGradMode mode(train);
  std::vector<double> values;
  for (size_t k = 0; k < student.size(); ++k) {
    const at::Tensor loss = hidden_mse(student[k](states[k]), states[k + 1], optional(mask), normalize);
    values.push_back(loss.item<double>());
    QUANTRAIN_CHECK_VALUE(std::isfinite(values.back()), "{}: expected a finite loss of layer {}, got {}", kLayers, k,
                          values.back());
    if (train) loss.backward();
  }
  return values;
}

}  // namespace

std::vector<LayerResult> distill_layers(const std::vector<Layer>& teacher, const std::vector<Layer>& student,
                                        const std::vector<at::Tensor>& parameters,
                                        const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& masks,
                                        const LayerOptions& options) {
  QUANTRAIN_CHECK_VALUE(!teacher.empty() && teacher.size() == student.size(),
                        "{}: expected as many student layers as the teacher has, got {} and {}", kLayers,
                        student.size(), teacher.size());
  QUANTRAIN_CHECK_VALUE(!inputs.empty() && !parameters.empty(),
                        "{}: expected inputs and parameters to train, got {} and {}", kLayers, inputs.size(),
                        parameters.size());
  QUANTRAIN_CHECK_VALUE(masks.empty() || masks.size() == inputs.size(),
                        "{}: expected a mask for each of {} inputs or none, got {}", kLayers, inputs.size(),
                        masks.size());
  QUANTRAIN_CHECK_VALUE(options.steps >= 1, "{}: expected at least one step, got {}", kLayers, options.steps);
  const auto mask_of = [&](size_t i) { return masks.empty() ? at::Tensor() : masks[i]; };
  const auto measured = [&] {
    std::vector<double> mean(student.size(), 0.0);
    const size_t count = std::min(kMeasured, inputs.size());
    for (size_t i = 0; i < count; ++i) {
      const auto values = losses(teacher, student, inputs[i], mask_of(i), options.normalize, false);
      for (size_t k = 0; k < mean.size(); ++k) mean[k] += values[k] / static_cast<double>(count);
    }
    return mean;
  };
  const std::vector<double> before = measured();
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(options.lr).weight_decay(0));
  for (int64_t step = 0; step < options.steps; ++step) {
    const size_t i = static_cast<size_t>(step) % inputs.size();
    optimizer.zero_grad();
    losses(teacher, student, inputs[i], mask_of(i), options.normalize, true);
    optimizer.step();
  }
  optimizer.zero_grad();
  const std::vector<double> after = measured();
  std::vector<LayerResult> results;
  for (size_t k = 0; k < before.size(); ++k) results.push_back({before[k], after[k]});
  return results;
}

at::Tensor loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const at::Tensor& task_loss,
                const LossOptions& options, const at::Tensor& mask, const std::vector<at::Tensor>& student_hidden,
                const std::vector<at::Tensor>& teacher_hidden) {
  QUANTRAIN_CHECK_VALUE(student_hidden.size() == teacher_hidden.size(),
                        "distill::loss: expected pairs of hidden states, got {} and {}", student_hidden.size(),
                        teacher_hidden.size());
  at::Tensor sum =
      distillation_kl(student_logits, teacher_logits, options.temperature, optional(mask)) * options.logits;
  if (task_loss.defined()) sum = sum + task_loss * options.task;
  for (size_t i = 0; i < student_hidden.size(); ++i) {
    const double weight = options.hidden / static_cast<double>(student_hidden.size());
    sum = sum + hidden_mse(student_hidden[i], teacher_hidden[i], std::nullopt, options.normalize) * weight;
  }
  return sum;
}

}  // namespace quantrain::distill

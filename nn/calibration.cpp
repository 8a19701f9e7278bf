#include "quantrain/nn/layers.h"

// Calibration: what it switches, what it restores, and what it says at its end.

#include <algorithm>
#include <exception>
#include <map>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "nn/labels.h"
#include "quantrain/nn/fixed_point/layers.h"

namespace quantrain::nn {
namespace {

// A batch norm without a batch so far. Weights of older releases have statistics without a count, and are not.
bool is_fresh(const torch::nn::Module& module) {
  const auto buffers = module.named_buffers(/*recurse=*/false);
  for (const char* name : {"num_batches_tracked", "running_mean", "running_var"}) {
    if (!buffers.contains(name) || !buffers[name].defined()) return false;
  }
  return buffers["num_batches_tracked"].item<int64_t>() == 0 && (buffers["running_mean"] == 0).all().item<bool>() &&
         (buffers["running_var"] == 1).all().item<bool>();
}

void warn_of_fresh_batch_norms(const torch::nn::Module& module) {
  std::vector<std::string> fresh;
  for (const auto& item : module.named_modules("", /*include_self=*/true)) {
    if (is_fresh(*item.value())) fresh.push_back(item.key());
  }
  if (fresh.empty()) return;
  TORCH_WARN("Calibration: ", fresh.size(), " batch norms have seen no batch (num_batches_tracked is 0; the first is '",
             fresh[0],
             "'): the ranges seen now are those of an untrained network. Train a new network before, or leave ",
             "calibration out: the ranges follow training until enable_observer(module, false)");
}

}  // namespace

std::string detail::listed(const std::vector<std::string>& names, const std::string& what) {
  constexpr size_t kMost = 8;
  if (names.empty()) return "";
  std::string text = what + ": ";
  for (size_t i = 0; i < std::min(names.size(), kMost); ++i) text += (i > 0 ? ", " : "") + names[i];
  return names.size() > kMost ? text + " and " + std::to_string(names.size() - kMost) + " more" : text;
}

std::string CalibrationReport::text() const {
  const std::string first = detail::listed(unreached, "never reached");
  const std::string second = detail::listed(only_zeros, "seen only as zeros");
  if (empty()) return "every range was seen";
  return first + (first.empty() || second.empty() ? "" : "; ") + second;
}

struct Calibration::Saved {
  struct Quantiser {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;  // keeps it alive
    FakeQuantizeImpl* fake_quant = nullptr;
    bool enabled = true;
    std::map<std::string, at::Tensor> state;
  };
  struct Switch {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;
    FixedPointSwitch* fixed_point = nullptr;
    bool enabled = true;
  };
  at::NoGradGuard no_grad;
  int exceptions = std::uncaught_exceptions();
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> training;
  std::vector<Quantiser> quantisers;
  std::vector<Switch> switches;
  std::vector<std::pair<at::Tensor, at::Tensor>> sizes;  // of average pools, and copies
  bool ended = false;
};

Calibration::Calibration(torch::nn::Module& module) : saved_(std::make_unique<Saved>()) {
  warn_of_fresh_batch_norms(module);
  detail::label_layers(module);
  for (const auto& item : module.named_modules()) {
    const std::shared_ptr<torch::nn::Module>& child = item.value();
    saved_->training.emplace_back(child, child->is_training());
    if (auto* fake_quant = child->as<FakeQuantizeImpl>()) {
      Saved::Quantiser quantiser{item.key(), child, fake_quant, fake_quant->fake_quant_enabled(), {}};
      for (const auto& tensor : fake_quant->named_parameters()) quantiser.state[tensor.key()] = tensor.value().clone();
      for (const auto& tensor : fake_quant->named_buffers()) quantiser.state[tensor.key()] = tensor.value().clone();
      saved_->quantisers.push_back(std::move(quantiser));
      fake_quant->enable_fake_quant(false);
      fake_quant->set_calibrating(true);
    }
    if (auto* fixed_point = dynamic_cast<FixedPointSwitch*>(child.get())) {
      saved_->switches.push_back({item.key(), child, fixed_point, fixed_point->fake_quant_enabled()});
      fixed_point->enable_fake_quant(false);
      fixed_point->begin_calibration();
    }
    if (auto* pool = child->as<FixedPointAvgPool2dImpl>()) saved_->sizes.emplace_back(pool->size, pool->size.clone());
  }
  module.eval();
}

Calibration::~Calibration() {
  if (saved_->ended) return;
  const bool keep = std::uncaught_exceptions() == saved_->exceptions;
  try {
    end(keep);
    if (const CalibrationReport found = keep ? report() : CalibrationReport(); !found.empty()) {
      TORCH_WARN("Calibration: ", found.text());
    }
  } catch (const std::exception& error) {  // a weight that is not finite, a device that failed
    TORCH_WARN("Calibration: expected to set every range, got ", error.what());
  }
}

CalibrationReport Calibration::finish() {
  TORCH_CHECK(!saved_->ended, "Calibration: expected finish() once, got a second call");
  end(/*keep=*/true);
  return report();
}

void Calibration::end(bool keep) {
  saved_->ended = true;
  if (keep) {  // a weight's range needs no batch: also where no batch reached the layer
    for (const auto& [child, training] : saved_->training) {
      auto* layer = dynamic_cast<QuantModule*>(child.get());
      if (!layer || layer->converted() || !layer->weight_fake_quant || layer->weight_fake_quant->has_scale()) continue;
      layer->weight_fake_quant->observe(layer->weight_to_quantize());
    }
  }
  for (const Saved::Quantiser& quantiser : saved_->quantisers) {
    quantiser.fake_quant->enable_fake_quant(quantiser.enabled);
    quantiser.fake_quant->set_calibrating(false);
    if (keep) continue;
    for (auto& tensor : quantiser.fake_quant->named_parameters())
      tensor.value().copy_(quantiser.state.at(tensor.key()));
    for (auto& tensor : quantiser.fake_quant->named_buffers()) tensor.value().copy_(quantiser.state.at(tensor.key()));
    quantiser.fake_quant->state_changed();
  }
  // Activations first: the fraction lengths of weights follow their levels.
  for (const bool activations : {true, false}) {
    for (const Saved::Switch& item : saved_->switches) {
      if ((dynamic_cast<FixedPointActivationImpl*>(item.module.get()) != nullptr) != activations) continue;
      item.fixed_point->enable_fake_quant(item.enabled);
      item.fixed_point->end_calibration(keep);
    }
  }
  for (auto& [size, copy] : saved_->sizes) {
    if (!keep) size.copy_(copy);
  }
  // Parents come before their children, whose own mode is set last.
  for (const auto& [child, training] : saved_->training) child->train(training);
  if (!keep) return;
  for (const auto& [child, training] : saved_->training) {
    auto* layer = dynamic_cast<QuantModule*>(child.get());
    if (!layer || layer->recipe().training) continue;
    for (const FakeQuantize& item : {layer->weight_fake_quant, layer->input_fake_quant, layer->output_fake_quant}) {
      FakeQuantize fake_quant = item;
      if (!fake_quant || !fake_quant->has_scale()) continue;
      if (fake_quant->of_weight() || !fake_quant->sees_only_zeros()) fake_quant->enable_observer(false);
    }
  }
}

CalibrationReport Calibration::report() const {
  CalibrationReport result;
  for (const Saved::Quantiser& quantiser : saved_->quantisers) {
    FakeQuantizeImpl& fake_quant = *quantiser.fake_quant;
    if (fake_quant.of_weight()) continue;
    if (!fake_quant.has_scale())
      result.unreached.push_back(quantiser.name);
    else if (fake_quant.sees_only_zeros())
      result.only_zeros.push_back(quantiser.name);
  }
  for (const Saved::Switch& item : saved_->switches) {
    auto* activation = dynamic_cast<FixedPointActivationImpl*>(item.module.get());
    if (activation && !activation->reached()) result.unreached.push_back(item.name);
  }
  return result;
}

}  // namespace quantrain::nn

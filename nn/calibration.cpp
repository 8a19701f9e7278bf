#include "quantrain/nn/calibration.h"

// Calibration: what it switches, what it restores, and what it says at its end.

#include <algorithm>
#include <exception>
#include <set>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "nn/labels.h"

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
  struct Switched {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;  // keeps it alive
    Calibrates* calibrates = nullptr;
    bool enabled = true;
  };
  at::NoGradGuard no_grad;
  int exceptions = std::uncaught_exceptions();
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> training;
  std::vector<Switched> switched;
  bool ended = false;
};

Calibration::Calibration(torch::nn::Module& module) : saved_(std::make_unique<Saved>()) {
  warn_of_fresh_batch_norms(module);
  detail::label_layers(module);
  std::set<const Calibrates*> seen;
  for (const auto& item : module.named_modules()) {
    const std::shared_ptr<torch::nn::Module>& child = item.value();
    saved_->training.emplace_back(child, child->is_training());
    if (auto* calibrates = dynamic_cast<Calibrates*>(child.get())) {
      if (!seen.insert(calibrates).second) continue;  // of layers that share it
      saved_->switched.push_back({item.key(), child, calibrates, calibrates->fake_quant_enabled()});
      calibrates->enable_fake_quant(false);
      calibrates->begin_calibration();
    }
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
  const auto finish_layers = [this](void (FinishesCalibration::*what)()) {
    for (const auto& [child, training] : saved_->training) {
      if (auto* layer = dynamic_cast<FinishesCalibration*>(child.get())) (layer->*what)();
    }
  };
  if (keep) finish_layers(&FinishesCalibration::observe_weight);
  for (const int order : {0, 1}) {
    for (const Saved::Switched& item : saved_->switched) {
      if (item.calibrates->end_order() != order) continue;
      item.calibrates->enable_fake_quant(item.enabled);
      item.calibrates->end_calibration(keep);
    }
  }
  // Parents come before their children, whose own mode is set last.
  for (const auto& [child, training] : saved_->training) child->train(training);
  if (keep) finish_layers(&FinishesCalibration::freeze_for_inference);
}

CalibrationReport Calibration::report() const {
  CalibrationReport result;
  for (const Saved::Switched& item : saved_->switched) {
    const Calibrates::Reached reached = item.calibrates->reached_by_calibration();
    if (reached == Calibrates::Reached::kNothing) result.unreached.push_back(item.name);
    if (reached == Calibrates::Reached::kOnlyZeros) result.only_zeros.push_back(item.name);
  }
  return result;
}

void enable_observer(torch::nn::Module& module, bool on) {
  for (const auto& child : module.modules()) {
    if (auto* calibrates = dynamic_cast<Calibrates*>(child.get())) calibrates->enable_observer(on);
  }
}

void enable_fake_quant(torch::nn::Module& module, bool on) {
  for (const auto& child : module.modules()) {
    if (auto* calibrates = dynamic_cast<Calibrates*>(child.get())) calibrates->enable_fake_quant(on);
  }
}

}  // namespace quantrain::nn

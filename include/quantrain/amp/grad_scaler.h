// Dynamic loss scaling (Micikevicius et al., arXiv:1710.03740, section 3.2), in C++ and, through bindings, in Python.
//
//   GradScaler scaler;
//   for (...) {
//     torch::Tensor loss;
//     {
//       AutocastGuard autocast(at::kCUDA, at::kHalf);
//       loss = loss_of(model->forward(x), y);
//     }
//     optimizer.zero_grad();
//     scaler.scale(loss).backward();
//     scaler.clip_grad_norm_(optimizer, 1.0);  // optional: unscales, checks and clips in one read and one write
//     scaler.step(optimizer);                  // skipped where a gradient is Inf or NaN
//     scaler.update();
//   }
//
// Same rules, same arithmetic and same state as torch.amp.GradScaler: the scale's course, the skipped steps and the
// parameters are equal bit for bit. With `enabled = false` every method passes its argument through.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain::amp {

struct QUANTRAIN_API GradScalerOptions {
  double init_scale = 65536.0;
  double growth_factor = 2.0;      // times the scale after `growth_interval` steps in a row without Inf or NaN; > 1
  double backoff_factor = 0.5;     // times the scale after a step with one; in (0, 1)
  int64_t growth_interval = 2000;  // > 0
  bool enabled = true;
  bool capturable = false;  // no host synchronization: only optimizers that take the scale (ScaledOptimizer) may step
};

// What torch.amp.GradScaler.state_dict() holds, under the same names.
struct QUANTRAIN_API GradScalerState {
  double scale = 0.0;
  double growth_factor = 0.0;
  double backoff_factor = 0.0;
  int64_t growth_interval = 0;
  int64_t growth_tracker = 0;  // "_growth_tracker"
};

// An optimizer that unscales by itself: it divides the gradients by grad_scale, and does nothing where found_inf is not
// 0. Both are float32 of one element on the gradients' device, so that the device decides and the host need not wait.
class QUANTRAIN_API ScaledOptimizer {
 public:
  virtual ~ScaledOptimizer() = default;
  virtual void step_scaled(const at::Tensor& grad_scale, const at::Tensor& found_inf) = 0;
};

// An optimizer as the scaler sees it, in either language.
struct OptimizerView {
  const void* id = nullptr;  // tells optimizers apart
  std::function<std::vector<at::Tensor>()> parameters;
  std::function<void()> step;
  std::function<void(const at::Tensor& grad_scale, const at::Tensor& found_inf)> step_scaled;  // empty: unscale first
};

// One parameter whose gradient was not finite.
struct QUANTRAIN_API OverflowRecord {
  std::string name;        // of the parameter in the module; "" where it is not the module's
  int64_t count = 0;       // steps in which its gradient held Inf or NaN
  int64_t first_step = 0;  // the first of them, counted in update() calls of this scaler from 0
};

class QUANTRAIN_API GradScaler {
 public:
  explicit GradScaler(const GradScalerOptions& options = {});

  // outputs * scale, on the outputs' device. The first call makes the scale tensor there.
  at::Tensor scale(const at::Tensor& outputs);
  std::vector<at::Tensor> scale(const std::vector<at::Tensor>& outputs);

  // Divides the gradients of the optimizer's parameters by the scale, in place, and notes whether one is Inf or NaN.
  // Sparse gradients are coalesced. At most once between two update() calls.
  // Errors: c10::Error for a wrong order of calls; ValueError where a gradient is float16 (keep MasterWeights in
  // float32); TypeError where one is not floating point, or where gradients lie on two devices. Nothing is changed
  // then.
  void unscale_(torch::optim::Optimizer& optimizer);
  void unscale_(const OptimizerView& optimizer);

  // unscale_ and torch::nn::utils::clip_grad_norm_ (2-norm) together: one read of the gradients, then one read and
  // write. An optimizer that takes the scale applies the clip itself: then the gradients are read once and stay scaled.
  // Returns the norm of the unscaled gradients before clipping, float32 on their device.
  at::Tensor clip_grad_norm_(torch::optim::Optimizer& optimizer, double max_norm);
  at::Tensor clip_grad_norm_(const OptimizerView& optimizer, double max_norm);

  // optimizer.step(), unscaled first if need be, unless a gradient is Inf or NaN. True where the step was made; an
  // optimizer that takes the scale decides on the device, and true is returned. A closure is refused, as by PyTorch:
  // the loss it returned would be scaled. Errors: c10::Error for a wrong order of calls, for an optimizer without
  // gradients, and, where the host decides, for a scale that reached 0 or Inf.
  bool step(torch::optim::Optimizer& optimizer);
  bool step(torch::optim::Optimizer& optimizer, const torch::optim::Optimizer::LossClosure& closure);
  bool step(const OptimizerView& optimizer);

  // The new scale: by backoff_factor after Inf or NaN, by growth_factor after growth_interval good steps in a row; or
  // the one given (a number, or one float32 element). Call once per step, after every optimizer's step.
  void update();
  void update(double new_scale);
  void update(const at::Tensor& new_scale);

  double get_scale() const;  // waits for the device; 1 where not enabled
  double growth_factor() const { return options_.growth_factor; }
  double backoff_factor() const { return options_.backoff_factor; }
  int64_t growth_interval() const { return options_.growth_interval; }
  void set_growth_factor(double value);
  void set_backoff_factor(double value);
  void set_growth_interval(int64_t value);
  bool is_enabled() const { return options_.enabled; }
  bool is_capturable() const { return options_.capturable; }

  // True from the first call for an optimizer to update(): what no copy or state of the scaler holds.
  bool is_mid_step() const { return !per_optimizer_.empty(); }

  // Waits for the device. Call between update() and the next step; state_dict() throws where not enabled.
  GradScalerState state_dict() const;
  void load_state_dict(const GradScalerState& state);

  // Parameters whose gradient was Inf or NaN in some step, the earliest first; in the same step, the later parameter
  // first, since the backward pass reaches it first. Kept on the device: where the scaler knows of an overflow on the
  // host, only such steps pay, else three small kernels per step. Waits for the device.
  std::vector<OverflowRecord> overflow_report(const torch::nn::Module& module) const;
  std::vector<OverflowRecord> overflow_report(
      const std::vector<std::pair<std::string, at::Tensor>>& named_parameters) const;

  // Called with found_inf (float32, one element) after each check: where ranks hold different gradients (sharded
  // training), reduce it by maximum over them, so that all decide alike. Under DDP the gradients are equal already.
  void set_found_inf_hook(std::function<void(at::Tensor&)> hook) { found_inf_hook_ = std::move(hook); }

  // The tensors themselves: float32 and int32 without dimensions; undefined before the first scale().
  const at::Tensor& scale_tensor() const { return scale_; }
  const at::Tensor& growth_tracker_tensor() const { return growth_tracker_; }

 private:
  enum class Stage { kReady, kUnscaled, kStepped };

  // What is known of one optimizer since the last update().
  struct PerOptimizer {
    Stage stage = Stage::kReady;
    at::Tensor found_inf;   // undefined: not checked, or no gradients
    at::Tensor grad_scale;  // what a ScaledOptimizer is to divide by; undefined: the scale, or nothing once unscaled
  };

  // Overflows of one list of parameters since the beginning.
  struct Overflows {
    std::vector<const void*> parameters;  // identities only: the scaler keeps no model alive
    at::Tensor count;                     // float64 [parameters], on the gradients' device
    at::Tensor first;                     // float64 [parameters]: the check at which count became 1
  };

  struct Gradients;

  void check_scale(const char* method) const;
  void set_options(GradScalerOptions options);  // checked first
  void end_step();
  PerOptimizer& state_of(const OptimizerView& optimizer, const char* method);
  void check_gradients(PerOptimizer& state, const Gradients& gradients, std::optional<double> max_norm,
                       at::Tensor* norm);
  void note_found_inf(PerOptimizer& state, at::Tensor found_inf);
  Overflows& overflows_of(const Gradients& gradients);
  void note_overflow_on_host(const Gradients& gradients);
  bool overflowed_on_host(const PerOptimizer& state);

  GradScalerOptions options_;
  double initial_scale_;
  int64_t initial_growth_tracker_ = 0;
  at::Tensor scale_;           // float32, undefined before the first scale()
  at::Tensor growth_tracker_;  // int32
  std::map<const void*, PerOptimizer> per_optimizer_;
  std::vector<Overflows> overflows_;
  int64_t checks_ = 0;            // update() calls that followed a check
  bool overflowed_last_ = false;  // the host saw an overflow at the last step that told it
  std::function<void(at::Tensor&)> found_inf_hook_;
};

}  // namespace quantrain::amp

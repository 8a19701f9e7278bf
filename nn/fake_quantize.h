// FakeQuantize: an observer and the fake_quantize operator as one module.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/observers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// Rounds its input to the codes of `spec` and back:
//   y = (clamp(rint(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale
// (quantrain::fake_quantize; straight-through gradient).
//
// Where the scale comes from:
//   dynamic              computed from each input (choose_qparams); nothing stored
//   another observer     `scale` (float32) and, affine, `zero_point` (int32) are buffers that follow the submodule `observer`
//   and learnable        `scale` is a parameter: set by the observer, then trained by LSQ with the gradient factor
//                        1 / sqrt(x.numel() / scale.numel() * quant_max); pulled up to 1e-8 where a step took it below
//
// It observes in training mode and under Calibration (layers.h), so evaluation never moves a range, and only while
// observer_enabled. A learnable scale that was not calibrated observes its first training batch, then no more.
//
// Input float32, float16, bfloat16 of any shape that `scale_shape` divides; output of the same dtype and shape. Scales stay float32.
// NaN gives NaN. ValueError: no scale yet (neither observed nor loaded), a shape that does not divide, a NaN batch while observing.
class QUANTRAIN_API FakeQuantizeImpl : public FixedDtypeModule {
 public:
  // scale_shape: {1} or the input's rank, each size dividing the input's; a size of -1 takes the input's own (dynamic only).
  // per_token with {1}: one scale for each index of all dimensions but the last.
  explicit FakeQuantizeImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape = {1});

  at::Tensor forward(const at::Tensor& input);

  void enable_observer(bool on = true) { observer_enabled_ = on; }
  void enable_fake_quant(bool on = true) { fake_quant_enabled_ = on; }
  bool observer_enabled() const { return observer_enabled_; }
  bool fake_quant_enabled() const { return fake_quant_enabled_; }

  // While on, forward observes in evaluation mode too. Set by Calibration.
  void set_calibrating(bool on) { calibrating_ = on; }

  // Whether a scale is there: dynamic, observed or loaded. The first call that finds one waits for the device.
  bool has_scale();

  // Takes the input's range into account where the rule above says so; what forward does first.
  void observe(const at::Tensor& input);

  // The (scale, zero_point) in force; zero_point undefined where symmetric. `input` is needed for dynamic only.
  std::tuple<at::Tensor, at::Tensor> calculate_qparams(const std::optional<at::Tensor>& input = std::nullopt);

  // forward's second half with a scale of the caller's choice: rows of this module's, for an embedding.
  at::Tensor quantize_dequantize(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero_point) const;

  // Drops the observer, and makes a learnable scale a buffer: the state of a converted model.
  void freeze();

  const QuantSpec& spec() const { return spec_; }
  const std::vector<int64_t>& scale_shape() const { return scale_shape_; }
  bool dynamic() const { return spec_.observer == "dynamic"; }

  at::Tensor scale;       // undefined for dynamic
  at::Tensor zero_point;  // undefined for dynamic and for symmetric
  Observer observer{nullptr};

 private:
  std::vector<int64_t> scale_shape_of(const at::Tensor& input) const;

  QuantSpec spec_;
  std::vector<int64_t> scale_shape_;
  bool observer_enabled_ = true;
  bool fake_quant_enabled_ = true;
  bool calibrating_ = false;
  bool has_scale_ = false;  // once seen, not checked again: no wait for the device at each forward
};
TORCH_MODULE(FakeQuantize);

// Switches every FakeQuantize in the module, itself included.
QUANTRAIN_API void enable_observer(torch::nn::Module& module, bool on = true);
QUANTRAIN_API void enable_fake_quant(torch::nn::Module& module, bool on = true);

}  // namespace quantrain::nn

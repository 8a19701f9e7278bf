// FakeQuantize: an observer and the fake_quantize operator as one module.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/calibration.h"
#include "quantrain/nn/observers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A fake-quantized tensor and, where it has some, its codes, which a layer may keep in its place:
// values = (codes - zero_point) scale. zero_point is undefined where the codes are symmetric.
struct QUANTRAIN_API Quantized {
  at::Tensor values;
  at::Tensor codes = {}, scale = {}, zero_point = {};
};

// What a tensor goes through before it is rounded for a linear layer: a function of norm_act_fake_quantize
// (quantrain/ops/norm_act.h).
struct QUANTRAIN_API Before {
  std::string function = "identity";  // or relu, silu, gelu, gelu_tanh, silu_mul, layer_norm, rms_norm
  at::Tensor other = {};              // the second factor of silu_mul
  at::Tensor weight = {}, bias = {};  // of a norm; may be undefined
  double eps = 1e-5;                  // of a norm

  // The same by PyTorch's operators.
  at::Tensor operator()(const at::Tensor& x) const;
};

// Rounds its input to the codes of `spec` and back:
//   y = (clamp(rint(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale
// (quantrain::fake_quantize; straight-through gradient).
//
// Where the scale comes from:
//   dynamic              computed from each input (choose_qparams); nothing stored
//   another observer     `scale` (float32) and, affine, `zero_point` (int32) are buffers that follow the submodule
//                        `observer`
//   and learnable        `scale` is a parameter: set by the observer, then trained by LSQ with the gradient factor
//                        1 / sqrt(x.numel() / scale.numel() * quant_max); pulled up to 1e-8 where a step took it below
//
// It observes under Calibration (calibration.h) and in training until enable_observer(false) freezes the range.
// Evaluation never moves a range, nor does a forward pass inside a backward pass (activation checkpointing). A
// learnable scale takes its first value from Calibration or else the first training batch; from then on, and from a
// loaded scale, only the optimizer moves it.
//
// A block of zeros says nothing about its range. Its scale is 1 until the first block that is not zero sets it. Where
// it is learnable and a weight's (set_of_weight: zero-initialized, so small at first and then growing), the scale
// follows that block's range from batch to batch until enable_observer(false), and is learned from there.
//
// State: `scale`, `zero_point`, and of `observer` the range and `frozen`, whether the range was frozen.
//
// Input float32, float16, bfloat16 of any shape that `scale_shape` divides; output of the same dtype and shape. Scales
// stay float32. NaN gives NaN. ValueError: no scale yet (neither observed nor loaded), a shape that does not divide, a
// NaN batch while observing. On CUDA a range that follows training waits for no such check: there a block with NaN or
// infinity leaves the range as it was and gives NaN.
class QUANTRAIN_API FakeQuantizeImpl : public Copied<FakeQuantizeImpl, FixedDtypeModule>, public Calibrates {
 public:
  // scale_shape: {1} or the input's rank, each size dividing the input's; a size of -1 takes the input's own (dynamic
  // only). per_token with {1}: one scale for each index of all dimensions but the last.
  explicit FakeQuantizeImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape = {1});

  // zero: bool, broadcast to the scale: blocks of a learnable scale to take as zeros whatever the input holds. An empty
  // input passes.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& zero = {});

  // forward's result with its codes, where there are some: one scale, fixed or learned (and then past its first value),
  // at most 8 bits, a gradient to come.
  Quantized with_codes(const at::Tensor& input);

  // forward's result of before(input) for a linear layer, with its codes and in the type of the layer's product
  // (autocast's), in one pass over memory. None where the plain call has to do: no gradient to come, more than 8 bits,
  // another granularity than per_tensor and per_token of single rows, a learned scale, calibration, an observer that
  // has to see more of before(input) than its extremes.
  std::optional<Quantized> of_rows(const at::Tensor& input, const Before& before = {});

  // Whether it rounds equal parts of a matrix's rows, each with a symmetric scale of its own, to codes of a byte.
  bool rounds_rows() const;

  // Whether a tensor becomes codes of a byte with one scale that no gradient reaches.
  bool has_codes() const;

  // Whether a learned scale has its first value everywhere. What is computed anew goes by what the first pass found.
  bool has_learned();

  // Whether it learns one scale that has its first value, for codes of a byte.
  bool learns_codes();

  // Of a learned scale's gradient for a tensor of so many elements: 1 / sqrt(elements per scale * quant_max).
  double grad_factor(int64_t numel) const;

  // Whether the extremes of a tensor are all that it needs to know of it: observe_range will do.
  bool takes_range();

  // (scale, zero_point) for a tensor of these extremes ([1] each), which are observed as forward observes a tensor;
  // undefined ones do where nothing is observed.
  std::tuple<at::Tensor, at::Tensor> observe_range(const at::Tensor& low, const at::Tensor& high);

  // Lets the range follow training, or freezes it. A learnable scale that has its first value is not observed again.
  void enable_observer(bool on = true) override;
  bool observer_enabled() const;

  // In between forward observes in evaluation mode too.
  void begin_calibration() override;
  void end_calibration(bool keep) override;
  Reached reached_by_calibration() override;

  // Whether a scale is there: dynamic, observed or loaded. The first call that finds one waits for the device.
  bool has_scale();

  // Whether a tensor that it is called with now moves the range.
  bool observing() const;

  // Takes the input's range into account where the rule above says so; what forward does first. Returns the scale and
  // the zero point for this input, copies, where a range was observed and gave a scale that is not learned; else
  // undefined ones.
  std::tuple<at::Tensor, at::Tensor> observe(const at::Tensor& input, const at::Tensor& zero = {});

  // Whether an observer saw tensors, and all of them zeros. Waits for the device.
  bool sees_only_zeros() const;

  void set_of_weight(bool on) { of_weight_ = on; }
  bool of_weight() const { return of_weight_; }

  // The path that error messages name, e.g. "layer1.0.conv1.input_fake_quant".
  void set_label(const std::string& path);

  // To be called where scale, zero_point or the observer's buffers were written from outside: what is known about them
  // is read again.
  void state_changed();

  // The (scale, zero_point) in force; zero_point undefined where symmetric. `input` is needed for dynamic only.
  std::tuple<at::Tensor, at::Tensor> calculate_qparams(const std::optional<at::Tensor>& input = std::nullopt);

  // forward's second half with a scale of the caller's choice: rows of this module's, for an embedding.
  at::Tensor quantize_dequantize(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero_point) const;

  // Takes over the switches of another.
  void copy_switches(const FakeQuantizeImpl& other);

  // Drops the observer, and makes a learnable scale a buffer: the state of a converted model.
  void freeze();

  const QuantSpec& spec() const { return spec_; }
  const std::vector<int64_t>& scale_shape() const { return scale_shape_; }
  bool dynamic() const { return spec_.dynamic(); }

  at::Tensor scale;       // undefined for dynamic
  at::Tensor zero_point;  // undefined for dynamic and for symmetric
  Observer observer{nullptr};

 private:
  friend Copied<FakeQuantizeImpl, FixedDtypeModule>;
  std::shared_ptr<FakeQuantizeImpl> fresh() const;
  std::vector<int64_t> scale_shape_of(const at::Tensor& input) const;
  void observe_first(const at::Tensor& input, const at::Tensor& zero);
  bool fits_byte() const;
  bool takes_rows(const at::Tensor& input, bool identity);
  at::Tensor unset() const;  // bool: blocks of a learnable scale without a first value

  QuantSpec spec_;
  std::vector<int64_t> scale_shape_;
  std::string label_ = "FakeQuantize";
  mutable bool observer_enabled_ = true;
  mutable std::optional<uint32_t>
      version_;  // of observer->frozen when last read: no wait for the device at each forward
  bool calibrating_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> before_;  // state and copies of it, while calibrating
  bool of_weight_ = false;
  bool has_scale_ = false;  // once seen, not checked again
  // Of a learnable scale: every block has its first value; some follow a weight that began as zeros. Both save looking.
  bool settled_ = false;
  bool follows_zeros_ = false;
  bool had_learned_ = false;  // what has_learned() found last outside of a backward pass
};
TORCH_MODULE(FakeQuantize);

// Whether this is a forward pass inside a backward pass, as activation checkpointing makes them.
QUANTRAIN_API bool in_backward();

}  // namespace quantrain::nn

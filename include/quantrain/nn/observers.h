// Observers: what range of values has a tensor had?
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

namespace detail {

// While it lives, what is drawn from the CPU's default generator leaves no trace.
class QUANTRAIN_API KeepRandomState {
 public:
  KeepRandomState();
  ~KeepRandomState();
  KeepRandomState(const KeepRandomState&) = delete;
  KeepRandomState& operator=(const KeepRandomState&) = delete;

 private:
  at::Tensor state_;
};

// Gives `to`, a module of the same structure as `from`, the values, modes and switches of `from` in tensors of its own.
QUANTRAIN_API void copy_state(const torch::nn::Module& from, torch::nn::Module& to,
                              const std::optional<torch::Device>& device);

}  // namespace detail

// clone() of the layers: a copy of everything, with tensors of its own. torch::nn::Cloneable builds a module anew with
// reset(), which a converted layer, whose parameters have become buffers, does not allow. `Derived` has fresh(): one of
// the same structure, of any values.
template <typename Derived, typename Base>
class Copied : public Base {
 public:
  using Base::Base;

  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    const detail::KeepRandomState keep;  // initial values are drawn
    const std::shared_ptr<Derived> copy = static_cast<const Derived&>(*this).fresh();
    detail::copy_state(*this, *copy, device);
    return copy;
  }

 protected:
  void clone_(torch::nn::Module& other, const std::optional<torch::Device>& device) override {
    const auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy, "clone: expected a module of the same type, got another");
    static_cast<Derived&>(*this) = *copy;
  }
};

// A module that keeps its own dtypes: to(dtype) moves nothing but the device. Scales, ranges and codes lose their
// meaning in half precision (a bfloat16 scale biases rounding), so a model cast with to(torch::kBFloat16) keeps them as
// they are.
class QUANTRAIN_API FixedDtypeModule : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
};

// Tracks the smallest and the largest value of each block of its inputs, in float32 buffers `min_val` and `max_val` of
// the shape of the scale; they start at +infinity and -infinity. spec.observer picks the batch's range (m, M):
//
//   min_max         m, M = min(x), max(x);             min_val = min(min_val, m),              max_val = max(max_val,
//                   M)
//   moving_average  m, M = min(x), max(x);             min_val += averaging_constant (m - min_val), max_val alike
//   percentile      of the n sorted elements of the block, M the k-th and m the (n + 1 - k)-th,
//                   k = ceil(percentile / 100 n);      averaged as moving_average
//   mse             the range [r min(x), r max(x)], r in {1/80, ..., 1}, whose quantized block has the least
//                   squared error;                     averaged as moving_average
//
// The first batch sets the average. A block of zeros sets the range of a block that saw nothing to [0, 0] and changes
// no other; the first block that is not zero sets the range anew. A batch with NaN or infinity raises ValueError
// (nan_policy "raise"; this waits for the device), or leaves the blocks that hold one unchanged (nan_policy "skip").
// Deterministic. Empty inputs change nothing. A third buffer, `frozen` (bool [1]), is where the switch of the
// FakeQuantize around it travels in a checkpoint.
class QUANTRAIN_API ObserverImpl : public Copied<ObserverImpl, FixedDtypeModule> {
 public:
  // The range of one batch, and which blocks are finite.
  struct Range {
    at::Tensor low;
    at::Tensor high;
    at::Tensor finite;
  };

  // scale_shape: the shape of the scale (see quantrain/ops/fake_quant.h). ValueError for observer "dynamic".
  explicit ObserverImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape = {1});

  // Takes the input's range into account; no gradient.
  void forward(const at::Tensor& input);

  // forward's two halves. check: raise on a batch that is not finite, where nan_policy says so.
  Range measure(const at::Tensor& input, bool check = true) const;
  void update(const Range& range);

  // forward, and scale and zero_point (where defined) from the range, in one operator after the measurement. Returns
  // those to use with this batch, copies: the scale is NaN in blocks that are not finite, where marks_nonfinite.
  std::tuple<at::Tensor, at::Tensor> observe_qparams(const at::Tensor& input, at::Tensor& scale,
                                                     const at::Tensor& zero_point, bool check, bool marks_nonfinite);

  // The same of a range that was measured elsewhere; without `finite` a block counts where its range is finite.
  std::tuple<at::Tensor, at::Tensor> take(const at::Tensor& low, const at::Tensor& high,
                                          const std::optional<at::Tensor>& finite, at::Tensor& scale,
                                          const at::Tensor& zero_point, bool marks_nonfinite);

  // Whether a batch's range is its extremes.
  bool of_extremes() const;

  // ValueError where a batch's extremes are not finite.
  void check_range(const at::Tensor& low, const at::Tensor& high) const;

  // The weight of a new batch; 0: the extremes of all batches.
  double averaging_constant() const;

  at::Tensor only_zeros() const;  // bool: blocks that were seen, but only as zeros
  at::Tensor unseen() const;      // bool: blocks that saw nothing

  // (scale, zero_point) of a range.
  std::tuple<at::Tensor, at::Tensor> qparams_of(const at::Tensor& low, const at::Tensor& high) const;

  // (scale, zero_point) of the range seen so far: symmetric: scale = max(|min_val|, |max_val|) / 2^(bits-1) rounded
  // down by one code, zero_point 0; affine: the range, widened to hold 0, spread over all codes. NaN where nothing has
  // been seen.
  std::tuple<at::Tensor, at::Tensor> calculate_qparams() const;

  const QuantSpec& spec() const { return spec_; }

  // What error messages call it.
  void set_label(std::string label) { label_ = std::move(label); }
  const std::string& label() const { return label_; }

  // Archives of earlier releases have no `frozen`; the module's own value stays.
  void load(torch::serialize::InputArchive& archive) override;

  at::Tensor min_val;
  at::Tensor max_val;
  at::Tensor frozen;

 private:
  friend Copied<ObserverImpl, FixedDtypeModule>;
  std::shared_ptr<ObserverImpl> fresh() const { return std::make_shared<ObserverImpl>(spec_, scale_shape_); }
  std::tuple<at::Tensor, at::Tensor> batch_range(const at::Tensor& input) const;

  QuantSpec spec_;
  std::vector<int64_t> scale_shape_;
  std::string label_ = "Observer";
};
TORCH_MODULE(Observer);

}  // namespace quantrain::nn

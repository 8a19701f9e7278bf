// Observers: what range of values has a tensor had?
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A module that keeps its own dtypes: to(dtype) moves nothing but the device. Scales, ranges and codes lose their meaning in half
// precision (a bfloat16 scale biases rounding), so a model cast with to(torch::kBFloat16) keeps them as they are.
class QUANTRAIN_API FixedDtypeModule : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
};

// Tracks the smallest and the largest value of each block of its inputs, in float32 buffers `min_val` and `max_val` of the shape
// of the scale; they start at +infinity and -infinity. spec.observer picks the batch's range (m, M):
//
//   min_max         m, M = min(x), max(x);             min_val = min(min_val, m),              max_val = max(max_val, M)
//   moving_average  m, M = min(x), max(x);             min_val += averaging_constant (m - min_val), max_val alike
//   percentile      of the n sorted elements of the block, M the k-th and m the (n + 1 - k)-th,
//                   k = ceil(percentile / 100 n);      averaged as moving_average
//   mse             the range [r min(x), r max(x)], r in {1/80, ..., 1}, whose quantised block has the least
//                   squared error;                     averaged as moving_average
//
// The first batch sets the average. A batch with NaN or infinity raises ValueError (nan_policy "raise"; this waits for the device),
// or leaves the blocks that hold one unchanged (nan_policy "skip"). Deterministic. Empty inputs change nothing.
class QUANTRAIN_API ObserverImpl : public FixedDtypeModule {
 public:
  // scale_shape: the shape of the scale (see quantrain/ops/fake_quant.h). ValueError for observer "dynamic".
  explicit ObserverImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape = {1});

  // Takes the input's range into account; no gradient.
  void forward(const at::Tensor& input);

  // (scale, zero_point) of the range seen so far: symmetric: scale = max(|min_val|, |max_val|) / 2^(bits-1) rounded down by one code,
  // zero_point 0; affine: the range, widened to hold 0, spread over all codes. NaN where nothing has been seen.
  std::tuple<at::Tensor, at::Tensor> calculate_qparams() const;

  const QuantSpec& spec() const { return spec_; }

  at::Tensor min_val;
  at::Tensor max_val;

 private:
  std::tuple<at::Tensor, at::Tensor> batch_range(const at::Tensor& input) const;

  QuantSpec spec_;
  std::vector<int64_t> scale_shape_;
};
TORCH_MODULE(Observer);

}  // namespace quantrain::nn

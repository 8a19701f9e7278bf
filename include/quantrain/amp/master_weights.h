// Float32 master copies of a model's 16-bit parameters (Micikevicius et al., arXiv:1710.03740, section 3.1): updates
// smaller than half a 16-bit step add up in the copy instead of being lost.
//
//   model->to(at::kHalf);
//   MasterWeights masters(model->parameters());
//   FusedAdamW optimizer(masters.parameters());
//   ... scaler.scale(loss).backward();
//   masters.copy_gradients_();   // 16-bit .grad of the model -> float32 .grad of the masters
//   scaler.step(optimizer);
//   masters.write_back_();       // masters -> model
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain::amp {

// stochastic_rounding  write_back_ rounds up or down at random so that the 16-bit value is the master's on average:
//                      E[round(w)] = w, with Philox numbers by (seed, offset, element), the same on CPU and CUDA
// Parameters of float32 are taken as their own masters. ValueError for parameters that are not floating point.
class QUANTRAIN_API MasterWeights {
 public:
  explicit MasterWeights(std::vector<at::Tensor> model_parameters, bool stochastic_rounding = false,
                         std::optional<at::Generator> generator = std::nullopt);

  // The masters, one per parameter and in the same order: float32 leaves that require a gradient. For the optimizer.
  const std::vector<at::Tensor>& parameters() const { return masters_; }

  // The gradients of the model's parameters, as float32, into the masters'; the model's are freed. A parameter without
  // one leaves its master without one.
  void copy_gradients_();

  // The masters' values, rounded to the model's type, into the model's parameters.
  void write_back_();

 private:
  std::vector<at::Tensor> model_;
  std::vector<at::Tensor> masters_;
  bool stochastic_;
  std::optional<at::Generator> generator_;
};

}  // namespace quantrain::amp

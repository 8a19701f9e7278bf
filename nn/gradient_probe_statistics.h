// One gradient under one quantizer, in float64: what theorem 3 of StatQuant predicts, and what draws show. Private to
// gradient_probe.
#pragma once

#include <functional>
#include <string>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/gradient_probe.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain::nn::probe {

// The error Q(x) - x of stochastic rounding by a plan: uncorrelated elements of variance p (1 - p) scale^2 in the rows
// that are rounded, y = T x, mapped back by T^-1 = diag(t) Q. T is the identity but for householder.
class ErrorModel {
 public:
  // x float32 [N, D]; the plan is that of quantize_gradient_codes.
  ErrorModel(const at::Tensor& x, const GradientSpec& spec, const QuantizedGradient& plan);

  at::Tensor variance() const;  // sum of the elements' variance, [] float64
  at::Tensor bound() const;     // (D / 4) ||S^-1||_F^2, [] float64

  // Variance of <direction, Q(x) - x>, [] float64. Floored where an element is so close to the grid that float32
  // rounding counts.
  at::Tensor variance_along(const at::Tensor& direction) const;

 private:
  at::Tensor group_sum(const at::Tensor& values) const;  // over the rows of each row's group
  at::Tensor back_weights() const;                       // ||T^-1 e_p||^2, [N, 1]

  int64_t rows_, columns_;
  at::Tensor s_, n_, m_, t_, group_;  // [N, 1] by row, group_ int64 [N]; undefined where T is the identity
  at::Tensor y_;                      // [N, D]
  at::Tensor scale_;                  // broadcasts against [N, D]; 0 for blocks without a range
  at::Tensor p_;                      // [N, D], place between the two neighbours
};

// Sums over observations; see ProbeRow for the means.
struct Sums {
  int64_t observations = 0;
  double gradient_square = 0, variance = 0, exact_variance = 0, bound = 0, weight_variance = 0;
  int64_t weight_observations = 0;
  // Projections, each observation's scaled by the model's standard deviation.
  double projection = 0, projection_square = 0;
  int64_t projections = 0, projected_observations = 0;

  double bias_z() const;
};

// A weight's gradient over batches, each batch with one pass or several. Sums of float64 over elements.
class BatchSums {
 public:
  void add(const at::Tensor& grad, bool repeat);
  ProbeLayer summary(const std::string& layer);

 private:
  void finish();

  at::Tensor group_, sum_;  // of this batch's passes; of the batches' means
  double group_square_ = 0, within_ = 0, means_square_ = 0, inverse_passes_ = 0;
  int64_t passes_ = 0, repeats_ = 0, batches_ = 0;
};

using Draw = std::function<at::Tensor(int64_t)>;  // number of the draw -> Q(x), float32 [N, D]
using SquaredEffect =
    std::function<at::Tensor(const at::Tensor&)>;  // error [N, D] float64 -> ||dTheta(error)||^2, [] float64

// Adds `draws` draws of Q(x) to the sums. effect may be empty.
void add_observation(Sums& sums, const at::Tensor& x, const ErrorModel& model, int64_t draws, const Draw& draw,
                     const SquaredEffect& effect);

}  // namespace quantrain::nn::probe

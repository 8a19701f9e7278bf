#include "nn/gradient_probe_statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace quantrain::nn::probe {
namespace {

// An element's noise counts as at least this part of scale^2 in the z-score's denominator: one that lies on the grid up
// to float32 rounding has no noise to speak of, and its rounding error would pass for bias.
constexpr double kLeastNoise = 0x1p-12;
constexpr double kFloatStep = 0x1p-23;

bool holds_zero(const GradientSpec& spec) { return spec.quantizer == "per_tensor" || spec.preserve_zero; }

// The range of each block that shares a scale, in the scale's shape.
at::Tensor block_range(const at::Tensor& y, const at::Tensor& scale, bool with_zero) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < 2; ++d)
    if (scale.size(d) == 1) dims.push_back(d);
  at::Tensor low = at::amin(y, dims, true), high = at::amax(y, dims, true);
  if (with_zero) {
    low = low.clamp_max(0);
    high = high.clamp_min(0);
  }
  return high - low;
}

double square_of(const at::Tensor& value) { return value.square().sum().item<double>(); }

}  // namespace

ErrorModel::ErrorModel(const at::Tensor& x, const GradientSpec& spec, const QuantizedGradient& plan)
    : rows_(x.size(0)), columns_(x.size(1)), y_(x.to(at::kDouble)) {
  if (plan.order.numel() > 0) {
    const at::Tensor order = plan.order.to(at::kLong), by_position = plan.reflector.to(at::kDouble);
    const at::Tensor by_row = at::zeros_like(by_position).index_copy_(0, order, by_position);
    s_ = by_row.narrow(1, 0, 1);
    n_ = by_row.narrow(1, 1, 1);
    m_ = by_row.narrow(1, 2, 1);
    t_ = by_row.narrow(1, 3, 1);
    // A group starts at its leader, n < 0, or is a single row, n = 0.
    const at::Tensor starts = by_position.select(1, 1).le(0).to(at::kLong);
    group_ = at::zeros_like(order).index_copy_(0, order, at::cumsum(starts, 0) - 1);
    y_ = s_ * y_;
    y_ = y_ - m_ * group_sum(n_ * y_);
  }
  const at::Tensor scale = plan.scale.to(at::kDouble);
  scale_ = at::minimum(scale, block_range(y_, scale, holds_zero(spec)));  // constant blocks have scale 1 in the plan
  const at::Tensor steps = (y_ - plan.offset.to(at::kDouble)) / scale;
  p_ = at::where(scale_ < scale, at::zeros_like(steps), steps - steps.floor());
}

at::Tensor ErrorModel::group_sum(const at::Tensor& values) const {
  return at::zeros_like(values).index_add_(0, group_, values).index_select(0, group_);
}

at::Tensor ErrorModel::back_weights() const {
  if (!group_.defined()) return at::ones_like(y_.narrow(1, 0, 1));
  // Column p of diag(t) Q with Q_qp = delta_qp - m_q n_p.
  return t_.square() * (1 - 2 * m_ * n_) + n_.square() * group_sum((t_ * m_).square());
}

at::Tensor ErrorModel::variance() const { return (back_weights() * scale_.square() * (p_ * (1 - p_))).sum(); }

at::Tensor ErrorModel::bound() const { return (back_weights() * scale_.square()).expand({rows_, columns_}).sum() / 4; }

at::Tensor ErrorModel::variance_along(const at::Tensor& direction) const {
  at::Tensor w = direction;
  if (group_.defined()) {  // T^-T direction = Q diag(t) direction
    w = t_ * w;
    w = w - m_ * group_sum(n_ * w);
  }
  const at::Tensor noise = scale_.square() * (p_ * (1 - p_)).clamp_min(kLeastNoise) + (kFloatStep * y_).square();
  return (w.square() * noise).sum();
}

double Sums::bias_z() const {
  if (projections == 0) return 0;
  // The larger of the model's variance, 1, and the draws' own about each observation's mean.
  const double n = static_cast<double>(projections);
  const double sample = projection_square / std::max(n - static_cast<double>(projected_observations), 1.0);
  return projection / std::sqrt(n * std::max(1.0, sample));
}

void BatchSums::add(const at::Tensor& grad, bool repeat) {
  const at::Tensor value = grad.detach().to(at::kDouble);
  if (!repeat) {
    finish();
    group_ = at::zeros_like(value);
  }
  if (!group_.defined()) return;
  group_ += value;
  group_square_ += value.square().sum().item<double>();
  passes_ += 1;
}

ProbeLayer BatchSums::summary(const std::string& layer) {
  finish();
  ProbeLayer result{layer, batches_, {}, {}, {}};
  if (batches_ == 0) return result;
  const double b = static_cast<double>(batches_), mean_square = square_of(sum_) / (b * b);
  result.gradient_square = mean_square;
  if (repeats_ > 0) result.repeat_variance = within_ / static_cast<double>(repeats_);
  if (batches_ > 1) {
    const double of_means = std::max((means_square_ - b * mean_square) / (b - 1), 0.0);
    // What is left of the passes' own noise in the means of batches.
    const double noise = result.repeat_variance.value_or(0) * inverse_passes_ / b;
    result.batch_variance = std::max(of_means - noise, 0.0);
  }
  return result;
}

void BatchSums::finish() {
  if (passes_ == 0) return;
  const double r = static_cast<double>(passes_), of_sum = square_of(group_);
  within_ += std::max(group_square_ - of_sum / r, 0.0);
  repeats_ += passes_ - 1;
  means_square_ += of_sum / (r * r);
  inverse_passes_ += 1 / r;
  sum_ = sum_.defined() ? sum_ + group_ / r : group_ / r;
  batches_ += 1;
  passes_ = 0;
  group_square_ = 0;
  group_ = at::Tensor();
}

void add_observation(Sums& sums, const at::Tensor& x, const ErrorModel& model, int64_t draws, const Draw& draw,
                     const SquaredEffect& effect) {
  const at::Tensor exact = x.to(at::kDouble);
  at::Tensor direction = at::zeros_like(exact);
  std::vector<at::Tensor> squares, effects, projections;
  for (int64_t i = 0; i < draws; ++i) {
    const at::Tensor error = draw(i).to(at::kDouble) - exact;
    squares.push_back(error.square().sum());
    if (effect) effects.push_back(effect(error));
    if (i < draws / 2) {
      direction += error;
    } else {
      projections.push_back((direction * error).sum());
    }
  }
  const double along = model.variance_along(direction).item<double>();
  const at::Tensor projected = at::stack(projections);
  sums.observations += 1;
  sums.gradient_square += exact.square().sum().item<double>();
  sums.variance += at::stack(squares).mean().item<double>();
  sums.exact_variance += model.variance().item<double>();
  sums.bound += model.bound().item<double>();
  if (effect) {
    sums.weight_observations += 1;
    sums.weight_variance += at::stack(effects).mean().item<double>();
  }
  if (along > 0) {
    const at::Tensor scaled = projected / std::sqrt(along);
    sums.projected_observations += 1;
    sums.projections += scaled.numel();
    sums.projection += scaled.sum().item<double>();
    sums.projection_square += (scaled - scaled.mean()).square().sum().item<double>();
  }
}

}  // namespace quantrain::nn::probe

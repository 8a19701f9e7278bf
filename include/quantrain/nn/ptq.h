// Linear layers under a recipe of scheme ptq: calibrated, then converted, without training between.
#pragma once

#include <memory>
#include <string>

#include "quantrain/nn/layers.h"
#include "quantrain/nn/schemes/ptq.h"
#include "quantrain/ops/ptq_linear.h"

namespace quantrain::nn {

// What calibration saw of a layer's input, by column (column_statistics_, <quantrain/ops/ptq.h>).
struct ColumnStatistics {
  at::Tensor absmax;    // float32 [K]
  at::Tensor mean_abs;  // float32 [K]
  at::Tensor hessian;   // float32 [K, K], where the recipe needs it
};

struct PtqResult {
  PtqWeight weight;
  double error = 0;  // of gptq and awq: tr((W - Q) H (W - Q)^T) / tr(W H W^T)
};

// The weight [O, K] of a layer under the recipe: factor, outlier columns, codes and scales, as PtqSpec says. Both
// languages' layers convert by it. statistics: tensors that the recipe does not need may be undefined. form_only: the
// right shapes alone, nothing searched (a skeleton to load a file into). ValueError: a recipe of another scheme, a
// weight or statistics with NaN or Inf.
QUANTRAIN_API PtqResult ptq_weight(const at::Tensor& weight, const Recipe& recipe, const ColumnStatistics& statistics,
                                   bool form_only = false);

// How a converted layer of the recipe multiplies.
QUANTRAIN_API PtqProduct ptq_product(const Recipe& recipe);

// Counts the columns of what it is shown while a Calibration lives, from nothing at its begin. State: absmax, mean_abs,
// hessian (where asked for), rows; a checkpoint carries it, so that another program converts. to(at::kCPU) lets a layer
// on a GPU count in the host's memory.
class QUANTRAIN_API ColumnObserverImpl : public Copied<ColumnObserverImpl, FixedDtypeModule>, public Calibrates {
 public:
  ColumnObserverImpl(int64_t columns, bool with_hessian);

  void observe(const at::Tensor& input);
  bool seen() const;  // whether there were rows, counted here or loaded; waits for the device
  ColumnStatistics statistics() const { return {absmax, mean_abs, hessian}; }

  void begin_calibration() override;
  void end_calibration(bool keep) override;
  Reached reached_by_calibration() override;

  at::Tensor absmax, mean_abs, hessian, rows;  // float32 [K], [K], [K, K] or undefined; int64 [1]

 private:
  friend Copied<ColumnObserverImpl, FixedDtypeModule>;
  std::shared_ptr<ColumnObserverImpl> fresh() const;
  std::vector<at::Tensor> state() const;

  bool observing_ = false;
  std::vector<at::Tensor> before_;  // the state at begin_calibration
};
TORCH_MODULE(ColumnObserver);

// y = x W^T + b. Before conversion x and W are fake-quantized as the recipe's specs say; factors, outlier columns and
// searches come with conversion, from what the child input_observer saw (there where the recipe needs it). After,
// ptq_linear on buffers weight_codes, weight_scale and what the recipe adds of input_factor, input_scale,
// outlier_columns, outlier_codes and outlier_scale.
class QUANTRAIN_API PtqLinearImpl : public Copied<PtqLinearImpl, QuantModule> {
 public:
  PtqLinearImpl(int64_t in_features, int64_t out_features, const Recipe& recipe)
      : PtqLinearImpl(torch::nn::LinearOptions(in_features, out_features), recipe) {}
  PtqLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& input);

  // Of a converted layer; its tensors share memory with the layer's.
  PtqWeight stored_weight() const;
  at::Tensor dequantized_weight(std::optional<at::ScalarType> dtype = std::nullopt) const override;

  ColumnObserver input_observer{nullptr};
  at::Tensor input_factor, input_scale, outlier_columns, outlier_codes, outlier_scale;

 protected:
  void store_codes(bool check_observed) override;

 private:
  friend Copied<PtqLinearImpl, QuantModule>;
  std::shared_ptr<PtqLinearImpl> fresh() const;
  const PtqSpec& spec() const { return *recipe().scheme_as<PtqSpec>(); }
};
TORCH_MODULE(PtqLinear);

}  // namespace quantrain::nn

#include "quantrain/nn/ptq.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "nn/layer_arguments.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/ptq.h"

namespace quantrain::nn {

using detail::defined_or_none;

namespace {

const PtqSpec& spec_of(const char* op, const Recipe& recipe) {
  const auto* spec = recipe.scheme_as<PtqSpec>();
  TORCH_CHECK_VALUE(spec && recipe.weight, op, ": expected a recipe of scheme ptq, got '", recipe.name, "'");
  return *spec;
}

void check_finite(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.isfinite().all().item<bool>(), "ptq_weight: expected a finite ", name, ", got NaN or Inf");
}

// The columns of the largest inputs, int32 [Ko], ascending.
at::Tensor largest_columns(const at::Tensor& absmax, int64_t count) {
  const auto [value, index] = at::topk(absmax, std::min(count, absmax.size(0)));
  return std::get<0>(at::sort(index)).to(at::kInt);
}

// [O, K] int8 -> int4 as quantize_4bit packs it, in whole groups.
at::Tensor packed_codes(const at::Tensor& codes, int64_t columns) {
  const at::Tensor whole = at::constant_pad_nd(codes, {0, columns - codes.size(1)});
  return quantrain::pack_int4(whole.contiguous());
}

}  // namespace

PtqResult ptq_weight(const at::Tensor& given, const Recipe& recipe, const ColumnStatistics& statistics,
                     bool form_only) {
  const PtqSpec& spec = spec_of("ptq_weight", recipe);
  TORCH_CHECK_VALUE(given.dim() == 2, "ptq_weight: expected weight [O, K], got shape ", given.sizes());
  const at::NoGradGuard no_grad;
  const int64_t k = given.size(1), bits = recipe.weight->bits;
  at::Tensor w = given.detach().to(at::kFloat);
  at::Tensor absmax = statistics.absmax, mean_abs = statistics.mean_abs, hessian = statistics.hessian;
  if (form_only) {
    absmax = mean_abs = at::ones({k}, w.options());
  } else {
    check_finite("weight", w);
    if (spec.needs_statistics(recipe)) {
      TORCH_CHECK_VALUE(absmax.defined() && mean_abs.defined() && (hessian.defined() || !spec.needs_hessian()),
                        "ptq_weight: expected the statistics that '", recipe.name, "' needs, got none");
      check_finite("input in calibration", absmax);
      if (spec.needs_hessian()) check_finite("hessian", hessian);
    }
  }
  const bool searches = spec.needs_hessian() && !form_only;
  if (searches) hessian = hessian.to(at::kFloat);

  PtqResult result;
  PtqWeight& out = result.weight;
  const bool four = bits == 4, columns = spec.static_columns();
  if (columns) out.outlier_columns = largest_columns(absmax, spec.outlier_columns);
  const at::Tensor kept = columns ? out.outlier_columns->to(at::kLong) : at::Tensor();
  const int64_t group =
      recipe.weight->granularity == Granularity::kPerGroup ? std::min(recipe.weight->group_size, k + k % 2) : k + k % 2;
  // What is rounded to few bits: without the columns that are kept at 8.
  const auto rest = [&](const at::Tensor& weight) { return four && columns ? weight.index_fill(1, kept, 0) : weight; };
  at::Tensor factor;  // of the weight
  if (spec.smooth_alpha > 0) {
    factor = smooth_factor(absmax, at::amax(w.abs(), {0}), spec.smooth_alpha);
  } else if (spec.scale_search == ScaleSearch::kAwq) {
    factor = at::ones({k}, w.options());
    if (searches) {
      const AwqScale found = awq_scale(rest(w), hessian, mean_abs, bits, four ? group : k);
      factor = found.factor;
    }
  }
  if (factor.defined()) {
    w = w * factor;
    if (searches) hessian = hessian / factor.unsqueeze(1) / factor;
    out.input_factor = factor.reciprocal();
    absmax = absmax * *out.input_factor;
  }
  if (recipe.input && !recipe.input->dynamic()) {
    const at::Tensor most = absmax.max().reshape({1});
    out.input_scale = at::where(most == 0, at::ones_like(most), most / 127);
  }
  const ColumnGrid grid = absmax_grid(rest(w), bits, four ? group : k);
  at::Tensor keep_scale, codes;
  if (four && columns) {
    keep_scale = absmax_grid(w.index_select(1, kept), 8, kept.size(0)).scale;
    out.outlier_scale = keep_scale;
  }
  if (spec.rounding == Rounding::kGptq && !form_only) {
    GptqOptions options;
    options.damping = spec.damping;
    if (four && columns) {
      options.keep = kept;
      options.keep_scale = keep_scale;
    }
    GptqCodes found = gptq_round(w, hessian, grid, options);
    codes = std::move(found.codes);
    result.error = found.error;
    if (four && columns) {
      out.outlier_codes = codes.index_select(1, kept);
      codes = codes.index_fill(1, kept, 0);
    }
  } else {
    codes = round_columns(rest(w), grid);
    if (four && columns) {
      out.outlier_codes = round_columns(w.index_select(1, kept), {keep_scale, std::nullopt, kept.size(0), -127, 127});
    }
  }
  if (!four && columns) out.outlier_codes = codes.index_select(1, kept);
  if (searches && spec.rounding != Rounding::kGptq) {
    at::Tensor q = decode_columns(codes, grid);
    if (four && columns) q = q.index_copy(1, kept, out.outlier_codes->to(at::kFloat) * keep_scale);
    const auto weighted = [&](const at::Tensor& d) { return (at::mm(d, hessian) * d).sum(at::kDouble).item<double>(); };
    const double all = weighted(w);
    result.error = all > 0 ? weighted(w - q) / all : 0.0;
  }
  out.scale = grid.scale;
  out.codes = four ? packed_codes(codes, grid.scale.size(1) * group) : codes;
  return result;
}

PtqProduct ptq_product(const Recipe& recipe) {
  const PtqSpec& spec = spec_of("ptq_product", recipe);
  return {recipe.input.has_value(), spec.outlier_threshold, spec.outlier_columns, spec.few_rows == "float"};
}

ColumnObserverImpl::ColumnObserverImpl(int64_t columns, bool with_hessian) : Copied("ColumnObserver") {
  absmax = register_buffer("absmax", at::zeros({columns}, at::kFloat));
  mean_abs = register_buffer("mean_abs", at::zeros({columns}, at::kFloat));
  if (with_hessian) hessian = register_buffer("hessian", at::zeros({columns, columns}, at::kFloat));
  rows = register_buffer("rows", at::zeros({1}, at::kLong));
}

std::shared_ptr<ColumnObserverImpl> ColumnObserverImpl::fresh() const {
  return std::make_shared<ColumnObserverImpl>(absmax.size(0), hessian.defined());
}

std::vector<at::Tensor> ColumnObserverImpl::state() const {
  std::vector<at::Tensor> tensors = {absmax, mean_abs, rows};
  if (hessian.defined()) tensors.push_back(hessian);
  return tensors;
}

void ColumnObserverImpl::observe(const at::Tensor& input) {
  if (observing_) column_statistics_(absmax, mean_abs, defined_or_none(hessian), rows, input.detach());
}

bool ColumnObserverImpl::seen() const { return rows.item<int64_t>() > 0; }

void ColumnObserverImpl::begin_calibration() {
  observing_ = true;
  before_.clear();
  for (at::Tensor& tensor : state()) {
    before_.push_back(tensor.clone());
    tensor.zero_();
  }
}

void ColumnObserverImpl::end_calibration(bool keep) {
  observing_ = false;
  const std::vector<at::Tensor> tensors = state();
  for (size_t i = 0; !keep && i < before_.size(); ++i) tensors[i].copy_(before_[i]);
  before_.clear();
}

Calibrates::Reached ColumnObserverImpl::reached_by_calibration() {
  if (!seen()) return Reached::kNothing;
  return (absmax == 0).all().item<bool>() ? Reached::kOnlyZeros : Reached::kSomething;
}

PtqLinearImpl::PtqLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe)
    : Copied("PtqLinear", recipe, std::vector<int64_t>{options.out_features(), options.in_features()},
             std::vector<int64_t>{1}) {
  spec_of("PtqLinear", recipe);
  reset_weight_and_bias(options.bias());
  if (spec().needs_statistics(recipe)) {
    input_observer = register_module("input_observer", ColumnObserver(options.in_features(), spec().needs_hessian()));
  }
}

std::shared_ptr<PtqLinearImpl> PtqLinearImpl::fresh() const {
  const auto options = torch::nn::LinearOptions(weight_shape()[1], weight_shape()[0]).bias(has_bias());
  auto layer = std::make_shared<PtqLinearImpl>(options, recipe());
  if (converted()) layer->convert_(/*check_observed=*/false);
  return layer;
}

at::Tensor PtqLinearImpl::forward(const at::Tensor& input) {
  if (converted()) {
    return quantrain::ptq_linear(input, stored_weight(), defined_or_none(bias), ptq_product(recipe()));
  }
  if (input_observer) input_observer->observe(input);
  return watched(at::linear(quantized_input(input), quantized_weight(weight), bias));
}

PtqWeight PtqLinearImpl::stored_weight() const {
  TORCH_CHECK_VALUE(converted(), "stored_weight: expected a converted PtqLinear, got one with a float weight");
  return {weight_codes,
          weight_scale,
          defined_or_none(input_factor),
          defined_or_none(input_scale),
          defined_or_none(outlier_columns),
          defined_or_none(outlier_codes),
          defined_or_none(outlier_scale)};
}

at::Tensor PtqLinearImpl::dequantized_weight(std::optional<at::ScalarType> dtype) const {
  return quantrain::ptq_dequantize(stored_weight(), weight_shape()[1], dtype.value_or(float_dtype()));
}

void PtqLinearImpl::store_codes(bool check_observed) {
  const bool seen = input_observer && input_observer->seen();
  TORCH_CHECK_VALUE(!check_observed || seen || !spec().needs_statistics(recipe()), "convert: expected a PtqLinear of '",
                    recipe().name, "' to be calibrated, got none");
  const PtqResult result =
      ptq_weight(float_weight(), recipe(), input_observer ? input_observer->statistics() : ColumnStatistics(),
                 /*form_only=*/!check_observed && !seen);
  if (input_observer) unregister_module("input_observer");
  if (input_fake_quant) unregister_module("input_fake_quant");
  input_observer = nullptr;
  input_fake_quant = nullptr;
  const auto keep = [this](const char* name, const std::optional<at::Tensor>& tensor, at::Tensor& member) {
    if (tensor) member = register_buffer(name, *tensor);
  };
  const PtqWeight& w = result.weight;
  keep("weight_codes", w.codes, weight_codes);
  keep("weight_scale", w.scale, weight_scale);
  keep("input_factor", w.input_factor, input_factor);
  keep("input_scale", w.input_scale, input_scale);
  keep("outlier_columns", w.outlier_columns, outlier_columns);
  keep("outlier_codes", w.outlier_codes, outlier_codes);
  keep("outlier_scale", w.outlier_scale, outlier_scale);
}

}  // namespace quantrain::nn

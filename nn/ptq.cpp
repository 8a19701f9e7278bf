#include "quantrain/nn/ptq.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full_like.h>
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

// Squared errors of the groups, [O, groups].
at::Tensor group_errors(const at::Tensor& w, const ColumnGrid& grid) {
  const int64_t groups = grid.scale.size(1);
  const at::Tensor error = (w - decode_columns(round_columns(w, grid), grid)).square();
  return at::constant_pad_nd(error, {0, groups * grid.group_size - w.size(1)})
      .reshape({w.size(0), groups, grid.group_size})
      .sum(2);
}

// The grid with two levels of scales: whole multiples, at most 15, of one scale per row. 8 times 15 fits int8.
// A row's largest scale stays, by which the product finds the unit (ops/four_bit_int8.cpp).
ColumnGrid two_levels(const at::Tensor& w, const ColumnGrid& grid) {
  const at::Tensor largest = at::amax(grid.scale, {1}, /*keepdim=*/true), unit = largest / 15;
  const at::Tensor multiple = at::where(grid.scale == largest, at::full_like(grid.scale, 15), grid.scale / unit);
  ColumnGrid down = grid, up = grid;
  down.scale = multiple.floor().clamp(1, 15) * unit;
  up.scale = multiple.ceil().clamp(1, 15) * unit;
  const at::Tensor better = group_errors(w, down) < group_errors(w, up);
  ColumnGrid chosen = grid;
  chosen.scale = at::where(grid.scale == 0, grid.scale, at::where(better, down.scale, up.scale));
  return chosen;
}

// A layer on its way: what is chosen goes to `result`, and what later choices see changes with it.
struct Choice {
  const Recipe& recipe;
  const PtqSpec& spec;
  bool searches;                         // by the Hessian; not where only the form is asked for
  at::Tensor w;                          // float32 [O, K]
  at::Tensor absmax, mean_abs, hessian;  // of the input in the coordinates of w
  at::Tensor kept;                       // int64 [Ko], or undefined
  PtqResult result = {};

  bool four_bits() const { return recipe.weight->bits == 4; }
  bool keeps_at_8() const { return four_bits() && kept.defined(); }
  int64_t columns() const { return w.size(1); }
  // A row of 4 bits has an even number of codes.
  int64_t group_size() const {
    if (!four_bits()) return columns();
    const int64_t even = columns() + columns() % 2;
    return recipe.weight->granularity == Granularity::kPerGroup ? std::min(recipe.weight->group_size, even) : even;
  }
  // What is rounded to the recipe's bits: without the columns that are kept at 8.
  at::Tensor rest() const { return keeps_at_8() ? w.index_fill(1, kept, 0) : w; }
  double weighted(const at::Tensor& d) const { return (at::mm(d, hessian) * d).sum(at::kDouble).item<double>(); }

  void choose_columns();
  void choose_factor();
  void choose_input_scale();
  void choose_codes();
};

void Choice::choose_columns() {
  if (!spec.static_columns()) return;
  result.weight.outlier_columns = largest_columns(absmax, spec.outlier_columns);
  kept = result.weight.outlier_columns->to(at::kLong);
}

void Choice::choose_factor() {
  at::Tensor factor;
  if (spec.smooth_alpha > 0) {
    factor = smooth_factor(absmax, at::amax(w.abs(), {0}), spec.smooth_alpha);
  } else if (spec.scale_search == ScaleSearch::kAwq) {
    factor = searches ? awq_scale(rest(), hessian, mean_abs, recipe.weight->bits, group_size()).factor
                      : at::ones({columns()}, w.options());
  } else {
    return;
  }
  w = w * factor;
  if (searches) hessian = hessian / factor.unsqueeze(1) / factor;
  result.weight.input_factor = factor.reciprocal();
  absmax = absmax * *result.weight.input_factor;
}

void Choice::choose_input_scale() {
  if (!recipe.input || recipe.input->dynamic()) return;
  const at::Tensor most = absmax.max().reshape({1});
  result.weight.input_scale = at::where(most == 0, at::ones_like(most), most / 127);
}

void Choice::choose_codes() {
  PtqWeight& out = result.weight;
  ColumnGrid grid = absmax_grid(rest(), recipe.weight->bits, group_size());
  if (four_bits() && spec.group_scales == "two_level") grid = two_levels(rest(), grid);
  ColumnGrid keep_grid;
  if (keeps_at_8()) {
    keep_grid = absmax_grid(w.index_select(1, kept), 8, kept.size(0));
    out.outlier_scale = keep_grid.scale;
  }
  at::Tensor codes;
  if (spec.rounding == Rounding::kGptq && searches) {
    GptqOptions options;
    options.damping = spec.damping;
    if (keeps_at_8()) {
      options.keep = kept;
      options.keep_scale = keep_grid.scale;
    }
    GptqCodes found = gptq_round(w, hessian, grid, options);
    codes = std::move(found.codes);
    result.error = found.error;
    if (kept.defined()) out.outlier_codes = codes.index_select(1, kept);
    if (keeps_at_8()) codes = codes.index_fill(1, kept, 0);
  } else {
    codes = round_columns(rest(), grid);
    if (keeps_at_8()) out.outlier_codes = round_columns(w.index_select(1, kept), keep_grid);
    if (kept.defined() && !keeps_at_8()) out.outlier_codes = codes.index_select(1, kept);
    if (searches) {
      at::Tensor q = decode_columns(codes, grid);
      if (keeps_at_8()) q = q.index_copy(1, kept, decode_columns(*out.outlier_codes, keep_grid));
      const double all = weighted(w);
      result.error = all > 0 ? weighted(w - q) / all : 0.0;
    }
  }
  out.scale = grid.scale;
  out.codes = four_bits() ? packed_codes(codes, grid.scale.size(1) * group_size()) : codes;
}

}  // namespace

PtqResult ptq_weight(const at::Tensor& weight, const Recipe& recipe, const ColumnStatistics& statistics,
                     bool form_only) {
  const PtqSpec& spec = spec_of("ptq_weight", recipe);
  TORCH_CHECK_VALUE(weight.dim() == 2, "ptq_weight: expected weight [O, K], got shape ", weight.sizes());
  const at::NoGradGuard no_grad;
  // Statistics may have been counted in the host's memory.
  const auto beside = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(weight.device()) : tensor; };
  Choice layer{recipe,
               spec,
               spec.needs_hessian() && !form_only,
               weight.detach().to(at::kFloat),
               beside(statistics.absmax),
               beside(statistics.mean_abs),
               beside(statistics.hessian),
               {}};
  if (form_only) {
    layer.absmax = at::ones({layer.columns()}, layer.w.options());
  } else {
    check_finite("weight", layer.w);
    if (spec.needs_statistics(recipe)) {
      TORCH_CHECK_VALUE(
          layer.absmax.defined() && layer.mean_abs.defined() && (layer.hessian.defined() || !spec.needs_hessian()),
          "ptq_weight: expected the statistics that '", recipe.name, "' needs, got none");
      check_finite("input in calibration", layer.absmax);
      if (spec.needs_hessian()) check_finite("hessian", layer.hessian);
    }
  }
  layer.choose_columns();
  layer.choose_factor();
  layer.choose_input_scale();
  layer.choose_codes();
  return std::move(layer.result);
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
  const bool kept = seen();  // of a Hessian that is zeros no second one is held
  for (at::Tensor& tensor : state()) {
    if (kept) before_.push_back(tensor.clone());
    tensor.zero_();
  }
}

void ColumnObserverImpl::end_calibration(bool keep) {
  observing_ = false;
  const std::vector<at::Tensor> tensors = state();
  for (size_t i = 0; !keep && i < tensors.size(); ++i)
    before_.empty() ? tensors[i].zero_() : tensors[i].copy_(before_[i]);
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

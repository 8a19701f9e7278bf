#include "quantrain/nn/int8_linear.h"

#include <optional>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>

#include "nn/layer_arguments.h"
#include "ops/common/stream.h"
#include "quantrain/nn/schemes/int8.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/int8_linear.h"

namespace quantrain::nn {

using detail::defined_or_none;

Int8LinearImpl::Int8LinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe)
    : Copied("Int8Linear", recipe, {options.out_features(), options.in_features()}, {1}) {
  TORCH_CHECK_VALUE(recipe.scheme_as<Int8Spec>(), "Int8Linear: expected a recipe with int8, got '", recipe.name, "'");
  reset_weight_and_bias(options.bias());
}

at::Tensor Int8LinearImpl::forward(const at::Tensor& input) {
  if (multiplies_integers()) return quantized_output(recipe().scheme->integer_linear(*this, input));
  if (converted()) {
    const at::Tensor x = quantized_input(input);
    return quantized_output(
        at::linear(x, dequantized_weight(x.scalar_type()), bias.defined() ? bias.to(x.scalar_type()) : bias));
  }
  if (left_float() || !weight_fake_quant->fake_quant_enabled() || !input_fake_quant->fake_quant_enabled()) {
    return quantized_output(watched(at::linear(input, weight, bias)));
  }
  const Int8Spec& spec = *recipe().scheme_as<Int8Spec>();
  const bool gradients = quantizes_gradients();
  const Int8LinearOptions options{spec.output, gradients ? std::string_view(spec.grad_input) : "none",
                                  gradients ? std::string_view(spec.grad_weight) : "none", spec.weight_scheme,
                                  spec.simulate};
  std::optional<at::Tensor> codes, scale;
  // What is recorded for replays would find a kept tensor stale.
  if (cache_weight_ && at::GradMode::is_enabled() && !is_capturing(weight.device())) {
    const WeightCodes& kept = kept_codes();
    codes = kept.codes;
    scale = kept.scale;
  }
  return quantized_output(watched(quantrain::int8_linear(input, weight, defined_or_none(bias), options, codes, scale)));
}

const Int8LinearImpl::WeightCodes& Int8LinearImpl::kept_codes() {
  if (!kept_.codes.defined() || kept_.data != weight.const_data_ptr() || kept_.version != weight._version()) {
    Int8Codes rows = quantrain::int8_quantize_rows(weight.detach());
    kept_ = {std::move(rows.codes), std::move(rows.scale), weight.const_data_ptr(),
             static_cast<uint32_t>(weight._version())};
  }
  return kept_;
}

void Int8LinearImpl::set_cache_weight(bool on) {
  cache_weight_ = on;
  kept_ = {};
}

void Int8LinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  kept_ = {};
  QuantModule::to(device, dtype, non_blocking);
}

void Int8LinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  kept_ = {};
  QuantModule::to(dtype, non_blocking);
}

void Int8LinearImpl::to(torch::Device device, bool non_blocking) {
  kept_ = {};
  QuantModule::to(device, non_blocking);
}

WeightCache::WeightCache(torch::nn::Module& module) {
  for (const auto& child : module.modules()) {
    if (auto layer = std::dynamic_pointer_cast<Int8LinearImpl>(child)) layers_.push_back(std::move(layer));
  }
  for (const auto& layer : layers_) layer->set_cache_weight(true);
}

WeightCache::~WeightCache() {
  for (const auto& layer : layers_) layer->set_cache_weight(false);
}

}  // namespace quantrain::nn

#include "quantrain/nn/fixed_point/layers.h"

// The forward passes call the same ATen operators in the same order as the Python layers, so that both train alike and
// evaluate to the same bits.

#include <algorithm>
#include <cmath>
#include <string>
#include <variant>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include "nn/fixed_point/constants.h"
#include "nn/parameters.h"
#include "quantrain/nn/fake_quantize.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/fixed_point.h"

namespace quantrain::nn {

using detail::kWordLength;
namespace {

constexpr double kInitialFractionLength = 6.0;  // before the first batch, as published
constexpr double kAveraging = 0.1;       // weight of the new batch in the average of fraction lengths, as published
constexpr double kSmallestLevel = 1e-8;  // an optimizer's step can carry a level through zero
constexpr double kExactFloat32 = 16777216.0;  // 2^24: integers below it are exact in float32
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Products and sums of small integers held in floating point stay exact: no autocast, no cuDNN (Winograd, TF32).
class ExactArithmetic {
 public:
  ExactArithmetic() : cudnn_(at::globalContext().userEnabledCuDNN()), tf32_(at::globalContext().allowTF32CuBLAS()) {
    at::globalContext().setUserEnabledCuDNN(false);
    at::globalContext().setAllowTF32CuBLAS(false);
  }
  ~ExactArithmetic() {
    at::globalContext().setUserEnabledCuDNN(cudnn_);
    at::globalContext().setAllowTF32CuBLAS(tf32_);
  }
  ExactArithmetic(const ExactArithmetic&) = delete;
  ExactArithmetic& operator=(const ExactArithmetic&) = delete;

 private:
  bool cudnn_;
  bool tf32_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

at::Tensor float_tensor(double value) { return at::full({1}, value, at::kFloat); }

const FixedPointSpec& fixed_point_spec(const std::string& name, const Recipe& recipe) {
  recipe.validate();
  const auto* spec = recipe.scheme_as<FixedPointSpec>();
  TORCH_CHECK_VALUE(spec, name, ": expected a recipe with fixed_point, got '", recipe.name, "'");
  return *spec;
}

std::vector<int64_t> conv_weight_shape(const torch::nn::Conv2dOptions& options) {
  static const std::string kName = "FixedPointConv2d";
  const int64_t groups = options.groups();
  TORCH_CHECK_VALUE(groups == 1 || (groups == options.in_channels() && groups == options.out_channels()), kName,
                    ": expected groups of 1 or a depthwise convolution, got groups=", groups, " of ",
                    options.in_channels(), " channels");
  const at::ArrayRef<int64_t> dilation = *options.dilation();
  TORCH_CHECK_VALUE(dilation[0] == 1 && dilation[1] == 1, kName, ": expected dilation 1, got ", dilation);
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()), kName,
                    ": expected padding_mode zeros, got another");
  TORCH_CHECK_VALUE(std::holds_alternative<torch::ExpandingArray<2>>(options.padding()), kName,
                    ": expected padding in numbers, got a name");
  const at::ArrayRef<int64_t> kernel = *options.kernel_size();
  return {options.out_channels(), options.in_channels() / groups, kernel[0], kernel[1]};
}

}  // namespace

// ---- activations ----------------------------------------------------------------------------------------------------

FixedPointActivationImpl::FixedPointActivationImpl(const FixedPointActivationOptions& options)
    : FixedDtypeModule("FixedPointActivation"), options_(options) {
  TORCH_CHECK_VALUE(options_.method == "std" || options_.method == "mse",
                    "FixedPointActivation: expected method 'std' or 'mse', got '", options_.method, "'");
  TORCH_CHECK_VALUE(options_.alpha > 0, "FixedPointActivation: expected alpha > 0, got ", options_.alpha);
  if (options_.clip) {
    const at::Tensor first = float_tensor(std::min(options_.alpha, options_.max_alpha));
    alpha = options_.fixed ? register_buffer("alpha", first) : register_parameter("alpha", first);
  }
  fraction_length = register_buffer("fraction_length", float_tensor(kInitialFractionLength));
}

at::Tensor FixedPointActivationImpl::rounded_fraction_length() const {
  const int64_t sign = const_cast<FixedPointActivationImpl*>(this)->is_signed() ? 1 : 0;
  return at::clamp(at::round(fraction_length), 0, kWordLength - sign).to(at::kInt);
}

at::Tensor FixedPointActivationImpl::level() {
  if (is_training() && !options_.fixed) {
    alpha.variable_data().clamp_(kSmallestLevel, options_.max_alpha);  // in place, so that it can grow again
  }
  return at::clamp(at::abs(alpha), kSmallestLevel, options_.max_alpha);
}

at::Tensor FixedPointActivationImpl::step() { return level() / quant_max(); }

at::Tensor FixedPointActivationImpl::eta() {
  if (!options_.clip) return at::ones_like(fraction_length);
  return at::exp2(rounded_fraction_length().to(at::kFloat)) * step();
}

at::Tensor FixedPointActivationImpl::forward(const at::Tensor& input, bool first) {
  if (!fake_quant_enabled()) {
    const at::Tensor x = is_signed() ? input : at::relu(input);
    if (calibrating_) calibrate(x);
    return options_.max_alpha == kInfinity ? x : at::clamp_max(x, options_.max_alpha);
  }
  if (!is_training()) return rounded_units(input);
  if ((first || !options_.clip) && !in_backward()) follow(input, first);
  return rounded_real(input);
}

at::Tensor FixedPointActivationImpl::rounded_real(const at::Tensor& input) {
  if (options_.clip) {
    if (options_.fixed) return quantrain::fake_quantize(input, step(), std::nullopt, quant_min(), quant_max());
    return quantrain::fake_quantize_learnable(input, step(), std::nullopt, quant_min(), quant_max());
  }
  const at::Tensor unit = eta();
  return quantrain::fixed_point_quantize(input / unit, rounded_fraction_length(), kWordLength, is_signed()) * unit;
}

at::Tensor FixedPointActivationImpl::rounded_units(const at::Tensor& units) {
  const at::Tensor scale = at::exp2(rounded_fraction_length().to(units.scalar_type()));
  return (at::clamp(at::round(units * scale), quant_min(), quant_max()) / scale).to(at::kFloat);
}

at::Tensor FixedPointActivationImpl::batch_fraction_length(const at::Tensor& real) {
  const at::NoGradGuard no_grad;
  at::Tensor x = real.detach();
  if (!options_.clip) x = x / eta();
  if (!is_signed()) x = at::relu(x);
  const std::string method = options_.method == "mse" ? "mse" : is_signed() ? "std" : "rms";
  return quantrain::fixed_point_fraction_length(x, std::nullopt, kWordLength, is_signed(), method);
}

void FixedPointActivationImpl::follow(const at::Tensor& input, bool first) {
  const at::NoGradGuard no_grad;
  if (first) before_ = fraction_length.clone();
  if (!before_.defined()) before_ = at::full_like(fraction_length, kInitialFractionLength);
  const at::Tensor moved = at::lerp(before_, batch_fraction_length(input).to(at::kFloat), kAveraging);
  fraction_length.copy_(first ? moved : at::minimum(fraction_length, moved));
}

void FixedPointActivationImpl::begin_calibration() {
  calibrating_ = true;
  seen_.clear();
  calls_ = 0;
}

void FixedPointActivationImpl::calibrate(const at::Tensor& input) {
  const at::NoGradGuard no_grad;
  if (input.numel() == 0) return;
  if (calls_ == seen_.size()) seen_.emplace_back();
  Seen& seen = seen_[calls_++];
  if (options_.clip) {
    TORCH_CHECK_VALUE(at::isfinite(input).all().item<bool>(),
                      "FixedPointActivation: expected a batch without NaN or infinity, got one that holds some");
    const auto [low, high] = quantrain::detail::mse_range(input, {1}, quant_min(), quant_max(), is_signed());
    if (!seen.low.defined()) {
      seen.low = low;
      seen.high = high;
    } else {  // as Observer: zeros change nothing, what follows zeros sets the range anew
      const at::Tensor zero = at::logical_and(low == 0, high == 0);
      const at::Tensor first = at::logical_and(seen.low == 0, seen.high == 0);
      const at::Tensor new_low = at::where(first, low, seen.low + kAveraging * (low - seen.low));
      const at::Tensor new_high = at::where(first, high, seen.high + kAveraging * (high - seen.high));
      seen.low = at::where(zero, seen.low, new_low);
      seen.high = at::where(zero, seen.high, new_high);
    }
    seen.fraction_lengths.push_back(batch_fraction_length(input));
  } else {
    seen.inputs.push_back(input.detach());  // rounded at the end, when eta is known
  }
}

void FixedPointActivationImpl::end_calibration(bool keep) {
  const at::NoGradGuard no_grad;
  if (!calibrating_) return;
  calibrating_ = false;
  reached_ = !seen_.empty();
  if (!keep) seen_.clear();
  if (seen_.empty()) return;
  if (options_.clip && !(options_.fixed && options_.max_alpha < kInfinity)) {
    std::vector<at::Tensor> highest;
    for (const Seen& seen : seen_) {
      highest.push_back(at::maximum(at::abs(seen.low), at::abs(seen.high)));
    }
    at::Tensor found = at::amax(at::stack(highest), 0);
    found = at::where(at::logical_and(at::isfinite(found), found > 0), found, at::ones_like(found));
    alpha.copy_(at::clamp_max(found, options_.max_alpha));
  }
  std::vector<at::Tensor> averages;
  for (Seen& seen : seen_) {
    for (const at::Tensor& input : seen.inputs) seen.fraction_lengths.push_back(batch_fraction_length(input));
    averages.push_back(at::stack(seen.fraction_lengths).to(at::kFloat).mean(0));
  }
  fraction_length.copy_(options_.clip ? averages[0] : at::amin(at::stack(averages), 0));
  seen_.clear();
}

FixedPointInputImpl::FixedPointInputImpl(const FixedPointSpec& spec, bool is_signed)
    : FixedPointActivationImpl({.is_signed = is_signed, .method = spec.fraction_length, .fixed = true, .alpha = 1.0}) {
  is_signed_ = register_buffer("is_signed", at::full({1}, is_signed, at::kBool));
}

// Read anew only where the buffer was written: no wait for the device at each forward.
bool FixedPointInputImpl::is_signed() {
  if (!version_ || *version_ != is_signed_._version()) {
    options_.is_signed = is_signed_.item<bool>();
    version_ = static_cast<uint32_t>(is_signed_._version());
  }
  return options_.is_signed;
}

at::Tensor FixedPointInputImpl::forward(const at::Tensor& input, bool /*first*/) {
  if (!fake_quant_enabled()) {
    if (calibrating() && input.numel() > 0) {
      const auto [low, high] = at::aminmax(input.detach().to(at::kFloat));
      low_ = low_.defined() ? at::minimum(low_, low) : low;
      high_ = high_.defined() ? at::maximum(high_, high) : high;
    }
    return input;
  }
  // FL stays: eta is exact for any, and that of images does not change.
  if (is_training()) return rounded_real(input);
  const at::NoGradGuard no_grad;
  const at::Tensor codes = at::clamp(at::round(input.to(at::kFloat) * (1 / step())), quant_min(), quant_max());
  return codes * at::exp2(-rounded_fraction_length().to(at::kFloat));
}

void FixedPointInputImpl::begin_calibration() {
  FixedPointActivationImpl::begin_calibration();
  low_ = high_ = at::Tensor();
}

void FixedPointInputImpl::end_calibration(bool keep) {
  const at::NoGradGuard no_grad;
  FixedPointActivationImpl::end_calibration(keep);
  reached_ = low_.defined();
  if (!keep) low_ = high_ = at::Tensor();
  if (!low_.defined()) return;
  const float low = low_.item<float>();
  const float largest = std::max(std::fabs(low), std::fabs(high_.item<float>()));
  is_signed_.fill_(low < 0);
  alpha.fill_(largest > 0 && std::isfinite(largest) ? largest : 1.0F);
  // The FL at which eta is nearest to 1, so that units are about real values.
  const at::Tensor best = at::round(at::log2(static_cast<double>(quant_max()) / alpha));
  fraction_length.copy_(at::clamp(best, 0, kWordLength - (is_signed() ? 1 : 0)));
  low_ = high_ = at::Tensor();
}

FixedPointPoolActivationImpl::FixedPointPoolActivationImpl(std::shared_ptr<FixedPointActivationImpl> source,
                                                           const std::string& method)
    : FixedPointActivationImpl({.is_signed = source->is_signed(), .clip = false, .method = method}),
      source_(std::move(source)) {}

// FL is that of units, whose eta is known once the source has its level.
void FixedPointPoolActivationImpl::end_calibration(bool keep) {
  source_->end_calibration(keep);
  FixedPointActivationImpl::end_calibration(keep);
}

int64_t FixedPointPoolActivationImpl::shift() const {
  return static_cast<int64_t>(std::nearbyint(std::log2(static_cast<double>(std::max<int64_t>(pixels, 1)))));
}

at::Tensor FixedPointPoolActivationImpl::eta() {
  const double count = static_cast<double>(std::max<int64_t>(pixels, 1));
  return source_->eta() * (std::ldexp(1.0, static_cast<int>(shift())) / count);
}

// ---- layers ---------------------------------------------------------------------------------------------------------

FixedPointLayer::FixedPointLayer(const std::string& name, const Recipe& recipe,
                                 const std::vector<int64_t>& weight_shape, bool has_bias)
    : torch::nn::Module(name), recipe_(recipe) {
  fixed_point_spec(name, recipe_);
  detail::register_weight_and_bias(*this, weight_shape, has_bias, weight, bias);
}

void FixedPointLayer::connect(std::shared_ptr<FixedPointActivationImpl> input,
                              std::shared_ptr<FixedPointActivationImpl> output, FixedPointActivation owned,
                              bool rounds) {
  input_activation = std::move(input);
  output_activation = std::move(output);
  quantizes = rounds && output_activation;
  if (!owned.is_empty()) activation = register_module("activation", owned);
  const bool per_channel = recipe_.weight->granularity == Granularity::kPerChannel && output_activation;
  weight_fraction_length = register_buffer(
      "weight_fraction_length", at::zeros(per_channel ? rows(weight.size(0)) : std::vector<int64_t>{1}, at::kInt));
  reset_fraction_length();
}

std::vector<int64_t> FixedPointLayer::rows(int64_t channels) const {
  std::vector<int64_t> shape(static_cast<size_t>(weight.dim()), 1);
  shape[0] = channels;
  return shape;
}

at::Tensor FixedPointLayer::scale_factor() const {
  if (!bn) return {};
  return bn->weight * at::rsqrt(bn->running_var + bn->options.eps());
}

std::pair<at::Tensor, at::Tensor> FixedPointLayer::factor(const at::Tensor& sf) const {
  at::Tensor factor = input_activation->eta();
  if (output_activation) factor = factor / output_activation->eta();
  if (sf.defined()) factor = factor * sf;
  if (factor.numel() > 1) factor = factor.reshape(rows());
  if (output_activation) return {factor, {}};
  const at::Tensor effective = weight.detach() * factor.detach();
  const at::Tensor deviation = at::sqrt(at::square(effective.to(at::kFloat)).mean()).reshape(1);
  at::Tensor exponent = at::floor(at::log2(detail::kMedianC / deviation)) - (kWordLength - 1);
  exponent = at::clamp(at::where(at::isfinite(exponent), exponent, at::zeros_like(exponent)), -31, 31);
  return {factor * at::exp2(exponent), exponent};
}

at::Tensor FixedPointLayer::choose_fraction_length(const at::Tensor& effective_weight, bool fresh) const {
  const FixedPointSpec& spec = *recipe_.scheme_as<FixedPointSpec>();
  const std::optional<int64_t> axis = weight_fraction_length.dim() > 1 ? std::optional<int64_t>(0) : std::nullopt;
  const bool keep = !fresh && spec.hysteresis > 0;
  return quantrain::fixed_point_fraction_length(
      effective_weight.detach(), axis, kWordLength, true, spec.fraction_length,
      keep ? std::optional<at::Tensor>(weight_fraction_length) : std::nullopt, keep ? spec.hysteresis : 0.0);
}

void FixedPointLayer::reset_fraction_length() {
  const at::NoGradGuard no_grad;
  weight_fraction_length.copy_(choose_fraction_length(weight * factor(scale_factor()).first, /*fresh=*/true));
}

at::Tensor FixedPointLayer::rounded(const at::Tensor& effective_weight) {
  const at::Tensor fraction_length = choose_fraction_length(effective_weight);
  {
    const at::NoGradGuard no_grad;
    weight_fraction_length.copy_(fraction_length);
  }
  return quantrain::fixed_point_quantize(effective_weight, fraction_length, kWordLength, true);
}

at::Tensor FixedPointLayer::forward(const at::Tensor& input, const at::Tensor& residual) {
  if (fake_quant_enabled() && !is_training()) return unit_forward(input, residual);
  at::Tensor y = !fake_quant_enabled()                                       ? float_forward(input)
                 : recipe_.scheme_as<FixedPointSpec>()->double_forward && bn ? double_forward(input)
                                                                             : one_forward(input);
  if (residual.defined()) y = y + residual;
  return quantizes ? output_activation->forward(y, /*first=*/!activation.is_empty()) : y;
}

at::Tensor FixedPointLayer::float_forward(const at::Tensor& input) {
  const at::Tensor y = product(input, weight, bias);
  return bn ? bn->forward(y) : y;
}

at::Tensor FixedPointLayer::one_forward(const at::Tensor& input) {
  at::Tensor constant;
  {
    const at::NoGradGuard no_grad;
    constant = factor(scale_factor()).first;
    constant = at::where(constant == 0, at::ones_like(constant), constant);
  }
  const at::Tensor y = product(input, rounded(weight * constant) / constant, bias);
  return bn ? bn->forward(y) : y;
}

at::Tensor FixedPointLayer::double_forward(const at::Tensor& input) {
  const at::Tensor y = product(input, weight, bias);
  bn->forward(y);  // moves the running statistics
  const auto [variance, mean] = at::var_mean(y.to(at::kFloat), {0, 2, 3}, /*correction=*/0);
  const at::Tensor sf = bn->weight * at::rsqrt(variance + bn->options.eps());
  const at::Tensor both = factor(sf).first;
  const at::Tensor ratio = both / sf.reshape(rows());  // eta_in / eta_out
  const at::Tensor w = rounded(weight * both) / ratio;
  const at::Tensor shift = bias.defined() ? mean - bias : mean;
  return product(input, w, bn->bias - shift * sf);
}

FixedPointFolded FixedPointLayer::folded() {
  const FixedPointSpec& spec = *recipe_.scheme_as<FixedPointSpec>();
  FixedPointFoldArguments arguments{.weight = weight,
                                    .bias = bias,
                                    .eta_in = input_activation->eta(),
                                    .input_fraction_length = input_activation->rounded_fraction_length(),
                                    .input_quant_max = input_activation->quant_max(),
                                    .weight_fraction_length = weight_fraction_length,
                                    .method = spec.fraction_length,
                                    .hysteresis = spec.hysteresis};
  if (output_activation) arguments.eta_out = output_activation->eta();
  if (bn) {
    arguments.bn_weight = bn->weight;
    arguments.bn_bias = bn->bias;
    arguments.bn_running_mean = bn->running_mean;
    arguments.bn_running_var = bn->running_var;
    arguments.bn_eps = bn->options.eps();
  }
  return fold_fixed_point(arguments);
}

at::Tensor FixedPointLayer::unit_forward(const at::Tensor& input, const at::Tensor& residual) {
  const ExactArithmetic exact;
  const FixedPointFolded layer = folded();
  const at::ScalarType type = layer.bound.max().item<double>() < kExactFloat32 ? at::kFloat : at::kDouble;
  at::Tensor b;
  if (layer.bias_codes.defined()) {
    b = (layer.bias_codes * at::exp2(-layer.accumulator_fraction_length.to(at::kDouble))).to(type);
  }
  at::Tensor y = product(input.to(type), layer.weight.to(type), b);
  if (residual.defined()) y = y.to(at::kDouble) + residual.to(at::kDouble);
  if (layer.exponent.defined()) return (y * at::exp2(-layer.exponent)).to(at::kFloat);
  return quantizes ? output_activation->rounded_units(y) : y;
}

FixedPointConv2dImpl::FixedPointConv2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe,
                                           bool batch_norm)
    : FixedPointLayer("FixedPointConv2d", recipe, conv_weight_shape(options), options.bias()), options_(options) {
  if (batch_norm) {
    bn = register_module("bn", torch::nn::BatchNorm2d(torch::nn::BatchNorm2dOptions(options.out_channels())));
  }
}

std::array<int64_t, 2> FixedPointConv2dImpl::padding() const {
  const at::ArrayRef<int64_t> sizes = *std::get<torch::ExpandingArray<2>>(options_.padding());
  return {sizes[0], sizes[1]};
}

at::Tensor FixedPointConv2dImpl::product(const at::Tensor& input, const at::Tensor& weight,
                                         const at::Tensor& bias) const {
  return at::conv2d(input, weight, bias, options_.stride(), padding(), 1, options_.groups());
}

FixedPointLinearImpl::FixedPointLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe)
    : FixedPointLayer("FixedPointLinear", recipe, {options.out_features(), options.in_features()}, options.bias()) {}

at::Tensor FixedPointLinearImpl::product(const at::Tensor& input, const at::Tensor& weight,
                                         const at::Tensor& bias) const {
  return at::linear(input, weight, bias);
}

FixedPointAvgPool2dImpl::FixedPointAvgPool2dImpl(std::shared_ptr<FixedPointActivationImpl> input_activation,
                                                 const Recipe& recipe)
    : torch::nn::Module("FixedPointAvgPool2d") {
  const FixedPointSpec spec = fixed_point_spec("FixedPointAvgPool2d", recipe);
  size = register_buffer("size", at::zeros({2}, at::kLong));
  activation =
      register_module("activation", FixedPointPoolActivation(std::move(input_activation), spec.fraction_length));
}

void FixedPointAvgPool2dImpl::end_calibration(bool keep) {
  const at::NoGradGuard no_grad;
  if (!keep) size.copy_(size_before_);
}

void FixedPointAvgPool2dImpl::read_size() {
  if (version_ && *version_ == size._version()) return;
  activation->pixels = size.prod().item<int64_t>();
  version_ = static_cast<uint32_t>(size._version());
}

at::Tensor FixedPointAvgPool2dImpl::forward(const at::Tensor& input) {
  read_size();
  if (activation->pixels != input.size(2) * input.size(3)) {
    const at::NoGradGuard no_grad;
    size.copy_(at::tensor({input.size(2), input.size(3)}, at::kLong));
    read_size();
  }
  if (!fake_quant_enabled() || is_training()) return activation->forward(at::mean(input, {2, 3}, /*keepdim=*/true));
  const double part = std::ldexp(1.0, -static_cast<int>(activation->shift()));
  return activation->forward(at::sum(input, {2, 3}, /*keepdim=*/true) * part);
}

}  // namespace quantrain::nn

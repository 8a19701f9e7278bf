#include "quantrain/nn/schemes/gradient_quant.h"

#include <map>
#include <stdexcept>

#include <c10/util/Exception.h>

#include "nn/json_fields.h"
#include "nn/layer_arguments.h"
#include "nn/named_recipes.h"
#include "nn/schemes/table.h"
#include "ops/gradient_quant_check.h"
#include "quantrain/ops/fqt.h"

namespace quantrain::nn {

using detail::check_one_of;
using detail::defined_or_none;
using detail::fail_field;

GradientSpec GradientSpec::resolved(const std::string& tensor, bool convolution) const {
  check_one_of(kTypeName, "tensor", tensor, {"grad_input", "grad_weight"});
  GradientSpec spec = *this;
  if (spec.quantizer == "auto") {
    spec.quantizer = tensor == "grad_input" ? "per_sample" : convolution ? "per_tensor" : "per_channel";
  }
  if (spec.rows == "auto") spec.rows = convolution ? "sample" : "token";
  return spec;
}

void GradientSpec::validate() const {
  const std::string fault = quantrain::detail::gradient_quantizer_fault(*this, "quantizer", "", {"auto"});
  if (!fault.empty()) throw std::invalid_argument(std::string(kTypeName) + ": expected " + fault);
}

std::string GradientSpec::to_json() const { return detail::to_object(*this).dump(); }

GradientSpec GradientSpec::from_json(const std::string& text) {
  return detail::from_object<GradientSpec>(detail::parse_object(kTypeName, text));
}

void GradientQuantSpec::validate() const {
  if (!grad_input && !grad_weight) fail_field(kTypeName, "a spec for grad_input or grad_weight", "none");
  if (grad_input) grad_input->validate();
  if (grad_weight) grad_weight->validate();
}

void GradientQuantSpec::check_layer(const std::string& layer, const Recipe& recipe) const {
  TORCH_CHECK_VALUE(layer != "QuantConvTranspose2d", layer,
                    ": expected a recipe without grad_input and grad_weight, got '", recipe.name, "'");
}

namespace {

// The spec of grad_input or grad_weight as fqt_linear and fqt_conv2d take it.
GradientQuantizer quantizer(const std::optional<GradientSpec>& spec, const std::string& tensor, bool convolution) {
  if (!spec) return {};
  const GradientSpec resolved = spec->resolved(tensor, convolution);
  return {resolved.quantizer, resolved.bits, resolved.rows, resolved.preserve_zero, resolved.max_group};
}

}  // namespace

at::Tensor GradientQuantSpec::linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const {
  const auto [for_input, for_weight] = *linear_quantizers();
  return quantrain::fqt_linear(input, weight, defined_or_none(bias), for_input, for_weight);
}

std::optional<std::pair<GradientQuantizer, GradientQuantizer>> GradientQuantSpec::linear_quantizers() const {
  return std::pair{quantizer(grad_input, "grad_input", /*convolution=*/false),
                   quantizer(grad_weight, "grad_weight", false)};
}

std::optional<std::pair<GradientQuantizer, GradientQuantizer>> GradientQuantSpec::conv2d_quantizers() const {
  return std::pair{quantizer(grad_input, "grad_input", /*convolution=*/true),
                   quantizer(grad_weight, "grad_weight", true)};
}

at::Tensor GradientQuantSpec::conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                                     const Conv2dArguments& arguments) const {
  const auto [for_input, for_weight] = *conv2d_quantizers();
  const auto& [stride, padding, dilation, padding_mode, groups] = arguments;
  if (padding_mode.empty()) {
    return quantrain::fqt_conv2d(input, weight, defined_or_none(bias), stride, padding, dilation, groups, for_input,
                                 for_weight);
  }
  return quantrain::fqt_conv2d(input, weight, defined_or_none(bias), stride, padding_mode, dilation, groups, for_input,
                               for_weight);
}

namespace {

// "fqt-8", or "fqt-<ptq|psq|bhq><bits>" with or without "-paper"; none where `name` is neither. Forward as qat-w8a8.
//
// As they are: scales that an integer product allows. "-paper": as the authors trained, rows are samples everywhere and
// grad_weight has a range for each column over the samples (per tensor for ptq).
std::optional<Recipe> fqt_recipe(const std::string& name) {
  static const std::map<std::string, std::string> kQuantizers = {
      {"ptq", "per_tensor"}, {"psq", "per_sample"}, {"bhq", "householder"}};
  // Not by std::regex, whose symbols libtorch exports too: with another compiler's version of them it crashes.
  std::string rest = name == "fqt-8" ? "fqt-psq8" : name;
  const bool paper = rest.size() > 6 && rest.compare(rest.size() - 6, 6, "-paper") == 0;
  if (paper) rest.resize(rest.size() - 6);
  if (rest.size() != 8 || rest.compare(0, 4, "fqt-") != 0 || rest[7] < '2' || rest[7] > '8') return std::nullopt;
  const std::string quantizer = rest.substr(4, 3);
  if (!kQuantizers.contains(quantizer)) return std::nullopt;
  const std::string columns = quantizer == "ptq" ? "per_tensor" : "per_channel";
  const GradientQuantSpec scheme(GradientSpec{rest[7] - '0', kQuantizers.at(quantizer), paper ? "sample" : "auto"},
                                 GradientSpec{8, paper ? columns : "auto", paper ? "sample" : "auto"});
  return detail::named_recipe(name, detail::dynamic_weight(8, Granularity::kPerChannel),
                              detail::affine_input(8, ObserverKind::kMovingAverage), scheme);
}

std::vector<Recipe> fqt_recipes() {
  std::vector<Recipe> recipes = {*fqt_recipe("fqt-8")};
  for (const char* mode : {"", "-paper"})
    for (const char* quantizer : {"ptq", "psq", "bhq"})
      for (const char* bits : {"8", "5", "4"})
        recipes.push_back(*fqt_recipe(std::string("fqt-") + quantizer + bits + mode));
  return recipes;
}

}  // namespace

SchemeEntry detail::gradient_quant_entry() {
  return {GradientQuantSpec::kKind, [] { return std::make_unique<GradientQuantSpec>(); }, fqt_recipes, fqt_recipe,
          GradientSpec::kTypeName};
}

}  // namespace quantrain::nn

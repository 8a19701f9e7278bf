#include "quantrain/nn/fixed_point/fold.h"

#include <cmath>

#include <ATen/ops/abs.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/floor.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/round.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "nn/fixed_point/constants.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/fixed_point.h"

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

// j such that weight 2^j has a standard deviation that fraction length 7 is for.
at::Tensor output_exponent(const at::Tensor& weight) {
  const at::Tensor deviation = at::sqrt(at::square(weight.to(at::kFloat)).mean()).reshape(1);
  const at::Tensor exponent = at::floor(at::log2(detail::kMedianC / deviation)) - (detail::kWordLength - 1);
  return at::clamp(at::where(at::isfinite(exponent), exponent, at::zeros_like(exponent)), -31, 31);
}

}  // namespace

FixedPointFolded fold_fixed_point(const FixedPointFoldArguments& a) {
  const at::NoGradGuard no_grad;
  at::Tensor sf;
  if (a.bn_weight.defined()) sf = a.bn_weight * at::rsqrt(a.bn_running_var + a.bn_eps);
  at::Tensor factor = a.eta_in;
  if (a.eta_out.defined()) factor = factor / a.eta_out;
  if (sf.defined()) factor = factor * sf;
  std::vector<int64_t> rows(static_cast<size_t>(a.weight.dim()), 1);
  rows[0] = -1;
  if (factor.numel() > 1) factor = factor.reshape(rows);
  FixedPointFolded result;
  if (!a.eta_out.defined()) {
    result.exponent = output_exponent(a.weight * factor);
    factor = factor * at::exp2(result.exponent);
  }
  const at::Tensor effective = a.weight.to(at::kFloat) * factor;
  const std::optional<int64_t> axis = a.weight_fraction_length.dim() > 1 ? std::optional<int64_t>(0) : std::nullopt;
  const bool keep = a.hysteresis > 0;
  result.fraction_length = quantrain::fixed_point_fraction_length(
      effective, axis, detail::kWordLength, true, a.method,
      keep ? std::optional<at::Tensor>(a.weight_fraction_length) : std::nullopt, keep ? a.hysteresis : 0.0);
  const at::Tensor scale = at::exp2(result.fraction_length.to(at::kFloat));
  result.codes = at::clamp(at::round(effective * scale), -127, 127);
  result.weight = result.codes / scale;
  result.accumulator_fraction_length = a.input_fraction_length + result.fraction_length.flatten();
  result.bound = at::abs(result.codes).to(at::kDouble).flatten(1).sum(1) * a.input_quant_max;
  at::Tensor b = a.bias;
  if (sf.defined()) {
    const at::Tensor shift = a.bias.defined() ? a.bn_running_mean - a.bias : a.bn_running_mean;
    b = a.bn_bias - shift * sf;
  }
  if (!b.defined()) return result;
  b = result.exponent.defined() ? b * at::exp2(result.exponent) : b / a.eta_out;
  b = at::round(b.to(at::kDouble) * at::exp2(result.accumulator_fraction_length.to(at::kDouble)));
  result.bias_codes = at::clamp(b, -detail::kLargestAccumulator, detail::kLargestAccumulator);
  result.bound = result.bound + at::abs(result.bias_codes);
  return result;
}

// ---- the program ----------------------------------------------------------------------------------------------------

struct FixedPointProgramWriter::Impl {
  Json graph;
  Json nodes = Json::array();
  std::map<std::string, at::Tensor> tensors;
  double output_scale = 1.0;

  Json& append(const std::string& name, const char* op, const std::vector<std::string>& inputs) {
    nodes.push_back({{"name", name}, {"op", op}, {"inputs", inputs}});
    return nodes.back();
  }

  void product(Json& node, const std::string& name, const FixedPointFolded& folded,
               const std::optional<Codes>& output) {
    TORCH_CHECK_VALUE(folded.bound.isfinite().all().item<bool>(), "convert: '", name,
                      "': expected finite weights, got NaN or Inf");
    const at::Tensor bias = folded.bias_codes.defined() ? folded.bias_codes : at::zeros_like(folded.bound);
    tensors[name + ".weight"] = folded.codes.to(at::kChar).cpu();
    tensors[name + ".bias"] = bias.to(at::kInt).cpu();
    const at::Tensor lengths = folded.fraction_length.flatten().cpu();
    const std::vector<int64_t> each(lengths.const_data_ptr<int32_t>(),
                                    lengths.const_data_ptr<int32_t>() + lengths.numel());
    if (folded.fraction_length.dim() > 1)
      node["weight_fraction_length"] = each;
    else
      node["weight_fraction_length"] = each.at(0);
    node["output"] = output ? "codes" : "accumulators";
    if (output) codes(node, *output);
    if (folded.exponent.defined()) {
      const auto length = static_cast<int>(folded.accumulator_fraction_length.flatten()[0].item<int64_t>());
      output_scale = std::ldexp(1.0, -length - static_cast<int>(folded.exponent.item<float>()));
    }
  }

  static void codes(Json& node, const Codes& output) {
    node["signed"] = output.is_signed;
    node["fraction_length"] = output.fraction_length;
  }
};

FixedPointProgramWriter::FixedPointProgramWriter(const Recipe& recipe, int64_t channels, const Codes& input,
                                                 double scale)
    : impl_(std::make_unique<Impl>()) {
  impl_->graph = {{"format", detail::kNetworkFormat},
                  {"version", detail::kProgramVersion},
                  {"recipe", recipe.to_json()},
                  {"input",
                   {{"name", "input"},
                    {"channels", channels},
                    {"signed", input.is_signed},
                    {"fraction_length", input.fraction_length},
                    {"scale", scale}}}};
}

FixedPointProgramWriter::~FixedPointProgramWriter() = default;

void FixedPointProgramWriter::conv2d(const std::string& name, const std::vector<std::string>& inputs,
                                     std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                                     std::array<int64_t, 2> padding, int64_t groups, const FixedPointFolded& folded,
                                     const std::optional<Codes>& output) {
  Json& node = impl_->append(name, "conv2d", inputs);
  node["kernel"] = kernel;
  node["stride"] = stride;
  node["padding"] = padding;
  node["groups"] = groups;
  node["channels"] = folded.codes.size(0);
  impl_->product(node, name, folded, output);
}

void FixedPointProgramWriter::linear(const std::string& name, const std::string& input, const FixedPointFolded& folded,
                                     const std::optional<Codes>& output) {
  Json& node = impl_->append(name, "linear", {input});
  node["features"] = folded.codes.size(0);
  impl_->product(node, name, folded, output);
}

void FixedPointProgramWriter::max_pool2d(const std::string& name, const std::string& input,
                                         std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                                         std::array<int64_t, 2> padding) {
  Json& node = impl_->append(name, "max_pool2d", {input});
  node["kernel"] = kernel;
  node["stride"] = stride;
  node["padding"] = padding;
}

void FixedPointProgramWriter::avg_pool2d(const std::string& name, const std::string& input, std::array<int64_t, 2> size,
                                         int64_t shift, int64_t fraction_length) {
  Json& node = impl_->append(name, "avg_pool2d", {input});
  node["size"] = size;
  node["shift"] = shift;
  node["fraction_length"] = fraction_length;
}

void FixedPointProgramWriter::slice_pad(const std::string& name, const std::string& input,
                                        std::array<int64_t, 2> stride, std::array<int64_t, 2> pad) {
  Json& node = impl_->append(name, "slice_pad", {input});
  node["stride"] = stride;
  node["pad"] = pad;
}

void FixedPointProgramWriter::add(const std::string& name, const std::vector<std::string>& inputs,
                                  const Codes& output) {
  Impl::codes(impl_->append(name, "add", inputs), output);
}

void FixedPointProgramWriter::flatten(const std::string& name, const std::string& input) {
  impl_->append(name, "flatten", {input});
}

FixedPointProgram FixedPointProgramWriter::finish() {
  TORCH_CHECK_VALUE(!impl_->nodes.empty(), "convert: expected a network with a layer, got none");
  Json graph = impl_->graph;
  graph["nodes"] = impl_->nodes;
  graph["output"] = {{"name", impl_->nodes.back()["name"]}, {"scale", impl_->output_scale}};
  return {graph.dump(), impl_->tensors};
}

}  // namespace quantrain::nn

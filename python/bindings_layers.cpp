// The training steps of a convolution with a folded batch norm and of a linear layer, for the layers in Python.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/quant_conv.h"
#include "autograd/quant_linear.h"

namespace py = pybind11;
using quantrain::ConvBatchNorm;
using quantrain::QuantLinear;
using quantrain::RowRounding;
using OptionalTensor = std::optional<at::Tensor>;

namespace {

at::Tensor or_none(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptionalTensor or_none(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

template <typename Settings>
void bind_gradient_quantizers(py::class_<Settings>& settings) {
  for (const auto& [name, quantizer] :
       {std::pair{"grad_input", &Settings::grad_input}, std::pair{"grad_weight", &Settings::grad_weight}}) {
    settings.def((std::string("set_") + name).c_str(),
                 [quantizer = quantizer](Settings& self, std::string kind, int64_t bits, std::string rows,
                                         bool preserve_zero, int64_t max_group) {
                   self.*quantizer = {std::move(kind), bits, std::move(rows), preserve_zero, max_group};
                 },
                 py::arg("quantizer"), py::arg("bits"), py::arg("rows"), py::arg("preserve_zero"),
                 py::arg("max_group"));
  }
}

}  // namespace

void bind_layers(py::module_& module);

void bind_layers(py::module_& module) {
  py::class_<ConvBatchNorm> settings(module, "ConvBatchNorm",
                                     "What does not change from step to step of a conv_batch_norm.");
  settings.def(py::init<>())
      .def_readwrite("stride", &ConvBatchNorm::stride)
      .def_readwrite("padding", &ConvBatchNorm::padding)
      .def_readwrite("dilation", &ConvBatchNorm::dilation)
      .def_readwrite("groups", &ConvBatchNorm::groups)
      .def_readwrite("weight_min", &ConvBatchNorm::weight_min)
      .def_readwrite("weight_max", &ConvBatchNorm::weight_max)
      .def_readwrite("weight_symmetric", &ConvBatchNorm::weight_symmetric)
      .def_readwrite("momentum", &ConvBatchNorm::momentum)
      .def_readwrite("eps", &ConvBatchNorm::eps)
      .def_readwrite("activation", &ConvBatchNorm::activation)
      .def_readwrite("averaging_constant", &ConvBatchNorm::averaging_constant)
      .def_readwrite("quant_min", &ConvBatchNorm::quant_min)
      .def_readwrite("quant_max", &ConvBatchNorm::quant_max)
      .def_readwrite("symmetric", &ConvBatchNorm::symmetric)
      .def_readwrite("packs_codes", &ConvBatchNorm::packs_codes)
      .def_readwrite("weight_grad_factor", &ConvBatchNorm::weight_grad_factor)
      .def_readwrite("grad_factor", &ConvBatchNorm::grad_factor);
  bind_gradient_quantizers(settings);
  module.def(
      "conv_batch_norm",
      [](const ConvBatchNorm& settings, const at::Tensor& input, const OptionalTensor& codes,
         const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, const at::Tensor& weight,
         const OptionalTensor& weight_scale, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
         const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& batches,
         const OptionalTensor& folding_variance, bool moves, const OptionalTensor& residual,
         const OptionalTensor& min_val, const OptionalTensor& max_val, const OptionalTensor& scale,
         const OptionalTensor& zero_point, bool observes, bool marks, const std::string& label) {
        ConvBatchNorm call = settings;
        call.input = input;
        call.codes = or_none(codes);
        call.input_scale = or_none(input_scale);
        call.input_zero_point = or_none(input_zero_point);
        call.weight = weight;
        call.weight_scale = or_none(weight_scale);
        call.bn_weight = bn_weight;
        call.bn_bias = bn_bias;
        call.running_mean = running_mean;
        call.running_var = running_var;
        call.batches = batches;
        call.folding_variance = or_none(folding_variance);
        call.moves = moves;
        call.residual = or_none(residual);
        call.min_val = or_none(min_val);
        call.max_val = or_none(max_val);
        call.scale = or_none(scale);
        call.zero_point = or_none(zero_point);
        call.observes = observes;
        call.marks = marks;
        call.label = label;
        const quantrain::ConvBatchNormResult result = [&] {
          const py::gil_scoped_release released;
          return quantrain::conv_batch_norm(call);
        }();
        return std::make_tuple(result.output, or_none(result.codes), or_none(result.scale), or_none(result.zero_point),
                               result.folding_variance);
      },
      "activation(batch_norm(conv2d(input, fold_fake_quantize(weight))) + residual) and its fake-quantized form, as "
      "one node: (output, codes, scale, zero_point, the variance folded with).");

  py::class_<RowRounding>(module, "RowRounding", "What does not change from call to call of round_rows.")
      .def(py::init<>())
      .def_readwrite("dynamic", &RowRounding::dynamic)
      .def_readwrite("averaging_constant", &RowRounding::averaging_constant)
      .def_readwrite("quant_min", &RowRounding::quant_min)
      .def_readwrite("quant_max", &RowRounding::quant_max)
      .def_readwrite("symmetric", &RowRounding::symmetric);
  module.def(
      "round_rows",
      [](const RowRounding& settings, const at::Tensor& input, const std::string& function, const OptionalTensor& other,
         const OptionalTensor& weight, const OptionalTensor& bias, double eps, const std::string& dtype,
         const OptionalTensor& min_val, const OptionalTensor& max_val, const OptionalTensor& scale,
         const OptionalTensor& zero_point, bool observes, bool marks, const std::string& label) {
        RowRounding call = settings;
        call.input = input;
        call.function = function;
        call.other = or_none(other);
        call.weight = or_none(weight);
        call.bias = or_none(bias);
        call.eps = eps;
        call.dtype = dtype;
        call.min_val = or_none(min_val);
        call.max_val = or_none(max_val);
        call.scale = or_none(scale);
        call.zero_point = or_none(zero_point);
        call.observes = observes;
        call.marks = marks;
        call.label = label;
        const quantrain::RoundedRows result = [&] {
          const py::gil_scoped_release released;
          return quantrain::round_rows(call);
        }();
        return std::make_tuple(result.values, result.codes, result.scale, or_none(result.zero_point));
      },
      "norm_act_fake_quantize with an observer's step before it, or its dynamic form: (values, codes, scale, "
      "zero_point).");
  py::class_<QuantLinear> linear(module, "QuantLinear", "What does not change from step to step of a quant_linear.");
  linear.def(py::init<>())
      .def_readwrite("packs_codes", &QuantLinear::packs_codes)
      .def_readwrite("weight_groups", &QuantLinear::weight_groups)
      .def_readwrite("weight_min", &QuantLinear::weight_min)
      .def_readwrite("weight_max", &QuantLinear::weight_max);
  bind_gradient_quantizers(linear);
  module.def(
      "quant_linear",
      [](const QuantLinear& settings, const at::Tensor& input, const OptionalTensor& codes,
         const OptionalTensor& input_scale, const OptionalTensor& input_zero_point, const at::Tensor& weight,
         const OptionalTensor& rounded, const OptionalTensor& bias) {
        QuantLinear call = settings;
        call.input = input;
        call.codes = or_none(codes);
        call.input_scale = or_none(input_scale);
        call.input_zero_point = or_none(input_zero_point);
        call.weight = weight;
        call.rounded = or_none(rounded);
        call.bias = or_none(bias);
        const py::gil_scoped_release released;
        return quantrain::quant_linear(call);
      },
      "linear(input, fake_quantize(weight), bias), the input kept as codes, as one node.");
  module.def(
      "rounded_weight",
      [](const QuantLinear& settings, const at::Tensor& weight, const at::Tensor& like) {
        QuantLinear call = settings;
        call.weight = weight;
        call.input = like;
        return quantrain::rounded_weight(call);
      },
      "The fake-quantized weight, in the type of `like`, without a gradient.");
}

// What layers of scheme ptq convert by; documented in quantrain/nn/ptq.py. Other Python threads run during every call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/ptq.h"

namespace py = pybind11;
using namespace quantrain::nn;

void bind_ptq(py::module_& module);

namespace {

using OptionalTensor = std::optional<at::Tensor>;

py::dict weight_parts(const quantrain::PtqWeight& weight) {
  py::dict parts;
  parts["weight_codes"] = weight.codes;
  parts["weight_scale"] = weight.scale;
  parts["input_factor"] = weight.input_factor;
  parts["input_scale"] = weight.input_scale;
  parts["outlier_columns"] = weight.outlier_columns;
  parts["outlier_codes"] = weight.outlier_codes;
  parts["outlier_scale"] = weight.outlier_scale;
  return parts;
}

}  // namespace

void bind_ptq(py::module_& module) {
  module.def(
      "ptq_statistics",
      [](const Recipe& recipe) {
        const auto* spec = recipe.scheme_as<PtqSpec>();
        return std::make_pair(spec && spec->needs_statistics(recipe), spec && spec->needs_hessian());
      },
      py::arg("recipe"), "Whether layers of the recipe have to be calibrated, and whether with a Hessian.");
  module.attr("PTQ_FEW_ROWS") = py::make_tuple(quantrain::kFewRows, quantrain::kFewRowsOnCpu);
  module.def(
      "ptq_weight",
      [](const at::Tensor& weight, const Recipe& recipe, const OptionalTensor& absmax, const OptionalTensor& mean_abs,
         const OptionalTensor& hessian, bool form_only) {
        const auto tensor = [](const OptionalTensor& given) { return given ? *given : at::Tensor(); };
        PtqResult result;
        {
          const py::gil_scoped_release release;
          result = ptq_weight(weight, recipe, {tensor(absmax), tensor(mean_abs), tensor(hessian)}, form_only);
        }
        return py::make_tuple(weight_parts(result.weight), result.error);
      },
      py::arg("weight"), py::arg("recipe"), py::arg("absmax"), py::arg("mean_abs"), py::arg("hessian"),
      py::arg("form_only"), "The buffers of a converted layer, by name, and the error of gptq or awq.");
  module.def(
      "ptq_product",
      [](const Recipe& recipe) {
        const quantrain::PtqProduct product = ptq_product(recipe);
        py::dict arguments;
        arguments["quantize_input"] = product.quantize_input;
        arguments["outlier_threshold"] = product.outlier_threshold;
        arguments["capacity"] = product.capacity;
        arguments["few_rows_float"] = product.few_rows_float;
        return arguments;
      },
      py::arg("recipe"), "What _ptq_linear is called with.");
  module.def(
      "ptq_dequantize",
      [](const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& input_factor,
         const OptionalTensor& outlier_columns, const OptionalTensor& outlier_codes,
         const OptionalTensor& outlier_scale, int64_t in_features, at::ScalarType dtype) {
        const py::gil_scoped_release release;
        return quantrain::ptq_dequantize(
            {codes, scale, input_factor, std::nullopt, outlier_columns, outlier_codes, outlier_scale}, in_features,
            dtype);
      },
      py::arg("codes"), py::arg("scale"), py::arg("input_factor"), py::arg("outlier_columns"), py::arg("outlier_codes"),
      py::arg("outlier_scale"), py::arg("in_features"), py::arg("dtype"),
      "The float weight [O, in_features] that a converted layer stands for.");
}

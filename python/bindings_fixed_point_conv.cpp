// FixedPointConv for Python: what benchmarks and tests run without the dispatcher. Not public.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/ops/fixed_point_conv.h"

namespace py = pybind11;
using quantrain::FixedPointConv;
using quantrain::FixedPointConvOptions;

void bind_fixed_point_conv(py::module_& module);

void bind_fixed_point_conv(py::module_& module) {
  py::class_<FixedPointConv>(module, "_FixedPointConv")
      .def(py::init([](const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::array<int64_t, 2> stride,
                       std::array<int64_t, 2> padding, int64_t groups, bool input_signed) {
             return FixedPointConv(weight, bias, FixedPointConvOptions{stride, padding, groups}, input_signed);
           }),
           py::arg("weight"), py::arg("bias"), py::arg("stride"), py::arg("padding"), py::arg("groups"),
           py::arg("input_signed"))
      .def(
          "run",
          [](const FixedPointConv& conv, const at::Tensor& input, at::Tensor output,
             const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& residual,
             const std::optional<at::Tensor>& residual_shift) {
            conv.run(input, output, shift.value_or(at::Tensor()), residual.value_or(at::Tensor()),
                     residual_shift.value_or(at::Tensor()));
          },
          py::arg("input"), py::arg("output"), py::arg("shift") = py::none(), py::arg("residual") = py::none(),
          py::arg("residual_shift") = py::none())
      .def("output_size", [](const FixedPointConv& conv, std::vector<int64_t> size) { return conv.output_size(size); });
}

// Python binding of FixedPointNetwork, documented in quantrain/nn/fixed_point/network.py. Other Python threads run
// during every call that computes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/fixed_point/fold.h"
#include "quantrain/nn/fixed_point/network.h"
#include "quantrain/nn/recipe.h"

namespace py = pybind11;
using quantrain::nn::FixedPointAuditRow;
using quantrain::nn::FixedPointFoldArguments;
using quantrain::nn::FixedPointFolded;
using quantrain::nn::FixedPointNetwork;
using quantrain::nn::FixedPointProgramWriter;
using quantrain::nn::Recipe;

void bind_fixed_point(py::module_& module);

namespace {

py::dict row_to_dict(const FixedPointAuditRow& row) {
  py::dict dict;
  dict["name"] = row.name;
  dict["op"] = row.op;
  dict["operations"] = row.operations;
  dict["operands"] = row.operands;
  dict["accumulator"] = row.accumulator;
  dict["result"] = row.result;
  dict["bound"] = row.bound;
  return dict;
}

using OptionalTensor = std::optional<at::Tensor>;

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// How Python's fixed-point layers and convert reach what decides bits. Not public.
void bind_writer(py::module_& module) {
  py::class_<FixedPointFolded>(module, "_FixedPointFolded")
      .def_readonly("weight", &FixedPointFolded::weight)
      .def_readonly("codes", &FixedPointFolded::codes)
      .def_property_readonly("bias_codes", [](const FixedPointFolded& self) { return optional(self.bias_codes); })
      .def_readonly("fraction_length", &FixedPointFolded::fraction_length)
      .def_readonly("accumulator_fraction_length", &FixedPointFolded::accumulator_fraction_length)
      .def_property_readonly("exponent", [](const FixedPointFolded& self) { return optional(self.exponent); })
      .def_readonly("bound", &FixedPointFolded::bound);
  module.def(
      "_fold_fixed_point",
      [](const at::Tensor& weight, const OptionalTensor& bias, const std::optional<std::array<at::Tensor, 4>>& bn,
         double bn_eps, const at::Tensor& eta_in, const OptionalTensor& eta_out,
         const at::Tensor& input_fraction_length, int64_t input_quant_max, const at::Tensor& weight_fraction_length,
         const std::string& method, double hysteresis) {
        FixedPointFoldArguments a{.weight = weight,
                                  .bias = bias.value_or(at::Tensor()),
                                  .bn_eps = bn_eps,
                                  .eta_in = eta_in,
                                  .eta_out = eta_out.value_or(at::Tensor()),
                                  .input_fraction_length = input_fraction_length,
                                  .input_quant_max = input_quant_max,
                                  .weight_fraction_length = weight_fraction_length,
                                  .method = method,
                                  .hysteresis = hysteresis};
        if (bn) {
          a.bn_weight = (*bn)[0];
          a.bn_bias = (*bn)[1];
          a.bn_running_mean = (*bn)[2];
          a.bn_running_var = (*bn)[3];
        }
        const py::gil_scoped_release unlocked;
        return quantrain::nn::fold_fixed_point(a);
      },
      py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("bn"), py::arg("bn_eps"), py::arg("eta_in"),
      py::arg("eta_out"), py::arg("input_fraction_length"), py::arg("input_quant_max"),
      py::arg("weight_fraction_length"), py::arg("method"), py::arg("hysteresis"));
  using Writer = FixedPointProgramWriter;
  using Codes = std::optional<std::pair<bool, int64_t>>;
  const auto codes = [](const Codes& given) {
    return given ? std::optional<Writer::Codes>({given->first, given->second}) : std::nullopt;
  };
  py::class_<Writer>(module, "_FixedPointProgramWriter")
      .def(py::init([](const Recipe& recipe, int64_t channels, std::pair<bool, int64_t> input, double scale) {
        return std::make_unique<Writer>(recipe, channels, Writer::Codes{input.first, input.second}, scale);
      }))
      .def("conv2d",
           [codes](Writer& self, const std::string& name, const std::vector<std::string>& inputs,
                   std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                   int64_t groups, const FixedPointFolded& folded, const Codes& output) {
             self.conv2d(name, inputs, kernel, stride, padding, groups, folded, codes(output));
           })
      .def("linear",
           [codes](Writer& self, const std::string& name, const std::string& input, const FixedPointFolded& folded,
                   const Codes& output) { self.linear(name, input, folded, codes(output)); })
      .def("max_pool2d", &Writer::max_pool2d)
      .def("avg_pool2d", &Writer::avg_pool2d)
      .def("slice_pad", &Writer::slice_pad)
      .def("add", [](Writer& self, const std::string& name, const std::vector<std::string>& inputs,
                     std::pair<bool, int64_t> output) { self.add(name, inputs, {output.first, output.second}); })
      .def("flatten", &Writer::flatten)
      .def("finish", [](Writer& self) {
        quantrain::nn::FixedPointProgram program = self.finish();
        return py::make_tuple(program.graph, program.tensors);
      });
}

}  // namespace

void bind_fixed_point(py::module_& module) {
  bind_writer(module);
  const py::call_guard<py::gil_scoped_release> release;
  py::class_<FixedPointNetwork>(
      module, "FixedPointNetwork",
      "A network in integers: 8-bit codes in, int32 sums out. Made of a graph (JSON text) and a dict of named tensors.")
      .def(py::init<const std::string&, const std::map<std::string, at::Tensor>&>(), py::arg("graph"),
           py::arg("tensors"), release)
      .def("forward", &FixedPointNetwork::forward, py::arg("codes"), release,
           "The output's integers for uint8 or int8 codes [N, C, H, W].")
      .def("__call__", &FixedPointNetwork::forward, py::arg("codes"), release)
      .def("forward_all", &FixedPointNetwork::forward_all, py::arg("codes"), release,
           "Every node's integers: {name: tensor}.")
      .def("quantize_input", &FixedPointNetwork::quantize_input, py::arg("images"), release,
           "The codes of float images.")
      .def("dequantize_output", &FixedPointNetwork::dequantize_output, py::arg("integers"), release,
           "The output as float32.")
      .def("graph", &FixedPointNetwork::graph, "The graph as JSON text.")
      .def("tensors", &FixedPointNetwork::tensors, "{name: int8 or int32 tensor}.")
      .def_property_readonly("device", &FixedPointNetwork::device)
      .def(
          "to",
          [](const FixedPointNetwork& self, const py::object& device) {
            const auto target = py::module_::import("torch").attr("device")(device).cast<at::Device>();
            const py::gil_scoped_release unlocked;
            return self.to(target);
          },
          py::arg("device"), "This network on another device; itself where it is there.")
      .def(
          "audit",
          [](const FixedPointNetwork& self) {
            py::list rows;
            for (const FixedPointAuditRow& row : self.audit()) rows.append(row_to_dict(row));
            return rows;
          },
          "A dict a node: what it computes with. ValueError for an operation that is not in integers.")
      .def("save", &FixedPointNetwork::save, py::arg("path"), release,
           "Writes path (safetensors) and the graph beside it (.json).")
      .def_static("load", &FixedPointNetwork::load, py::arg("path"), release,
                  "Reads both; ValueError for a changed byte in either.");
}

// Python binding of FixedPointNetwork, documented in quantrain/nn/fixed_point/network.py. Other Python threads run
// during every call that computes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/fixed_point/network.h"

namespace py = pybind11;
using quantrain::nn::FixedPointAuditRow;
using quantrain::nn::FixedPointNetwork;

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

}  // namespace

void bind_fixed_point(py::module_& module) {
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

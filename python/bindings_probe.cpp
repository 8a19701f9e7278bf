// Python bindings of GradientProbe: the C++ class, its rows as dicts. Documented in quantrain/nn/gradient_probe.py.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/gradient_probe.h"

namespace py = pybind11;
using quantrain::nn::GradientProbe;
using quantrain::nn::GradientProbeOptions;
using quantrain::nn::GradientSpec;
using quantrain::nn::ProbeAdvice;
using quantrain::nn::ProbeLayer;
using quantrain::nn::ProbeRow;

void bind_probe(py::module_& module);

namespace {

py::dict to_dict(const ProbeRow& row) {
  py::dict dict;
  dict["layer"] = row.layer;
  dict["quantizer"] = row.quantizer;
  dict["rows"] = row.rows;
  dict["columns"] = row.columns;
  dict["observations"] = row.observations;
  dict["skipped"] = row.skipped;
  dict["gradient_square"] = row.gradient_square;
  dict["variance"] = row.variance;
  dict["exact_variance"] = row.exact_variance;
  dict["bound"] = row.bound;
  dict["bias_z"] = row.bias_z;
  dict["weight_variance"] = row.weight_variance;
  dict["network_variance"] = row.network_variance;
  return dict;
}

py::dict to_dict(const ProbeLayer& layer) {
  py::dict dict;
  dict["layer"] = layer.layer;
  dict["batches"] = layer.batches;
  dict["gradient_square"] = layer.gradient_square;
  dict["batch_variance"] = layer.batch_variance;
  dict["repeat_variance"] = layer.repeat_variance;
  return dict;
}

py::dict to_dict(const ProbeAdvice& advice) {
  py::dict dict;
  dict["layer"] = advice.layer;
  dict["quantizer"] = advice.quantizer;
  dict["basis"] = advice.basis;
  dict["ratio"] = advice.ratio;
  dict["allowed"] = advice.allowed;
  dict["bits_needed"] = advice.bits_needed;
  return dict;
}

template <typename T>
py::list to_list(const std::vector<T>& records) {
  py::list list;
  for (const T& record : records) list.append(to_dict(record));
  return list;
}

}  // namespace

void bind_probe(py::module_& module) {
  const GradientProbeOptions defaults;
  module.def("probe_quantizer", &quantrain::nn::probe_quantizer, py::arg("text"));
  py::class_<GradientProbe>(module, "GradientProbe")
      .def(py::init([](std::vector<GradientSpec> quantizers, int64_t draws, double fraction, int64_t seed,
                       std::function<at::Tensor(const at::Tensor&, const GradientSpec&, int64_t)> quantize) {
             return std::make_unique<GradientProbe>(
                 GradientProbeOptions{std::move(quantizers), draws, fraction, seed, std::move(quantize)});
           }),
           py::kw_only(), py::arg("quantizers") = defaults.quantizers, py::arg("draws") = defaults.draws,
           py::arg("fraction") = defaults.fraction, py::arg("seed") = defaults.seed, py::arg("quantize") = py::none())
      .def("watch", &GradientProbe::watch, py::arg("layer"), py::arg("output"), py::arg("weight"),
           py::arg("exact_backward") = true)
      // Autograd's threads call back into Python where hooks are Python's.
      .def("observe", &GradientProbe::observe, py::arg("layer"), py::arg("grad"), py::arg("rows") = "auto",
           py::call_guard<py::gil_scoped_release>())
      .def("end_batch", &GradientProbe::end_batch)
      .def("end_repeat", &GradientProbe::end_repeat)
      .def("measure_network", &GradientProbe::measure_network, py::arg("loss"), py::arg("repeats"),
           py::call_guard<py::gil_scoped_release>())
      .def("rows", [](const GradientProbe& self) { return to_list(self.rows()); })
      .def("layers", [](const GradientProbe& self) { return to_list(self.layers()); })
      .def(
          "recommend", [](const GradientProbe& self, double fraction) { return to_list(self.recommend(fraction)); },
          py::arg("fraction"))
      .def("to_json", &GradientProbe::to_json)
      .def_property_readonly("draws", [](const GradientProbe& self) { return self.options().draws; })
      .def_property_readonly("fraction", [](const GradientProbe& self) { return self.options().fraction; });
}

// Python bindings of GradScaler and MasterWeights: the C++ classes, on torch.optim optimizers. Documented in
// quantrain/amp/.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/amp/grad_scaler.h"
#include "quantrain/amp/master_weights.h"

namespace py = pybind11;
using quantrain::amp::GradScaler;
using quantrain::amp::GradScalerOptions;
using quantrain::amp::GradScalerState;
using quantrain::amp::MasterWeights;
using quantrain::amp::OptimizerView;

void bind_amp(py::module_& module);

namespace {

std::vector<at::Tensor> parameters_of(const py::object& optimizer) {
  std::vector<at::Tensor> parameters;
  for (const py::handle group : optimizer.attr("param_groups"))
    for (const py::handle parameter : group["params"]) parameters.push_back(parameter.cast<at::Tensor>());
  return parameters;
}

// PyTorch's protocol of optimizers that unscale by themselves: two attributes for the length of a step.
void step_scaled(const py::object& optimizer, const py::object& step, const at::Tensor& grad_scale,
                 const at::Tensor& found_inf) {
  const py::object before = py::getattr(optimizer, "grad_scale", py::none());
  py::object scale = before;
  if (grad_scale.defined()) scale = before.is_none() ? py::cast(grad_scale) : before * py::cast(grad_scale);
  optimizer.attr("grad_scale") = scale;
  optimizer.attr("found_inf") = py::cast(found_inf);
  const auto forget = [&] {
    py::delattr(optimizer, "grad_scale");
    py::delattr(optimizer, "found_inf");
  };
  try {
    step();
  } catch (...) {
    forget();
    throw;
  }
  forget();
}

OptimizerView view_of(const py::object& optimizer, const py::object& step = py::none()) {
  OptimizerView view;
  view.id = optimizer.ptr();
  view.parameters = [optimizer] { return parameters_of(optimizer); };
  view.step = [step] { step(); };
  if (py::getattr(optimizer, "_step_supports_amp_scaling", py::bool_(false)).cast<bool>())
    view.step_scaled = [optimizer, step](const at::Tensor& grad_scale, const at::Tensor& found_inf) {
      step_scaled(optimizer, step, grad_scale, found_inf);
    };
  return view;
}

py::dict state_to_dict(const GradScalerState& state) {
  py::dict dict;
  dict["scale"] = state.scale;
  dict["growth_factor"] = state.growth_factor;
  dict["backoff_factor"] = state.backoff_factor;
  dict["growth_interval"] = state.growth_interval;
  dict["_growth_tracker"] = state.growth_tracker;
  return dict;
}

template <typename T>
T entry(const py::dict& dict, const char* key) {
  if (!dict.contains(key))
    throw py::value_error(std::string("GradScaler.load_state_dict: expected the key ") + key +
                          ", got a state without it");
  return dict[key].cast<T>();
}

GradScalerState state_from_dict(const py::dict& dict) {
  return {entry<double>(dict, "scale"), entry<double>(dict, "growth_factor"), entry<double>(dict, "backoff_factor"),
          entry<int64_t>(dict, "growth_interval"), entry<int64_t>(dict, "_growth_tracker")};
}

void bind_grad_scaler(py::module_& module) {
  py::class_<GradScaler>(module, "GradScaler")
      .def(py::init([](double init_scale, double growth_factor, double backoff_factor, int64_t growth_interval,
                       bool enabled, bool capturable) {
             return GradScaler(
                 GradScalerOptions{init_scale, growth_factor, backoff_factor, growth_interval, enabled, capturable});
           }),
           py::arg("init_scale"), py::arg("growth_factor"), py::arg("backoff_factor"), py::arg("growth_interval"),
           py::arg("enabled"), py::arg("capturable"))
      .def("scale", py::overload_cast<const at::Tensor&>(&GradScaler::scale))
      .def("unscale_", [](GradScaler& self, const py::object& optimizer) { self.unscale_(view_of(optimizer)); })
      .def("clip_grad_norm_", [](GradScaler& self, const py::object& optimizer,
                                 double max_norm) { return self.clip_grad_norm_(view_of(optimizer), max_norm); })
      .def("step", [](GradScaler& self, const py::object& optimizer,
                      const py::object& step) { return self.step(view_of(optimizer, step)); })
      .def("update", py::overload_cast<>(&GradScaler::update))
      .def("update", py::overload_cast<double>(&GradScaler::update))
      .def("update", py::overload_cast<const at::Tensor&>(&GradScaler::update))
      .def("get_scale", &GradScaler::get_scale)
      .def_property("growth_factor", &GradScaler::growth_factor, &GradScaler::set_growth_factor)
      .def_property("backoff_factor", &GradScaler::backoff_factor, &GradScaler::set_backoff_factor)
      .def_property("growth_interval", &GradScaler::growth_interval, &GradScaler::set_growth_interval)
      .def("is_enabled", &GradScaler::is_enabled)
      .def("is_mid_step", &GradScaler::is_mid_step)
      .def("state_dict", [](const GradScaler& self) { return state_to_dict(self.state_dict()); })
      .def("load_state_dict",
           [](GradScaler& self, const py::dict& state) { self.load_state_dict(state_from_dict(state)); })
      .def("overflow_report",
           [](const GradScaler& self, const std::vector<std::pair<std::string, at::Tensor>>& named_parameters) {
             py::list rows;
             for (const auto& record : self.overflow_report(named_parameters)) {
               py::dict row;
               row["name"] = record.name;
               row["count"] = record.count;
               row["first_step"] = record.first_step;
               rows.append(row);
             }
             return rows;
           })
      .def("set_found_inf_hook",
           [](GradScaler& self, const py::function& hook) {
             self.set_found_inf_hook([hook](at::Tensor& found_inf) { hook(found_inf); });
           })
      .def_property_readonly("scale_tensor", [](const GradScaler& self) -> py::object {
        return self.scale_tensor().defined() ? py::cast(self.scale_tensor()) : py::none();
      });
}

void bind_master_weights(py::module_& module) {
  py::class_<MasterWeights>(module, "MasterWeights")
      .def(py::init<std::vector<at::Tensor>, bool, std::optional<at::Generator>>(), py::arg("parameters"),
           py::arg("stochastic_rounding"), py::arg("generator"))
      .def("parameters", &MasterWeights::parameters)
      .def("copy_gradients_", &MasterWeights::copy_gradients_)
      .def("write_back_", &MasterWeights::write_back_);
}

}  // namespace

void bind_amp(py::module_& module) {
  bind_grad_scaler(module);
  bind_master_weights(module);
}

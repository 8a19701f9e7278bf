// Python bindings of QuantSpec, GradientSpec, Int8Spec, FixedPointSpec and Recipe: keyword constructors, properties,
// equality, copy and pickle (through JSON).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "quantrain/nn/recipe.h"

namespace py = pybind11;
using quantrain::nn::FixedPointSpec;
using quantrain::nn::GradientSpec;
using quantrain::nn::Int8Spec;
using quantrain::nn::QuantSpec;
using quantrain::nn::Recipe;

void bind_recipe(py::module_& module);

namespace {

std::string python_repr(const py::object& value) { return py::repr(value).cast<std::string>(); }

template <typename T>
std::string repr_of(const char* name, const T& self, std::initializer_list<const char*> fields) {
  const py::object object = py::cast(self);
  std::string text = std::string(name) + "(";
  const char* separator = "";
  for (const char* field : fields) {
    text += separator + std::string(field) + "=" + python_repr(object.attr(field));
    separator = ", ";
  }
  return text + ")";
}

// to_json, from_json, ==, copy, deepcopy and pickle, the same for all five structs. Pickle keeps a value that is not
// valid, as an assignment can make it, only as far as JSON does: reading it back raises.
template <typename T>
void bind_value_semantics(py::class_<T>& cls) {
  cls.def("to_json", &T::to_json, "The JSON form, every field under its name.")
      .def_static("from_json", &T::from_json, py::arg("text"),
                  "Reads to_json()'s text; ValueError where it is not valid.")
      .def("validate", &T::validate, "Raises ValueError naming the field, the rule and the value.")
      .def("__eq__", [](const T& a, const py::object& b) { return py::isinstance<T>(b) && a == b.cast<const T&>(); })
      .def("__copy__", [](const T& self) { return T(self); })
      .def(
          "__deepcopy__", [](const T& self, const py::dict&) { return T(self); }, py::arg("memo"))
      .def(py::pickle([](const T& self) { return self.to_json(); },
                      [](const std::string& text) { return T::from_json(text); }));
}

void bind_quant_spec(py::module_& module) {
  const QuantSpec defaults;
  py::class_<QuantSpec> cls(
      module, "QuantSpec",
      "How one tensor of a layer is quantised: codes, granularity, and where the scale comes from.");
  cls.def(py::init([](int64_t bits, bool symmetric, const std::string& granularity, int64_t group_size,
                      const std::string& observer, bool learnable, double averaging_constant, double percentile,
                      const std::string& nan_policy) {
            QuantSpec spec{bits,      symmetric,          granularity, group_size, observer,
                           learnable, averaging_constant, percentile,  nan_policy};
            spec.validate();
            return spec;
          }),
          py::kw_only(), py::arg("bits") = defaults.bits, py::arg("symmetric") = defaults.symmetric,
          py::arg("granularity") = defaults.granularity, py::arg("group_size") = defaults.group_size,
          py::arg("observer") = defaults.observer, py::arg("learnable") = defaults.learnable,
          py::arg("averaging_constant") = defaults.averaging_constant, py::arg("percentile") = defaults.percentile,
          py::arg("nan_policy") = defaults.nan_policy)
      .def_readwrite("bits", &QuantSpec::bits)
      .def_readwrite("symmetric", &QuantSpec::symmetric)
      .def_readwrite("granularity", &QuantSpec::granularity)
      .def_readwrite("group_size", &QuantSpec::group_size)
      .def_readwrite("observer", &QuantSpec::observer)
      .def_readwrite("learnable", &QuantSpec::learnable)
      .def_readwrite("averaging_constant", &QuantSpec::averaging_constant)
      .def_readwrite("percentile", &QuantSpec::percentile)
      .def_readwrite("nan_policy", &QuantSpec::nan_policy)
      .def("quant_min", &QuantSpec::quant_min, "The smallest code: -2**(bits-1) symmetric, 0 affine.")
      .def("quant_max", &QuantSpec::quant_max, "The largest code: 2**(bits-1) - 1 symmetric, 2**bits - 1 affine.")
      .def("__repr__", [](const QuantSpec& self) {
        return repr_of("QuantSpec", self,
                       {"bits", "symmetric", "granularity", "group_size", "observer", "learnable", "averaging_constant",
                        "percentile", "nan_policy"});
      });
  bind_value_semantics(cls);
}

void bind_gradient_spec(py::module_& module) {
  const GradientSpec defaults;
  py::class_<GradientSpec> cls(
      module, "GradientSpec",
      "How the gradient of a layer's output is rounded before the product that gives grad_input or grad_weight.");
  cls.def(py::init([](int64_t bits, const std::string& quantizer, const std::string& rows, bool preserve_zero,
                      int64_t max_group) {
            GradientSpec spec{bits, quantizer, rows, preserve_zero, max_group};
            spec.validate();
            return spec;
          }),
          py::kw_only(), py::arg("bits") = defaults.bits, py::arg("quantizer") = defaults.quantizer,
          py::arg("rows") = defaults.rows, py::arg("preserve_zero") = defaults.preserve_zero,
          py::arg("max_group") = defaults.max_group)
      .def_readwrite("bits", &GradientSpec::bits)
      .def_readwrite("quantizer", &GradientSpec::quantizer)
      .def_readwrite("rows", &GradientSpec::rows)
      .def_readwrite("preserve_zero", &GradientSpec::preserve_zero)
      .def_readwrite("max_group", &GradientSpec::max_group)
      .def("resolved", &GradientSpec::resolved, py::arg("tensor"), py::kw_only(), py::arg("convolution"),
           "This spec as a layer runs it, without 'auto'. tensor: 'grad_input' or 'grad_weight'.")
      .def("__repr__", [](const GradientSpec& self) {
        return repr_of("GradientSpec", self, {"bits", "quantizer", "rows", "preserve_zero", "max_group"});
      });
  bind_value_semantics(cls);
}

void bind_int8_spec(py::module_& module) {
  const Int8Spec defaults;
  py::class_<Int8Spec> cls(
      module, "Int8Spec",
      "Which of a Linear layer's three matrix products run in int8 while it trains: 'int8', 'none' or 'auto' each.");
  cls.def(py::init([](const std::string& output, const std::string& grad_input, const std::string& grad_weight,
                      const std::string& weight_scheme) {
            Int8Spec spec{output, grad_input, grad_weight, weight_scheme};
            spec.validate();
            return spec;
          }),
          py::kw_only(), py::arg("output") = defaults.output, py::arg("grad_input") = defaults.grad_input,
          py::arg("grad_weight") = defaults.grad_weight, py::arg("weight_scheme") = defaults.weight_scheme)
      .def_readwrite("output", &Int8Spec::output)
      .def_readwrite("grad_input", &Int8Spec::grad_input)
      .def_readwrite("grad_weight", &Int8Spec::grad_weight)
      .def_readwrite("weight_scheme", &Int8Spec::weight_scheme)
      .def("__repr__", [](const Int8Spec& self) {
        return repr_of("Int8Spec", self, {"output", "grad_input", "grad_weight", "weight_scheme"});
      });
  bind_value_semantics(cls);
}

void bind_fixed_point_spec(py::module_& module) {
  const FixedPointSpec defaults;
  py::class_<FixedPointSpec> cls(
      module, "FixedPointSpec",
      "How a model trains in fixed point (F8Net): how fraction lengths are chosen, and whether "
      "activations are clipped at a learned level.");
  cls.def(py::init([](const std::string& fraction_length, bool clip, double hysteresis, bool double_forward) {
            FixedPointSpec spec{fraction_length, clip, hysteresis, double_forward};
            spec.validate();
            return spec;
          }),
          py::kw_only(), py::arg("fraction_length") = defaults.fraction_length, py::arg("clip") = defaults.clip,
          py::arg("hysteresis") = defaults.hysteresis, py::arg("double_forward") = defaults.double_forward)
      .def_readwrite("fraction_length", &FixedPointSpec::fraction_length)
      .def_readwrite("clip", &FixedPointSpec::clip)
      .def_readwrite("hysteresis", &FixedPointSpec::hysteresis)
      .def_readwrite("double_forward", &FixedPointSpec::double_forward)
      .def("__repr__", [](const FixedPointSpec& self) {
        return repr_of("FixedPointSpec", self, {"fraction_length", "clip", "hysteresis", "double_forward"});
      });
  bind_value_semantics(cls);
}

void bind_recipe(py::module_& module) {
  using Spec = std::optional<QuantSpec>;
  using Gradient = std::optional<GradientSpec>;
  using Int8 = std::optional<Int8Spec>;
  using FixedPoint = std::optional<FixedPointSpec>;
  py::class_<Recipe> cls(
      module, "Recipe",
      "How a layer is quantised: a QuantSpec (or None) for weight, input and output, a GradientSpec (or None) for "
      "grad_input and grad_weight, an Int8Spec (or None) for training on int8 products, and a FixedPointSpec (or "
      "None) for "
      "training in fixed point.");
  cls.def(py::init([](const std::string& name, const Spec& weight, const Spec& input, const Spec& output,
                      const std::string& backend, bool training, int64_t edge_bits, const Gradient& grad_input,
                      const Gradient& grad_weight, const Int8& int8, const FixedPoint& fixed_point) {
            Recipe recipe{name,      weight,     input,       output, backend,    training,
                          edge_bits, grad_input, grad_weight, int8,   fixed_point};
            recipe.validate();
            return recipe;
          }),
          py::kw_only(), py::arg("name") = "", py::arg("weight") = py::none(), py::arg("input") = py::none(),
          py::arg("output") = py::none(), py::arg("backend") = "simulate", py::arg("training") = true,
          py::arg("edge_bits") = 0, py::arg("grad_input") = py::none(), py::arg("grad_weight") = py::none(),
          py::arg("int8") = py::none(), py::arg("fixed_point") = py::none())
      .def_readwrite("name", &Recipe::name)
      .def_readwrite("weight", &Recipe::weight)
      .def_readwrite("input", &Recipe::input)
      .def_readwrite("output", &Recipe::output)
      .def_readwrite("backend", &Recipe::backend)
      .def_readwrite("training", &Recipe::training)
      .def_readwrite("edge_bits", &Recipe::edge_bits)
      .def_readwrite("grad_input", &Recipe::grad_input)
      .def_readwrite("grad_weight", &Recipe::grad_weight)
      .def_readwrite("int8", &Recipe::int8)
      .def_readwrite("fixed_point", &Recipe::fixed_point)
      .def_property_readonly("linear_only", &Recipe::linear_only,
                             "Whether only Linear layers run so: integer products, in training or converted.")
      .def_static("from_name", &Recipe::from_name, py::arg("name"), "A named recipe; ValueError lists the names.")
      .def_static("names", &Recipe::names, "The names from_name knows.")
      .def("edge", &Recipe::edge, "The recipe of a model's first and last layer: edge_bits for weight and input.")
      .def("__repr__", [](const Recipe& self) {
        return repr_of("Recipe", self,
                       {"name", "weight", "input", "output", "backend", "training", "edge_bits", "grad_input",
                        "grad_weight", "int8", "fixed_point"});
      });
  bind_value_semantics(cls);
}

}  // namespace

void bind_recipe(py::module_& module) {
  bind_quant_spec(module);
  bind_gradient_spec(module);
  bind_int8_spec(module);
  bind_fixed_point_spec(module);
  bind_recipe(module);
}

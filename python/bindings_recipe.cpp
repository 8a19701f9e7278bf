// Python bindings of the structs whose fields() lists them (QuantSpec, GradientSpec, Recipe, the schemes): keyword
// constructors, properties, printing, equality, copy and pickle (through JSON), made from that list alone.

#include <set>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/recipe.h"
#include "quantrain/nn/schemes/fixed_point.h"
#include "quantrain/nn/schemes/four_bit.h"
#include "quantrain/nn/schemes/gradient_quant.h"
#include "quantrain/nn/schemes/int8.h"
#include "quantrain/nn/schemes/ptq.h"

namespace py = pybind11;
using namespace quantrain::nn;

void bind_recipe(py::module_& module);

namespace {

// An enum is its name in Python, a spec inside another the object itself, so that `recipe.weight.bits = 4` writes it.
template <typename T>
py::object to_python(T& value, py::handle parent) {
  if constexpr (std::is_enum_v<T>)
    return py::cast(name_of(value));
  else
    return py::cast(value, py::return_value_policy::reference_internal, parent);
}

template <typename T>
py::object to_python(std::optional<T>& value, py::handle parent) {
  return value ? py::cast(&*value, py::return_value_policy::reference_internal, parent) : py::none();
}

template <typename T>
void from_python(const char* name, py::handle given, T& value) {
  if constexpr (std::is_enum_v<T>) {
    value = value_of<T>(given.cast<std::string>(), name);
  } else {
    value = given.cast<T>();
  }
}

template <typename T>
std::vector<std::string> names_of_fields() {
  std::vector<std::string> names;
  T value;
  T::fields(value, [&names](const char* name, auto&) { names.push_back(name); });
  return names;
}

template <typename T>
void set_field(T& self, const std::string& field, py::handle given) {
  T::fields(self, [&](const char* name, auto& value) {
    if (field != name) return;
    try {
      from_python(name, given, value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(T::kTypeName) + ": expected another type for " + name + ", got " +
                           py::repr(given).cast<std::string>());
    } catch (const std::invalid_argument& error) {
      throw py::value_error(std::string(T::kTypeName) + ": " + error.what());
    }
  });
}

template <typename T>
std::string repr_of(const py::object& self, const std::vector<std::string>& fields) {
  std::string text = std::string(T::kTypeName) + "(";
  const char* separator = "";
  for (const std::string& field : fields) {
    text += separator + field + "=" + py::repr(self.attr(field.c_str())).cast<std::string>();
    separator = ", ";
  }
  return text + ")";
}

// `others`: fields beside those that fields() lists, whose properties the caller defines.
template <typename T, typename Class>
void bind_fields(Class& cls, const std::vector<std::string>& others = {}) {
  std::vector<std::string> names = names_of_fields<T>();
  for (const std::string& name : names) {
    cls.def_property(
        name.c_str(),
        [name](const py::object& self) {
          py::object found;
          T& value = self.cast<T&>();
          T::fields(value, [&](const char* field, auto& member) {
            if (name == field) found = to_python(member, self);
          });
          return found;
        },
        [name](T& self, const py::object& given) { set_field(self, name, given); });
  }
  names.insert(names.end(), others.begin(), others.end());
  cls.def(py::init([names](const py::kwargs& given) {
    T value;
    py::object object = py::cast(&value, py::return_value_policy::reference);
    for (const auto& item : given) {
      const auto name = item.first.cast<std::string>();
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        throw py::type_error(std::string(T::kTypeName) + ": expected a field of its own, got '" + name + "'");
      }
      object.attr(name.c_str()) = item.second;
    }
    value.validate();
    return value;
  }));
  cls.def("validate", &T::validate, "Raises ValueError naming the field, the rule and the value.")
      .def("__repr__", [names](const py::object& self) { return repr_of<T>(self, names); });
}

// Pickle keeps a value that is not valid, as an assignment can make it, only as far as JSON does: reading it back
// raises.
template <typename T, typename Class>
void bind_value(Class& cls) {
  cls.def("to_json", &T::to_json, "The JSON form, every field under its name.")
      .def_static("from_json", &T::from_json, py::arg("text"),
                  "Reads to_json()'s text; ValueError where it is not valid.")
      .def("__eq__", [](const T& a, const py::object& b) { return py::isinstance<T>(b) && a == b.cast<const T&>(); })
      .def("__copy__", [](const T& self) { return T(self); })
      .def(
          "__deepcopy__", [](const T& self, const py::dict&) { return T(self); }, py::arg("memo"))
      .def(py::pickle([](const T& self) { return self.to_json(); },
                      [](const std::string& text) { return T::from_json(text); }));
}

std::shared_ptr<Scheme> scheme_from(const std::string& kind, const std::string& fields) {
  return make_scheme(kind, fields);
}

py::object loads(const std::string& text) { return py::module_::import("json").attr("loads")(text); }

// Of a scheme that this file does not bind, one registered from outside, its fields are attributes by way of JSON.
void bind_scheme(py::module_& module) {
  py::class_<Scheme, std::shared_ptr<Scheme>>(
      module, "Scheme", "How a layer runs beyond rounding its tensors: one of a recipe's, by kind and fields.")
      .def_static(
          "make",
          [](const std::string& kind, const py::kwargs& fields) {
            return scheme_from(kind, py::module_::import("json").attr("dumps")(fields).cast<std::string>());
          },
          py::arg("kind"), "The scheme of a kind, of its own class where it has one; ValueError for an unknown field.")
      .def_property_readonly("kind", &Scheme::kind)
      .def_property_readonly("linear_only", &Scheme::linear_only, "Whether only Linear layers run so.")
      .def_property_readonly("integer_products", &Scheme::integer_products,
                             "Whether converted Linear layers multiply integers.")
      .def_property_readonly("quantizes_gradients", &Scheme::quantizes_gradients)
      .def_property_readonly("stored_form", &Scheme::stored_form,
                             "What a file's tensors mean beyond the specs: a file and a model must agree on it.")
      .def_property_readonly("packs_weight", &Scheme::packs_weight,
                             "Whether layers hold the weight as packed codes of the scheme's own.")
      .def("to_json", &Scheme::to_json)
      .def_property_readonly("has_weight_rule", &Scheme::has_weight_rule,
                             "Whether weight_qparams, and not the recipe's QuantSpec, decides the codes of weights.")
      .def(
          "weight_qparams",
          [](const Scheme& self, const at::Tensor& weight) {
            const WeightQparams own = self.weight_qparams(weight);
            const std::optional<at::Tensor> zero =
                own.zero_point.defined() ? std::optional<at::Tensor>(own.zero_point) : std::nullopt;
            return py::make_tuple(own.scale, zero, own.quant_min, own.quant_max);
          },
          py::arg("weight"),
          "(scale, zero_point, quant_min, quant_max) of a weight [O, ...]; ValueError where the scheme has no rule for "
          "weights.")
      .def_static("kinds", &scheme_kinds, "The kinds that are known.")
      .def("__getattr__",
           [](const Scheme& self, const std::string& name) -> py::object {
             const py::dict fields = loads(self.to_json());
             if (!fields.contains(name.c_str())) {
               throw py::attribute_error(self.type_name() + " has no field '" + name + "'");
             }
             return fields[name.c_str()];
           })
      .def("__eq__", [](const Scheme& a,
                        const py::object& b) { return py::isinstance<Scheme>(b) && a == b.cast<const Scheme&>(); })
      .def("__repr__",
           [](const Scheme& self) {
             std::string text = self.type_name() + "(";
             const char* separator = "";
             for (const auto& item : loads(self.to_json()).cast<py::dict>()) {
               text += separator + item.first.cast<std::string>() + "=" + py::repr(item.second).cast<std::string>();
               separator = ", ";
             }
             return text + ")";
           })
      .def("__copy__", [](const Scheme& self) { return std::shared_ptr<Scheme>(self.clone()); })
      .def(
          "__deepcopy__", [](const Scheme& self, const py::dict&) { return std::shared_ptr<Scheme>(self.clone()); },
          py::arg("memo"))
      .def(py::pickle([](const Scheme& self) { return py::make_tuple(self.kind(), self.to_json()); },
                      [](const py::tuple& state) {
                        return scheme_from(state[0].cast<std::string>(), state[1].cast<std::string>());
                      }));
}

template <typename S>
void bind_scheme_of(py::module_& module, const char* doc) {
  py::class_<S, Scheme, std::shared_ptr<S>> cls(module, S::kTypeName, doc);
  bind_fields<S>(cls);
  cls.def_static(
      "from_json",
      [](const std::string& text) {
        return std::static_pointer_cast<S>(std::shared_ptr<Scheme>(make_scheme(S::kKind, text)));
      },
      py::arg("text"), "Reads to_json()'s text; ValueError where it is not valid.");
  cls.def(py::pickle([](const S& self) { return self.to_json(); },
                     [](const std::string& text) {
                       return std::static_pointer_cast<S>(std::shared_ptr<Scheme>(make_scheme(S::kKind, text)));
                     }));
}

void bind_recipe_class(py::module_& module) {
  py::class_<Recipe> cls(
      module, "Recipe",
      "How a layer is quantized: a QuantSpec (or None) for weight, input and output, a scheme (or None) for "
      "how it runs beyond that, and a PruneSpec (or None) for which weights stay at zero.");
  cls.def_property(
      "scheme", [](const Recipe& self) { return self.scheme.pointer(); },
      [](Recipe& self, const py::object& scheme) {
        if (!scheme.is_none() && !py::isinstance<Scheme>(scheme)) {
          throw py::type_error("Recipe: expected another type for scheme, got " + py::repr(scheme).cast<std::string>());
        }
        self.scheme = scheme.is_none() ? SchemeValue() : SchemeValue(scheme.cast<const Scheme&>().clone());
      });
  cls.def_property(
      "prune", [](const py::object& self) { return to_python(self.cast<Recipe&>().prune, self); },
      [](Recipe& self, const py::object& given) {
        if (!given.is_none() && !py::isinstance<PruneSpec>(given)) {
          throw py::type_error("Recipe: expected another type for prune, got " + py::repr(given).cast<std::string>());
        }
        self.prune = given.is_none() ? std::nullopt : std::optional(given.cast<PruneSpec>());
      });
  bind_fields<Recipe>(cls, {"scheme", "prune"});
  bind_value<Recipe>(cls);
  cls.def_property_readonly("linear_only", &Recipe::linear_only, "Whether only Linear layers run so.")
      .def(
          "scheme_is",
          [](const Recipe& self, const std::string& kind) { return self.scheme && self.scheme->kind() == kind; },
          py::arg("kind"), "Whether the recipe's scheme is of that kind.")
      .def_static("from_name", &Recipe::from_name, py::arg("name"), "A named recipe; ValueError lists the names.")
      .def_static("names", &Recipe::names, "The names from_name knows.")
      .def("edge", &Recipe::edge, "The recipe of a model's first and last layer: edge_bits for weight and input.");
}

}  // namespace

void bind_recipe(py::module_& module) {
  py::class_<QuantSpec> quant(
      module, "QuantSpec",
      "How one tensor of a layer is quantized: codes, granularity, and where the scale comes from.");
  bind_fields<QuantSpec>(quant);
  bind_value<QuantSpec>(quant);
  quant.def("quant_min", &QuantSpec::quant_min, "The smallest code: -2**(bits-1) symmetric, 0 affine.")
      .def("quant_max", &QuantSpec::quant_max, "The largest code: 2**(bits-1) - 1 symmetric, 2**bits - 1 affine.")
      .def("weight_scale_shape", &QuantSpec::weight_scale_shape, py::arg("weight_shape"),
           "Shape of the scale of a weight [O, ...]: (1,) per tensor, (O, 1, ...) per channel, (O, K / group_size) per "
           "group of a matrix whose rows group_size divides.");
  py::class_<GradientSpec> gradient(
      module, "GradientSpec",
      "How the gradient of a layer's output is rounded before the product that gives grad_input or grad_weight.");
  bind_fields<GradientSpec>(gradient);
  bind_value<GradientSpec>(gradient);
  gradient.def("resolved", &GradientSpec::resolved, py::arg("tensor"), py::kw_only(), py::arg("convolution"),
               "This spec as a layer runs it, without 'auto'. tensor: 'grad_input' or 'grad_weight'.");
  py::class_<PruneSpec> prune(module, "PruneSpec",
                              "Which weights of a model stay at zero: sparsity, pattern, score, scope, schedule.");
  bind_fields<PruneSpec>(prune);
  bind_value<PruneSpec>(prune);
  prune
      .def("sparsity_at", &PruneSpec::sparsity_at, py::arg("step"), py::arg("steps"),
           "What is dropped after that step of so many: of one_shot the sparsity at once.")
      .def("renews_at", &PruneSpec::renews_at, py::arg("step"), py::arg("steps"),
           "Whether masks are made anew after that step; 0 is before the first.")
      .def("last_step", &PruneSpec::last_step, py::arg("steps"), "The step after which the masks are fixed.")
      .def_property_readonly("needs_batches", &PruneSpec::needs_batches, "Whether the score looks at inputs.");
  bind_scheme(module);
  bind_scheme_of<GradientQuantSpec>(
      module,
      "Gradients computed from a quantized gradient of the output: a GradientSpec (or None) for grad_input and "
      "grad_weight.");
  bind_scheme_of<Int8Spec>(
      module,
      "Which of a Linear layer's three matrix products run in int8 while it trains: 'int8', 'none' or 'auto' each.");
  bind_scheme_of<FixedPointSpec>(
      module,
      "How a model trains in fixed point (F8Net): how fraction lengths are chosen, and whether activations are clipped "
      "at a learned level.");
  bind_scheme_of<FourBitSpec>(
      module,
      "Weights packed in 4 bits, and LoRA: scale_rule, compress_scale, whether embedding and head are packed too, "
      "storage ('uint8' or 'bfloat16' views for FSDP2), lora_rank, lora_alpha, lora_dropout.");
  bind_scheme_of<PtqSpec>(
      module,
      "Post-training quantization of linear layers: smooth_alpha, outlier_columns, outlier_threshold, rounding, "
      "damping, scale_search, group_scales, attention_bits, few_rows, distill_steps, distill_lr, head, kv_cache.");
  bind_recipe_class(module);
}

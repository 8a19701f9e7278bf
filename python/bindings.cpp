// quantrain._C: importing it loads libquantrain, and with it the operators in torch.ops.quantrain. Beside that it says
// how the library was built, and binds the classes that are not operators.
#include <pybind11/pybind11.h>

void bind_amp(pybind11::module_& module);
void bind_files(pybind11::module_& module);
void bind_fixed_point(pybind11::module_& module);
void bind_fixed_point_conv(pybind11::module_& module);
void bind_four_bit(pybind11::module_& module);
void bind_int8(pybind11::module_& module);
void bind_layers(pybind11::module_& module);
void bind_ptq(pybind11::module_& module);
void bind_recipe(pybind11::module_& module);
void bind_probe(pybind11::module_& module);

PYBIND11_MODULE(_C, module) {
  module.doc() = "quantrain's compiled part";
  module.attr("__version__") = QUANTRAIN_VERSION;
  module.attr("built_with_cuda") = static_cast<bool>(QUANTRAIN_CUDA_BUILD);
  bind_amp(module);
  bind_files(module);
  bind_fixed_point(module);
  bind_fixed_point_conv(module);
  bind_four_bit(module);
  bind_int8(module);
  bind_layers(module);
  bind_ptq(module);
  bind_recipe(module);
  bind_probe(module);
}

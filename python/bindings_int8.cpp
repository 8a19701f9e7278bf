// A transformer layer whose weights and options are kept, for quantrain/nn/int8_blocks.py. Other Python threads run
// during every call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/ops/int8_transformer.h"

namespace py = pybind11;
using namespace quantrain;

void bind_int8(py::module_& module);

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Tensors = std::vector<OptionalTensor>;

Int8TransformerInputs inputs_of(const OptionalTensor& mask, const OptionalTensor& cos, const OptionalTensor& sin,
                                const OptionalTensor& codes, const OptionalTensor& scale) {
  Int8TransformerInputs in{mask, cos, sin};
  if (codes && scale) in.codes = Int8Codes{*codes, *scale};
  return in;
}

py::tuple as_tuple(Int8TransformerResult result) {
  if (!result.codes) return py::make_tuple(std::move(result.output), py::none(), py::none());
  return py::make_tuple(std::move(result.output), std::move(result.codes->codes), std::move(result.codes->scale));
}

}  // namespace

void bind_int8(py::module_& module) {
  py::class_<Int8TransformerCall>(module, "Int8TransformerCall")
      .def(py::init([](const Tensors& weights, int64_t heads, int64_t kv_heads, std::string norm, bool pre_norm,
                       std::string activation, bool causal, double eps, double softmax_scale, bool quantize_input,
                       double outlier_threshold, int64_t capacity, bool few_rows_float) {
             return Int8TransformerCall(int8_transformer_weights(weights),
                                        {heads,
                                         kv_heads,
                                         std::move(norm),
                                         pre_norm,
                                         std::move(activation),
                                         causal,
                                         eps,
                                         softmax_scale,
                                         {quantize_input, outlier_threshold, capacity, few_rows_float}});
           }),
           py::arg("weights"), py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("norm"),
           py::arg("pre_norm"), py::arg("activation"), py::arg("causal"), py::arg("eps"), py::arg("softmax_scale"),
           py::arg("quantize_input"), py::arg("outlier_threshold"), py::arg("capacity"), py::arg("few_rows_float"))
      .def("layer",
           [](const Int8TransformerCall& self, const at::Tensor& input, const OptionalTensor& mask,
              const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& codes,
              const OptionalTensor& scale) {
             Int8TransformerResult result;
             {
               const py::gil_scoped_release no_gil;
               result = self.layer(input, inputs_of(mask, cos, sin, codes, scale));
             }
             return as_tuple(std::move(result));
           })
      .def("step",
           [](const Int8TransformerCall& self, const at::Tensor& input, const OptionalTensor& cos,
              const OptionalTensor& sin, const at::Tensor& key_codes, const at::Tensor& key_scale,
              const at::Tensor& value_codes, const at::Tensor& value_scale, const at::Tensor& position,
              const OptionalTensor& kept) {
             const py::gil_scoped_release no_gil;
             Int8KvCache cache{key_codes, key_scale, value_codes, value_scale};
             Int8TransformerInputs in{std::nullopt, cos, sin};
             in.cache = &cache;
             in.position = position;
             in.kept = kept;
             return self.layer(input, in).output;
           })
      .def("qkv",
           [](const Int8TransformerCall& self, const at::Tensor& input, const OptionalTensor& cos,
              const OptionalTensor& sin) {
             const py::gil_scoped_release no_gil;
             return self.qkv(input, inputs_of(std::nullopt, cos, sin, std::nullopt, std::nullopt));
           })
      .def("output", [](const Int8TransformerCall& self, const at::Tensor& input, const at::Tensor& attended) {
        const py::gil_scoped_release no_gil;
        return self.output(input, attended).output;
      });
}

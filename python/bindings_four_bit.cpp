// Weights of 4 bits in the files of others, GGUF files and LoRA adapters; documented in
// quantrain/nn/four_bit_formats.py. Other Python threads run during every call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "quantrain/nn/four_bit.h"
#include "quantrain/nn/four_bit_formats.h"
#include "quantrain/nn/gguf.h"
#include "quantrain/nn/lora_adapter.h"

namespace py = pybind11;
using namespace quantrain::nn;

void bind_four_bit(py::module_& module);

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// An undefined tensor is None in Python.
constexpr std::pair<const char*, at::Tensor FourBitWeight::*> kTensors[] = {
    {"codes", &FourBitWeight::codes},
    {"scale", &FourBitWeight::scale},
    {"zero_point", &FourBitWeight::zero_point},
    {"scale_scale", &FourBitWeight::scale_scale},
    {"scale_offset", &FourBitWeight::scale_offset},
    {"table", &FourBitWeight::table},
    {"permutation", &FourBitWeight::permutation},
    {"bias", &FourBitWeight::bias},
};

std::string representation(const FourBitWeight& self) {
  std::string parts;
  for (const auto& [name, member] : kTensors) {
    if ((self.*member).defined()) parts += (parts.empty() ? "" : ", ") + std::string(name);
  }
  return "FourBitWeight(format='" + self.format + "', size=" + py::repr(py::cast(self.size)).cast<std::string>() +
         ", block_size=" + std::to_string(self.block_size) +
         ", dtype=" + py::repr(py::cast(self.dtype)).cast<std::string>() + ", tensors: " + parts + ")";
}

void bind_weight(py::module_& module) {
  py::class_<FourBitWeight> cls(
      module, "FourBitWeight",
      "A packed weight and what belongs to it: codes, scale, zero_point, scale_scale, scale_offset, table, permutation "
      "and bias, tensors or None; format, size, block_size and dtype. Its size is a copy: assign it whole.");
  cls.def(
      py::init([](OptionalTensor codes, OptionalTensor scale, std::string format, std::vector<int64_t> size,
                  int64_t block_size, at::ScalarType dtype, OptionalTensor zero_point, OptionalTensor scale_scale,
                  OptionalTensor scale_offset, OptionalTensor table, OptionalTensor permutation, OptionalTensor bias) {
        const auto tensor = [](OptionalTensor& given) { return given ? std::move(*given) : at::Tensor(); };
        return FourBitWeight{.codes = tensor(codes),
                             .scale = tensor(scale),
                             .zero_point = tensor(zero_point),
                             .scale_scale = tensor(scale_scale),
                             .scale_offset = tensor(scale_offset),
                             .table = tensor(table),
                             .permutation = tensor(permutation),
                             .bias = tensor(bias),
                             .format = std::move(format),
                             .size = std::move(size),
                             .block_size = block_size,
                             .dtype = dtype};
      }),
      py::arg("codes"), py::arg("scale"), py::arg("format"), py::arg("size"), py::arg("block_size"),
      py::arg("dtype") = at::kFloat, py::kw_only(), py::arg("zero_point") = py::none(),
      py::arg("scale_scale") = py::none(), py::arg("scale_offset") = py::none(), py::arg("table") = py::none(),
      py::arg("permutation") = py::none(), py::arg("bias") = py::none());
  for (const auto& [name, member] : kTensors) {
    cls.def_property(
        name,
        [member = member](const FourBitWeight& self) {
          const at::Tensor& tensor = self.*member;
          return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
        },
        [member = member](FourBitWeight& self, const OptionalTensor& tensor) {
          self.*member = tensor.value_or(at::Tensor());
        });
  }
  cls.def_readwrite("format", &FourBitWeight::format)
      .def_readwrite("size", &FourBitWeight::size)
      .def_readwrite("block_size", &FourBitWeight::block_size)
      .def_readwrite("dtype", &FourBitWeight::dtype)
      .def("__repr__", &representation);
}

void bind_formats(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> release;
  module.def("load_bitsandbytes", &load_bitsandbytes, py::arg("tensors"), py::arg("prefix"), release);
  module.def("to_bitsandbytes", &to_bitsandbytes, py::arg("weight"), py::arg("prefix"), py::arg("quant_storage"),
             release);
  module.def("from_gptq", &from_gptq, py::arg("tensors"), py::arg("prefix"), py::arg("version"), py::arg("group_size"),
             release);
  module.def("to_gptq", &to_gptq, py::arg("weight"), py::arg("prefix"), py::arg("version"), py::arg("group_size"),
             py::arg("round_scale"), release);
  module.def("from_awq", &from_awq, py::arg("tensors"), py::arg("prefix"), py::arg("group_size"), release);
  module.def("to_awq", &to_awq, py::arg("weight"), py::arg("prefix"), py::arg("group_size"), py::arg("round_scale"),
             release);
  module.def("from_compressed_tensors", &from_compressed_tensors, py::arg("tensors"), py::arg("prefix"), release);
  module.def("to_compressed_tensors", &to_compressed_tensors, py::arg("weight"), py::arg("prefix"),
             py::arg("group_size"), py::arg("round_scale"), release);
  module.def("from_hqq", &from_hqq, py::arg("tensors"), py::arg("prefix"), release);
  module.def("pack_four_bit", &pack_four_bit, py::arg("weight"), py::arg("recipe"), release);
  module.def("dequantized", &dequantized, py::arg("weight"), py::arg("dtype"), release);
  module.def("recipe_of", &recipe_of, py::arg("weight"));
  module.def(
      "merged_weight",
      [](const FourBitWeight& weight, const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
         at::ScalarType dtype) {
        MergedWeight merged =
            merged_weight(weight, lora_a.value_or(at::Tensor()), lora_b.value_or(at::Tensor()), scaling, dtype);
        return std::make_tuple(merged.weight, merged.weight_error, merged.update_error);
      },
      py::arg("weight"), py::arg("lora_a"), py::arg("lora_b"), py::arg("scaling"), py::arg("dtype"), release);
  module.def("four_bit_layers", &four_bit_layers, py::arg("tensors"), release);
  py::class_<FourBitConfig>(module, "FourBitConfig",
                            "What a config.json says of a model's format: method, GPTQ's version, group_size.")
      .def(py::init([](std::string method, int64_t version, int64_t group_size) {
             return FourBitConfig{std::move(method), version, group_size};
           }),
           py::arg("method"), py::arg("version") = 0, py::arg("group_size") = 0)
      .def_readwrite("method", &FourBitConfig::method)
      .def_readwrite("version", &FourBitConfig::version)
      .def_readwrite("group_size", &FourBitConfig::group_size)
      .def("__repr__", [](const FourBitConfig& self) {
        return "FourBitConfig(method='" + self.method + "', version=" + std::to_string(self.version) +
               ", group_size=" + std::to_string(self.group_size) + ")";
      });
  module.def("read_four_bit_config", &read_four_bit_config, py::arg("json"));
  module.def("load_four_bit_layers", &load_four_bit_layers, py::arg("tensors"), py::arg("config"), release);
}

void bind_gguf(py::module_& module) {
  py::class_<EightBitWeight>(module, "EightBitWeight",
                             "Codes int8 [..., K] with one float32 scale for 32 elements of a row.")
      .def_readonly("codes", &EightBitWeight::codes)
      .def_readonly("scale", &EightBitWeight::scale);
  py::class_<GgufFile>(module, "GgufFile",
                       "A GGUF file's content: metadata, float tensors, four_bit and eight_bit weights, by name.")
      .def_readonly("metadata", &GgufFile::metadata)
      .def_readonly("tensors", &GgufFile::tensors)
      .def_readonly("four_bit", &GgufFile::four_bit)
      .def_readonly("eight_bit", &GgufFile::eight_bit);
  module.def("read_gguf", &read_gguf, py::arg("path"), py::call_guard<py::gil_scoped_release>());
}

void bind_adapter(py::module_& module) {
  py::class_<LoraWeight>(module, "LoraWeight", "The two matrices of a LoRA layer: a [r, in] and b [out, r].")
      .def(py::init([](at::Tensor a, at::Tensor b) { return LoraWeight{std::move(a), std::move(b)}; }), py::arg("a"),
           py::arg("b"))
      .def_readwrite("a", &LoraWeight::a)
      .def_readwrite("b", &LoraWeight::b);
  py::class_<LoraAdapter>(
      module, "LoraAdapter",
      "A LoRA adapter as PEFT's files hold it: layers and others by name, and the settings. Dicts and lists "
      "are copies: assign them whole.")
      .def(py::init([](std::map<std::string, LoraWeight> layers, int64_t r, double lora_alpha, double lora_dropout,
                       std::vector<std::string> target_modules, bool use_rslora, std::string bias) {
             LoraAdapter adapter;
             adapter.layers = std::move(layers);
             adapter.r = r;
             adapter.lora_alpha = lora_alpha;
             adapter.lora_dropout = lora_dropout;
             adapter.target_modules = std::move(target_modules);
             adapter.use_rslora = use_rslora;
             adapter.bias = std::move(bias);
             return adapter;
           }),
           py::arg("layers") = std::map<std::string, LoraWeight>{}, py::kw_only(), py::arg("r") = 8,
           py::arg("lora_alpha") = 8.0, py::arg("lora_dropout") = 0.0,
           py::arg("target_modules") = std::vector<std::string>{}, py::arg("use_rslora") = false,
           py::arg("bias") = "none")
      .def_readwrite("layers", &LoraAdapter::layers)
      .def_readwrite("others", &LoraAdapter::others)
      .def_readwrite("r", &LoraAdapter::r)
      .def_readwrite("lora_alpha", &LoraAdapter::lora_alpha)
      .def_readwrite("lora_dropout", &LoraAdapter::lora_dropout)
      .def_readwrite("target_modules", &LoraAdapter::target_modules)
      .def_readwrite("target_pattern", &LoraAdapter::target_pattern)
      .def_readwrite("modules_to_save", &LoraAdapter::modules_to_save)
      .def_readwrite("use_rslora", &LoraAdapter::use_rslora)
      .def_readwrite("bias", &LoraAdapter::bias)
      .def_readwrite("base_model", &LoraAdapter::base_model)
      .def_readwrite("task_type", &LoraAdapter::task_type)
      .def("scaling", &LoraAdapter::scaling, py::arg("layer"),
           "lora_alpha / rank of the layer, with rslora lora_alpha / sqrt(rank).");
  const py::call_guard<py::gil_scoped_release> release;
  module.def("load_lora_adapter", &load_lora_adapter, py::arg("folder"), release);
  module.def("save_lora_adapter", &save_lora_adapter, py::arg("folder"), py::arg("adapter"), release);
}

}  // namespace

void bind_four_bit(py::module_& module) {
  bind_weight(module);
  bind_formats(module);
  bind_gguf(module);
  bind_adapter(module);
}

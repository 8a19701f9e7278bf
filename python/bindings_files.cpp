// Files, written by one function in both languages: whole or not at all, safe among several writers.
#include <torch/extension.h>

#include "nn/replace_file.h"
#include "quantrain/nn/checkpoint.h"

namespace py = pybind11;

void bind_files(py::module_& module);

void bind_files(py::module_& module) {
  module.def(
      "replace_file",
      [](const std::string& path, const py::bytes& content) {
        const std::string_view view = content;
        const py::gil_scoped_release release;
        quantrain::nn::detail::replace_file(path, {view});
      },
      py::arg("path"), py::arg("content"),
      "Puts content in place of the file: written beside it under a name of its own, synchronized, renamed.");
  module.def(
      "write_safetensors",
      [](const std::string& path, std::map<std::string, at::Tensor> tensors,
         std::map<std::string, std::string> metadata) {
        const py::gil_scoped_release release;
        quantrain::nn::write_safetensors(path, {std::move(tensors), std::move(metadata)});
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata") = std::map<std::string, std::string>{},
      "Writes a safetensors file, by replace_file.");
}

// safetensors files: their headers, and files in memory. `path` is for messages throughout. Private to the library.
#pragma once

#include <fstream>
#include <istream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/checkpoint.h"

namespace quantrain::nn::detail {

// c10::ValueError: "<path>: expected <rule>, got <value>".
[[noreturn]] void fail_file(const std::string& path, const std::string& rule, const std::string& value);
std::string in_quotes(const std::string& name);
std::string shape_text(at::IntArrayRef shape);

struct SafeTensorsEntry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct SafeTensorsHeader {
  std::vector<SafeTensorsEntry> entries;  // in the order of their bytes
  std::map<std::string, std::string> metadata;
  uint64_t data_start = 0;
};

std::ifstream open_to_read(const std::string& path);
SafeTensorsHeader read_header(const std::string& path, std::istream& file);
SafeTensors read_tensors(const std::string& path, std::istream& file, const SafeTensorsHeader& header);

struct PackedSafeTensors {
  std::string head;  // the header's length and the header: metadata first, its keys in alphabetical order
  std::vector<at::Tensor> tensors;  // on the CPU, contiguous, in the order of their bytes

  // The file, piece by piece; valid as long as this is.
  std::vector<std::string_view> pieces() const;
};

// Raises c10::ValueError for a dtype that has no name in the format.
PackedSafeTensors pack_safetensors(const std::string& path, const SafeTensors& content);

// The content of a file that is open, or in memory.
SafeTensors read_safetensors(const std::string& path, std::istream& file);

}  // namespace quantrain::nn::detail

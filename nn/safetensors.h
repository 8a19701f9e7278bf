// safetensors files in memory.
#pragma once

#include <istream>
#include <string>
#include <string_view>
#include <vector>

#include "quantrain/nn/checkpoint.h"

namespace quantrain::nn::detail {

struct PackedSafeTensors {
  std::string head;  // the header's length and the header: metadata first, its keys in alphabetical order
  std::vector<at::Tensor> tensors;  // on the CPU, contiguous, in the order of their bytes

  // The file, piece by piece; valid as long as this is.
  std::vector<std::string_view> pieces() const;
};

// `path` is for messages. Raises c10::ValueError for a dtype that has no name in the format.
PackedSafeTensors pack_safetensors(const std::string& path, const SafeTensors& content);

// The content of a file that is open, or in memory. `path` is for messages.
SafeTensors read_safetensors(const std::string& path, std::istream& file);

}  // namespace quantrain::nn::detail

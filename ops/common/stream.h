// The CUDA stream that work is put on. Of the CPU, and in a build without CUDA: 0 and false.
#pragma once

#include <ATen/core/Tensor.h>

namespace quantrain {

int64_t current_stream(const at::Device& device);
bool is_capturing(const at::Device& device);  // into a CUDA graph

}  // namespace quantrain

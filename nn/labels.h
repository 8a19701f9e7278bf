// The names of layers in messages. Private to the library.
#pragma once

#include <string>
#include <vector>

#include <torch/nn/module.h>

namespace quantrain::nn::detail {

// Tells every quantized layer below `module` its path.
void label_layers(const torch::nn::Module& module);

// "<what>: a, b, c", and how many more there are than a message holds; "" without names.
std::string listed(const std::vector<std::string>& names, const std::string& what);

}  // namespace quantrain::nn::detail

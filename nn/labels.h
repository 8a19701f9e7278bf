// The names that layers give themselves in error messages. Private to the library.
#pragma once

#include <torch/nn/module.h>

namespace quantrain::nn::detail {

// Tells every quantised layer below `module` its path.
void label_layers(const torch::nn::Module& module);

}  // namespace quantrain::nn::detail

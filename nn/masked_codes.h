// Masks of pruned weights in checkpoints: buffers `weight_mask` (ops/pruning.h), and the codes of converted layers
// without those that a mask drops. Private to the library.
//
// A converted layer whose mask drops codes of 0 is written as weight_mask and `weight_codes_kept`, the codes that are
// kept, in row-major order: of a weight half of which is dropped 5 bits an element in place of 8.
#pragma once

#include <map>
#include <string>

#include <torch/nn/module.h>

namespace quantrain::nn::detail {

using NamedTensors = std::map<std::string, at::Tensor>;

// In place, what a file holds: kept codes where a layer's codes are of a byte each and dropped ones are 0.
void keep_codes(NamedTensors& tensors);

// In place, and back: zeros where a mask drops. shapes: of converted layers' weights, by the layer's name. ValueError
// naming the file: no mask or shape, a mask or a number of codes that do not fit.
void spread_codes(const std::string& path, NamedTensors& tensors,
                  const std::map<std::string, std::vector<int64_t>>& shapes);

// Takes the masks out of `tensors` that belong to modules without one; ValueError where a mask does not fit its weight.
NamedTensors take_new_masks(const std::string& path, NamedTensors& tensors, const torch::nn::Module& module);

// Registers them.
void add_masks(torch::nn::Module& module, const NamedTensors& masks);

}  // namespace quantrain::nn::detail

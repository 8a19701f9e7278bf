// The program of an integer network, proven: parsed from JSON, checked against its tensors, and proven to keep every
// sum inside int32. Private to the library; the format is described in quantrain/nn/fixed_point/network.h.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace quantrain::nn::detail {

enum class FixedPointOp { kInput, kConv2d, kLinear, kMaxPool2d, kAvgPool2d, kSlicePad, kAdd, kFlatten };

// One value of the network: what the input or a node makes. A number is integer * 2^-fraction_length.
struct FixedPointNode {
  std::string name;
  std::string op_name;
  FixedPointOp op = FixedPointOp::kInput;
  std::vector<int> inputs;  // indices of earlier nodes; a convolution's second is its residual

  // The value.
  at::ScalarType dtype = at::kByte;      // uint8 or int8 codes, int32 accumulators
  std::vector<int64_t> fraction_length;  // one element, or one per channel
  int64_t channels = 0;                  // 0: a flattened image of unknown size
  bool flat = false;                     // [N, channels], not [N, channels, H, W]
  bool single_pixel = false;             // known to be [N, channels, 1, 1]
  std::vector<int64_t> bound;            // largest magnitude: one element (codes), or one per channel (accumulators)

  int64_t sum_bound = 0;  // largest magnitude of what is summed on the way; 0 where nothing is

  // What the operation needs, where it has it.
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, padding{0, 0}, size{1, 1}, pad{0, 0};
  int64_t groups = 1;
  int64_t pool_shift = 0;
  // Accumulator's fraction length less the output's; for a residual (or the second operand of an addition) less its
  // own.
  std::vector<int64_t> shift, residual_shift;

  bool has_codes() const { return dtype != at::kInt; }
  bool has_weight() const { return op == FixedPointOp::kConv2d || op == FixedPointOp::kLinear; }
};

// What a FixedPointProgram (graph.h) says, once it holds.
struct ProvenProgram {
  std::string json;                   // canonical text
  std::vector<FixedPointNode> nodes;  // [0] is the input; topological
  int output = 0;
  double input_scale = 1;
  double output_scale = 1;
};

const char* fixed_point_dtype_name(at::ScalarType type);

// Throws ValueError: a graph that is not version 1, whatever is missing, unknown, of a wrong type or out of range,
// tensors that do not fit, and a sum that could pass int32.
ProvenProgram prove_program(const std::string& json, const std::map<std::string, at::Tensor>& tensors);

// [N, C, H, W] of every value for an input of the given sizes; a flat value is [N, C, 1, 1]. ValueError where the image
// does not fit.
std::vector<std::array<int64_t, 4>> fixed_point_shapes(const ProvenProgram& graph, std::array<int64_t, 4> input,
                                                       const std::map<std::string, at::Tensor>& tensors);

}  // namespace quantrain::nn::detail

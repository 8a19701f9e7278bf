// FixedPointNetwork: a whole network in integers. Convolutions of 8-bit codes with int32 sums, additions, shifts,
// comparisons and copies; no float between the input's codes and the output's sums (F8Net: Jin et al., ICLR 2022).
//
// Made of a graph (JSON text) and named tensors. A value is integer * 2^-FL, FL its fraction length. Graph, version 1:
//   {"format": "quantrain.fixed_point", "version": 1, "recipe": Recipe JSON, "" or "{}",
//    "input": {"name", "channels", "signed", "fraction_length", "scale"},    // real value = code * scale
//    "nodes": [{"name", "op", "inputs": [names], ...}, ...],                 // in topological order
//    "output": {"name", "scale"}}                                            // real value = accumulator * scale, a
//                                                                            power of two
// Fields a node has beside those three (an array of two is height, width):
//   conv2d      kernel [2], stride [2], padding [2], groups, channels, weight_fraction_length, output, (signed,
//               fraction_length) groups is 1, or the number of input and output channels. A second input is a residual,
//               codes or accumulators, added before the one rounding; then output is "codes".
//   linear      features, weight_fraction_length, output, (signed, fraction_length); its input is flat
//   max_pool2d  kernel [2], stride [2], padding [2]
//   avg_pool2d  size [2] (the whole image), shift, fraction_length: the sum has FL of the input + shift, and is rounded
//               to codes
//   slice_pad   stride [2], pad [before, after]: x[:, :, ::sh, ::sw] between channels of zeros
//   add         signed, fraction_length: two inputs, codes or accumulators
//   flatten     [N, C, H, W] to [N, C H W], in that order
// conv2d and linear have tensors "<name>.weight", int8 codes -127..127 [O, C / groups, kh, kw] or [O, K] of
// weight_fraction_length 0..7 (one, or a list of O), and "<name>.bias", int32 [O] of the sum's fraction length (input's
// + weight's), which may be absent. output "accumulators": the int32 sums. "codes": uint8 (signed false, FL 0..8;
// negative sums clip to 0, a ReLU) or int8 (FL 0..7).
//
// Proven at construction, for any input: max over channels of sum |w| * max |code| + |bias| + max |residual|, each also
// after it was shifted to the other's fraction length, stays below 2^31. Otherwise ValueError, which names the layer
// and the bound.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A line of audit(): what one node computes with.
struct QUANTRAIN_API FixedPointAuditRow {
  std::string name;
  std::string op;           // of the graph
  std::string operations;   // "multiply, add, shift": what it does to integers
  std::string operands;     // "uint8 x int8", "uint8 + int32", "uint8"
  std::string accumulator;  // "int32", or "" where nothing is summed
  std::string result;       // dtype
  int64_t bound = 0;        // proven: no sum is larger in magnitude; 0 where nothing is summed
};

// Copies share everything. Weights are packed once, in the constructor; memory is planned once for each input shape
// (lifetimes in one arena; the 8 latest shapes are kept). Calls from several threads are safe and wait for each other;
// on CUDA each stream has its own arena, and a forward pass under graph capture takes one of the graph's memory. The
// network must outlive the graph.
class QUANTRAIN_API FixedPointNetwork {
 public:
  // ValueError for a graph or tensors that are not as above; nothing is half made. The tensors are on one device, and
  // are not copied there.
  FixedPointNetwork(const std::string& graph, const std::map<std::string, at::Tensor>& tensors);

  // codes uint8 or int8 [N, C, H, W] as the graph's input says, any strides, to the output's integers: int32, or codes
  // where the output node makes codes; contiguous. TypeError for floats ("expected uint8 or int8 codes, got float32")
  // and another device, ValueError for shapes.
  at::Tensor forward(const at::Tensor& codes) const;

  // Every node's integers by name, [N, C, H, W] or [N, C], contiguous.
  std::map<std::string, at::Tensor> forward_all(const at::Tensor& codes) const;

  at::Tensor quantize_input(const at::Tensor& images) const;       // clamp(rint(x / scale)), as the op quantize
  at::Tensor dequantize_output(const at::Tensor& integers) const;  // float32: integers * scale

  const std::string& graph() const;                          // canonical JSON
  const std::map<std::string, at::Tensor>& tensors() const;  // int8 and int32
  at::Device device() const;
  FixedPointNetwork to(const at::Device& device) const;  // a network there; this one where it is there already

  // One row per node. ValueError where one would do anything but multiply 8-bit codes, add, shift, compare or copy.
  std::vector<FixedPointAuditRow> audit() const;

  // Writes `path` (safetensors, with the graph and a checksum as metadata), whole or not at all: an existing file is
  // replaced by a rename. ValueError for a path that ends in .json.
  void save(const std::string& path) const;
  // Also of version 1, whose graph is a file of its own beside `path`. ValueError for a changed byte, a file that is
  // not whole, or two that are not of one network; Error (c10) where one cannot be read.
  static FixedPointNetwork load(const std::string& path);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace quantrain::nn

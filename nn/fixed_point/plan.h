// How an integer network runs for one size of images: memory for its values, placed once, and the steps over it.
// Private to the library.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "nn/fixed_point/program.h"
#include "ops/fixed_point_network.h"
#include "quantrain/ops/fixed_point_conv.h"

namespace quantrain::nn::detail {

using FixedPointShape = std::array<int64_t, 4>;  // [N, C, H, W]

// What a node's steps need beside the values.
struct FixedPointStepLayer {
  std::optional<FixedPointConv> conv;
  at::Tensor shift, residual_shift;
};

struct FixedPointStep {
  enum class Kind { kConv, kMaxPool, kSumPool, kCopy, kSum };
  Kind kind = Kind::kConv;
  const FixedPointStepLayer* layer = nullptr;
  const FixedPointNode* node = nullptr;
  at::Tensor input, output, residual;
  FixedPointCopyArgs copy{};
  FixedPointSumArgs sum{};
};

struct FixedPointPlan {
  FixedPointShape input_shape{};
  int64_t stream = 0;  // CUDA: whose arena this is
  std::vector<FixedPointShape> shapes;
  at::Tensor arena;
  std::vector<at::Tensor> values;  // views [N, C, H, W], channels_last in memory; undefined where a node is not needed
  std::vector<FixedPointStep> steps;  // front: the input's copy; back: the output's
};

// layers: one per node. all: every value keeps memory of its own.
std::unique_ptr<FixedPointPlan> make_plan(const ProvenProgram& graph, const std::vector<FixedPointStepLayer>& layers,
                                          const std::map<std::string, at::Tensor>& tensors, const at::Device& device,
                                          const FixedPointShape& input_shape, bool all);

// From codes [N, C, H, W] of any strides to the output's integers.
void run_steps(FixedPointPlan& plan, const at::Tensor& codes, at::Tensor& output);

}  // namespace quantrain::nn::detail

#include "nn/fixed_point/plan.h"

// Steps read and write raw views of one arena: no dispatcher, no JSON, nothing allocated. The first copies the input's
// codes to NHWC, the last one the output's integers to what the caller gets.

#include <algorithm>
#include <utility>

#include <ATen/ops/empty.h>

#include "ops/common/layout.h"

namespace quantrain::nn::detail {
namespace {

constexpr int64_t kAlignment = 64;  // of a value in the arena: a cache line, and more than any kernel's vector

// A stretch of memory that is in use from one node's step to another's.
struct Buffer {
  int64_t bytes = 0;
  int first = 0, last = -1;
  int64_t offset = 0;
};

// Largest first, each at the lowest offset that is free for its whole life. Returns the size of the arena.
int64_t place(std::vector<Buffer>& buffers) {
  std::vector<Buffer*> order;
  for (Buffer& buffer : buffers) {
    if (buffer.last >= 0) order.push_back(&buffer);
  }
  std::stable_sort(order.begin(), order.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  int64_t total = 0;
  std::vector<const Buffer*> placed;  // by offset
  for (Buffer* buffer : order) {
    int64_t offset = 0;
    for (const Buffer* other : placed) {
      const bool meet = other->first <= buffer->last && buffer->first <= other->last;
      if (!meet) continue;
      if (offset + buffer->bytes <= other->offset) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    buffer->offset = offset;
    total = std::max(total, offset + buffer->bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                   [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; }),
                  buffer);
  }
  return total;
}

int64_t numel(const FixedPointShape& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

int64_t bytes_of(const FixedPointShape& shape, at::ScalarType type) {
  const int64_t bytes = numel(shape) * static_cast<int64_t>(c10::elementSize(type));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

at::Tensor view(const at::Tensor& arena, int64_t offset, const FixedPointShape& shape, at::ScalarType type) {
  const int64_t bytes = numel(shape) * static_cast<int64_t>(c10::elementSize(type));
  const auto [n, c, h, w] = shape;
  return arena.narrow(0, offset, bytes).view(type).as_strided({n, c, h, w}, {h * w * c, 1, w * c, c});
}

// A flattened value of one pixel is its input's memory.
bool is_alias(const FixedPointNode& node, const std::vector<FixedPointShape>& shapes) {
  const FixedPointShape& from = shapes[node.inputs.empty() ? 0 : node.inputs[0]];
  return node.op == FixedPointOp::kFlatten && from[2] * from[3] == 1;
}

std::vector<bool> needed_nodes(const ProvenProgram& graph, bool all) {
  std::vector<bool> needed(graph.nodes.size(), all);
  needed[0] = needed[graph.output] = true;
  for (size_t i = graph.nodes.size(); i-- > 0;) {
    if (needed[i])
      for (const int input : graph.nodes[i].inputs) needed[input] = true;
  }
  return needed;
}

FixedPointCopyArgs copy_args(const at::Tensor& input, std::array<int64_t, 4> size, std::array<int64_t, 4> stride) {
  FixedPointCopyArgs args{};
  args.input = input.defined() ? input.const_data_ptr() : nullptr;
  args.element_size = input.defined() ? input.element_size() : 1;
  std::copy(size.begin(), size.end(), args.size);
  std::copy(stride.begin(), stride.end(), args.stride);
  args.last = size[3];
  return args;
}

// From a value in the arena to [N, C, H, W] in that order.
FixedPointCopyArgs to_contiguous(const at::Tensor& input) {
  return copy_args(input, {input.size(0), input.size(1), input.size(2), input.size(3)},
                   {input.stride(0), input.stride(1), input.stride(2), input.stride(3)});
}

FixedPointCopyArgs slice_pad_args(const FixedPointNode& node, const at::Tensor& input, const at::Tensor& output) {
  FixedPointCopyArgs args =
      copy_args(input, {output.size(0), output.size(2), output.size(3), output.size(1)},
                {input.stride(0), input.stride(2) * node.stride[0], input.stride(3) * node.stride[1], input.stride(1)});
  args.first = node.pad[0];
  args.last = node.pad[0] + input.size(1);
  return args;
}

FixedPointSumArgs sum_args(const FixedPointStepLayer& layer, const at::Tensor& a, const at::Tensor& b,
                           const at::Tensor& output) {
  const auto stride = [](const at::Tensor& values) -> int64_t { return values.defined() && values.numel() > 1; };
  FixedPointSumArgs args{};
  args.a = a.const_data_ptr();
  args.a_type = dtype_of(a);
  args.shift = layer.shift.const_data_ptr<int32_t>();
  args.shift_stride = stride(layer.shift);
  if (b.defined()) {
    args.b = b.const_data_ptr();
    args.b_type = dtype_of(b);
    args.residual_shift = layer.residual_shift.const_data_ptr<int32_t>();
    args.residual_shift_stride = stride(layer.residual_shift);
  }
  args.output = output.mutable_data_ptr();
  args.output_signed = output.scalar_type() == at::kChar;
  args.numel = output.numel();
  args.channels = output.size(1);
  return args;
}

// The steps of one node, which may need memory of its own in between (`scratch`).
void add_steps(FixedPointPlan& plan, const FixedPointNode& node, const FixedPointStepLayer& layer,
               const at::Tensor& output, const at::Tensor& scratch) {
  FixedPointStep step;
  step.layer = &layer;
  step.node = &node;
  step.input = plan.values[node.inputs[0]];
  step.output = output;
  const at::Tensor second = node.inputs.size() == 2 ? plan.values[node.inputs[1]] : at::Tensor();
  switch (node.op) {
    case FixedPointOp::kConv2d:
    case FixedPointOp::kLinear:
      step.kind = FixedPointStep::Kind::kConv;
      step.residual = second;
      break;
    case FixedPointOp::kMaxPool2d:
      step.kind = FixedPointStep::Kind::kMaxPool;
      break;
    case FixedPointOp::kAvgPool2d:
      step.kind = FixedPointStep::Kind::kSumPool;
      step.output = scratch;
      plan.steps.push_back(step);
      step.kind = FixedPointStep::Kind::kSum;
      step.input = scratch;
      step.output = output;
      step.sum = sum_args(layer, scratch, {}, output);
      break;
    case FixedPointOp::kSlicePad:
      step.kind = FixedPointStep::Kind::kCopy;
      step.copy = slice_pad_args(node, step.input, output);
      break;
    case FixedPointOp::kAdd:
      step.kind = FixedPointStep::Kind::kSum;
      step.sum = sum_args(layer, step.input, second, output);
      break;
    case FixedPointOp::kFlatten:
      step.kind = FixedPointStep::Kind::kCopy;
      step.copy = to_contiguous(step.input);
      break;
    case FixedPointOp::kInput:
      return;
  }
  if (step.kind == FixedPointStep::Kind::kCopy) step.copy.output = output.mutable_data_ptr();
  plan.steps.push_back(std::move(step));
}

void run_step(FixedPointStep& step) {
  switch (step.kind) {
    case FixedPointStep::Kind::kConv:
      return step.layer->conv->run(step.input, step.output, step.layer->shift, step.residual,
                                   step.layer->residual_shift);
    case FixedPointStep::Kind::kMaxPool:
      return fixed_point_max_pool2d_out(step.input, step.output, step.node->kernel, step.node->stride,
                                        step.node->padding);
    case FixedPointStep::Kind::kSumPool:
      return fixed_point_sum_pool2d_out(step.input, step.output);
    case FixedPointStep::Kind::kCopy:
      return fixed_point_copy(step.copy, step.output);
    case FixedPointStep::Kind::kSum:
      return fixed_point_sum(step.sum, step.output);
  }
}

}  // namespace

std::unique_ptr<FixedPointPlan> make_plan(const ProvenProgram& graph, const std::vector<FixedPointStepLayer>& layers,
                                          const std::map<std::string, at::Tensor>& tensors, const at::Device& device,
                                          const FixedPointShape& input_shape, bool all) {
  auto plan = std::make_unique<FixedPointPlan>();
  plan->input_shape = input_shape;
  plan->shapes = fixed_point_shapes(graph, input_shape, tensors);
  const std::vector<FixedPointNode>& nodes = graph.nodes;
  const int count = static_cast<int>(nodes.size());
  const std::vector<bool> needed = needed_nodes(graph, all);

  std::vector<int> root(count);
  std::vector<Buffer> buffers(2 * count);  // a node's value, and its scratch
  for (int i = 0; i < count; ++i) {
    if (!needed[i]) continue;
    root[i] = is_alias(nodes[i], plan->shapes) ? root[nodes[i].inputs[0]] : i;
    if (root[i] == i) buffers[i] = {bytes_of(plan->shapes[i], nodes[i].dtype), i, i, 0};
    for (const int input : nodes[i].inputs) buffers[root[input]].last = i;
    if (nodes[i].op == FixedPointOp::kAvgPool2d) buffers[count + i] = {bytes_of(plan->shapes[i], at::kInt), i, i, 0};
  }
  buffers[root[graph.output]].last = count;
  for (Buffer& buffer : buffers) {
    if (all && buffer.last >= 0) buffer.last = count;
  }
  plan->arena = at::empty({place(buffers)}, at::TensorOptions().dtype(at::kByte).device(device));

  plan->values.resize(count);
  FixedPointStep input;
  input.kind = FixedPointStep::Kind::kCopy;
  for (int i = 0; i < count; ++i) {
    if (!needed[i]) continue;
    plan->values[i] = view(plan->arena, buffers[root[i]].offset, plan->shapes[i], nodes[i].dtype);
    if (i == 0) {
      const auto [n, c, h, w] = input_shape;
      input.output = plan->values[0];
      input.copy = copy_args({}, {n, h, w, c}, {0, 0, 0, 0});
      input.copy.output = input.output.mutable_data_ptr();
      plan->steps.push_back(input);
    } else if (root[i] == i) {
      const bool pool = nodes[i].op == FixedPointOp::kAvgPool2d;
      add_steps(*plan, nodes[i], layers[i], plan->values[i],
                pool ? view(plan->arena, buffers[count + i].offset, plan->shapes[i], at::kInt) : at::Tensor());
    }
  }
  FixedPointStep output;
  output.kind = FixedPointStep::Kind::kCopy;
  output.output = plan->values[graph.output];
  output.copy = to_contiguous(output.output);
  plan->steps.push_back(output);
  return plan;
}

void run_steps(FixedPointPlan& plan, const at::Tensor& codes, at::Tensor& output) {
  FixedPointCopyArgs& input = plan.steps.front().copy;
  input.input = codes.const_data_ptr();
  const int order[] = {0, 2, 3, 1};  // NHWC
  for (int d = 0; d < 4; ++d) input.stride[d] = codes.stride(order[d]);
  plan.steps.back().copy.output = output.mutable_data_ptr();
  for (FixedPointStep& step : plan.steps) run_step(step);
}

}  // namespace quantrain::nn::detail

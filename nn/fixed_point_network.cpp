#include "quantrain/nn/fixed_point_network.h"

// A run is a flat loop over a plan's steps: raw views of one arena, no dispatcher, no JSON, nothing allocated but the output. The first step copies the
// input's codes to NHWC, the last one the output's integers to what the caller gets.

#include <algorithm>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include "csrc/common/fixed_point_network.h"
#include "csrc/cpu/fixed_point_network.h"
#include "nn/fixed_point_graph.h"
#include "ops/check.h"
#include "ops/launch.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/fixed_point_layers.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include "csrc/cuda/fixed_point_network.h"
#endif

namespace quantrain::nn {
namespace {

using detail::fixed_point_dtype_name;
using detail::FixedPointGraph;
using detail::FixedPointNode;
using detail::FixedPointOp;

constexpr size_t kMaxPlans = 8;
constexpr int64_t kAlignment = 64;  // of a value in the arena: a cache line, and more than any kernel's vector

using Shape = std::array<int64_t, 4>;  // [N, C, H, W]

struct Layer {
  std::optional<FixedPointConv> conv;
  at::Tensor shift, residual_shift;
};

struct Step {
  enum class Kind { kConv, kMaxPool, kSumPool, kCopy, kSum };
  Kind kind = Kind::kConv;
  const Layer* layer = nullptr;
  const FixedPointNode* node = nullptr;
  at::Tensor input, output, residual;
  FixedPointCopyArgs copy{};
  FixedPointSumArgs sum{};
};

struct Plan {
  Shape input_shape{};
  int64_t stream = 0;  // CUDA: whose arena this is
  std::vector<Shape> shapes;
  at::Tensor arena;
  std::vector<at::Tensor> values;  // views [N, C, H, W], channels_last in memory; undefined where a node is not needed
  std::vector<Step> steps;         // front: the input's copy; back: the output's
};

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

int64_t numel(const Shape& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

int64_t bytes_of(const Shape& shape, at::ScalarType type) {
  const int64_t bytes = numel(shape) * static_cast<int64_t>(c10::elementSize(type));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

at::Tensor view(const at::Tensor& arena, int64_t offset, const Shape& shape, at::ScalarType type) {
  const int64_t bytes = numel(shape) * static_cast<int64_t>(c10::elementSize(type));
  const auto [n, c, h, w] = shape;
  return arena.narrow(0, offset, bytes).view(type).as_strided({n, c, h, w}, {h * w * c, 1, w * c, c});
}

// A flattened value of one pixel is its input's memory.
bool is_alias(const FixedPointNode& node, const std::vector<Shape>& shapes) {
  const Shape& from = shapes[node.inputs.empty() ? 0 : node.inputs[0]];
  return node.op == FixedPointOp::kFlatten && from[2] * from[3] == 1;
}

std::vector<bool> needed_nodes(const FixedPointGraph& graph, bool all) {
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

FixedPointSumArgs sum_args(const Layer& layer, const at::Tensor& a, const at::Tensor& b, const at::Tensor& output) {
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
void add_steps(Plan& plan, const FixedPointNode& node, const Layer& layer, const at::Tensor& output,
               const at::Tensor& scratch) {
  Step step;
  step.layer = &layer;
  step.node = &node;
  step.input = plan.values[node.inputs[0]];
  step.output = output;
  const at::Tensor second = node.inputs.size() == 2 ? plan.values[node.inputs[1]] : at::Tensor();
  switch (node.op) {
    case FixedPointOp::kConv2d:
    case FixedPointOp::kLinear:
      step.kind = Step::Kind::kConv;
      step.residual = second;
      break;
    case FixedPointOp::kMaxPool2d:
      step.kind = Step::Kind::kMaxPool;
      break;
    case FixedPointOp::kAvgPool2d:
      step.kind = Step::Kind::kSumPool;
      step.output = scratch;
      plan.steps.push_back(step);
      step.kind = Step::Kind::kSum;
      step.input = scratch;
      step.output = output;
      step.sum = sum_args(layer, scratch, {}, output);
      break;
    case FixedPointOp::kSlicePad:
      step.kind = Step::Kind::kCopy;
      step.copy = slice_pad_args(node, step.input, output);
      break;
    case FixedPointOp::kAdd:
      step.kind = Step::Kind::kSum;
      step.sum = sum_args(layer, step.input, second, output);
      break;
    case FixedPointOp::kFlatten:
      step.kind = Step::Kind::kCopy;
      step.copy = to_contiguous(step.input);
      break;
    case FixedPointOp::kInput:
      return;
  }
  if (step.kind == Step::Kind::kCopy) step.copy.output = output.mutable_data_ptr();
  plan.steps.push_back(std::move(step));
}

// all: every value keeps memory of its own.
std::unique_ptr<Plan> make_plan(const FixedPointGraph& graph, const std::vector<Layer>& layers,
                                const std::map<std::string, at::Tensor>& tensors, const at::Device& device,
                                const Shape& input_shape, bool all) {
  auto plan = std::make_unique<Plan>();
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
  Step input;
  input.kind = Step::Kind::kCopy;
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
  Step output;
  output.kind = Step::Kind::kCopy;
  output.output = plan->values[graph.output];
  output.copy = to_contiguous(output.output);
  plan->steps.push_back(output);
  return plan;
}

void run_copy(const FixedPointCopyArgs& args, const at::Tensor& on) {
  const int64_t row_bytes = args.size[2] * args.size[3] * args.element_size;
  run_tasks(args, args.size[0] * args.size[1], grain_of(row_bytes, kGrainBytes), on,
            QUANTRAIN_KERNELS(fixed_point_copy));
}

void run_step(Step& step) {
  switch (step.kind) {
    case Step::Kind::kConv:
      return step.layer->conv->run(step.input, step.output, step.layer->shift, step.residual,
                                   step.layer->residual_shift);
    case Step::Kind::kMaxPool:
      return fixed_point_max_pool2d_out(step.input, step.output, step.node->kernel, step.node->stride,
                                        step.node->padding);
    case Step::Kind::kSumPool:
      return fixed_point_sum_pool2d_out(step.input, step.output);
    case Step::Kind::kCopy:
      return run_copy(step.copy, step.output);
    case Step::Kind::kSum:
      return run_elementwise(step.sum, step.output, QUANTRAIN_KERNELS(fixed_point_sum));
  }
}

void run_steps(Plan& plan, const at::Tensor& codes, at::Tensor& output) {
  FixedPointCopyArgs& input = plan.steps.front().copy;
  input.input = codes.const_data_ptr();
  const int order[] = {0, 2, 3, 1};  // NHWC
  for (int d = 0; d < 4; ++d) input.stride[d] = codes.stride(order[d]);
  plan.steps.back().copy.output = output.mutable_data_ptr();
  for (Step& step : plan.steps) run_step(step);
}

at::Tensor int32_tensor(const std::vector<int64_t>& values, const at::Device& device) {
  if (values.empty()) return {};
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kInt);
  std::transform(values.begin(), values.end(), tensor.mutable_data_ptr<int32_t>(),
                 [](int64_t value) { return static_cast<int32_t>(value); });
  return tensor.to(device);
}

// [N, C] of a flat value, [N, C, H, W] of an image.
std::vector<int64_t> public_shape(const FixedPointNode& node, const Shape& shape) {
  if (node.flat) return {shape[0], shape[1]};
  return {shape.begin(), shape.end()};
}

int64_t current_stream([[maybe_unused]] const at::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda()) return c10::cuda::getCurrentCUDAStream(device.index()).id();
#endif
  return 0;
}

bool is_capturing([[maybe_unused]] const at::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }
#endif
  return false;
}

}  // namespace

struct FixedPointNetwork::Impl {
  FixedPointGraph graph;
  std::map<std::string, at::Tensor> tensors;
  at::Device device{at::kCPU};
  std::vector<Layer> layers;  // one a node
  std::mutex mutex;
  std::list<std::unique_ptr<Plan>> plans;  // latest first

  std::unique_ptr<Plan> new_plan(const Shape& shape, bool all) const {
    return make_plan(graph, layers, tensors, device, shape, all);
  }

  // The caller holds the mutex.
  Plan& plan_for(const Shape& shape) {
    const int64_t stream = current_stream(device);
    const auto found = std::find_if(plans.begin(), plans.end(), [&](const std::unique_ptr<Plan>& plan) {
      return plan->input_shape == shape && plan->stream == stream;
    });
    if (found != plans.end()) {
      plans.splice(plans.begin(), plans, found);
    } else {
      plans.push_front(new_plan(shape, /*all=*/false));
      plans.front()->stream = stream;
      if (plans.size() > kMaxPlans) plans.pop_back();
    }
    return *plans.front();
  }

  Shape check_codes(const at::Tensor& codes) const {
    const at::ScalarType type = codes.scalar_type(), wanted = graph.nodes[0].dtype;
    QUANTRAIN_CHECK_TYPE(type == at::kByte || type == at::kChar,
                         "FixedPointNetwork: expected uint8 or int8 codes, got {}", fixed_point_dtype_name(type));
    QUANTRAIN_CHECK_TYPE(type == wanted, "FixedPointNetwork: expected {} codes, as the graph's input says, got {}",
                         fixed_point_dtype_name(wanted), fixed_point_dtype_name(type));
    QUANTRAIN_CHECK_TYPE(codes.device() == device, "FixedPointNetwork: expected codes on {}, got {}", device.str(),
                         codes.device().str());
    QUANTRAIN_CHECK_VALUE(
        codes.dim() == 4 && codes.size(1) == graph.nodes[0].channels && codes.size(2) > 0 && codes.size(3) > 0,
        "FixedPointNetwork: expected codes [N, {}, H, W] of at least one pixel, got {}", graph.nodes[0].channels,
        quantrain::detail::shape_text(codes));
    return {codes.size(0), codes.size(1), codes.size(2), codes.size(3)};
  }
};

FixedPointNetwork::FixedPointNetwork(const std::string& graph, const std::map<std::string, at::Tensor>& tensors)
    : impl_(std::make_shared<Impl>()) {
  Impl& impl = *impl_;
  impl.graph = detail::parse_fixed_point_graph(graph, tensors);
  if (!tensors.empty()) impl.device = tensors.begin()->second.device();
  for (const auto& [name, tensor] : tensors) {
    QUANTRAIN_CHECK_TYPE(tensor.device() == impl.device && (tensor.is_cpu() || tensor.is_cuda()),
                         "FixedPointNetwork: tensors: expected all on one CPU or CUDA device, got '{}' on {}", name,
                         tensor.device().str());
    impl.tensors[name] = tensor.detach().clone(at::MemoryFormat::Contiguous);  // packed below: theirs may change
  }
  for (const FixedPointNode& node : impl.graph.nodes) {
    Layer& layer = impl.layers.emplace_back();
    if (node.has_weight()) {
      at::Tensor weight = impl.tensors.at(node.name + ".weight");
      if (weight.dim() == 2) weight = weight.unsqueeze(-1).unsqueeze(-1);
      const auto bias = impl.tensors.find(node.name + ".bias");
      layer.conv.emplace(weight, bias == impl.tensors.end() ? std::nullopt : std::optional(bias->second),
                         FixedPointConvOptions{node.stride, node.padding, node.groups},
                         impl.graph.nodes[node.inputs[0]].dtype == at::kChar);
    }
    layer.shift = int32_tensor(node.shift, impl.device);
    layer.residual_shift = int32_tensor(node.residual_shift, impl.device);
  }
}

at::Tensor FixedPointNetwork::forward(const at::Tensor& codes) const {
  Impl& impl = *impl_;
  const Shape shape = impl.check_codes(codes);
  const FixedPointNode& node = impl.graph.nodes[impl.graph.output];
  const auto run = [&](Plan& plan) {
    at::Tensor output =
        at::empty(public_shape(node, plan.shapes[impl.graph.output]), codes.options().dtype(node.dtype));
    if (codes.numel() > 0) run_steps(plan, codes, output);
    return output;
  };
  // A graph replays with the memory it was captured with: such a plan is the graph's, not ours to use again.
  if (is_capturing(impl.device)) return run(*impl.new_plan(shape, /*all=*/false));
  const std::lock_guard lock(impl.mutex);
  return run(impl.plan_for(shape));
}

std::map<std::string, at::Tensor> FixedPointNetwork::forward_all(const at::Tensor& codes) const {
  const Impl& impl = *impl_;
  const std::unique_ptr<Plan> plan = impl.new_plan(impl.check_codes(codes), /*all=*/true);
  at::Tensor output =
      at::empty(plan->shapes[impl.graph.output], codes.options().dtype(impl.graph.nodes[impl.graph.output].dtype));
  if (codes.numel() > 0) run_steps(*plan, codes, output);
  std::map<std::string, at::Tensor> values;
  for (size_t i = 1; i < impl.graph.nodes.size(); ++i) {
    values[impl.graph.nodes[i].name] =
        plan->values[i].clone(at::MemoryFormat::Contiguous).reshape(public_shape(impl.graph.nodes[i], plan->shapes[i]));
  }
  return values;
}

at::Tensor FixedPointNetwork::quantize_input(const at::Tensor& images) const {
  QUANTRAIN_CHECK_TYPE(images.is_floating_point(),
                       "FixedPointNetwork: quantize_input: expected floating-point images, got {}",
                       fixed_point_dtype_name(images.scalar_type()));
  const bool is_signed = impl_->graph.nodes[0].dtype == at::kChar;
  const at::Tensor scale = at::full({1}, impl_->graph.input_scale, images.options().dtype(at::kFloat));
  return quantize(images, scale, std::nullopt, is_signed ? -127 : 0, is_signed ? 127 : 255,
                  is_signed ? at::kChar : at::kByte);
}

at::Tensor FixedPointNetwork::dequantize_output(const at::Tensor& integers) const {
  QUANTRAIN_CHECK_TYPE(c10::isIntegralType(integers.scalar_type(), /*includeBool=*/false),
                       "FixedPointNetwork: dequantize_output: expected integers, got {}",
                       fixed_point_dtype_name(integers.scalar_type()));
  return integers.to(at::kFloat).mul_(impl_->graph.output_scale);
}

const std::string& FixedPointNetwork::graph() const { return impl_->graph.json; }

const std::map<std::string, at::Tensor>& FixedPointNetwork::tensors() const { return impl_->tensors; }

at::Device FixedPointNetwork::device() const { return impl_->device; }

FixedPointNetwork FixedPointNetwork::to(const at::Device& device) const {
  std::map<std::string, at::Tensor> tensors;
  bool moved = false;
  for (const auto& [name, tensor] : impl_->tensors) {
    tensors[name] = tensor.to(device);
    moved = moved || tensors[name].device() != impl_->device;
  }
  return moved ? FixedPointNetwork(graph(), tensors) : *this;
}

std::vector<FixedPointAuditRow> FixedPointNetwork::audit() const {
  const std::vector<FixedPointNode>& nodes = impl_->graph.nodes;
  std::vector<FixedPointAuditRow> rows;
  for (size_t i = 1; i < nodes.size(); ++i) {
    const FixedPointNode& node = nodes[i];
    const FixedPointNode& input = nodes[node.inputs[0]];
    const auto need = [&](bool condition, const char* rule, at::ScalarType got) {
      QUANTRAIN_CHECK_VALUE(condition, "FixedPointNetwork: audit: {}: expected {}, got {}", node.name, rule,
                            fixed_point_dtype_name(got));
    };
    FixedPointAuditRow row{
        node.name,     node.op_name, "", fixed_point_dtype_name(input.dtype), "", fixed_point_dtype_name(node.dtype),
        node.sum_bound};
    const std::string shift = node.has_codes() ? ", shift" : "";
    const bool codes = input.dtype == at::kByte || input.dtype == at::kChar;
    need(codes || input.dtype == at::kInt, "integers", input.dtype);
    need(node.has_codes() || node.dtype == at::kInt, "an integer result", node.dtype);
    if (node.has_weight()) {
      const at::ScalarType weight = impl_->tensors.at(node.name + ".weight").scalar_type();
      const auto found = impl_->tensors.find(node.name + ".bias");
      const at::ScalarType bias = found == impl_->tensors.end() ? at::kInt : found->second.scalar_type();
      need(codes, "products of 8-bit codes", input.dtype);
      need(weight == at::kChar, "int8 weights", weight);
      need(bias == at::kInt, "an int32 bias", bias);
      row.operations = "multiply, add" + shift;
      row.operands += std::string(" x ") + fixed_point_dtype_name(weight);
    } else if (node.op == FixedPointOp::kMaxPool2d) {
      row.operations = "compare";
    } else if (node.op == FixedPointOp::kAvgPool2d || node.op == FixedPointOp::kAdd) {
      row.operations = "add" + shift;
    } else {
      row.operations = "copy";
    }
    if (node.inputs.size() == 2)
      row.operands += std::string(" + ") + fixed_point_dtype_name(nodes[node.inputs[1]].dtype);
    if (node.sum_bound > 0 || node.has_weight()) row.accumulator = "int32";
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace quantrain::nn

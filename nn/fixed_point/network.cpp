#include "quantrain/nn/fixed_point/network.h"

// A run is a flat loop over the steps of a plan, of which the latest are kept: one per size of images and stream.

#include <algorithm>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include "nn/fixed_point/plan.h"
#include "nn/fixed_point/program.h"
#include "ops/common/check.h"
#include "ops/common/stream.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/fixed_point_conv.h"

namespace quantrain::nn {
namespace {

using detail::fixed_point_dtype_name;
using detail::FixedPointNode;
using detail::FixedPointOp;
using detail::FixedPointPlan;
using detail::FixedPointShape;
using detail::FixedPointStepLayer;
using detail::make_plan;
using detail::ProvenProgram;
using detail::run_steps;

constexpr size_t kMaxPlans = 8;

at::Tensor int32_tensor(const std::vector<int64_t>& values, const at::Device& device) {
  if (values.empty()) return {};
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kInt);
  std::transform(values.begin(), values.end(), tensor.mutable_data_ptr<int32_t>(),
                 [](int64_t value) { return static_cast<int32_t>(value); });
  return tensor.to(device);
}

// [N, C] of a flat value, [N, C, H, W] of an image.
std::vector<int64_t> public_shape(const FixedPointNode& node, const FixedPointShape& shape) {
  if (node.flat) return {shape[0], shape[1]};
  return {shape.begin(), shape.end()};
}

}  // namespace

struct FixedPointNetwork::Impl {
  ProvenProgram graph;
  std::map<std::string, at::Tensor> tensors;
  at::Device device{at::kCPU};
  std::vector<FixedPointStepLayer> layers;  // one per node
  std::mutex mutex;
  std::list<std::unique_ptr<FixedPointPlan>> plans;  // latest first

  std::unique_ptr<FixedPointPlan> new_plan(const FixedPointShape& shape, bool all) const {
    return make_plan(graph, layers, tensors, device, shape, all);
  }

  // The caller holds the mutex.
  FixedPointPlan& plan_for(const FixedPointShape& shape) {
    const int64_t stream = current_stream(device);
    const auto found = std::find_if(plans.begin(), plans.end(), [&](const std::unique_ptr<FixedPointPlan>& plan) {
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

  FixedPointShape check_codes(const at::Tensor& codes) const {
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
  impl.graph = detail::prove_program(graph, tensors);
  if (!tensors.empty()) impl.device = tensors.begin()->second.device();
  for (const auto& [name, tensor] : tensors) {
    QUANTRAIN_CHECK_TYPE(tensor.device() == impl.device && (tensor.is_cpu() || tensor.is_cuda()),
                         "FixedPointNetwork: tensors: expected all on one CPU or CUDA device, got '{}' on {}", name,
                         tensor.device().str());
    impl.tensors[name] = tensor.detach().clone(at::MemoryFormat::Contiguous);  // packed below: theirs may change
  }
  for (const FixedPointNode& node : impl.graph.nodes) {
    FixedPointStepLayer& layer = impl.layers.emplace_back();
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
  const FixedPointShape shape = impl.check_codes(codes);
  const FixedPointNode& node = impl.graph.nodes[impl.graph.output];
  const auto run = [&](FixedPointPlan& plan) {
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
  const std::unique_ptr<FixedPointPlan> plan = impl.new_plan(impl.check_codes(codes), /*all=*/true);
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

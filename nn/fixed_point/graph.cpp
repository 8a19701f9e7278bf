#include "quantrain/nn/fixed_point/graph.h"

// Declaration, forward pass and conversion of a FixedPointGraph.

#include <algorithm>
#include <set>
#include <sstream>
#include <utility>

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace quantrain::nn {
namespace {

// A step of a module's path that is no layer: "layer1", "0".
class Folder : public torch::nn::Module {
 public:
  Folder() : torch::nn::Module("Folder") {}
};

std::vector<std::string> split(const std::string& name) {
  std::vector<std::string> parts;
  std::istringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

int64_t whole(const at::Tensor& one) { return one.item<int64_t>(); }

}  // namespace

FixedPointGraphImpl::FixedPointGraphImpl(const Recipe& recipe, int64_t channels, bool signed_input)
    : Copied("FixedPointGraph"), recipe_(recipe) {
  recipe_.validate();
  TORCH_CHECK_VALUE(scheme(), "FixedPointGraph: expected a recipe with fixed_point, got '", recipe_.name, "'");
  TORCH_CHECK_VALUE(channels > 0, "FixedPointGraph: expected at least one channel, got ", channels);
  input_activation = register_module("input_activation", FixedPointInput(*scheme(), signed_input));
  Node first;
  first.name = "input";
  first.op = "input";
  first.channels = channels;
  first.activation = input_activation.ptr();
  nodes_.push_back(std::move(first));
}

const FixedPointGraphImpl::Node& FixedPointGraphImpl::node(const std::string& name, FixedPointValue value,
                                                           bool codes) const {
  TORCH_CHECK_VALUE(value.node_ >= 0 && value.node_ < static_cast<int64_t>(nodes_.size()), "FixedPointGraph: '", name,
                    "': expected an input of this graph, got none");
  const Node& found = nodes_[static_cast<size_t>(value.node_)];
  TORCH_CHECK_VALUE(!codes || (found.activation && !found.shortcut), "FixedPointGraph: '", name,
                    "': expected an input of 8-bit codes, got the accumulators of '", found.name, "'");
  return found;
}

FixedPointValue FixedPointGraphImpl::append(Node next, std::function<void(FixedPointGraphImpl&)> declaration) {
  for (const Node& other : nodes_) {
    TORCH_CHECK_VALUE(other.name != next.name, "FixedPointGraph: expected a name that is new, got '", next.name, "'");
  }
  const auto index = static_cast<int64_t>(nodes_.size());
  for (const int64_t input : next.inputs) nodes_[static_cast<size_t>(input)].last_reader = index;
  nodes_.push_back(std::move(next));
  declarations_.push_back(std::move(declaration));
  return FixedPointValue(index);
}

void FixedPointGraphImpl::place(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  const std::vector<std::string> parts = split(name);
  TORCH_CHECK_VALUE(!parts.empty() && std::none_of(parts.begin(), parts.end(), [](const auto& p) { return p.empty(); }),
                    "FixedPointGraph: expected a module path such as 'layer1.0.conv1', got '", name, "'");
  torch::nn::Module* folder = this;
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    const auto children = folder->named_children();
    const auto* found = children.find(parts[i]);
    folder = found ? found->get() : folder->register_module(parts[i], std::make_shared<Folder>()).get();
  }
  TORCH_CHECK_VALUE(!folder->named_children().contains(parts.back()),
                    "FixedPointGraph: expected a name that is new, got '", name, "'");
  folder->register_module(parts.back(), module);
}

void FixedPointGraphImpl::check_units(const std::string& name, const Node& other, bool is_signed,
                                      double max_alpha) const {
  TORCH_CHECK_VALUE(other.op != "avg_pool2d" && other.activation != nodes_[0].activation, "FixedPointGraph: '", name,
                    "': expected codes that a convolution made, got those of '", other.name, "'");
  TORCH_CHECK_VALUE(other.activation->is_signed() == is_signed && other.max_alpha == max_alpha, "FixedPointGraph: '",
                    name, "': expected the sum to be clipped as '", other.name, "' is, got another sign or max_alpha");
}

FixedPointActivation FixedPointGraphImpl::make_activation(const std::string& name,
                                                          const FixedPointConvArguments& arguments) const {
  const bool six = arguments.max_alpha < std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(!six || arguments.relu, "FixedPointGraph: '", name,
                    "': expected max_alpha with relu, got it without");
  FixedPointActivationOptions options;
  options.is_signed = !arguments.relu;
  options.clip = scheme()->clip || six;
  options.fixed = six && !scheme()->clip;
  options.method = scheme()->fraction_length;
  options.max_alpha = arguments.max_alpha;
  if (options.fixed) options.alpha = arguments.max_alpha;
  return FixedPointActivation(options);
}

FixedPointValue FixedPointGraphImpl::conv2d(const std::string& name, FixedPointValue input,
                                            const torch::nn::Conv2dOptions& options,
                                            const FixedPointConvArguments& arguments) {
  const Node& from = node(name, input);
  TORCH_CHECK_VALUE(from.channels == options.in_channels(), "FixedPointGraph: '", name, "': expected ", from.channels,
                    " input channels, got ", options.in_channels());
  const auto declaration = [=](FixedPointGraphImpl& graph) { graph.conv2d(name, input, options, arguments); };
  Node next;
  next.name = name;
  next.op = "conv2d";
  next.inputs = {input.node_};
  next.channels = options.out_channels();
  next.max_alpha = arguments.max_alpha;
  next.shortcut = arguments.shortcut;
  FixedPointConv2d conv(options, recipe_, arguments.batch_norm);
  next.layer = conv.ptr();
  if (arguments.shortcut) {
    TORCH_CHECK_VALUE(!arguments.relu && !arguments.residual, "FixedPointGraph: '", name,
                      "': expected a shortcut without relu and residual, got one of them");
    TORCH_CHECK_VALUE(!arguments.like, "FixedPointGraph: '", name, "': expected a shortcut without like, got it");
    place(name, conv.ptr());
    return append(std::move(next), declaration);  // connected by the sum that it ends in
  }
  FixedPointActivation owned{nullptr};
  if (arguments.residual) {
    const Node& other = node(name, *arguments.residual, /*codes=*/false);
    TORCH_CHECK_VALUE(other.channels == next.channels, "FixedPointGraph: '", name, "': expected a residual of ",
                      next.channels, " channels, got ", other.channels, " of '", other.name, "'");
    next.inputs.push_back(arguments.residual->node_);
    TORCH_CHECK_VALUE(!other.shortcut || !other.layer->output_activation, "FixedPointGraph: '", name,
                      "': expected the shortcut '", other.name, "' to have no other reader, got one");
    if (!other.shortcut) {
      TORCH_CHECK_VALUE(other.activation, "FixedPointGraph: '", name,
                        "': expected a residual of codes or a shortcut, got the logits of '", other.name, "'");
      check_units(name, other, !arguments.relu, arguments.max_alpha);
      next.activation = other.activation;
    }
  }
  if (arguments.like) {
    const Node& other = node(name, *arguments.like);
    TORCH_CHECK_VALUE(!next.activation || next.activation == other.activation, "FixedPointGraph: '", name,
                      "': expected like to name codes in the units of the residual, got '", other.name, "'");
    check_units(name, other, !arguments.relu, arguments.max_alpha);
    next.activation = other.activation;
  }
  if (!next.activation) {
    owned = make_activation(name, arguments);
    next.activation = owned.ptr();
  }
  place(name, conv.ptr());
  next.layer->connect(from.activation, next.activation, owned, /*rounds=*/true);
  if (arguments.residual && nodes_[static_cast<size_t>(arguments.residual->node_)].shortcut) {
    Node& shortcut = nodes_[static_cast<size_t>(arguments.residual->node_)];
    shortcut.layer->connect(nodes_[static_cast<size_t>(shortcut.inputs[0])].activation, next.activation, nullptr,
                            /*rounds=*/false);
  }
  return append(std::move(next), declaration);
}

FixedPointValue FixedPointGraphImpl::linear(const std::string& name, FixedPointValue input, int64_t features,
                                            bool bias) {
  const Node& from = node(name, input);
  Node next;
  next.name = name;
  next.op = "linear";
  next.inputs = {input.node_};
  next.channels = features;
  FixedPointLinear layer(torch::nn::LinearOptions(from.channels, features).bias(bias), recipe_);
  next.layer = layer.ptr();
  place(name, layer.ptr());
  next.layer->connect(from.activation, nullptr, nullptr, /*rounds=*/false);
  return append(std::move(next), [=](FixedPointGraphImpl& graph) { graph.linear(name, input, features, bias); });
}

FixedPointValue FixedPointGraphImpl::max_pool2d(const std::string& name, FixedPointValue input,
                                                std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                                                std::array<int64_t, 2> padding) {
  const Node& from = node(name, input);
  Node next;
  next.name = name;
  next.op = "max_pool2d";
  next.inputs = {input.node_};
  next.kernel = kernel;
  next.stride = stride;
  next.padding = padding;
  next.channels = from.channels;
  next.max_alpha = from.max_alpha;
  next.activation = from.activation;
  return append(std::move(next),
                [=](FixedPointGraphImpl& graph) { graph.max_pool2d(name, input, kernel, stride, padding); });
}

FixedPointValue FixedPointGraphImpl::avg_pool2d(const std::string& name, FixedPointValue input) {
  const Node& from = node(name, input);
  Node next;
  next.name = name;
  next.op = "avg_pool2d";
  next.inputs = {input.node_};
  next.channels = from.channels;
  FixedPointAvgPool2d pool(from.activation, recipe_);
  next.pool = pool.ptr();
  next.activation = pool->activation.ptr();
  place(name, pool.ptr());
  return append(std::move(next), [=](FixedPointGraphImpl& graph) { graph.avg_pool2d(name, input); });
}

FixedPointValue FixedPointGraphImpl::slice_pad(const std::string& name, FixedPointValue input,
                                               std::array<int64_t, 2> stride, int64_t before, int64_t after) {
  const Node& from = node(name, input);
  TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0 && before >= 0 && after >= 0, "FixedPointGraph: '", name,
                    "': expected a positive stride and no negative padding, got ", stride[0], ", ", stride[1], ", ",
                    before, " and ", after);
  Node next;
  next.name = name;
  next.op = "slice_pad";
  next.inputs = {input.node_};
  next.stride = stride;
  next.padding = {before, after};
  next.channels = from.channels + before + after;
  next.max_alpha = from.max_alpha;
  next.activation = from.activation;
  return append(std::move(next),
                [=](FixedPointGraphImpl& graph) { graph.slice_pad(name, input, stride, before, after); });
}

FixedPointValue FixedPointGraphImpl::add(const std::string& name, FixedPointValue a, FixedPointValue b) {
  const Node& first = node(name, a);
  const Node& second = node(name, b);
  TORCH_CHECK_VALUE(first.channels == second.channels, "FixedPointGraph: '", name, "': expected two values of ",
                    first.channels, " channels, got ", second.channels, " of '", second.name, "'");
  check_units(name, first, first.activation->is_signed(), first.max_alpha);
  TORCH_CHECK_VALUE(first.activation == second.activation, "FixedPointGraph: '", name,
                    "': expected codes in the same units, got those of '", first.name, "' and '", second.name,
                    "' (declare the later of their convolutions with like)");
  Node next;
  next.name = name;
  next.op = "add";
  next.inputs = {a.node_, b.node_};
  next.channels = first.channels;
  next.max_alpha = first.max_alpha;
  next.activation = first.activation;
  return append(std::move(next), [=](FixedPointGraphImpl& graph) { graph.add(name, a, b); });
}

// The declarations once more: activations are shared as they were.
std::shared_ptr<FixedPointGraphImpl> FixedPointGraphImpl::fresh() const {
  auto copy = std::make_shared<FixedPointGraphImpl>(recipe_, nodes_[0].channels);
  for (const auto& declare : declarations_) declare(*copy);
  return copy;
}

// ---- forward --------------------------------------------------------------------------------------------------------

at::Tensor FixedPointGraphImpl::run(const Node& node, const std::vector<at::Tensor>& values, const at::Tensor& images) {
  if (node.op == "input") return input_activation->forward(images);
  const at::Tensor& x = values[static_cast<size_t>(node.inputs[0])];
  if (node.op == "conv2d") {
    return node.layer->forward(x, node.inputs.size() > 1 ? values[static_cast<size_t>(node.inputs[1])] : at::Tensor());
  }
  if (node.op == "linear") return node.layer->forward(x.flatten(1));
  if (node.op == "add")
    return node.activation->forward(x + values[static_cast<size_t>(node.inputs[1])], /*first=*/false);
  if (node.op == "avg_pool2d") return node.pool->forward(x);
  if (node.op == "max_pool2d") return at::max_pool2d(x, node.kernel, node.stride, node.padding);
  const at::Tensor cut = x.slice(2, 0, std::nullopt, node.stride[0]).slice(3, 0, std::nullopt, node.stride[1]);
  return at::constant_pad_nd(cut, {0, 0, 0, 0, node.padding[0], node.padding[1]});
}

void FixedPointGraphImpl::restart_calibration() {
  for (const Node& node : nodes_) {
    if (node.activation) node.activation->restart_calibration();
  }
}

at::Tensor FixedPointGraphImpl::forward(const at::Tensor& images) {
  restart_calibration();
  std::vector<at::Tensor> values(nodes_.size());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    values[i] = run(nodes_[i], values, images);
    for (const int64_t input : nodes_[i].inputs) {
      const auto read = static_cast<size_t>(input);
      if (nodes_[read].last_reader == static_cast<int64_t>(i)) values[read].reset();
    }
  }
  return values.back();
}

std::map<std::string, at::Tensor> FixedPointGraphImpl::forward_all(const at::Tensor& images) {
  restart_calibration();
  std::vector<at::Tensor> values(nodes_.size());
  std::map<std::string, at::Tensor> named;
  for (size_t i = 0; i < nodes_.size(); ++i) named[nodes_[i].name] = values[i] = run(nodes_[i], values, images);
  return named;
}

void FixedPointGraphImpl::to(torch::Device device, torch::Dtype /*dtype*/, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

void FixedPointGraphImpl::to(torch::Dtype /*dtype*/, bool /*non_blocking*/) {}

void FixedPointGraphImpl::to(torch::Device device, bool non_blocking) { torch::nn::Module::to(device, non_blocking); }

// ---- conversion -----------------------------------------------------------------------------------------------------

FixedPointProgram FixedPointGraphImpl::program() {
  const at::NoGradGuard no_grad;
  using Codes = FixedPointProgramWriter::Codes;
  const auto codes = [](FixedPointActivationImpl& activation) {
    return Codes{activation.is_signed(), whole(activation.rounded_fraction_length())};
  };
  FixedPointProgramWriter writer(recipe_, nodes_[0].channels, codes(*input_activation),
                                 static_cast<double>(input_activation->step().item<float>()));
  for (const Node& node : nodes_) {
    if (node.op == "input") continue;
    std::vector<std::string> inputs;
    for (const int64_t input : node.inputs) inputs.push_back(nodes_[static_cast<size_t>(input)].name);
    if (node.layer) {
      TORCH_CHECK_VALUE(node.layer->input_activation, "convert: '", node.name,
                        "': expected a shortcut that a sum reads, got one without reader");
      const FixedPointFolded folded = node.layer->folded();
      const std::optional<Codes> output =
          node.layer->quantizes ? std::optional<Codes>(codes(*node.activation)) : std::nullopt;
      if (node.op == "conv2d") {
        const auto& conv = static_cast<const FixedPointConv2dImpl&>(*node.layer);
        const at::ArrayRef<int64_t> kernel = *conv.options().kernel_size(), stride = *conv.options().stride();
        writer.conv2d(node.name, inputs, {kernel[0], kernel[1]}, {stride[0], stride[1]}, conv.padding(),
                      conv.options().groups(), folded, output);
      } else {
        writer.flatten(inputs[0] + ".flatten", inputs[0]);
        writer.linear(node.name, inputs[0] + ".flatten", folded, output);
      }
    } else if (node.op == "avg_pool2d") {
      const at::Tensor size = node.pool->size.cpu();
      node.pool->read_size();
      TORCH_CHECK_VALUE(node.pool->activation->pixels > 0, "convert: '", node.name,
                        "': expected a pool that has seen an image, got none (calibrate or evaluate first)");
      writer.avg_pool2d(node.name, inputs[0], {size[0].item<int64_t>(), size[1].item<int64_t>()},
                        node.pool->activation->shift(), whole(node.activation->rounded_fraction_length()));
    } else if (node.op == "add") {
      writer.add(node.name, inputs, codes(*node.activation));
    } else if (node.op == "max_pool2d") {
      writer.max_pool2d(node.name, inputs[0], node.kernel, node.stride, node.padding);
    } else {
      writer.slice_pad(node.name, inputs[0], node.stride, node.padding);
    }
  }
  TORCH_CHECK_VALUE(nodes_.size() > 1 && nodes_.back().op == "linear",
                    "convert: expected a graph that ends in a linear layer, got '", nodes_.back().op, "'");
  return writer.finish();
}

FixedPointNetwork convert(FixedPointGraphImpl& graph) {
  const FixedPointProgram program = graph.program();
  return FixedPointNetwork(program.graph, program.tensors).to(graph.input_activation->fraction_length.device());
}

}  // namespace quantrain::nn

#include "nn/fixed_point/program.h"

// Reading a graph trusts nothing: a field is known, present and of its type, a name is new or refers back, a tensor has
// the shape and dtype that its node gives, and every sum is bounded by the weights themselves. All of it before
// anything is built.

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <set>
#include <stdexcept>
#include <utility>

#include <ATen/ops/abs.h>
#include <ATen/ops/sum.h>

#include "nn/fixed_point/constants.h"
#include "nn/fixed_point/fields.h"
#include "nn/json.h"
#include "ops/common/check.h"
#include "quantrain/nn/recipe.h"

namespace quantrain::nn::detail {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int64_t kMaxSize = 1 << 20;  // of a kernel, a stride, an image side: far beyond use, far from overflow
constexpr int64_t kMaxChannels = 1 << 24;
constexpr int64_t kMaxPoolShift = 23;  // more pixels than a sum in int32 can hold
constexpr const char* kOps[] = {"conv2d", "linear", "max_pool2d", "avg_pool2d", "slice_pad", "add", "flatten"};

int64_t at_channel(const std::vector<int64_t>& values, int64_t channel) {
  return values.size() == 1 ? values[0] : values[channel];
}

int64_t largest(const std::vector<int64_t>& values) { return *std::max_element(values.begin(), values.end()); }

std::vector<int64_t> to_vector(const at::Tensor& values) {
  const at::Tensor flat = values.to(at::kCPU, at::kLong).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

class Parser {
 public:
  explicit Parser(const Tensors& tensors) : tensors_(tensors) {}

  ProvenProgram parse(const std::string& text) {
    const Json json = parse_json(text);
    if (json.is_discarded()) fail("graph", "JSON text", std::to_string(text.size()) + " bytes that are none");
    graph_.json = json.dump();
    Fields fields("graph", json);
    if (const std::string format = fields.string("format"); format != kNetworkFormat)
      fail("graph", std::string("format ") + in_quotes(kNetworkFormat), in_quotes(format));
    if (const Json& version = fields.get("version"); version != 1) fail("graph", "version 1", shortened(version));
    check_recipe(fields.string("recipe"));
    read_input(fields.get("input"));
    const Json& nodes = fields.get("nodes");
    if (!nodes.is_array() || nodes.empty()) fail("graph", "nodes to be a list of at least one", shortened(nodes));
    for (const Json& node : nodes) {
      if (node.is_object() && node.contains("name") && node["name"].is_string())
        all_names_.insert(node["name"].get<std::string>());
    }
    for (const Json& node : nodes) read_node(node);
    read_output(fields.get("output"));
    fields.done();
    check_tensor_names();
    return std::move(graph_);
  }

 private:
  void check_recipe(const std::string& text) {
    if (text.empty() || text == "{}") return;
    try {
      Recipe::from_json(text);
    } catch (const std::invalid_argument& error) {
      fail("graph", "recipe to be a Recipe's JSON, or nothing (\"\" or \"{}\")", error.what());
    }
  }

  // Of the next node; added with it, so that a node is not its own input.
  std::string read_name(Fields& fields) {
    std::string name = fields.string("name");
    if (name.empty()) fail(fields.where(), "a name", "''");
    if (index_.count(name)) fail("graph", "every name once", in_quotes(name) + " twice");
    fields.set_where(name);
    return name;
  }

  void add(FixedPointNode node, const std::string& name) {
    node.name = name;
    index_[name] = static_cast<int>(graph_.nodes.size());
    graph_.nodes.push_back(std::move(node));
  }

  void read_input(const Json& json) {
    Fields fields("input", json);
    FixedPointNode node;
    const std::string name = read_name(fields);
    fields.set_where("input");
    node.op_name = "input";
    node.channels = fields.integer("channels", 1, kMaxChannels);
    const bool is_signed = fields.boolean("signed");
    set_codes(node, is_signed, fields.integer("fraction_length", 0, is_signed ? 7 : 8));
    if (is_signed) node.bound = {128};  // a caller's tensor may hold -128, which no node writes
    graph_.input_scale = fields.number("scale");
    if (!(graph_.input_scale > 0) || !std::isfinite(static_cast<float>(graph_.input_scale)) ||
        static_cast<float>(graph_.input_scale) < std::numeric_limits<float>::min())
      fail("input", "scale to be a positive float32", shortened(json["scale"]));
    fields.done();
    add(std::move(node), name);
  }

  void read_output(const Json& json) {
    Fields fields("output", json);
    const std::string name = fields.string("name");
    const auto found = index_.find(name);
    if (found == index_.end() || found->second == 0) fail("output", "the name of a node", in_quotes(name));
    graph_.output = found->second;
    const FixedPointNode& node = graph_.nodes[graph_.output];
    const auto& lengths = node.fraction_length;
    if (std::any_of(lengths.begin(), lengths.end(), [&](int64_t length) { return length != lengths[0]; }))
      fail("output", "one fraction length for all channels of " + in_quotes(name) + ", as the scale is one",
           "one a channel");
    graph_.output_scale = fields.number("scale");
    int exponent = 0;
    if (!(graph_.output_scale > 0) || std::frexp(graph_.output_scale, &exponent) != 0.5 || exponent < -100 ||
        exponent > 100)
      fail("output", "scale to be a power of two", shortened(json["scale"]));
    fields.done();
  }

  void read_node(const Json& json) {
    Fields fields("node " + std::to_string(graph_.nodes.size() - 1), json);
    FixedPointNode node;
    const std::string name = read_name(fields);
    node.op_name = fields.string("op");
    if (std::find(std::begin(kOps), std::end(kOps), node.op_name) == std::end(kOps))
      fail(fields.where(), fmt::format("op to be one of {}", fmt::join(kOps, ", ")), in_quotes(node.op_name));
    read_inputs(node, name, fields);
    if (node.op_name == "conv2d")
      read_conv2d(node, name, fields);
    else if (node.op_name == "linear")
      read_linear(node, name, fields);
    else if (node.op_name == "max_pool2d")
      read_max_pool2d(node, fields);
    else if (node.op_name == "avg_pool2d")
      read_avg_pool2d(node, fields);
    else if (node.op_name == "slice_pad")
      read_slice_pad(node, fields);
    else if (node.op_name == "add")
      read_add(node, fields);
    else
      read_flatten(node, fields);
    fields.done();
    add(std::move(node), name);
  }

  void read_inputs(FixedPointNode& node, const std::string& name, Fields& fields) {
    const Json& inputs = fields.get("inputs");
    const bool is_list = inputs.is_array() &&
                         std::all_of(inputs.begin(), inputs.end(), [](const Json& item) { return item.is_string(); });
    const size_t least = node.op_name == "add" ? 2 : 1;
    const size_t most = node.op_name == "add" || node.op_name == "conv2d" ? 2 : 1;
    if (!is_list || inputs.size() < least || inputs.size() > most) {
      fail(fields.where(),
           "inputs to be a list of " + std::to_string(least) + (most > least ? " or " + std::to_string(most) : "") +
               (most > 1 ? " names" : " name"),
           shortened(inputs));
    }
    for (const Json& item : inputs) {
      const std::string input = item.get<std::string>();
      const auto found = index_.find(input);
      if (found == index_.end()) {
        if (input == name || all_names_.count(input))
          fail(fields.where(), "inputs that come before it (nodes in topological order, no cycle)", in_quotes(input));
        fail(fields.where(), "inputs that are names of the graph", in_quotes(input));
      }
      node.inputs.push_back(found->second);
    }
  }

  const FixedPointNode& input_of(const FixedPointNode& node, size_t i = 0) const {
    return graph_.nodes[node.inputs[i]];
  }

  void need_codes(const FixedPointNode& input, const Fields& fields) const {
    if (!input.has_codes()) fail(fields.where(), "8-bit codes from " + in_quotes(input.name), "int32 accumulators");
  }

  void need_image(const FixedPointNode& input, const Fields& fields) const {
    if (input.flat) fail(fields.where(), "an image [N, C, H, W] from " + in_quotes(input.name), "a flat value [N, C]");
  }

  static void set_codes(FixedPointNode& node, bool is_signed, int64_t fraction_length) {
    node.dtype = is_signed ? at::kChar : at::kByte;
    node.fraction_length = {fraction_length};
    node.bound = {is_signed ? 127 : 255};
  }

  static void set_as(FixedPointNode& node, const FixedPointNode& input) {
    node.dtype = input.dtype;
    node.fraction_length = input.fraction_length;
    node.channels = input.channels;
    node.single_pixel = input.single_pixel;
    node.bound = input.bound;
  }

  const at::Tensor& tensor(const std::string& name, at::ScalarType type, at::IntArrayRef shape) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("tensors", "the tensor " + in_quotes(name), "none");
    const at::Tensor& tensor = found->second;
    if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.scalar_type() != type) {
      fail("tensors", in_quotes(name) + " of dtype " + fixed_point_dtype_name(type),
           tensor.defined() ? fixed_point_dtype_name(tensor.scalar_type()) : "none");
    }
    if (!tensor.sizes().equals(shape)) {
      fail("tensors", in_quotes(name) + " of shape " + Json(shape.vec()).dump(), Json(tensor.sizes().vec()).dump());
    }
    used_.insert(name);
    return tensor;
  }

  // Weights, bias and what comes out, of a convolution or a linear layer.
  void read_product(FixedPointNode& node, const std::string& name, Fields& fields, at::IntArrayRef weight_shape) {
    const FixedPointNode& input = input_of(node);
    const at::Tensor weight = tensor(name + ".weight", at::kChar, weight_shape).cpu();
    if (weight.eq(-128).any().item<bool>())
      fail("tensors", in_quotes(name + ".weight") + " to hold codes from -127 to 127", "-128");
    node.fraction_length = fields.integers("weight_fraction_length", node.channels, 0, 7);
    for (int64_t& length : node.fraction_length) length += input.fraction_length[0];
    const at::Tensor sums = weight.to(at::kInt).abs_().flatten(1).sum(1, /*keepdim=*/false, at::kLong);
    node.bound = to_vector(sums.mul(input.bound[0]));
    if (tensors_.count(name + ".bias")) {
      const std::vector<int64_t> bias = to_vector(tensor(name + ".bias", at::kInt, {node.channels}));
      for (size_t c = 0; c < bias.size(); ++c) node.bound[c] += std::abs(bias[c]);
    }
    node.sum_bound = largest(node.bound);
    check_bound(fields.where(), "its sum", node.sum_bound);

    const std::string output = fields.string("output");
    const bool residual = node.inputs.size() == 2;
    if (output == "accumulators") {
      if (residual) fail(fields.where(), "output 'codes' where there is a residual", "'accumulators'");
      node.dtype = at::kInt;
      return;
    }
    if (output != "codes") fail(fields.where(), "output 'codes' or 'accumulators'", in_quotes(output));
    if (residual) {
      align(node, input_of(node, 1), fields.where());
    }
    requantize(node, fields);
  }

  // Adds `other` to the sum in `node`: the shift between them, the bound and the fraction length of the whole.
  void align(FixedPointNode& node, const FixedPointNode& other, const std::string& where) {
    const int64_t channels = std::max({node.fraction_length.size(), other.fraction_length.size()});
    for (int64_t c = 0; c < channels; ++c)
      node.residual_shift.push_back(at_channel(node.fraction_length, c) - at_channel(other.fraction_length, c));
    std::vector<int64_t> bounds;
    for (int64_t c = 0; c < node.channels; ++c) {
      const int64_t shift = at_channel(node.residual_shift, c);
      const int64_t own = at_channel(node.bound, c) << std::max<int64_t>(-shift, 0);
      const int64_t others = at_channel(other.bound, c) << std::max<int64_t>(shift, 0);
      check_bound(where, "its sum after the alignment with " + in_quotes(other.name), own);
      check_bound(where, in_quotes(other.name) + " after the alignment", others);
      check_bound(where, "its sum with " + in_quotes(other.name), own + others);
      bounds.push_back(own + others);
    }
    node.bound = std::move(bounds);
    node.sum_bound = largest(node.bound);
  }

  // Reads the output's codes. node.fraction_length is that of the sum before a residual's alignment.
  void requantize(FixedPointNode& node, Fields& fields) {
    const bool is_signed = fields.boolean("signed");
    const int64_t fraction_length = fields.integer("fraction_length", 0, is_signed ? 7 : 8);
    for (const int64_t length : node.fraction_length) node.shift.push_back(length - fraction_length);
    set_codes(node, is_signed, fraction_length);
  }

  void check_bound(const std::string& where, const std::string& what, int64_t bound) {
    if (bound >= kLimit) fail(where, what + " to stay below 2^31 = 2147483648", "a bound of " + std::to_string(bound));
  }

  void read_conv2d(FixedPointNode& node, const std::string& name, Fields& fields) {
    node.op = FixedPointOp::kConv2d;
    const FixedPointNode& input = input_of(node);
    need_codes(input, fields);
    need_image(input, fields);
    node.channels = fields.integer("channels", 1, kMaxChannels);
    node.kernel = fields.pair("kernel", 1, kMaxSize);
    node.stride = fields.pair("stride", 1, kMaxSize);
    node.padding = fields.pair("padding", 0, kMaxSize);
    node.groups = fields.integer("groups", 1, kMaxChannels);
    const bool depthwise = node.groups == input.channels && node.groups == node.channels;
    if (node.groups != 1 && !depthwise) {
      fail(fields.where(), "groups 1, or as many as input and output channels (depthwise)",
           "groups " + std::to_string(node.groups) + " for " + std::to_string(input.channels) + " and " +
               std::to_string(node.channels) + " channels");
    }
    if (node.inputs.size() == 2) {
      const FixedPointNode& residual = input_of(node, 1);
      need_image(residual, fields);
      need_channels(residual, node.channels, fields);
    }
    node.single_pixel = input.single_pixel && node.kernel == std::array<int64_t, 2>{1, 1} &&
                        node.padding == std::array<int64_t, 2>{0, 0};
    read_product(node, name, fields, {node.channels, input.channels / node.groups, node.kernel[0], node.kernel[1]});
  }

  void need_channels(const FixedPointNode& input, int64_t channels, const Fields& fields) const {
    if (input.channels != channels) {
      fail(fields.where(), std::to_string(channels) + " channels from " + in_quotes(input.name),
           std::to_string(input.channels));
    }
  }

  void read_linear(FixedPointNode& node, const std::string& name, Fields& fields) {
    node.op = FixedPointOp::kLinear;
    node.flat = node.single_pixel = true;
    const FixedPointNode& input = input_of(node);
    need_codes(input, fields);
    if (!input.flat) fail(fields.where(), "a flat value [N, C] from " + in_quotes(input.name), "an image (flatten it)");
    node.channels = fields.integer("features", 1, kMaxChannels);
    int64_t features = input.channels;
    if (features == 0) {  // of an image whose size is not known yet; checked once it is
      const auto found = tensors_.find(name + ".weight");
      features =
          found != tensors_.end() && found->second.defined() && found->second.dim() == 2 ? found->second.size(1) : 1;
    }
    read_product(node, name, fields, {node.channels, features});
  }

  void read_max_pool2d(FixedPointNode& node, Fields& fields) {
    node.op = FixedPointOp::kMaxPool2d;
    const FixedPointNode& input = input_of(node);
    need_codes(input, fields);
    need_image(input, fields);
    set_as(node, input);
    node.single_pixel = false;
    node.kernel = fields.pair("kernel", 1, kMaxSize);
    node.stride = fields.pair("stride", 1, kMaxSize);
    node.padding = fields.pair("padding", 0, kMaxSize);
    for (int i = 0; i < 2; ++i) {
      if (2 * node.padding[i] > node.kernel[i])
        fail(fields.where(), "padding of at most half the kernel", std::to_string(node.padding[i]));
    }
  }

  void read_avg_pool2d(FixedPointNode& node, Fields& fields) {
    node.op = FixedPointOp::kAvgPool2d;
    const FixedPointNode& input = input_of(node);
    need_codes(input, fields);
    need_image(input, fields);
    set_as(node, input);
    node.single_pixel = true;
    node.size = fields.pair("size", 1, kMaxSize);
    node.pool_shift = fields.integer("shift", 0, kMaxPoolShift);
    node.sum_bound = node.size[0] * node.size[1] * input.bound[0];
    check_bound(fields.where(), "its sum", node.sum_bound);
    const bool is_signed = input.dtype == at::kChar;
    const int64_t fraction_length = fields.integer("fraction_length", 0, is_signed ? 7 : 8);
    node.shift = {input.fraction_length[0] + node.pool_shift - fraction_length};
    set_codes(node, is_signed, fraction_length);
  }

  void read_slice_pad(FixedPointNode& node, Fields& fields) {
    node.op = FixedPointOp::kSlicePad;
    const FixedPointNode& input = input_of(node);
    need_image(input, fields);
    set_as(node, input);
    node.stride = fields.pair("stride", 1, kMaxSize);
    node.pad = fields.pair("pad", 0, kMaxChannels);
    node.channels += node.pad[0] + node.pad[1];
    const auto widen = [&](std::vector<int64_t>& values, int64_t fill) {
      if (values.size() == 1) return;
      values.insert(values.begin(), node.pad[0], fill);
      values.insert(values.end(), node.pad[1], fill);
    };
    widen(node.fraction_length, node.fraction_length[0]);  // zero at any fraction length
    widen(node.bound, 0);
  }

  void read_add(FixedPointNode& node, Fields& fields) {
    node.op = FixedPointOp::kAdd;
    const FixedPointNode &a = input_of(node), &b = input_of(node, 1);
    if (a.flat != b.flat) fail(fields.where(), "two images or two flat values", "one of each");
    need_channels(b, a.channels, fields);
    set_as(node, a);
    node.flat = a.flat;
    node.single_pixel = a.single_pixel && b.single_pixel;
    if (node.channels == 0) node.channels = 1;  // flattened codes of unknown number: one bound holds for all
    align(node, b, fields.where());
    node.channels = a.channels;
    requantize(node, fields);
  }

  void read_flatten(FixedPointNode& node, Fields& fields) {
    node.op = FixedPointOp::kFlatten;
    const FixedPointNode& input = input_of(node);
    need_image(input, fields);
    if (!input.single_pixel) need_codes(input, fields);
    set_as(node, input);
    if (!input.single_pixel) node.channels = 0;
    node.flat = node.single_pixel = true;
  }

  void check_tensor_names() {
    for (const auto& item : tensors_) {
      if (!used_.count(item.first)) fail("tensors", "only weights and biases of the graph", in_quotes(item.first));
    }
  }

  const Tensors& tensors_;
  ProvenProgram graph_;
  std::map<std::string, int> index_;
  std::set<std::string> all_names_;
  std::set<std::string> used_;
};

}  // namespace

const char* fixed_point_dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return "uint8";
    case at::kChar:
      return "int8";
    case at::kInt:
      return "int32";
    case at::kFloat:
      return "float32";
    default:
      return c10::toString(type);
  }
}

ProvenProgram prove_program(const std::string& json, const Tensors& tensors) { return Parser(tensors).parse(json); }

}  // namespace quantrain::nn::detail

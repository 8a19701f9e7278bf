// A network that trains in fixed point, declared by a C++ trainer, and its conversion to integers.
//
//   FixedPointGraph graph(Recipe::from_name("f8net"), /*channels=*/3);
//   auto x = graph->conv2d("conv1", graph->input(), Conv2dOptions(3, 16, 3).padding(1).bias(false), {.batch_norm =
//   true, .relu = true}); auto y = graph->conv2d("layer1.0.conv1", x, ..., {.batch_norm = true, .relu = true});
//   y = graph->conv2d("layer1.0.conv2", y, ..., {.batch_norm = true, .relu = true, .residual = x});
//   graph->linear("linear", graph->avg_pool2d("pool", y), 10);
//
// Then: Calibration and graph->forward(images), training, graph->eval(), convert(*graph). Names of parameters and
// buffers are those of the Python model after prepare(), so that checkpoints pass between the two.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quantrain/nn/fixed_point/layers.h"
#include "quantrain/nn/fixed_point/network.h"

namespace quantrain::nn {

// A tensor of the graph that declared it.
class FixedPointValue {
 public:
  FixedPointValue() = default;

 private:
  friend class FixedPointGraphImpl;
  explicit FixedPointValue(int64_t node) : node_(node) {}
  int64_t node_ = -1;
};

// What follows a convolution: batch norm, an addition, a ReLU.
struct FixedPointConvArguments {
  bool batch_norm = false;
  bool relu = false;                                           // unsigned codes; without, signed ones
  double max_alpha = std::numeric_limits<double>::infinity();  // with relu: 6 for a ReLU6
  std::optional<FixedPointValue> residual = std::nullopt;      // added before the ReLU: codes, or a shortcut
  bool shortcut = false;  // the output stays in 32 bits, for a residual; quantized there
  std::optional<FixedPointValue> like =
      std::nullopt;  // codes in the units of these, as FixedPointGraph::add() needs them
};

// Layers in the order of their declaration; ValueError names the layer and the rule. A residual that is codes (an
// identity shortcut, or slice and pad) shares its activation with the sum: one alpha and one FL along a chain of
// residual blocks. The sum must then have the same sign and max_alpha.
class QUANTRAIN_API FixedPointGraphImpl : public Copied<FixedPointGraphImpl, torch::nn::Module> {
 public:
  FixedPointGraphImpl(const Recipe& recipe, int64_t channels, bool signed_input = false);

  FixedPointValue input() const { return FixedPointValue(0); }
  FixedPointValue conv2d(const std::string& name, FixedPointValue input, const torch::nn::Conv2dOptions& options,
                         const FixedPointConvArguments& arguments = {});
  // The last layer, in real values. Flattens an image of one pixel.
  FixedPointValue linear(const std::string& name, FixedPointValue input, int64_t features, bool bias = true);
  FixedPointValue max_pool2d(const std::string& name, FixedPointValue input, std::array<int64_t, 2> kernel,
                             std::array<int64_t, 2> stride, std::array<int64_t, 2> padding = {0, 0});
  // The mean over the whole image.
  FixedPointValue avg_pool2d(const std::string& name, FixedPointValue input);
  // input[:, :, ::stride, ::stride] with `before` and `after` channels of zeros around its own.
  FixedPointValue slice_pad(const std::string& name, FixedPointValue input, std::array<int64_t, 2> stride,
                            int64_t before, int64_t after);
  // The sum of two values of codes in the same units (of one chain of residual blocks, or declared with `like`),
  // rounded to such codes: where no convolution can hold the addition as its residual. A ReLU behind it is in the codes
  // where the operands have one.
  FixedPointValue add(const std::string& name, FixedPointValue a, FixedPointValue b);

  // float32 [N, channels, H, W] -> logits of the last layer, float32.
  at::Tensor forward(const at::Tensor& images);

  // Every node's tensor by name, as forward computes it.
  std::map<std::string, at::Tensor> forward_all(const at::Tensor& images);

  // As torch::nn::Module::to; integer state stays integer.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  const Recipe& recipe() const { return recipe_; }

  // What convert() makes a network of.
  FixedPointProgram program();

  FixedPointInput input_activation{nullptr};

 private:
  struct Node {
    std::string name;
    std::string op;
    std::vector<int64_t> inputs;
    std::shared_ptr<FixedPointActivationImpl> activation;  // what its codes mean; null: 32-bit accumulators or logits
    std::shared_ptr<FixedPointLayer> layer;                // conv2d, linear
    std::shared_ptr<FixedPointAvgPool2dImpl> pool;         // avg_pool2d
    std::array<int64_t, 2> kernel{0, 0};
    std::array<int64_t, 2> stride{1, 1};
    std::array<int64_t, 2> padding{0, 0};  // slice_pad: channels before and after
    int64_t channels = 0;
    double max_alpha = std::numeric_limits<double>::infinity();
    int64_t last_reader = -1;
    bool shortcut = false;
  };

  const Node& node(const std::string& name, FixedPointValue value, bool codes = true) const;
  friend Copied<FixedPointGraphImpl, torch::nn::Module>;
  std::shared_ptr<FixedPointGraphImpl> fresh() const;
  FixedPointValue append(Node node, std::function<void(FixedPointGraphImpl&)> declaration);
  void place(const std::string& name, const std::shared_ptr<torch::nn::Module>& module);
  at::Tensor run(const Node& node, const std::vector<at::Tensor>& values, const at::Tensor& images);
  void restart_calibration();
  void check_units(const std::string& name, const Node& other, bool is_signed, double max_alpha) const;
  FixedPointActivation make_activation(const std::string& name, const FixedPointConvArguments& arguments) const;

  const FixedPointSpec* scheme() const { return recipe_.scheme_as<FixedPointSpec>(); }

  Recipe recipe_;
  std::vector<Node> nodes_;
  std::vector<std::function<void(FixedPointGraphImpl&)>> declarations_;  // of all but the input, for clone()
};
TORCH_MODULE(FixedPointGraph);

// The integer network that the graph is in evaluation, on the graph's device: the same codes and the same accumulators.
// The graph stays as it is. ValueError: an average pool that saw no image, a graph that does not end in a linear layer,
// an accumulator that may leave 32 bits.
QUANTRAIN_API FixedPointNetwork convert(FixedPointGraphImpl& graph);

}  // namespace quantrain::nn

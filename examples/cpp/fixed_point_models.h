// Networks that train in fixed point, declared layer by layer: ResNet-20 for small images; ResNet-18 and -50,
// MobileNet-V1 and -V2 for large ones. Names are those of the Python models after prepare() (resnet20 of the
// fine-tuning job; torchvision's, which has no MobileNet-V1), so that checkpoints pass between the two.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <quantrain/nn/fixed_point/graph.h>
#include <torch/nn/init.h>

namespace example {

namespace qnn = quantrain::nn;
using Conv = torch::nn::Conv2dOptions;
using qnn::FixedPointGraph;
using qnn::FixedPointValue;

inline Conv square_conv(int64_t in_planes, int64_t planes, int64_t size, int64_t stride = 1, int64_t groups = 1) {
  return Conv(in_planes, planes, size).stride(stride).padding(size / 2).groups(groups).bias(false);
}

// He et al., arXiv:1502.01852: what the Python models start from.
inline void initialize(FixedPointGraph& graph) {
  for (const auto& item : graph->named_parameters()) {
    const bool is_weight = item.key().ends_with("weight") && item.value().dim() >= 2;
    if (is_weight) torch::nn::init::kaiming_normal_(item.value());
  }
}

// ResNet-20 (He et al., arXiv:1512.03385, section 4.2): shortcuts without parameters, as ResNet20 in resnet20.h.
inline FixedPointGraph fixed_point_resnet20(int64_t classes, int64_t in_channels, const qnn::Recipe& recipe) {
  FixedPointGraph graph(recipe, in_channels);
  FixedPointValue x =
      graph->conv2d("conv1", graph->input(), square_conv(in_channels, 16, 3), {.batch_norm = true, .relu = true});
  int64_t planes = 16;
  for (int64_t stage = 0; stage < 3; ++stage) {
    for (int64_t block = 0; block < 3; ++block) {
      const std::string name = "layer" + std::to_string(stage + 1) + "." + std::to_string(block);
      const int64_t wide = int64_t{16} << stage;
      const int64_t stride = wide == planes ? 1 : 2;
      FixedPointValue shortcut = x;
      if (wide != planes) {
        const int64_t before = (wide - planes) / 2;
        shortcut = graph->slice_pad(name + ".shortcut", x, {stride, stride}, before, wide - planes - before);
      }
      x = graph->conv2d(name + ".conv1", x, square_conv(planes, wide, 3, stride), {.batch_norm = true, .relu = true});
      x = graph->conv2d(name + ".conv2", x, square_conv(wide, wide, 3),
                        {.batch_norm = true, .relu = true, .residual = shortcut});
      planes = wide;
    }
  }
  graph->linear("linear", graph->avg_pool2d("mean", x), classes);
  initialize(graph);
  return graph;
}

namespace detail {

// The first convolution and pooling of torchvision's ResNets.
inline FixedPointValue resnet_stem(FixedPointGraph& graph) {
  const FixedPointValue x =
      graph->conv2d("conv1", graph->input(), square_conv(3, 64, 7, 2), {.batch_norm = true, .relu = true});
  return graph->max_pool2d("maxpool", x, {3, 3}, {2, 2}, {1, 1});
}

inline FixedPointValue downsample(FixedPointGraph& graph, const std::string& name, FixedPointValue x, int64_t in_planes,
                                  int64_t planes, int64_t stride) {
  return graph->conv2d(name + ".downsample.0", x, square_conv(in_planes, planes, 1, stride),
                       {.batch_norm = true, .shortcut = true});
}

// A multiple of 8 near `value`, not less than 0.9 of it, as torchvision's MobileNets round their widths.
inline int64_t make_divisible(double value) {
  const int64_t near = std::max<int64_t>(8, static_cast<int64_t>(value + 4) / 8 * 8);
  return static_cast<double>(near) < 0.9 * value ? near + 8 : near;
}

}  // namespace detail

// ResNet-18 (He et al., section 4.1), torchvision's names. Images [N, 3, 224, 224].
inline FixedPointGraph fixed_point_resnet18(int64_t classes, const qnn::Recipe& recipe) {
  FixedPointGraph graph(recipe, 3);
  FixedPointValue x = detail::resnet_stem(graph);
  int64_t planes = 64;
  for (int64_t stage = 0; stage < 4; ++stage) {
    for (int64_t block = 0; block < 2; ++block) {
      const std::string name = "layer" + std::to_string(stage + 1) + "." + std::to_string(block);
      const int64_t wide = int64_t{64} << stage;
      const int64_t stride = wide == planes ? 1 : 2;
      const FixedPointValue shortcut = wide == planes ? x : detail::downsample(graph, name, x, planes, wide, stride);
      x = graph->conv2d(name + ".conv1", x, square_conv(planes, wide, 3, stride), {.batch_norm = true, .relu = true});
      x = graph->conv2d(name + ".conv2", x, square_conv(wide, wide, 3),
                        {.batch_norm = true, .relu = true, .residual = shortcut});
      planes = wide;
    }
  }
  graph->linear("fc", graph->avg_pool2d("avgpool", x), classes);
  initialize(graph);
  return graph;
}

// ResNet-50 with the stride in the 3x3 convolution (version 1.5), torchvision's names.
inline FixedPointGraph fixed_point_resnet50(int64_t classes, const qnn::Recipe& recipe) {
  static constexpr std::array<int64_t, 4> kBlocks = {3, 4, 6, 3};
  FixedPointGraph graph(recipe, 3);
  FixedPointValue x = detail::resnet_stem(graph);
  int64_t planes = 64;
  for (int64_t stage = 0; stage < 4; ++stage) {
    for (int64_t block = 0; block < kBlocks[static_cast<size_t>(stage)]; ++block) {
      const std::string name = "layer" + std::to_string(stage + 1) + "." + std::to_string(block);
      const int64_t narrow = int64_t{64} << stage;
      const int64_t wide = 4 * narrow;
      const int64_t stride = block == 0 && stage > 0 ? 2 : 1;
      const FixedPointValue shortcut = wide == planes ? x : detail::downsample(graph, name, x, planes, wide, stride);
      x = graph->conv2d(name + ".conv1", x, square_conv(planes, narrow, 1), {.batch_norm = true, .relu = true});
      x = graph->conv2d(name + ".conv2", x, square_conv(narrow, narrow, 3, stride), {.batch_norm = true, .relu = true});
      x = graph->conv2d(name + ".conv3", x, square_conv(narrow, wide, 1),
                        {.batch_norm = true, .relu = true, .residual = shortcut});
      planes = wide;
    }
  }
  graph->linear("fc", graph->avg_pool2d("avgpool", x), classes);
  initialize(graph);
  return graph;
}

// MobileNet-V1 (Howard et al., arXiv:1704.04861, table 1): pairs of a depthwise and a 1x1 convolution.
inline FixedPointGraph fixed_point_mobilenet_v1(int64_t classes, const qnn::Recipe& recipe, double width = 1.0) {
  struct Block {
    int64_t planes;
    int64_t stride;
  };
  static constexpr std::array<Block, 13> kBlocks = {{{64, 1},
                                                     {128, 2},
                                                     {128, 1},
                                                     {256, 2},
                                                     {256, 1},
                                                     {512, 2},
                                                     {512, 1},
                                                     {512, 1},
                                                     {512, 1},
                                                     {512, 1},
                                                     {512, 1},
                                                     {1024, 2},
                                                     {1024, 1}}};
  FixedPointGraph graph(recipe, 3);
  int64_t planes = detail::make_divisible(32 * width);
  FixedPointValue x = graph->conv2d("features.0.conv", graph->input(), square_conv(3, planes, 3, 2),
                                    {.batch_norm = true, .relu = true});
  for (size_t i = 0; i < kBlocks.size(); ++i) {
    const std::string name = "features." + std::to_string(i + 1);
    const int64_t wide = detail::make_divisible(static_cast<double>(kBlocks[i].planes) * width);
    x = graph->conv2d(name + ".depthwise", x, square_conv(planes, planes, 3, kBlocks[i].stride, planes),
                      {.batch_norm = true, .relu = true});
    x = graph->conv2d(name + ".pointwise", x, square_conv(planes, wide, 1), {.batch_norm = true, .relu = true});
    planes = wide;
  }
  graph->linear("classifier", graph->avg_pool2d("pool", x), classes);
  initialize(graph);
  return graph;
}

// MobileNet-V2 (Sandler et al., arXiv:1801.04381, table 2), torchvision's names. Bottlenecks have signed codes and no
// ReLU.
inline FixedPointGraph fixed_point_mobilenet_v2(int64_t classes, const qnn::Recipe& recipe, double width = 1.0) {
  struct Stage {
    int64_t expansion;
    int64_t planes;
    int64_t blocks;
    int64_t stride;
  };
  static constexpr std::array<Stage, 7> kStages = {
      {{1, 16, 1, 1}, {6, 24, 2, 2}, {6, 32, 3, 2}, {6, 64, 4, 2}, {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}}};
  const qnn::FixedPointConvArguments relu6{.batch_norm = true, .relu = true, .max_alpha = 6.0};
  FixedPointGraph graph(recipe, 3);
  int64_t planes = detail::make_divisible(32 * width);
  FixedPointValue x = graph->conv2d("features.0.0", graph->input(), square_conv(3, planes, 3, 2), relu6);
  int64_t index = 1;
  for (const Stage& stage : kStages) {
    const int64_t wide = detail::make_divisible(static_cast<double>(stage.planes) * width);
    for (int64_t block = 0; block < stage.blocks; ++block, ++index) {
      const std::string name = "features." + std::to_string(index) + ".conv.";
      const int64_t stride = block == 0 ? stage.stride : 1;
      const int64_t hidden = planes * stage.expansion;
      const FixedPointValue input = x;
      if (stage.expansion != 1) x = graph->conv2d(name + "0.0", x, square_conv(planes, hidden, 1), relu6);
      const int64_t next = stage.expansion == 1 ? 0 : 1;
      x = graph->conv2d(name + std::to_string(next) + ".0", x, square_conv(hidden, hidden, 3, stride, hidden), relu6);
      qnn::FixedPointConvArguments linear{.batch_norm = true};
      if (stride == 1 && planes == wide) linear.residual = input;
      x = graph->conv2d(name + std::to_string(next + 1), x, square_conv(hidden, wide, 1), linear);
      planes = wide;
    }
  }
  const int64_t last = detail::make_divisible(1280 * std::max(1.0, width));
  x = graph->conv2d("features." + std::to_string(index) + ".0", x, square_conv(planes, last, 1), relu6);
  graph->linear("classifier.1", graph->avg_pool2d("adaptive_avg_pool2d", x), classes);
  initialize(graph);
  return graph;
}

}  // namespace example

// The sizes of an integer network's values for one size of images.

#include "nn/fixed_point/fields.h"
#include "nn/fixed_point/program.h"

namespace quantrain::nn::detail {
namespace {

constexpr double kMaxElements = 0x1p48;  // of a value: far beyond memory, far from overflow

std::string size_text(const std::array<int64_t, 4>& shape) {
  return Json(std::vector<int64_t>{shape[2], shape[3]}).dump();
}

// Of a window operation; 0 where the window does not fit.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t span = size + 2 * padding - kernel;
  return span < 0 ? 0 : span / stride + 1;
}

}  // namespace

std::vector<std::array<int64_t, 4>> fixed_point_shapes(const ProvenProgram& graph, std::array<int64_t, 4> input,
                                                       const std::map<std::string, at::Tensor>& tensors) {
  std::vector<std::array<int64_t, 4>> shapes{input};
  for (size_t i = 1; i < graph.nodes.size(); ++i) {
    const FixedPointNode& node = graph.nodes[i];
    std::array<int64_t, 4> shape = shapes[node.inputs[0]];
    const std::array<int64_t, 4> from = shape;
    switch (node.op) {
      case FixedPointOp::kConv2d:
      case FixedPointOp::kMaxPool2d:
        shape[1] = node.channels;
        for (int d = 0; d < 2; ++d)
          shape[2 + d] = windows(from[2 + d], node.kernel[d], node.stride[d], node.padding[d]);
        if (shape[2] == 0 || shape[3] == 0) fail(node.name, "an image that its kernel fits", size_text(from));
        break;
      case FixedPointOp::kAvgPool2d:
        if (from[2] != node.size[0] || from[3] != node.size[1]) {
          fail(node.name, "an image of " + Json(node.size).dump(), size_text(from));
        }
        shape[2] = shape[3] = 1;
        break;
      case FixedPointOp::kSlicePad:
        shape[1] = node.channels;
        for (int d = 0; d < 2; ++d) shape[2 + d] = (from[2 + d] - 1) / node.stride[d] + 1;
        break;
      case FixedPointOp::kFlatten:
        shape = {from[0], from[1] * from[2] * from[3], 1, 1};
        break;
      case FixedPointOp::kLinear: {
        const int64_t features = tensors.at(node.name + ".weight").size(1);
        if (from[1] != features) {
          fail(node.name, std::to_string(features) + " input features", std::to_string(from[1]) + " from this image");
        }
        shape[1] = node.channels;
        break;
      }
      default:
        break;
    }
    if (node.inputs.size() == 2 && shapes[node.inputs[1]] != shape) {
      fail(node.name, "both operands of its addition to be images of " + size_text(shape),
           size_text(shapes[node.inputs[1]]));
    }
    const auto [n, c, h, w] = shape;
    if (static_cast<double>(n) * static_cast<double>(c) * static_cast<double>(h) * static_cast<double>(w) >
        kMaxElements)
      fail(node.name, "a result of at most 2^48 elements", Json(shape).dump());
    shapes.push_back(shape);
  }
  return shapes;
}

}  // namespace quantrain::nn::detail

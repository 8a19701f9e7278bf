// What an integer network does beside its layers, without the dispatcher: copies of images, additions that end in
// codes. Private to the library; nn/fixed_point/plan.cpp prepares the arguments once and runs them at each image.
#pragma once

#include <ATen/core/Tensor.h>

#include "csrc/common/fixed_point_network.h"

namespace quantrain {

// `on` is a tensor of the device that runs it.
void fixed_point_copy(const FixedPointCopyArgs& args, const at::Tensor& on);
void fixed_point_sum(const FixedPointSumArgs& args, const at::Tensor& output);

}  // namespace quantrain

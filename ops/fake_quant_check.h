// The checks and result shapes of the fake_quant family, some of them fixed_point's too, one function per schema: used
// by the CPU and CUDA kernels and, with symbolic sizes, as the Meta kernels, so that eager and compiled runs cannot
// disagree.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace quantrain {

void check_range(std::string_view op, int64_t quant_min, int64_t quant_max);

// A floating-point input of a type that the kernels have.
void check_input(std::string_view op, const at::Tensor& input);

// scale and zero_point against an input (or codes) on the same device.
void check_qparams(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                   const std::optional<at::Tensor>& zero_point, bool zero_point_may_be_float = false);

// One size, or sizes that divide the input's.
void check_scale_shape(std::string_view op, std::string_view name, c10::SymIntArrayRef sizes,
                       c10::SymIntArrayRef scale_shape);

// One bit per element: the straight-through estimator's mask.
at::Tensor allocate_mask(const at::Tensor& input);

// What only a look at the values can tell. CPU tensors alone: on CUDA it would wait for the device.
void check_qparam_values(std::string_view op, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                         int64_t quant_min, int64_t quant_max);

}  // namespace quantrain

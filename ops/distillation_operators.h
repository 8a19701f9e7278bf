// The operators behind the losses of distillation.h, of rows: what the autograd node calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace quantrain {

// (loss [..], moments [.., 4])
using DistillationRows = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& student, const at::Tensor& teacher,
                                                            const std::optional<at::Tensor>& indices,
                                                            const std::optional<at::Tensor>& mask,
                                                            std::string_view kind, double temperature);

// The student's gradient, of its shape and type.
using DistillationRowsBackward = at::Tensor(const at::Tensor& grad, const at::Tensor& student,
                                            const at::Tensor& teacher, const std::optional<at::Tensor>& indices,
                                            const std::optional<at::Tensor>& mask, const at::Tensor& moments,
                                            std::string_view kind, double temperature);

}  // namespace quantrain

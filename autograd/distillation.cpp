#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/dispatch.h"
#include "ops/distillation_operators.h"

// The gradient of a student's rows: what is kept besides them are four numbers per row.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

constexpr const char* kName = "_distillation_rows";

struct DistillationFunction : torch::autograd::Function<DistillationFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& student, const at::Tensor& teacher,
                               const OptionalTensor& indices, const OptionalTensor& mask, std::string_view kind,
                               double temperature) {
    static const auto op = find_operator<DistillationRows>(kName);
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, moments] = op.call(student, teacher, indices, mask, kind, temperature);
    const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    ctx->save_for_backward({student, teacher, or_none(indices), or_none(mask), moments});
    ctx->saved_data["kind"] = std::string(kind);
    ctx->saved_data["temperature"] = temperature;
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({moments});
    return {loss, moments};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<DistillationRowsBackward>("_distillation_rows_backward");
    variable_list gradients(6);
    const Variable& given = grad_outputs[0];
    if (!given.defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      gradients[0] = op.call(given, saved[0], saved[1], optional(2), optional(3), saved[4],
                             ctx->saved_data["kind"].toStringRef(), ctx->saved_data["temperature"].toDouble());
    }
    refuse_second_derivative(gradients, given, kName);
    return gradients;
  }
};

std::tuple<at::Tensor, at::Tensor> rows_autograd(const at::Tensor& student, const at::Tensor& teacher,
                                                 const OptionalTensor& indices, const OptionalTensor& mask,
                                                 std::string_view kind, double temperature) {
  static const auto op = find_operator<DistillationRows>(kName);
  refuse_transforms(kName, {student, teacher});
  const at::Tensor constant = teacher.detach();  // a teacher's gradient is not asked for
  if (needs_grad(student)) {
    const variable_list results = DistillationFunction::apply(student, constant, indices, mask, kind, temperature);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(student, constant, indices, mask, kind, temperature);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) { m.impl("_distillation_rows", &quantrain::rows_autograd); }

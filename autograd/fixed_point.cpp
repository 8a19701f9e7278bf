#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/straight_through.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/fixed_point.h"

// The gradient of fixed_point_quantize: fake_quantize's, from a mask that leaves out the end codes. The other operators
// have none.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> quantize_mask(const at::Tensor& input, const at::Tensor& fraction_length,
                                                 int64_t word_length, bool is_signed) {
  static const auto op =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t, bool)>(
          "_fixed_point_quantize_mask");
  return op.call(input, fraction_length, word_length, is_signed);
}

struct FixedPointQuantizeFunction : torch::autograd::Function<FixedPointQuantizeFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& fraction_length,
                          int64_t word_length, bool is_signed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mask] = quantize_mask(input, fraction_length, word_length, is_signed);
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = output.sym_strides();
    return output;
  }

  // _fake_quantize_backward is differentiable itself: with the same mask.
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    return {fake_quantize_backward(grad_outputs[0], ctx->get_saved_variables()[0], stride), {}, {}, {}};
  }
};

at::Tensor fixed_point_quantize_autograd(const at::Tensor& input, const at::Tensor& fraction_length,
                                         int64_t word_length, bool is_signed) {
  if (is_transformed(input))
    return straight_through(input, [&] { return quantize_mask(input, fraction_length, word_length, is_signed); });
  if (needs_grad(input)) return FixedPointQuantizeFunction::apply(input, fraction_length, word_length, is_signed);
  const at::AutoDispatchBelowADInplaceOrView below;
  return fixed_point_quantize(input, fraction_length, word_length, is_signed);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("fixed_point_quantize", &quantrain::fixed_point_quantize_autograd);
}

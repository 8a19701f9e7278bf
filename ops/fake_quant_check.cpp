#include "ops/fake_quant_check.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "ops/common/check.h"
#include "ops/common/layout.h"

namespace quantrain {
namespace {

std::string type_name(const at::Tensor& tensor) { return c10::toString(tensor.scalar_type()); }

bool is_scale(float value) { return value > 0.0f && value <= std::numeric_limits<float>::max(); }

// -1 where every value is positive and finite; else the index of the first that is not.
int64_t first_not_a_scale(const float* values, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= is_scale(values[i]);  // no early exit: this form vectorizes
  if (good) return -1;
  int64_t i = 0;
  while (is_scale(values[i])) ++i;
  return i;
}

// A float64 input takes float64 parameters too: a model in float64 for a test of gradients has them.
bool both_double(const at::Tensor& input, const at::Tensor& parameter) {
  return input.scalar_type() == at::kDouble && parameter.scalar_type() == at::kDouble;
}

template <typename T>
void check_zero_points(std::string_view op, const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  const at::Tensor points = zero_point.contiguous();
  const T* point = points.const_data_ptr<T>();
  for (int64_t i = 0; i < points.numel(); ++i)
    QUANTRAIN_CHECK_VALUE(point[i] >= quant_min && point[i] <= quant_max,
                          "{}: expected zero_point in [{}, {}], got {} at index {}", op, quant_min, quant_max, point[i],
                          i);
}

}  // namespace

void check_range(std::string_view op, int64_t quant_min, int64_t quant_max) {
  QUANTRAIN_CHECK_VALUE(quant_min <= quant_max, "{}: expected quant_min <= quant_max, got {} and {}", op, quant_min,
                        quant_max);
  QUANTRAIN_CHECK_VALUE(
      quant_min >= -32768 && quant_max <= 65535 && quant_max - quant_min <= 65535,
      "{}: expected codes of at most 16 bits (quant_min >= -32768, quant_max <= 65535), got {} and {}", op, quant_min,
      quant_max);
}

void check_input(std::string_view op, const at::Tensor& input) {
  const auto type = input.scalar_type();
  QUANTRAIN_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble,
                       "{}: expected input of float32, float16, bfloat16 or float64, got {}", op, type_name(input));
  detail::check_dense(op, "input", input);
}

void check_scale_shape(std::string_view op, std::string_view name, c10::SymIntArrayRef sizes,
                       c10::SymIntArrayRef scale_shape) {
  bool one = true;
  for (const auto& size : scale_shape) one = one && size == 1;
  if (one) return;
  QUANTRAIN_CHECK_VALUE(scale_shape.size() == sizes.size(),
                        "{}: expected {} to have one element or the input's {} dimensions, got {} dimensions", op, name,
                        sizes.size(), scale_shape.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    const bool divides = scale_shape[d] == sizes[d] || (scale_shape[d] > 0 && sizes[d] % scale_shape[d] == 0);
    QUANTRAIN_CHECK_VALUE(divides, "{}: expected {} to divide input at dimension {}, got {} and {}", op, name, d,
                          c10::str(scale_shape[d]), c10::str(sizes[d]));
  }
}

void check_qparams(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                   const std::optional<at::Tensor>& zero_point, bool zero_point_may_be_float) {
  QUANTRAIN_CHECK_TYPE(scale.scalar_type() == at::kFloat || both_double(input, scale),
                       "{}: expected scale of float32, got {}", op, type_name(scale));
  detail::check_device(op, "scale", scale, input, "the input's");
  check_scale_shape(op, "scale", input.sym_sizes(), scale.sym_sizes());
  if (!zero_point) return;
  const bool learned = zero_point->scalar_type() == at::kFloat || both_double(input, *zero_point);
  QUANTRAIN_CHECK_TYPE(holds_integers(*zero_point) || (zero_point_may_be_float && learned),
                       "{}: expected zero_point of an integer type{}, got {}", op,
                       zero_point_may_be_float ? " or float32" : "", type_name(*zero_point));
  detail::check_device(op, "zero_point", *zero_point, input, "the input's");
  // One integer serves every scale; a learned zero point has its gradient's shape.
  const bool one = !zero_point->is_floating_point() && TORCH_GUARD_OR_FALSE(zero_point->sym_numel().sym_eq(1));
  QUANTRAIN_CHECK_VALUE(one || zero_point->sym_sizes() == scale.sym_sizes(),
                        "{}: expected zero_point to have the shape of scale {}, got {}", op, detail::shape_text(scale),
                        detail::shape_text(*zero_point));
}

at::Tensor allocate_mask(const at::Tensor& input) {
  return at::empty_symint({(input.sym_numel() + 7) / 8}, input.options().dtype(at::kByte));
}

void check_qparam_values(std::string_view op, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                         int64_t quant_min, int64_t quant_max) {
  const at::Tensor scales = scale.to(at::kFloat).contiguous();
  const float* values = scales.const_data_ptr<float>();
  const int64_t bad = first_not_a_scale(values, scales.numel());
  QUANTRAIN_CHECK_VALUE(bad < 0, "{}: expected every scale to be positive and finite, got {} at index {}", op,
                        values[bad], bad);
  if (!zero_point || !holds_integers(*zero_point)) return;
  if (zero_point->scalar_type() == at::kLong)  // before as_int32 saturates it
    check_zero_points<int64_t>(op, *zero_point, quant_min, quant_max);
  else
    check_zero_points<int32_t>(op, as_int32(*zero_point), quant_min, quant_max);
}

}  // namespace quantrain

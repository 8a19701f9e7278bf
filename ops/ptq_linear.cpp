#include "quantrain/ops/ptq_linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/four_bit.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/int8_outliers.h"

// Composed of public operators, so that autograd, torch.compile and each device have what those have.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kName = "_ptq_linear";

bool few_rows(const at::Tensor& input) {
  c10::SymInt rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows = rows * input.sym_size(d);
  return TORCH_GUARD_OR_FALSE(rows.sym_le(input.is_cpu() ? kFewRowsOnCpu : kFewRows));
}

at::Tensor scaled(const at::Tensor& input, const OptionalTensor& factor) {
  return factor ? (input * *factor).to(input.scalar_type()) : input;
}

at::Tensor eight_bits(const at::Tensor& input, const PtqWeight& w, const OptionalTensor& bias,
                      const PtqProduct& product) {
  if (!product.quantize_input || (product.few_rows_float && few_rows(input))) {
    return int8_weight_mm(scaled(input, w.input_factor), w.codes, w.scale, bias);
  }
  const at::ScalarType type = input.scalar_type();
  if (product.outlier_threshold > 0) {
    const at::Tensor columns = int8_outlier_columns(input, product.outlier_threshold, product.capacity);
    const at::Tensor codes = w.codes.index_select(1, columns.clamp_min(0));
    const Int8OutlierCodes x = int8_quantize_rows_outliers(input, columns, w.input_factor);
    return int8_mm_outliers(x.codes, x.planes, x.scale, w.codes, codes, w.scale, bias, type);
  }
  if (w.outlier_columns) {
    const Int8OutlierCodes x = int8_quantize_rows_outliers(input, *w.outlier_columns, w.input_factor);
    return int8_mm_outliers(x.codes, x.planes, x.scale, w.codes, *w.outlier_codes, w.scale, bias, type);
  }
  if (w.input_scale) {
    const at::Tensor x =
        quantrain::quantize(scaled(input, w.input_factor), *w.input_scale, std::nullopt, -128, 127, at::kChar);
    return int8_mm(x, w.codes, w.input_scale, w.scale, bias, type);
  }
  Int8QuantizeOptions options;
  options.column_factor = w.input_factor;
  const Int8Codes x = int8_quantize_rows(input, options);
  return int8_mm(x.codes, w.codes, x.scale, w.scale, bias, type);
}

at::Tensor four_bits(const at::Tensor& input, const PtqWeight& w, const OptionalTensor& bias,
                     const PtqProduct& product) {
  at::Tensor x = scaled(input, w.input_factor), apart;
  if (w.outlier_columns) {
    const at::Tensor columns = w.outlier_columns->to(at::kLong);
    apart = x.index_select(-1, columns);
    // Their weights are 0; but they would be the absmax of rows that are rounded.
    if (product.quantize_input) x = x.index_fill(-1, columns, 0);
  }
  const int64_t missing = w.codes.size(1) * 2 - x.sym_size(-1).guard_int(__FILE__, __LINE__);
  if (missing > 0) x = at::constant_pad_nd(x, {0, missing});
  at::Tensor y =
      linear_4bit(x, w.codes, w.scale, bias, "int4", {}, product.quantize_input ? "int8" : "auto", w.codes.size(0));
  return apart.defined() ? y + int8_weight_mm(apart, *w.outlier_codes, *w.outlier_scale) : y;
}

void check_size(const char* name, const at::Tensor& tensor, const c10::SymInt& size) {
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(tensor.sym_numel().sym_eq(size)), "{}: expected {} of {} elements, got {}",
                        kName, name, c10::str(size), detail::shape_text(tensor));
}

// x: after autocast. What the operators behind check, in the names of this one.
void check_parts(const at::Tensor& x, const PtqWeight& w, const OptionalTensor& bias, const PtqProduct& product) {
  detail::check_float(kName, "input", x.scalar_type());
  detail::check_dense(kName, "input", x);
  const bool eight = w.codes.scalar_type() == at::kChar;
  QUANTRAIN_CHECK_TYPE(eight || w.codes.scalar_type() == at::kByte, "{}: expected codes of int8 or uint8, got {}",
                       kName, c10::toString(w.codes.scalar_type()));
  QUANTRAIN_CHECK_VALUE(w.codes.dim() == 2 && x.dim() >= 1,
                        "{}: expected input [..., K] and codes of two dimensions, got {} and {}", kName,
                        detail::shape_text(x), detail::shape_text(w.codes));
  const c10::SymInt k = x.sym_size(-1), rows = w.codes.sym_size(0);
  QUANTRAIN_CHECK_VALUE(eight ? TORCH_GUARD_OR_TRUE(w.codes.sym_size(1).sym_eq(k))
                              : TORCH_GUARD_OR_TRUE((w.codes.sym_size(1) * 2).sym_ge(k)),
                        "{}: expected input of the columns of codes, got {} and {}", kName, detail::shape_text(x),
                        detail::shape_text(w.codes));
  const auto there = [&](const char* name, const OptionalTensor& tensor, at::ScalarType type, const char* type_name) {
    if (!tensor) return false;
    detail::check_type(kName, name, *tensor, type, type_name);
    detail::check_device(kName, name, *tensor, x, "input's");
    return true;
  };
  there("codes", w.codes, w.codes.scalar_type(), "");
  there("scale", w.scale, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(w.scale.dim() == 2 && TORCH_GUARD_OR_TRUE(w.scale.sym_size(0).sym_eq(rows)) &&
                            (!eight || TORCH_GUARD_OR_TRUE(w.scale.sym_size(1).sym_eq(1))),
                        "{}: expected scale [{}, {}], got {}", kName, c10::str(rows), eight ? "1" : "groups",
                        detail::shape_text(w.scale));
  if (there("input_factor", w.input_factor, at::kFloat, "float32")) {
    QUANTRAIN_CHECK_VALUE(w.input_factor->dim() == 1, "{}: expected input_factor [K], got {}", kName,
                          detail::shape_text(*w.input_factor));
    check_size("input_factor", *w.input_factor, k);
  }
  if (there("input_scale", w.input_scale, at::kFloat, "float32")) check_size("input_scale", *w.input_scale, 1);
  QUANTRAIN_CHECK_VALUE(w.outlier_columns.has_value() == w.outlier_codes.has_value() &&
                            w.outlier_scale.has_value() == (w.outlier_columns.has_value() && !eight),
                        "{}: expected outlier_columns and outlier_codes together, with outlier_scale where weights are "
                        "of 4 bits, got others",
                        kName);
  if (there("outlier_columns", w.outlier_columns, at::kInt, "int32")) {
    there("outlier_codes", w.outlier_codes, at::kChar, "int8");
    QUANTRAIN_CHECK_VALUE(w.outlier_columns->dim() == 1 && w.outlier_codes->dim() == 2,
                          "{}: expected outlier_columns [Ko] and outlier_codes [O, Ko], got {} and {}", kName,
                          detail::shape_text(*w.outlier_columns), detail::shape_text(*w.outlier_codes));
    check_size("outlier_codes", *w.outlier_codes, rows * w.outlier_columns->sym_size(0));
  }
  if (there("outlier_scale", w.outlier_scale, at::kFloat, "float32"))
    check_size("outlier_scale", *w.outlier_scale, rows);
  if (bias) {
    detail::check_float(kName, "bias", bias->scalar_type());
    there("bias", bias, bias->scalar_type(), "");
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1, "{}: expected bias [O], got {}", kName, detail::shape_text(*bias));
    check_size("bias", *bias, rows);
  }
  QUANTRAIN_CHECK_VALUE(product.outlier_threshold >= 0 && (product.outlier_threshold == 0 || product.capacity >= 1),
                        "{}: expected outlier_threshold of at least 0, and capacity of at least 1 where it is above, "
                        "got {} and {}",
                        kName, product.outlier_threshold, product.capacity);
}

at::Tensor ptq_linear_operator(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& bias, const OptionalTensor& input_factor,
                               const OptionalTensor& input_scale, const OptionalTensor& outlier_columns,
                               const OptionalTensor& outlier_codes, const OptionalTensor& outlier_scale,
                               bool quantize_input, double outlier_threshold, int64_t capacity, bool few_rows_float) {
  const c10::DeviceType device = input.device().type();
  const at::Tensor x = (device == at::kCPU || device == at::kCUDA) && at::autocast::is_autocast_enabled(device) &&
                               input.is_floating_point() && input.scalar_type() != at::kDouble
                           ? input.to(at::autocast::get_autocast_dtype(device))
                           : input;
  const PtqWeight w{codes, scale, input_factor, input_scale, outlier_columns, outlier_codes, outlier_scale};
  const PtqProduct product{quantize_input, outlier_threshold, capacity, few_rows_float};
  check_parts(x, w, bias, product);
  return codes.scalar_type() == at::kChar ? eight_bits(x, w, bias, product) : four_bits(x, w, bias, product);
}

}  // namespace

at::Tensor ptq_linear(const at::Tensor& input, const PtqWeight& w, const OptionalTensor& bias,
                      const PtqProduct& product) {
  return ptq_linear_operator(input, w.codes, w.scale, bias, w.input_factor, w.input_scale, w.outlier_columns,
                             w.outlier_codes, w.outlier_scale, product.quantize_input, product.outlier_threshold,
                             product.capacity, product.few_rows_float);
}

at::Tensor ptq_dequantize(const PtqWeight& w, int64_t in_features, at::ScalarType dtype) {
  const int64_t rows = w.codes.size(0);
  at::Tensor weight;
  if (w.codes.scalar_type() == at::kChar) {
    weight = w.codes.to(at::kFloat) * w.scale;
  } else {
    weight = dequantize_4bit(w.codes, w.scale, {rows, w.codes.size(1) * 2}, "int4").narrow(1, 0, in_features);
    if (w.outlier_columns) {
      weight =
          weight.index_copy(1, w.outlier_columns->to(at::kLong), w.outlier_codes->to(at::kFloat) * *w.outlier_scale);
    }
  }
  if (w.input_factor) weight = weight * *w.input_factor;
  return weight.to(dtype).contiguous();
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "_ptq_linear(Tensor input, Tensor codes, Tensor scale, Tensor? bias, *, Tensor? input_factor=None, Tensor? "
      "input_scale=None, Tensor? outlier_columns=None, Tensor? outlier_codes=None, Tensor? outlier_scale=None, bool "
      "quantize_input=True, float outlier_threshold=0.0, int capacity=0, bool few_rows_float=True) -> Tensor",
      &quantrain::ptq_linear_operator);
}

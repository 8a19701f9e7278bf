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
  return TORCH_GUARD_OR_FALSE(rows.sym_le(kFewRows));
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

at::Tensor ptq_linear_operator(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& bias, const OptionalTensor& input_factor,
                               const OptionalTensor& input_scale, const OptionalTensor& outlier_columns,
                               const OptionalTensor& outlier_codes, const OptionalTensor& outlier_scale,
                               bool quantize_input, double outlier_threshold, int64_t capacity, bool few_rows_float) {
  const c10::DeviceType device = input.device().type();
  const at::Tensor x = at::autocast::is_autocast_enabled(device) && input.scalar_type() != at::kDouble
                           ? input.to(at::autocast::get_autocast_dtype(device))
                           : input;
  detail::check_float(kName, "input", x.scalar_type());
  const PtqWeight w{codes, scale, input_factor, input_scale, outlier_columns, outlier_codes, outlier_scale};
  const PtqProduct product{quantize_input, outlier_threshold, capacity, few_rows_float};
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

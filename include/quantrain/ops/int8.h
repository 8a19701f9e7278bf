// Int8 codes with one scale per row, and matrix products of them on integer tensor cores: the int8 family.
//
//   scale = absmax(row) / 127        codes = rint(row / scale), int8 in [-127, 127]        row ~ codes * scale
//
// An all-zero row has scale 1; a row with NaN or Inf has scale NaN and codes 0, so that every product with it is NaN
// and a loss scaler sees it. Rounded to nearest, codes and scales are those of choose_qparams and quantize
// (fake_quant.h); stochastic codes have mean x / scale within 2e-4 steps. Random numbers are Philox's by (seed, offset,
// row, column of the input): the same on CPU and CUDA, as are the codes, bit for bit.
//
// The products need both operands with the summed dimension last, so a training step needs transposed codes of weight,
// input and gradient. A scale along the summed dimension cannot leave the sum; it is multiplied into the other operand
// before that one is quantized (column_factor, row_factor): "folding", exact. For Y = X W^T with codes and scales Xq,
// sx, Wq, sw of rows:
//
//   dX = dY W   = (dY * sw) Wq            dW = dY^T X = (dY * sx)^T Xq
//
// float32, float16 and bfloat16 in; any strides and sizes. Nothing waits for the device. No gradients: int8_linear.h
// has them. CUDA needs compute capability 8.0 for products. Errors: c10::ValueError for shapes and values,
// c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

struct Int8Codes {
  at::Tensor codes;  // int8
  at::Tensor scale;  // float32, one per row: codes' shape with a last dimension of 1
};

struct Int8QuantizeOptions {
  bool stochastic = false;
  std::optional<at::Tensor> column_factor = std::nullopt;  // float32 [K]: rows of input * column_factor
  std::optional<at::Tensor> row_factor = std::nullopt;     // float32 [M]: columns of input * row_factor
  std::optional<at::Generator> generator = std::nullopt;
};

// Rows of input [..., K]: codes [..., K], scale [..., 1].
QUANTRAIN_API Int8Codes int8_quantize_rows(const at::Tensor& input, const Int8QuantizeOptions& options = {});

// Columns of input [..., K], taken as [M, K], written as rows: codes [K, M], scale [K, 1].
QUANTRAIN_API Int8Codes int8_quantize_columns(const at::Tensor& input, const Int8QuantizeOptions& options = {});

// Both, from one draw: what a gradient needs for its two products. Each has the right mean; their errors are not
// independent. Fewer passes over the input than one after the other.
struct Int8RowsAndColumns {
  Int8Codes rows;
  Int8Codes columns;
};

QUANTRAIN_API Int8RowsAndColumns int8_quantize_rows_and_columns(const at::Tensor& input,
                                                                const Int8QuantizeOptions& options = {});

// codes [M, K] as contiguous [K, M].
QUANTRAIN_API at::Tensor int8_transpose(const at::Tensor& codes);

// The weight's operand in dX = dY W, from the weight [O, K] (or its int8 codes) and the scale of its rows in the
// forward pass (O elements).
//   "fold"     codes those of the forward pass, transposed; column_factor = scale; scale 1
//   "columns"  columns quantized anew; column_factor 1
//   "auto"     fold where max(s^2) <= 4 mean(s^2), which bounds how much folding can raise the variance of dX; decided
//              on the device
struct Int8WeightTranspose {
  at::Tensor codes;          // int8 [K, O]
  at::Tensor column_factor;  // float32 [O], for dY
  at::Tensor scale;          // float32 [K, 1]
};

QUANTRAIN_API Int8WeightTranspose int8_weight_transpose(const at::Tensor& weight, const at::Tensor& scale,
                                                        std::string_view scheme = "auto");

// (float(a b^T) * b_scale) * a_scale + bias in float32, then in out_dtype; the sums are exact in int32 for K < 133,000.
// a int8 [..., K], b int8 [N, K]; scales float32 of M (the rows of a) and N elements or of one, none: 1; bias of any
// floating type [N]. Result [..., N].
QUANTRAIN_API at::Tensor int8_mm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& a_scale,
                                 const std::optional<at::Tensor>& b_scale,
                                 const std::optional<at::Tensor>& bias = std::nullopt,
                                 at::ScalarType out_dtype = at::kFloat);

// y = (x codes^T) * scale + bias, for inference with weights of 8 bits and activations of floating point (W8A16). input
// [..., K] of float32, float16 or bfloat16; codes int8 [N, K]; scale float32 of N elements or of one; bias of any
// floating type [N]. Result [..., N] of input's type; sums in float32, of a fixed order. On CUDA float16 and bfloat16
// input of at most 32 rows with K a multiple of 16 is multiplied without decoding the weight first; on the CPU input of
// at most 64 rows (8 without AVX2). Under autocast the input is cast. Differentiable in input and bias, any number of
// times.
QUANTRAIN_API at::Tensor int8_weight_mm(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                        const std::optional<at::Tensor>& bias = std::nullopt);

// accumulator [M, N] += the product, added in float32 and rounded once to accumulator's type.
QUANTRAIN_API void int8_mm_accumulate_(at::Tensor& accumulator, const at::Tensor& a, const at::Tensor& b,
                                       const std::optional<at::Tensor>& a_scale,
                                       const std::optional<at::Tensor>& b_scale);

}  // namespace quantrain

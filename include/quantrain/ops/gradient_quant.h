// Unbiased quantizers of gradients for fully quantized training: the gradient_quant family. StatQuant: Chen, Gai, Yao,
// Mahoney, Gonzalez, "A statistical framework for low-bitwidth training of deep neural networks" (NeurIPS 2020,
// arXiv:2010.14298).
//
// A gradient is a matrix X [N, D]: rows "sample" takes size 0 as N and the rest as D, rows "token" the last size as D
// and the rest as N. B = 2^bits - 1 steps span the range (largest minus smallest value) R of a block:
//
//   quantizer        block          error sum at most, in expectation
//   "per_tensor"     X              N D R(X)^2 / (4 B^2)                             (PTQ; zero is on the grid)
//   "per_sample"     row x_i        D sum_i R(x_i)^2 / (4 B^2)                       (PSQ)
//   "per_channel"    column of X    likewise over columns
//   "householder"    row of T X     D (lambda_1^{2/3} k^{-1/3} + lambda_2^{2/3} k^{1/3})^3 / (4 B^2) per group (BHQ)
//
// "householder" joins each large row to k - 1 small ones and spreads it over them with a Householder reflection T
// before it rounds rows; T^-1 follows. Rows are ordered by range and dealt to blocks of at most max_group rows; the
// authors' rule groups each block. Blocks of fewer than three rows are "per_sample". A reflection costs O(N D): no N x
// N matrix is ever made.
//
// Rounding is stochastic and unbiased, E[Q(X)] = X, for float32, float16 and bfloat16 alike: results are drawn among
// values that the type holds (probabilities to 2^-17; float16 householder results above 65504 are infinite).
// householder works in float32: where a row's mean is thousands of times its range, the mean's rounding errors (2^-24
// of it) remain. Random numbers are Philox's by (seed, offset, row, column in memory), so a channels_last gradient
// draws others than a contiguous one; they are the same on CPU and CUDA, as are the results, bit for bit. preserve_zero
// puts zero on the grid of every row or column too. A block with NaN or Inf becomes NaN (householder: the row's group),
// so that a loss scaler sees it; all-zero rows stay zero. Nothing waits for the device.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

// How a gradient is quantized before a product (fqt.h), and what one rule checks for all who take these fields.
struct GradientQuantizer {
  std::string quantizer = "none";  // or per_tensor, per_sample, per_channel, householder
  int64_t bits = 8;                // 2 to 8
  std::string rows = "";           // "sample" or "token"; "": "token" for fqt_linear, "sample" for fqt_conv2d
  bool preserve_zero = false;
  int64_t max_group = 128;
};

struct GradientQuantOptions {
  std::string_view rows = "sample";  // or "token"
  bool preserve_zero = false;        // "per_sample" and "per_channel"; "per_tensor" always does
  int64_t max_group = 128;           // "householder": rows of a block, 3 to 256
  bool stochastic = true;            // false: to nearest
};

// The quantized gradient in floating point, with grad's shape, element type and strides. bits in 2 to 8. No gradient of
// its own.
QUANTRAIN_API at::Tensor quantize_gradient(const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                                           const GradientQuantOptions& options = {},
                                           const std::optional<at::Generator>& generator = std::nullopt);

// The same from the given seed and offset: a pure function of its arguments. Always stochastic.
QUANTRAIN_API at::Tensor quantize_gradient_seeded(const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                                                  const GradientQuantOptions& options, int64_t seed, int64_t offset);

// The integer form: T X ~ codes * scale + offset (T the identity but for "householder"), so that X W = T^-1 [scale *
// (codes W) + offset * (1^T W)] runs on an int8 matrix product. Equal to quantize_gradient of the same random numbers
// for contiguous float32 gradients.
struct QuantizedGradient {
  at::Tensor codes;   // int8 [N, D]
  at::Tensor scale;   // float32 [1, 1], [N, 1] or [1, D]
  at::Tensor offset;  // float32, as scale: the value of code 0, minus the zero point times the scale
  at::Tensor order;   // int32 [N]: the row at each position, groups one after the other; [0] without a reflection
  at::Tensor
      // float32 [N, 4] by position: s, n, m, t with (T X)_p = s x_p - m sum_q(n_q s_q x_q) over the group's q
      reflector;
};

QUANTRAIN_API QuantizedGradient quantize_gradient_codes(const at::Tensor& grad, int64_t bits,
                                                        std::string_view quantizer,
                                                        const GradientQuantOptions& options = {},
                                                        const std::optional<at::Generator>& generator = std::nullopt);

// T^-1 (codes * scale + offset) as float32, float16 or bfloat16 [N, D].
QUANTRAIN_API at::Tensor dequantize_gradient(const QuantizedGradient& quantized, at::ScalarType dtype = at::kFloat);

namespace detail {

// T x, or T^-1 x, for float32 x [N, K].
QUANTRAIN_API at::Tensor reflect_rows(const at::Tensor& input, const at::Tensor& order, const at::Tensor& reflector,
                                      bool inverse);

}  // namespace detail
}  // namespace quantrain

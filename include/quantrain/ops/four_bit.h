// Weights of 4 bits: codes in blocks that share a scale, double quantization of the scales, and linear layers whose
// packed weight is decoded inside the product.
//
// A code q stands for value = code_value(q) * scale, of the format:
//   nf4    one of 16 quantiles of a normal distribution in [-1, 1] (Dettmers et al. 2023, arXiv:2305.14314, appendix E)
//   fp4    bitsandbytes' 4-bit float: sign in bit 3, magnitudes {0, 1/16, 8, 12, 4, 6, 2, 3} / 12 of the low bits
//   e2m1   the OCP float of 2 exponent bits and 1 mantissa bit, magnitudes {0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6
//   int4   an integer -8..7 in two's complement
//   uint4  an integer 0..15 less the block's zero point (int32, or float32 for formats that have one of that kind)
//   table  code_value is a float32 tensor of 16 values
//
// Blocks are runs of block_size elements in row-major order. Where block_size divides the last dimension K and K is
// even, codes are uint8 [..., K / 2] and scales float32 [..., K / block_size]; else both are flat, [(numel + 1) / 2]
// and [ceil(numel / block_size)], and a short last block counts as a whole one. Byte i of nf4, fp4, e2m1 and tables
// holds element 2i in its HIGH nibble, as bitsandbytes' files do; of int4 and uint4 in its LOW nibble, as pack_int4
// does. The unused nibble after an odd number of elements is the code of 0.
//
// Scales: float32; or compressed, uint8 codes c of the signed dynamic map with one float32 scale per 256 of them and
// one offset: scale = map[c] * scale_scale[block / 256] + scale_offset ("double quantization", ibid. section 3).
//
// A block with a NaN or an Inf has scale NaN and decodes to NaN throughout. A block of zeros, or of nothing larger than
// 2^-126, has scale 0 (not 1, which would spoil the double quantization of its neighbors) and the code of 0. The bits
// are the same on CPU and CUDA. Errors: c10::ValueError for shapes and values, c10::TypeError for element types.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "quantrain/ops/export.h"

namespace quantrain {

// The optional parts of a packed weight.
struct FourBitExtras {
  std::optional<at::Tensor> zero_point;    // uint4: int32 or float32, shaped as scale
  std::optional<at::Tensor> scale_scale;   // compressed scales: float32 [ceil(number of scales / 256)]
  std::optional<at::Tensor> scale_offset;  // compressed scales: float32 []
  std::optional<at::Tensor> table;         // format "table": float32 [16]
};

struct FourBitCodes {
  at::Tensor codes;
  at::Tensor scale;
};

// scale_rule: "absmax" (nf4, fp4, e2m1, table: max |x|; int4: max |x| / 7), "signed" (int4: the element of largest
// magnitude, with its sign, / -8), or "search" (the factor 0.8, 0.8125, ..., 1.1 of "absmax" with the least squared
// error; any reader of the format decodes it). The code is the nearest: of x * (1 / scale) against the midpoints of
// neighboring values, where a tie takes the smaller value (the smaller magnitude in fp4 and e2m1); of int4 rounding
// half to even. input: float32, float16 or bfloat16, of at least one dimension. block_size: 32, 64,
// ..., 4096, for int4 and a matrix also any even divisor of K. Not differentiable.
QUANTRAIN_API FourBitCodes quantize_4bit(const at::Tensor& input, int64_t block_size = 64,
                                         std::string_view format = "nf4",
                                         const std::optional<at::Tensor>& table = std::nullopt,
                                         std::string_view scale_rule = "absmax");

// uint4: scale = (max - min) / 15 with 0 in the range, zero_point = rint(-min / scale). Codes, scale, zero_point.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_4bit_affine(const at::Tensor& input,
                                                                                  int64_t block_size = 64);

// The float tensor of shape `size` that codes and scales stand for, as element type dtype (float32, float16, bfloat16),
// rounded once from float32.
QUANTRAIN_API at::Tensor dequantize_4bit(const at::Tensor& codes, const at::Tensor& scale, at::IntArrayRef size,
                                         std::string_view format = "nf4", const FourBitExtras& extras = {},
                                         at::ScalarType dtype = at::kFloat);

// Double quantization: codes (uint8, shaped as scale), scale_scale and scale_offset. Code 127 stands for 0.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor, at::Tensor> compress_scale(const at::Tensor& scale);
QUANTRAIN_API at::Tensor decompress_scale(const at::Tensor& codes, const at::Tensor& scale_scale,
                                          const at::Tensor& scale_offset);

// y = x W^T + bias, W [N, K] the decoded weight. input [..., K] in float32, float16 or bfloat16, y of its type. A flat
// weight has out_features rows, by default numel / K (which needs saying where K is 1 and N odd). Under autocast the
// input is cast. Differentiable in input and bias, once and again: grad_input = grad_output W, by the packed weight,
// which is all that is saved. method: "fused" (decoded inside the product; on CUDA float16 or bfloat16 input of at most
// 32 rows, K and blocks of whole 64 elements, no float zero point, else ValueError), "dequantize" (decoded first, then
// the float product), or "auto", the faster of the two. Sums are float32 and of a fixed order. "int8" computes
// something else (W4A8): input is rounded to 8 bits per row, the weight's rows to 8 bits from their 4, and int8_mm
// multiplies; its gradient is that of the unrounded product.
QUANTRAIN_API at::Tensor linear_4bit(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                     const std::optional<at::Tensor>& bias = std::nullopt,
                                     std::string_view format = "nf4", const FourBitExtras& extras = {},
                                     std::string_view method = "auto",
                                     std::optional<int64_t> out_features = std::nullopt);

// QLoRA (arXiv:2305.14314, eq. 5): y = x W^T + scaling D(x) A^T B^T + bias, where D is dropout by `dropout`, in one
// node. lora_a [r, K], lora_b [N, r], of any float type. Differentiable once, in
// input, lora_a, lora_b and bias; saved are input, D(x) A^T [M, r] and the packed weight, and D's mask is computed
// again from its random numbers (Philox by element; of the device's default generator where none is given).
QUANTRAIN_API at::Tensor linear_4bit_lora(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                          const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                                          double dropout = 0.0, const std::optional<at::Tensor>& bias = std::nullopt,
                                          std::string_view format = "nf4", const FourBitExtras& extras = {},
                                          std::string_view method = "auto",
                                          std::optional<int64_t> out_features = std::nullopt,
                                          const std::optional<at::Generator>& generator = std::nullopt);

}  // namespace quantrain

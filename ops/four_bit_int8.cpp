#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

#include "csrc/cpu/four_bit.h"
#include "ops/common/launch.h"
#include "ops/four_bit_linear.h"
#include "quantrain/ops/four_bit.h"
#include "quantrain/ops/int8.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/four_bit.h"
#endif

// A packed weight in an integer product. Its rows get int8 codes anew at each call: a pass that reads half a byte and
// writes one for each element, beside a product that takes half of the time of one in 16 bits.

namespace quantrain {
namespace {

// What an int8 code of a row counts, [N]: of the largest magnitude that the row may have a 127th. Of int4 a 15th of the
// row's largest scale: where the others are whole 15ths of it (two levels of scales, PtqSpec), each code times its
// group's multiple is an int8 code, and nothing is rounded again.
at::Tensor row_scale(const PackedWeight& w) {
  const at::Tensor scale = (w.scale_scale ? decompress_scale(w.scale, *w.scale_scale, *w.scale_offset) : w.scale).abs();
  if (w.format == "int4") return at::amax(scale, {1}) / 15;
  if (w.format == "table") return at::amax(scale, {1}) * w.table->abs().max() / 127;
  if (w.format != "uint4") return at::amax(scale, {1}) / 127;
  const at::Tensor zero_point = w.zero_point->to(at::kFloat);
  return at::amax(scale * at::maximum(zero_point, 15 - zero_point), {1}) / 127;
}

Int8Codes int8_rows(const PackedWeight& given, int64_t rows, int64_t k) {
  const int64_t block = packed_block("linear_4bit", given, rows * k, k);
  PackedWeight w = given;
  if (given.flat() || k % block != 0 || block % 8 != 0 || k % 8 != 0) {
    return int8_quantize_rows(
        dequantize_4bit(w.codes, w.scale, {rows, k}, w.format, {w.zero_point, w.scale_scale, w.scale_offset, w.table}));
  }
  // The CUDA kernel reads 4 bytes at a time.
  w.codes = w.codes.contiguous();
  if (reinterpret_cast<uintptr_t>(w.codes.const_data_ptr()) % 4 != 0) w.codes = w.codes.clone();
  const at::Tensor unit = row_scale(w), scale = at::where(unit == 0, at::ones_like(unit), unit);
  const at::Tensor codes = at::empty({rows, k}, w.codes.options().dtype(at::kChar));
  const FourBitFormat format = parse_four_bit_format("linear_4bit", w.format, w.table);
  const PackedPointers packed(w, format);
  const FourBitToInt8Args args{packed.codes,
                               packed.scales,
                               format,
                               packed.table,
                               block,
                               scale.const_data_ptr<float>(),
                               codes.mutable_data_ptr<int8_t>(),
                               rows,
                               k};
  run_tasks(args, rows, grain_of(k), codes, QUANTRAIN_KERNELS(four_bit_to_int8));
  return {codes, scale.view({-1, 1})};
}

}  // namespace

at::Tensor linear_4bit_int8(const at::Tensor& input, const PackedWeight& weight, const std::optional<at::Tensor>& bias,
                            int64_t rows) {
  const Int8Codes w = int8_rows(weight, rows, input.size(-1));
  const Int8Codes x = int8_quantize_rows(input);
  return int8_mm(x.codes, w.codes, x.scale, w.scale, bias, input.scalar_type());
}

}  // namespace quantrain

#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "csrc/cpu/fake_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"
#include "ops/fake_quant_check.h"
#include "quantrain/ops/fake_quant.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#endif

// Stored codes: quantize, dequantize, and two 4-bit codes per byte.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

bool holds_codes(at::ScalarType type) {
  return type == at::kChar || type == at::kByte || type == at::kShort || type == at::kInt;
}

void check_code_type(std::string_view op, std::string_view name, at::ScalarType type) {
  QUANTRAIN_CHECK_TYPE(holds_codes(type), "{}: expected {} int8, uint8, int16 or int32, got {}", op, name,
                       c10::toString(type));
}

void check_quantize(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                    int64_t quant_min, int64_t quant_max, at::ScalarType dtype) {
  check_range("quantize", quant_min, quant_max);
  check_input("quantize", input);
  check_qparams("quantize", input, scale, zero_point);
  check_code_type("quantize", "dtype", dtype);
  const int64_t low = dtype == at::kChar ? -128 : dtype == at::kByte ? 0 : -32768;
  const int64_t high = dtype == at::kChar ? 127 : dtype == at::kByte ? 255 : dtype == at::kShort ? 32767 : 65535;
  QUANTRAIN_CHECK_VALUE(quant_min >= low && quant_max <= high,
                        "quantize: expected codes that fit {} [{}, {}], got [{}, {}]", c10::toString(dtype), low, high,
                        quant_min, quant_max);
}

void check_dequantize(const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& zero_point,
                      at::ScalarType dtype) {
  check_code_type("dequantize", "input of", codes.scalar_type());
  check_qparams("dequantize", codes, scale, zero_point);
  QUANTRAIN_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble,
                       "dequantize: expected dtype float32, float16, bfloat16 or float64, got {}",
                       c10::toString(dtype));
}

at::Tensor quantize_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                         int64_t quant_min, int64_t quant_max, at::ScalarType dtype, bool, const OptionalGenerator&) {
  check_quantize(input, scale, zero_point, quant_min, quant_max, dtype);
  return at::empty_like(input, input.options().dtype(dtype));
}

at::Tensor quantize_nearest_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                 int64_t quant_min, int64_t quant_max, c10::string_view dtype) {
  return quantize_meta(input, scale, zero_point, quant_min, quant_max, detail::named_type("quantize", "dtype", dtype),
                       false, std::nullopt);
}

at::Tensor quantize_seeded_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                int64_t quant_min, int64_t quant_max, at::ScalarType dtype, int64_t, int64_t) {
  check_quantize(input, scale, zero_point, quant_min, quant_max, dtype);
  return at::empty_like(input, input.options().dtype(dtype));
}

at::Tensor dequantize_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                           at::ScalarType dtype) {
  check_dequantize(input, scale, zero_point, dtype);
  return at::empty_like(input, input.options().dtype(dtype));
}

at::Tensor dequantize_typed_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                 c10::string_view dtype) {
  return dequantize_meta(input, scale, zero_point, detail::named_type("dequantize", "dtype", dtype));
}

at::Tensor pack_int4_meta(const at::Tensor& input) {
  QUANTRAIN_CHECK_TYPE(input.scalar_type() == at::kChar || input.scalar_type() == at::kByte,
                       "pack_int4: expected input of int8 or uint8, got {}", c10::toString(input.scalar_type()));
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "pack_int4: expected input with at least one dimension, got {}", input.dim());
  auto sizes = input.sym_sizes().vec();
  sizes.back() = (sizes.back() + 1) / 2;
  return at::empty_symint(sizes, input.options().dtype(at::kByte));
}

at::Tensor unpack_int4_meta(const at::Tensor& input, c10::SymInt size, bool is_signed) {
  QUANTRAIN_CHECK_TYPE(input.scalar_type() == at::kByte, "unpack_int4: expected input of uint8, got {}",
                       c10::toString(input.scalar_type()));
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "unpack_int4: expected input with at least one dimension, got {}",
                        input.dim());
  auto sizes = input.sym_sizes().vec();
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(size.sym_ge(0)) && (size + 1) / 2 == sizes.back(),
                        "unpack_int4: expected size to be twice the {} packed bytes, or one less, got {}",
                        c10::str(sizes.back()), c10::str(size));
  sizes.back() = size;
  return at::empty_symint(sizes, input.options().dtype(is_signed ? at::kChar : at::kByte));
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

at::Tensor quantize_with_state(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                               int64_t quant_min, int64_t quant_max, at::ScalarType dtype, bool stochastic,
                               const PhiloxState& philox) {
  if (scale.is_cpu()) check_qparam_values("quantize", scale, zero_point, quant_min, quant_max);
  if (input.scalar_type() == at::kDouble)
    return quantize_with_state(input.to(at::kFloat), scale, zero_point, quant_min, quant_max, dtype, stochastic,
                               philox);
  const Arranged arranged = arrange("quantize", input, scale, zero_point);
  at::Tensor codes = at::empty_like(arranged.input, arranged.input.options().dtype(dtype));
  if (input.numel() == 0) return codes;
  const QuantizeArgs args{arranged.input.const_data_ptr(),
                          codes.mutable_data_ptr(),
                          dtype_of(input),
                          dtype_of(codes),
                          arranged.grouping,
                          arranged.qparams(),
                          make_range(quant_min, quant_max),
                          stochastic,
                          philox};
  run_elementwise(args, codes, QUANTRAIN_KERNELS(quantize));
  return codes;
}

at::Tensor quantize_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                           int64_t quant_min, int64_t quant_max, at::ScalarType dtype, bool stochastic,
                           const OptionalGenerator& generator) {
  check_quantize(input, scale, zero_point, quant_min, quant_max, dtype);
  const PhiloxState philox = stochastic ? next_philox_state("quantize", generator, input.device()) : PhiloxState{};
  return quantize_with_state(input, scale, zero_point, quant_min, quant_max, dtype, stochastic, philox);
}

at::Tensor quantize_nearest_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                   int64_t quant_min, int64_t quant_max, c10::string_view dtype) {
  return quantize_kernel(input, scale, zero_point, quant_min, quant_max, detail::named_type("quantize", "dtype", dtype),
                         false, std::nullopt);
}

at::Tensor quantize_seeded_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                  int64_t quant_min, int64_t quant_max, at::ScalarType dtype, int64_t seed,
                                  int64_t offset) {
  check_quantize(input, scale, zero_point, quant_min, quant_max, dtype);
  return quantize_with_state(input, scale, zero_point, quant_min, quant_max, dtype, true,
                             seeded_philox_state(seed, offset));
}

at::Tensor dequantize_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                             at::ScalarType dtype) {
  check_dequantize(input, scale, zero_point, dtype);
  if (dtype == at::kDouble) return dequantize_kernel(input, scale, zero_point, at::kFloat).to(at::kDouble);
  const Arranged arranged = arrange("dequantize", input, scale, zero_point);
  at::Tensor values = at::empty_like(arranged.input, arranged.input.options().dtype(dtype));
  if (input.numel() == 0) return values;
  const DequantizeArgs args{arranged.input.const_data_ptr(),
                            values.mutable_data_ptr(),
                            dtype_of(input),
                            dtype_of(values),
                            arranged.grouping,
                            arranged.qparams()};
  run_elementwise(args, values, QUANTRAIN_KERNELS(dequantize));
  return values;
}

at::Tensor dequantize_typed_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                   c10::string_view dtype) {
  return dequantize_kernel(input, scale, zero_point, detail::named_type("dequantize", "dtype", dtype));
}

// Packing happens once, when a model is converted: composed from PyTorch's operators, the same on every device.
at::Tensor pack_int4_kernel(const at::Tensor& input) {
  pack_int4_meta(input);
  if (input.is_cpu() && input.numel() > 0) {
    const int64_t low = input.min().item<int64_t>(), high = input.max().item<int64_t>();
    const int64_t least = input.scalar_type() == at::kChar ? -8 : 0, most = input.scalar_type() == at::kChar ? 7 : 15;
    QUANTRAIN_CHECK_VALUE(low >= least && high <= most, "pack_int4: expected codes in [{}, {}], got [{}, {}]", least,
                          most, low, high);
  }
  const at::Tensor nibbles = input.view(at::kByte).bitwise_and(15);
  const at::Tensor even = at::constant_pad_nd(nibbles, {0, input.size(-1) % 2}, 0);
  const at::Tensor pairs = even.reshape([&] {
    auto sizes = even.sizes().vec();
    sizes.back() /= 2;
    sizes.push_back(2);
    return sizes;
  }());
  return at::bitwise_or(pairs.select(-1, 0), at::bitwise_left_shift(pairs.select(-1, 1), 4)).contiguous();
}

at::Tensor unpack_int4_kernel(const at::Tensor& input, c10::SymInt size, bool is_signed) {
  unpack_int4_meta(input, size, is_signed);
  const at::Tensor nibbles = at::stack({at::bitwise_and(input, 15), at::bitwise_right_shift(input, 4)}, -1)
                                 .flatten(-2)
                                 .narrow_symint(-1, 0, size);
  if (!is_signed) return nibbles.contiguous();
  return nibbles.to(at::kChar).bitwise_xor(8).sub_(8);  // sign extension of 4 bits
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                    int64_t quant_min, int64_t quant_max, at::ScalarType dtype, bool stochastic,
                    const std::optional<at::Generator>& generator) {
  static const auto op = find_operator<decltype(quantize_kernel)>("quantize");
  return op.call(input, scale, zero_point, quant_min, quant_max, dtype, stochastic, generator);
}

at::Tensor quantize_seeded(const at::Tensor& input, const at::Tensor& scale,
                           const std::optional<at::Tensor>& zero_point, int64_t quant_min, int64_t quant_max,
                           at::ScalarType dtype, int64_t seed, int64_t offset) {
  static const auto op = find_operator<decltype(quantize_seeded_kernel)>("quantize", "seeded");
  return op.call(input, scale, zero_point, quant_min, quant_max, dtype, seed, offset);
}

at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                      at::ScalarType dtype) {
  static const auto op = find_operator<decltype(dequantize_kernel)>("dequantize");
  return op.call(input, scale, zero_point, dtype);
}

at::Tensor pack_int4(const at::Tensor& input) {
  static const auto op = find_operator<decltype(pack_int4_kernel)>("pack_int4");
  return op.call(input);
}

at::Tensor unpack_int4(const at::Tensor& input, int64_t size, bool is_signed) {
  static const auto op = find_operator<decltype(unpack_int4_kernel)>("unpack_int4");
  return op.call(input, size, is_signed);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> random{at::Tag::nondeterministic_seeded};
  m.def(
      "quantize(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, int quant_max=127, "
      "ScalarType "
      "dtype=int8, bool stochastic=False, Generator? generator=None) -> Tensor",
      random);
  m.def(
      "quantize.seeded(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, int "
      "quant_max=127, ScalarType "
      "dtype=int8, int seed, int offset) -> Tensor");
  // To nearest: without the tag of random operators, so that a recomputation may repeat it, and with the type by name.
  m.def(
      "quantize.nearest(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, int "
      "quant_max=127, str "
      "dtype=\"int8\") -> Tensor");
  m.def("dequantize(Tensor input, Tensor scale, Tensor? zero_point=None, *, ScalarType dtype=float) -> Tensor");
  m.def("dequantize.typed(Tensor input, Tensor scale, Tensor? zero_point=None, *, str dtype=\"float32\") -> Tensor");
  m.def("pack_int4(Tensor input) -> Tensor");
  m.def("unpack_int4(Tensor input, *, SymInt size, bool signed=True) -> Tensor");
}

#define QUANTRAIN_REGISTER_CODES(kind)                             \
  m.impl("quantize", &quantrain::quantize_##kind);                 \
  m.impl("quantize.seeded", &quantrain::quantize_seeded_##kind);   \
  m.impl("quantize.nearest", &quantrain::quantize_nearest_##kind); \
  m.impl("dequantize", &quantrain::dequantize_##kind);             \
  m.impl("dequantize.typed", &quantrain::dequantize_typed_##kind); \
  m.impl("pack_int4", &quantrain::pack_int4_##kind);               \
  m.impl("unpack_int4", &quantrain::unpack_int4_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_CODES(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_CODES(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_CODES(kernel); }
#endif

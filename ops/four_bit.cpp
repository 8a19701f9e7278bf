#include "quantrain/ops/four_bit.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "csrc/common/dynamic_map.h"
#include "csrc/cpu/four_bit.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/four_bit_check.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/four_bit.h"
#endif

// Codes, scales and back. The product is in ops/four_bit_linear.cpp.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kQuantize = "quantize_4bit";
constexpr std::string_view kAffine = "quantize_4bit_affine";
constexpr std::string_view kDequantize = "dequantize_4bit";
constexpr std::string_view kCompress = "compress_scale";
constexpr std::string_view kDecompress = "decompress_scale";

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

FourBitScaleRule parse_rule(std::string_view rule, FourBitFormat format) {
  if (rule == "absmax") return FourBitScaleRule::kAbsmax;
  if (rule == "search") return FourBitScaleRule::kSearch;
  QUANTRAIN_CHECK_VALUE(rule == "signed", "{}: expected scale_rule to be one of absmax, signed, search, got '{}'",
                        kQuantize, rule);
  QUANTRAIN_CHECK_VALUE(format == FourBitFormat::kInt4,
                        "{}: expected scale_rule 'signed' with format 'int4' only, got it "
                        "with another",
                        kQuantize);
  return FourBitScaleRule::kSigned;
}

void check_input(std::string_view op, const at::Tensor& input, int64_t block_size, bool integers) {
  detail::check_float(op, "input", input.scalar_type());
  detail::check_dense(op, "input", input);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "{}: expected input of at least one dimension, got none", op);
  const bool power = block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0;
  const bool divides = integers && input.dim() >= 2 && block_size >= 2 && block_size % 2 == 0 &&
                       TORCH_GUARD_OR_FALSE((input.sym_size(-1) % block_size).sym_eq(0));
  QUANTRAIN_CHECK_VALUE(power || divides, "{}: expected block_size to be a power of 2 from 32 to 4096{}, got {}", op,
                        integers ? ", or an even divisor of a matrix's last dimension" : "", block_size);
}

// The shapes of codes and scales.
Pair allocate(const at::Tensor& input, int64_t block_size) {
  const c10::SymInt k = input.sym_size(-1);
  const auto codes_options = input.options().dtype(at::kByte), scale_options = input.options().dtype(at::kFloat);
  if (TORCH_GUARD_OR_FALSE((k % block_size).sym_eq(0)) && TORCH_GUARD_OR_FALSE((k % 2).sym_eq(0))) {
    std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
    sizes.back() = k / 2;
    const at::Tensor codes = at::empty_symint(sizes, codes_options);
    sizes.back() = k / block_size;
    return {codes, at::empty_symint(sizes, scale_options)};
  }
  const c10::SymInt numel = input.sym_numel();
  return {at::empty_symint({(numel + 1) / 2}, codes_options),
          at::empty_symint({(numel + (block_size - 1)) / block_size}, scale_options)};
}

Pair quantize_meta(const at::Tensor& input, int64_t block_size, std::string_view format, const OptionalTensor& table,
                   std::string_view scale_rule) {
  const FourBitFormat parsed = parse_four_bit_format(kQuantize, format, table);
  QUANTRAIN_CHECK_VALUE(parsed != FourBitFormat::kUint4,
                        "{}: expected format other than 'uint4', which quantize_4bit_affine gives, got '{}'", kQuantize,
                        format);
  if (table) detail::check_device(kQuantize, "table", *table, input, "input's");
  parse_rule(scale_rule, parsed);
  check_input(kQuantize, input, block_size, parsed == FourBitFormat::kInt4);
  return allocate(input, block_size);
}

Triple affine_meta(const at::Tensor& input, int64_t block_size) {
  check_input(kAffine, input, block_size, /*integers=*/true);
  auto [codes, scale] = allocate(input, block_size);
  const at::Tensor zero_point = at::empty_symint(scale.sym_sizes(), scale.options().dtype(at::kInt));
  return {codes, scale, zero_point};
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& zero_point,
                           const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                           c10::SymIntArrayRef size, std::string_view format, const OptionalTensor& table,
                           std::string_view dtype) {
  const at::ScalarType type = detail::named_type(kDequantize, "dtype", dtype);
  detail::check_float(kDequantize, "dtype", type);
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  check_packed(kDequantize, weight);
  QUANTRAIN_CHECK_VALUE(!size.empty(), "{}: expected a size of at least one dimension, got none", kDequantize);
  c10::SymInt numel = 1;
  for (const c10::SymInt& length : size) {
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(length.sym_ge(0)), "{}: expected sizes of at least 0, got {}",
                          kDequantize, c10::str(size));
    numel *= length;
  }
  check_packed_size(kDequantize, weight, numel, size.back());
  return at::empty_symint(size, codes.options().dtype(type));
}

Triple compress_meta(const at::Tensor& scale) {
  detail::check_type(kCompress, "scale", scale, at::kFloat, "float32");
  detail::check_dense(kCompress, "scale", scale);
  const c10::SymInt blocks = (scale.sym_numel() + (kScaleBlock - 1)) / kScaleBlock;
  return {at::empty_symint(scale.sym_sizes(), scale.options().dtype(at::kByte)),
          at::empty_symint({blocks}, scale.options()), at::empty({}, scale.options())};
}

at::Tensor decompress_meta(const at::Tensor& codes, const at::Tensor& scale_scale, const at::Tensor& scale_offset) {
  detail::check_type(kDecompress, "codes", codes, at::kByte, "uint8");
  detail::check_type(kDecompress, "scale_scale", scale_scale, at::kFloat, "float32");
  detail::check_type(kDecompress, "scale_offset", scale_offset, at::kFloat, "float32");
  detail::check_device(kDecompress, "scale_scale", scale_scale, codes, "codes'");
  detail::check_device(kDecompress, "scale_offset", scale_offset, codes, "codes'");
  const c10::SymInt blocks = (codes.sym_numel() + (kScaleBlock - 1)) / kScaleBlock;
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale_scale.sym_numel().sym_eq(blocks)) &&
                            TORCH_GUARD_OR_TRUE(scale_offset.sym_numel().sym_eq(1)),
                        "{}: expected scale_scale of one element per 256 codes and one scale_offset, got {} and {} for "
                        "codes {}",
                        kDecompress, detail::shape_text(scale_scale), detail::shape_text(scale_offset),
                        detail::shape_text(codes));
  return at::empty_symint(codes.sym_sizes(), scale_scale.options());
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

void quantize(const at::Tensor& input, int64_t block_size, FourBitFormat format, FourBitScaleRule rule,
              const OptionalTensor& table, const at::Tensor& codes, const at::Tensor& scale, int32_t* zero_point) {
  if (input.numel() == 0) return;
  const at::Tensor x = input.contiguous();
  const at::Tensor values = table ? table->contiguous() : at::Tensor();
  const FourBitQuantizeArgs args{x.const_data_ptr(),
                                 dtype_of(x),
                                 x.numel(),
                                 block_size,
                                 format,
                                 rule,
                                 table ? values.const_data_ptr<float>() : nullptr,
                                 codes.mutable_data_ptr<uint8_t>(),
                                 scale.mutable_data_ptr<float>(),
                                 zero_point,
                                 scale.numel()};
  run_tasks(args, args.blocks, grain_of(block_size), x, QUANTRAIN_KERNELS(four_bit_quantize));
}

Pair quantize_kernel(const at::Tensor& input, int64_t block_size, std::string_view format, const OptionalTensor& table,
                     std::string_view scale_rule) {
  const Pair result = quantize_meta(input, block_size, format, table, scale_rule);
  const FourBitFormat parsed = parse_four_bit_format(kQuantize, format, table);
  quantize(input, block_size, parsed, parse_rule(scale_rule, parsed), table, std::get<0>(result), std::get<1>(result),
           nullptr);
  return result;
}

Triple affine_kernel(const at::Tensor& input, int64_t block_size) {
  const Triple result = affine_meta(input, block_size);
  const auto& [codes, scale, zero_point] = result;
  quantize(input, block_size, FourBitFormat::kUint4, FourBitScaleRule::kAbsmax, std::nullopt, codes, scale,
           zero_point.mutable_data_ptr<int32_t>());
  return result;
}

at::Tensor dequantize_kernel(const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& zero_point,
                             const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                             c10::SymIntArrayRef size, std::string_view format, const OptionalTensor& table,
                             std::string_view dtype) {
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  at::Tensor y = dequantize_meta(codes, scale, zero_point, scale_scale, scale_offset, size, format, table, dtype);
  const int64_t block = packed_block(kDequantize, weight, y.numel(), y.size(-1));
  if (y.numel() == 0) return y;
  const FourBitFormat parsed = parse_four_bit_format(kDequantize, format, table);
  const PackedPointers packed(weight, parsed);
  const FourBitDequantizeArgs args{packed.codes, packed.scales,        parsed,     packed.table, block,
                                   y.numel(),    y.mutable_data_ptr(), dtype_of(y)};
  run_tasks(args, (y.numel() + block - 1) / block, grain_of(block), y, QUANTRAIN_KERNELS(four_bit_dequantize));
  return y;
}

at::Tensor signed_map(const at::Tensor& like) {
  static const at::Tensor map = [] {
    at::Tensor values = at::empty({kDynamicCodes}, at::TensorOptions().dtype(at::kFloat));
    std::copy(std::begin(kSignedMap.value), std::end(kSignedMap.value), values.mutable_data_ptr<float>());
    return values;
  }();
  if (like.is_cpu()) return map;
  // Pinned and never freed, so that a captured graph may copy it at each replay.
  static const auto* pinned = new at::Tensor(map.pin_memory());
  return pinned->to(like.device(), /*non_blocking=*/true);
}

// The sum in float64 by halves, each an addition of two vectors: the same bits wherever it is computed.
at::Tensor halved_sum(at::Tensor x) {
  while (x.numel() > 1) {
    if (x.numel() % 2 != 0) x = at::constant_pad_nd(x, {0, 1}, 0);
    const int64_t half = x.numel() / 2;
    x = x.slice(0, 0, half) + x.slice(0, half, 2 * half);
  }
  return x.reshape({});
}

Triple compress_kernel(const at::Tensor& scale) {
  Triple result = compress_meta(scale);
  auto& [codes, scale_scale, offset] = result;
  const int64_t n = scale.numel();
  if (n == 0) {
    offset.zero_();
    return result;
  }
  const at::Tensor flat = scale.reshape({-1});
  offset.copy_(halved_sum(flat.to(at::kDouble)) / static_cast<double>(n));
  const int64_t blocks = scale_scale.numel();
  const at::Tensor centered = at::constant_pad_nd(flat - offset, {0, blocks * kScaleBlock - n}, 0);
  const at::Tensor rows = centered.reshape({blocks, kScaleBlock});
  scale_scale.copy_(rows.abs().amax(1));
  // What is not a number divides by nothing else: a block of equal scales has the code of 0.
  scale_scale.masked_fill_(scale_scale < std::numeric_limits<float>::min(), 0.0);  // whose reciprocal would be Inf
  const at::Tensor inverse = at::where(scale_scale == 0, at::zeros({}, scale.options()), scale_scale.reciprocal());
  const at::Tensor map = signed_map(scale);
  const at::Tensor middle = (map.slice(0, 0, 255) + map.slice(0, 1, 256)) * 0.5;
  const at::Tensor nearest = at::bucketize(rows * inverse.unsqueeze(1), middle).reshape({-1}).slice(0, 0, n);
  codes.copy_(nearest.clamp_max(255).reshape(scale.sizes()));
  return result;
}

at::Tensor decompress_kernel(const at::Tensor& codes, const at::Tensor& scale_scale, const at::Tensor& scale_offset) {
  const at::Tensor result = decompress_meta(codes, scale_scale, scale_offset);
  const int64_t n = codes.numel(), blocks = scale_scale.numel();
  if (n == 0) return result;
  const at::Tensor values = signed_map(codes).index_select(0, codes.reshape({-1}).to(at::kLong));
  const at::Tensor padded =
      at::constant_pad_nd(values, {0, blocks * kScaleBlock - n}, 0).reshape({blocks, kScaleBlock});
  const at::Tensor scaled = (padded * scale_scale.reshape({-1, 1})).reshape({-1}).slice(0, 0, n);
  result.copy_((scaled + scale_offset.reshape({})).reshape(codes.sizes()));
  return result;
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

FourBitCodes quantize_4bit(const at::Tensor& input, int64_t block_size, std::string_view format,
                           const OptionalTensor& table, std::string_view scale_rule) {
  static const auto op = find_operator<decltype(quantize_kernel)>(kQuantize);
  auto [codes, scale] = op.call(input, block_size, format, table, scale_rule);
  return {std::move(codes), std::move(scale)};
}

Triple quantize_4bit_affine(const at::Tensor& input, int64_t block_size) {
  static const auto op = find_operator<decltype(affine_kernel)>(kAffine);
  return op.call(input, block_size);
}

at::Tensor dequantize_4bit(const at::Tensor& codes, const at::Tensor& scale, at::IntArrayRef size,
                           std::string_view format, const FourBitExtras& extras, at::ScalarType dtype) {
  static const auto op = find_operator<decltype(dequantize_kernel)>(kDequantize);
  const std::string_view name = dtype == at::kFloat ? "float32" : dtype == at::kHalf ? "float16" : "bfloat16";
  detail::check_float(kDequantize, "dtype", dtype);
  return op.call(codes, scale, extras.zero_point, extras.scale_scale, extras.scale_offset,
                 c10::fromIntArrayRefSlow(size), format, extras.table, name);
}

Triple compress_scale(const at::Tensor& scale) {
  static const auto op = find_operator<decltype(compress_kernel)>(kCompress);
  return op.call(scale);
}

at::Tensor decompress_scale(const at::Tensor& codes, const at::Tensor& scale_scale, const at::Tensor& scale_offset) {
  static const auto op = find_operator<decltype(decompress_kernel)>(kDecompress);
  return op.call(codes, scale_scale, scale_offset);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "quantize_4bit(Tensor input, *, int block_size=64, str format=\"nf4\", Tensor? table=None, str "
      "scale_rule=\"absmax\") -> (Tensor codes, Tensor scale)",
      fixed);
  m.def("quantize_4bit_affine(Tensor input, *, int block_size=64) -> (Tensor codes, Tensor scale, Tensor zero_point)",
        fixed);
  m.def(
      "dequantize_4bit(Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? scale_scale=None, Tensor? "
      "scale_offset=None, *, SymInt[] size, str format=\"nf4\", Tensor? table=None, str dtype=\"float32\") -> Tensor",
      fixed);
  m.def("compress_scale(Tensor scale) -> (Tensor codes, Tensor scale_scale, Tensor scale_offset)", fixed);
  m.def("decompress_scale(Tensor codes, Tensor scale_scale, Tensor scale_offset) -> Tensor", fixed);
}

#define QUANTRAIN_REGISTER_FOUR_BIT(kind)                    \
  m.impl("quantize_4bit", &quantrain::quantize_##kind);      \
  m.impl("quantize_4bit_affine", &quantrain::affine_##kind); \
  m.impl("dequantize_4bit", &quantrain::dequantize_##kind);  \
  m.impl("compress_scale", &quantrain::compress_##kind);     \
  m.impl("decompress_scale", &quantrain::decompress_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_FOUR_BIT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_FOUR_BIT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_FOUR_BIT(kernel); }
#endif

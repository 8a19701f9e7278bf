// An input that a node keeps as codes for the products of its backward pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <c10/util/accumulate.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "ops/common/dispatch.h"

namespace quantrain {

// The element type's name, of the three that these nodes compute in.
inline std::string_view name_of(at::ScalarType type) {
  return type == at::kFloat ? "float32" : type == at::kHalf ? "float16" : "bfloat16";
}

// (codes - zero_point) scale in `type`; zero_point may be undefined. Where only a gradient that needs no values is
// asked for, nothing is decoded: the result has the sizes alone.
inline at::Tensor decoded(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& zero_point,
                          at::ScalarType type, bool needs_values) {
  using OptionalTensor = std::optional<at::Tensor>;
  static const auto dequantize =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::string_view)>(
          "dequantize", "typed");
  if (!needs_values) return at::empty_like(codes, codes.options().dtype(type));
  return dequantize.call(codes, scale, zero_point.defined() ? OptionalTensor(zero_point) : std::nullopt, name_of(type));
}

// ---- codes of at most 4 bits, two in a byte -------------------------------------------------------------------------

// What unpacked has to know: sizes, then strides, then whether codes are signed; empty where they are kept as they are.
inline std::vector<int64_t> packing_of(const at::Tensor& codes, bool packs) {
  std::vector<int64_t> packing;
  if (!packs || !codes.defined() || !codes.is_non_overlapping_and_dense()) return packing;
  packing.assign(codes.sizes().begin(), codes.sizes().end());
  packing.insert(packing.end(), codes.strides().begin(), codes.strides().end());
  packing.push_back(codes.scalar_type() == at::kChar);
  return packing;
}

// Dense codes in the order of their memory.
inline at::Tensor packed(const at::Tensor& codes, bool packs) {
  static const auto op = find_operator<at::Tensor(const at::Tensor&)>("pack_int4");
  return packing_of(codes, packs).empty() ? codes : op.call(codes.as_strided({codes.numel()}, {1}));
}

inline at::Tensor unpacked(const at::Tensor& kept, const c10::IValue& packing_value) {
  static const auto op = find_operator<at::Tensor(const at::Tensor&, c10::SymInt, bool)>("unpack_int4");
  const std::vector<int64_t> packing = packing_value.toIntVector();
  if (packing.empty()) return kept;
  const size_t rank = packing.size() / 2;
  const at::IntArrayRef sizes(packing.data(), rank), strides(packing.data() + rank, rank);
  return op.call(kept, c10::multiply_integers(sizes), packing.back() != 0).as_strided(sizes, strides);
}

}  // namespace quantrain

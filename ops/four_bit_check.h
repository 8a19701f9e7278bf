// A packed weight's arguments: read once, checked once, for every operator that takes one. Private to the library.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "csrc/common/four_bit.h"
#include "ops/common/matrix.h"

namespace quantrain {

// As the schemas list them.
struct PackedWeight {
  at::Tensor codes, scale;
  std::optional<at::Tensor> zero_point, scale_scale, scale_offset;
  std::string_view format;
  std::optional<at::Tensor> table;

  bool flat() const { return codes.dim() == 1 && scale.dim() == 1; }
};

FourBitFormat parse_four_bit_format(std::string_view op, std::string_view format,
                                    const std::optional<at::Tensor>& table);

// Types, devices and dimensions; works on symbolic sizes.
void check_packed(std::string_view op, const PackedWeight& weight);

// Rows of a weight whose rows have k elements. given: where the caller says so, else by the number of codes.
c10::SymInt packed_rows(std::string_view op, const PackedWeight& weight, const c10::SymInt& k,
                        const std::optional<c10::SymInt>& given);

// How many elements share a scale, of a weight of numel elements in rows of k. ValueError where codes and scales do not
// fit that size.
int64_t packed_block(std::string_view op, const PackedWeight& weight, int64_t numel, int64_t k);

// The same as a check, where the sizes are numbers and not symbols.
void check_packed_size(std::string_view op, const PackedWeight& weight, const c10::SymInt& numel, const c10::SymInt& k);

// Contiguous tensors and the pointers that kernels take; it keeps the tensors alive.
struct PackedPointers {
  PackedPointers(const PackedWeight& weight, FourBitFormat format);

  const uint8_t* codes;
  FourBitScales scales;
  const float* table;

 private:
  std::vector<at::Tensor> kept_;
};

}  // namespace quantrain

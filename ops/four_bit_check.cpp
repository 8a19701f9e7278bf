#include "ops/four_bit_check.h"

#include <algorithm>
#include <cmath>

#include "ops/common/check.h"
#include "ops/common/layout.h"

namespace quantrain {
namespace {

constexpr int64_t kLeastBlock = 32, kMostBlock = 4096;

void check_float_like(std::string_view op, std::string_view name, const std::optional<at::Tensor>& tensor,
                      const at::Tensor& codes) {
  if (!tensor) return;
  detail::check_type(op, name, *tensor, at::kFloat, "float32");
  detail::check_device(op, name, *tensor, codes, "codes'");
}

// Elements to a scale of a flat weight. Where there are two blocks or more only one power of two gives that many; one
// block holds everything.
int64_t flat_block(int64_t numel, int64_t blocks) {
  if (blocks == 1) return std::max<int64_t>(numel + numel % 2, kLeastBlock);
  for (int64_t block = kLeastBlock; block <= kMostBlock; block *= 2)
    if ((numel + block - 1) / block == blocks) return block;
  return 0;
}

}  // namespace

FourBitFormat parse_four_bit_format(std::string_view op, std::string_view format,
                                    const std::optional<at::Tensor>& table) {
  const bool is_table = format == "table";
  QUANTRAIN_CHECK_VALUE(is_table == table.has_value(),
                        "{}: expected a table with format 'table' and with no other, got {}", op,
                        table ? fmt::format("one with format '{}'", format) : std::string("none"));
  if (table) {
    detail::check_type(op, "table", *table, at::kFloat, "float32");
    QUANTRAIN_CHECK_VALUE(table->dim() == 1 && TORCH_GUARD_OR_TRUE(table->sym_size(0).sym_eq(kFourBitCodes)),
                          "{}: expected a table of 16 values, got {}", op, detail::shape_text(*table));
    return FourBitFormat::kTable;
  }
  if (format == "nf4") return FourBitFormat::kNf4;
  if (format == "fp4") return FourBitFormat::kFp4;
  if (format == "e2m1") return FourBitFormat::kE2m1;
  if (format == "int4") return FourBitFormat::kInt4;
  QUANTRAIN_CHECK_VALUE(format == "uint4",
                        "{}: expected format to be one of nf4, fp4, e2m1, int4, uint4, table, got '{}'", op, format);
  return FourBitFormat::kUint4;
}

void check_packed(std::string_view op, const PackedWeight& w) {
  const FourBitFormat format = parse_four_bit_format(op, w.format, w.table);
  if (w.table) detail::check_device(op, "table", *w.table, w.codes, "codes'");
  detail::check_type(op, "codes", w.codes, at::kByte, "uint8");
  detail::check_dense(op, "codes", w.codes);
  detail::check_device(op, "scale", w.scale, w.codes, "codes'");
  QUANTRAIN_CHECK_VALUE(w.codes.dim() >= 1 && w.codes.dim() == w.scale.dim(),
                        "{}: expected codes and scale of as many dimensions, got {} and {}", op,
                        detail::shape_text(w.codes), detail::shape_text(w.scale));
  const bool compressed = w.scale.scalar_type() == at::kByte;
  QUANTRAIN_CHECK_TYPE(compressed || w.scale.scalar_type() == at::kFloat,
                       "{}: expected scale of float32, or uint8 where it is compressed, got {}", op,
                       c10::toString(w.scale.scalar_type()));
  QUANTRAIN_CHECK_VALUE(compressed == w.scale_scale.has_value() && compressed == w.scale_offset.has_value(),
                        "{}: expected scale_scale and scale_offset with a compressed (uint8) scale and with no other, "
                        "got scale of {}, {} scale_scale, {} scale_offset",
                        op, c10::toString(w.scale.scalar_type()), w.scale_scale ? "a" : "no",
                        w.scale_offset ? "a" : "no");
  check_float_like(op, "scale_scale", w.scale_scale, w.codes);
  check_float_like(op, "scale_offset", w.scale_offset, w.codes);
  if (compressed) {
    QUANTRAIN_CHECK_VALUE(
        TORCH_GUARD_OR_TRUE(w.scale_scale->sym_numel().sym_eq((w.scale.sym_numel() + (kScaleBlock - 1)) / kScaleBlock)),
        "{}: expected scale_scale of one element per 256 scales, got {} for scale {}", op,
        detail::shape_text(*w.scale_scale), detail::shape_text(w.scale));
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(w.scale_offset->sym_numel().sym_eq(1)),
                          "{}: expected scale_offset of one element, got {}", op, detail::shape_text(*w.scale_offset));
  }
  QUANTRAIN_CHECK_VALUE((format == FourBitFormat::kUint4) == w.zero_point.has_value(),
                        "{}: expected a zero_point with format 'uint4' and with no other, got {} with format '{}'", op,
                        w.zero_point ? "one" : "none", w.format);
  if (!w.zero_point) return;
  QUANTRAIN_CHECK_TYPE(holds_integers(*w.zero_point) || w.zero_point->scalar_type() == at::kFloat,
                       "{}: expected zero_point of an integer type or float32, got {}", op,
                       c10::toString(w.zero_point->scalar_type()));
  detail::check_device(op, "zero_point", *w.zero_point, w.codes, "codes'");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(w.zero_point->sym_numel().sym_eq(w.scale.sym_numel())),
                        "{}: expected zero_point of scale's shape, got {} and {}", op,
                        detail::shape_text(*w.zero_point), detail::shape_text(w.scale));
}

c10::SymInt packed_rows(std::string_view op, const PackedWeight& w, const c10::SymInt& k,
                        const std::optional<c10::SymInt>& given) {
  c10::SymInt rows;
  if (!w.flat()) {
    QUANTRAIN_CHECK_VALUE(w.codes.dim() == 2 && TORCH_GUARD_OR_TRUE((w.codes.sym_size(1) * 2).sym_eq(k)),
                          "{}: expected codes [N, K / 2] for rows of {} elements, got {}", op, c10::str(k),
                          detail::shape_text(w.codes));
    rows = w.codes.sym_size(0);
  } else {
    // An odd number of elements leaves a nibble over, which makes another row only where rows have one element.
    rows = given ? *given : w.codes.sym_numel() * 2 / k;
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(((rows * k + 1) / 2).sym_eq(w.codes.sym_numel())),
                          "{}: expected codes of whole rows of {} elements, got {}", op, c10::str(k),
                          detail::shape_text(w.codes));
  }
  QUANTRAIN_CHECK_VALUE(!given || TORCH_GUARD_OR_TRUE(given->sym_eq(rows)),
                        "{}: expected out_features of {}, the rows of the weight, got {}", op, c10::str(rows),
                        given ? c10::str(*given) : "");
  return rows;
}

int64_t packed_block(std::string_view op, const PackedWeight& w, int64_t numel, int64_t k) {
  const int64_t blocks = w.scale.numel();
  QUANTRAIN_CHECK_VALUE(w.codes.numel() == (numel + 1) / 2, "{}: expected {} bytes of codes for {} elements, got {}",
                        op, (numel + 1) / 2, numel, detail::shape_text(w.codes));
  if (numel == 0) return kLeastBlock;
  int64_t block = 0;
  if (w.flat()) {
    block = blocks > 0 ? flat_block(numel, blocks) : 0;
  } else if (const int64_t per_row = w.scale.size(-1);
             per_row > 0 && k % per_row == 0 && blocks == numel / k * per_row) {
    block = k / per_row;
  }
  QUANTRAIN_CHECK_VALUE(block > 0 && block % 2 == 0,
                        "{}: expected a scale for each block of {} elements in rows of {}, blocks of an even size, got "
                        "scale {}",
                        op, numel, k, detail::shape_text(w.scale));
  return block;
}

void check_packed_size(std::string_view op, const PackedWeight& w, const c10::SymInt& numel, const c10::SymInt& k) {
  const auto n = numel.maybe_as_int(), columns = k.maybe_as_int();
  if (n && columns && w.codes.sym_numel().maybe_as_int() && w.scale.sym_numel().maybe_as_int() && *columns > 0)
    packed_block(op, w, *n, *columns);
}

PackedPointers::PackedPointers(const PackedWeight& w, FourBitFormat format) {
  const auto keep = [this](const at::Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); };
  codes = keep(w.codes).const_data_ptr<uint8_t>();
  scales = {};
  if (w.scale_scale) {
    scales.scale_codes = keep(w.scale).const_data_ptr<uint8_t>();
    scales.scale_scale = keep(*w.scale_scale).const_data_ptr<float>();
    scales.scale_offset = keep(*w.scale_offset).const_data_ptr<float>();
  } else {
    scales.scale = keep(w.scale).const_data_ptr<float>();
  }
  if (format == FourBitFormat::kUint4) {
    if (w.zero_point->scalar_type() == at::kFloat)
      scales.float_zero_point = keep(*w.zero_point).const_data_ptr<float>();
    else
      scales.zero_point = keep(as_int32(*w.zero_point)).const_data_ptr<int32_t>();
  }
  table = w.table ? keep(*w.table).const_data_ptr<float>() : nullptr;
}

}  // namespace quantrain

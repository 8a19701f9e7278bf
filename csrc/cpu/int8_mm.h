// The CPU's int8 matrix product: panels of both operands in the order in which the processor's dot product instruction
// takes them, a register tile of exact int32 sums, and their dequantization while they are in the cache.
#pragma once

#include <cstdint>

#include "csrc/common/int8.h"

namespace quantrain::cpu {

// A word is what one lane of the instruction takes of an operand: four bytes, a (signed) times b + 128 (unsigned), or a
// pair of int16.
enum class Int8Isa {
  kPlain,      // pairs; on x86-64 by SSE2
  kAvx2,       // pairs: vpmaddwd, exact where vpmaddubsw would saturate
  kAvx512,     // pairs
  kAvxVnni,    // four bytes
  kAvx512Vnni  // four bytes
};

Int8Isa best_int8_isa();
bool int8_isa_supported(Int8Isa isa);

// How [m, k] times [n, k] is cut. A panel is [groups][rows or columns of the register tile] of words; beyond m, n and k
// there are zeros.
struct Int8MmPlan {
  Int8Isa isa;
  int64_t a_rows, b_rows;      // of a panel
  int64_t groups;              // words of a row
  int64_t a_panels, b_panels;  // how many
  int64_t tasks;

  int64_t a_words() const { return a_panels * a_rows * groups; }
  int64_t b_words() const { return b_panels * b_rows * groups; }
};

Int8MmPlan plan_int8_mm(const Int8MmArgs& args, Int8Isa isa);

struct Int8MmPacked {
  uint32_t* a;     // [a_panels, groups, a_rows], on a 64-byte boundary
  uint32_t* b;     // [b_panels, groups, b_rows], likewise
  int32_t* start;  // [a_panels * a_rows]: what a row's sums begin with
};

void pack_int8_a(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin,
                 int64_t end);  // a_panels
void pack_int8_b(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin,
                 int64_t end);  // b_panels
void int8_mm(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin,
             int64_t end);  // tasks

// For few rows of a, of which packing b would be most of the time: b is read once, as it lies. Whether this processor
// has it; sums [m, n] of rows [begin, end) of b, exact, for dequantize_sums.
constexpr int64_t kInt8FewRows = 8;
bool has_int8_few_rows();
void int8_few_rows_sums(const Int8MmArgs& args, int32_t* sums, int64_t begin, int64_t end);

// args.d from sums [rows, n] that stand in `sums`; rows.
void dequantize_sums(const Int8MmArgs& args, const int32_t* sums, int64_t begin, int64_t end);

}  // namespace quantrain::cpu

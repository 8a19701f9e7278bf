#include "csrc/cpu/int8_mm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "csrc/cpu/int8_lanes.h"
#include "csrc/cpu/simd.h"

namespace quantrain::cpu {
namespace {

constexpr int64_t kTaskRows = 128;  // rows of a task: its sums, 128 x 48 int32, stay in the second-level cache
constexpr int64_t kBlockGroups =
    128;  // words of a block along k: a panel of b, 128 x 48 words, stays in the first-level cache
constexpr int64_t kMaxColumns = 48;  // of a panel of b

// ---- register tiles -------------------------------------------------------------------------------------------------

// sums[i][j] = (first ? start[i] : sums[i][j]) + the dot product of rows a[.][i] and b[.][j] over `groups` words.
struct TileArgs {
  const uint32_t* a;     // [groups, a_rows]
  const uint32_t* b;     // [groups, b_rows]
  const int32_t* start;  // [a_rows]
  int32_t* sums;         // [a_rows, b_rows]
  int64_t groups;
  bool first;
};

struct TileShape {
  int64_t a_rows, b_rows;
};

// A macro, because intrinsics go only into functions that name their instruction set, and a template cannot take that
// as an argument. rows x vectors registers of sums and one row of b must fit.
#define QUANTRAIN_SUM_TILE(name, isa, Lanes, rows, vectors, dot)                                              \
  constexpr TileShape name##_shape{rows, (vectors) * static_cast<int64_t>(sizeof(Lanes) / sizeof(int32_t))};  \
  isa void name(const TileArgs& t) {                                                                          \
    constexpr int64_t kLanes = sizeof(Lanes) / sizeof(int32_t), kColumns = name##_shape.b_rows;               \
    Lanes sum[rows][vectors];                                                                                 \
    _Pragma("GCC unroll 16") for (int64_t i = 0; i < (rows); ++i)                                             \
        _Pragma("GCC unroll 16") for (int64_t j = 0; j < (vectors); ++j) {                                    \
      if (t.first)                                                                                            \
        sum[i][j] = Lanes{} + t.start[i];                                                                     \
      else                                                                                                    \
        std::memcpy(&sum[i][j], t.sums + i * kColumns + j * kLanes, sizeof(Lanes));                           \
    }                                                                                                         \
    _Pragma("GCC unroll 1") for (int64_t g = 0; g < t.groups; ++g) {                                          \
      Lanes b[vectors];                                                                                       \
      _Pragma("GCC unroll 16") for (int64_t j = 0; j < (vectors); ++j)                                        \
          std::memcpy(&b[j], t.b + g * kColumns + j * kLanes, sizeof(Lanes));                                 \
      _Pragma("GCC unroll 16") for (int64_t i = 0; i < (rows); ++i) {                                         \
        const Lanes a = Lanes{} + static_cast<int32_t>(t.a[g * (rows) + i]);                                  \
        _Pragma("GCC unroll 16") for (int64_t j = 0; j < (vectors); ++j) sum[i][j] = dot(sum[i][j], b[j], a); \
      }                                                                                                       \
    }                                                                                                         \
    _Pragma("GCC unroll 16") for (int64_t i = 0; i < (rows); ++i)                                             \
        _Pragma("GCC unroll 16") for (int64_t j = 0; j < (vectors); ++j)                                      \
            std::memcpy(t.sums + i * kColumns + j * kLanes, &sum[i][j], sizeof(Lanes));                       \
  }

QUANTRAIN_SUM_TILE(plain_tile, , Lanes4, 4, 2, QUANTRAIN_PAIRS4)
#if defined(QUANTRAIN_X86)
QUANTRAIN_SUM_TILE(avx2_tile, __attribute__((target("avx2"))), Lanes8, 4, 3, QUANTRAIN_PAIRS8)
QUANTRAIN_SUM_TILE(avx512_tile, __attribute__((target("avx512f,avx512bw"))), Lanes16, 8, 3, QUANTRAIN_PAIRS16)

// b is the operand that packing made unsigned.
#define QUANTRAIN_DOT(sum, b, a) QUANTRAIN_BYTES8(sum, b, a)
QUANTRAIN_SUM_TILE(avx_vnni_tile, __attribute__((target("avx2,avxvnni"))), Lanes8, 4, 3, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT
#define QUANTRAIN_DOT(sum, b, a) QUANTRAIN_BYTES16(sum, b, a)
QUANTRAIN_SUM_TILE(avx512_vnni_tile, __attribute__((target("avx512f,avx512vnni"))), Lanes16, 8, 3, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT
#endif

// Sums of `rows` rows of a [., k] with `columns` rows of b [., k], which lie as they are: sums[i * n + j].
#if defined(QUANTRAIN_X86)
#define QUANTRAIN_CODES16(codes) _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))
#define QUANTRAIN_FEW_ROWS(name, rows, columns)                                                                        \
  __attribute__((target("avx2"))) void name(const int8_t* a, const int8_t* b, int64_t k, int64_t n, int32_t* sums) {   \
    Lanes8 sum[rows][columns] = {};                                                                                    \
    int64_t c = 0;                                                                                                     \
    _Pragma("GCC unroll 1") for (; c + 16 <= k; c += 16) {                                                             \
      __m256i x[rows];                                                                                                 \
      _Pragma("GCC unroll 4") for (int64_t i = 0; i < (rows); ++i) x[i] = QUANTRAIN_CODES16(a + i * k + c);            \
      _Pragma("GCC unroll 4") for (int64_t j = 0; j < (columns); ++j) {                                                \
        const __m256i y = QUANTRAIN_CODES16(b + j * k + c);                                                            \
        _Pragma("GCC unroll 4") for (int64_t i = 0; i < (rows); ++i) sum[i][j] = QUANTRAIN_PAIRS8(sum[i][j], y, x[i]); \
      }                                                                                                                \
    }                                                                                                                  \
    for (int64_t i = 0; i < (rows); ++i)                                                                               \
      for (int64_t j = 0; j < (columns); ++j) {                                                                        \
        int32_t total = 0;                                                                                             \
        for (int lane = 0; lane < 8; ++lane) total += sum[i][j][lane];                                                 \
        for (int64_t at = c; at < k; ++at) total += int32_t{a[i * k + at]} * b[j * k + at];                            \
        sums[i * n + j] = total;                                                                                       \
      }                                                                                                                \
  }
QUANTRAIN_FEW_ROWS(few_rows_1x1, 1, 1)
QUANTRAIN_FEW_ROWS(few_rows_1x4, 1, 4)
QUANTRAIN_FEW_ROWS(few_rows_2x1, 2, 1)
QUANTRAIN_FEW_ROWS(few_rows_2x4, 2, 4)
#undef QUANTRAIN_CODES16
#endif

using SumTile = void (*)(const TileArgs&);

struct Kernel {
  SumTile tile;
  TileShape shape;
  bool bytes;  // a word is four bytes, else a pair of int16
};

Kernel kernel_of(Int8Isa isa) {
  switch (isa) {
#if defined(QUANTRAIN_X86)
    case Int8Isa::kAvx512Vnni:
      return {avx512_vnni_tile, avx512_vnni_tile_shape, true};
    case Int8Isa::kAvxVnni:
      return {avx_vnni_tile, avx_vnni_tile_shape, true};
    case Int8Isa::kAvx512:
      return {avx512_tile, avx512_tile_shape, false};
    case Int8Isa::kAvx2:
      return {avx2_tile, avx2_tile_shape, false};
#endif
    default:
      return {plain_tile, plain_tile_shape, false};
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------

QUANTRAIN_INLINE uint32_t word_at(const int8_t* row, int64_t group, bool bytes) {
  uint32_t word;
  if (bytes) {
    std::memcpy(&word, row + 4 * group, 4);
    return word;
  }
  const auto low = static_cast<uint16_t>(row[2 * group]), high = static_cast<uint16_t>(row[2 * group + 1]);
  return low | static_cast<uint32_t>(high) << 16;
}

// The last word of a row, where k ends inside it.
QUANTRAIN_INLINE uint32_t last_word(const int8_t* row, int64_t group, int64_t k, bool bytes) {
  int8_t padded[4] = {0, 0, 0, 0};
  const int64_t first = group * (bytes ? 4 : 2);
  for (int64_t i = first; i < k; ++i) padded[i - first] = row[i];
  return word_at(padded, 0, bytes);
}

using Words4 = uint32_t __attribute__((vector_size(16)));

QUANTRAIN_INLINE Words4 words_at(const int8_t* row, int64_t group, bool bytes) {
  Words4 words;
  if (bytes) {
    std::memcpy(&words, row + 4 * group, sizeof(words));
    return words;
  }
  using Bytes8 = int8_t __attribute__((vector_size(8)));
  using Pairs4 = int16_t __attribute__((vector_size(16)));
  Bytes8 codes;
  std::memcpy(&codes, row + 2 * group, sizeof(codes));
  const Pairs4 pairs = __builtin_convertvector(codes, Pairs4);
  std::memcpy(&words, &pairs, sizeof(words));
  return words;
}

// Four words of each of four rows: panel[g * width + i] is word g of row i. Transposed as in int8.cpp, by interleaving
// halves.
QUANTRAIN_INLINE void pack_square(const int8_t* x, int64_t k, int64_t group, bool bytes, uint32_t flip, int64_t width,
                                  uint32_t* panel) {
  Words4 w[4], t[4];
  for (int i = 0; i < 4; ++i) w[i] = words_at(x + i * k, group, bytes) ^ flip;
  for (int stage = 0; stage < 2; ++stage) {
    for (int i = 0; i < 2; ++i) {
      t[2 * i] = __builtin_shufflevector(w[i], w[i + 2], 0, 4, 1, 5);
      t[2 * i + 1] = __builtin_shufflevector(w[i], w[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; ++i) w[i] = t[i];
  }
  for (int g = 0; g < 4; ++g) std::memcpy(panel + g * width, &w[g], sizeof(Words4));
}

// `rows` rows of x [., k] as a panel of `width` rows; every word is xored with `flip`.
QUANTRAIN_INLINE void pack_panel(const int8_t* x, int64_t k, int64_t rows, int64_t width, int64_t groups, bool bytes,
                                 uint32_t flip, uint32_t* panel) {
  const int64_t whole = k / (bytes ? 4 : 2);
  for (int64_t i = 0; i < width; i += 4) {
    int64_t done = 0;
    if (i + 4 <= rows)
      for (; done + 4 <= whole; done += 4)
        pack_square(x + i * k, k, done, bytes, flip, width, panel + done * width + i);
    for (int64_t j = i; j < i + 4; ++j)
      for (int64_t g = done; g < groups; ++g) {
        const int8_t* row = x + j * k;
        const uint32_t word = j >= rows ? 0 : g < whole ? word_at(row, g, bytes) : last_word(row, g, k, bytes);
        panel[g * width + j] = word ^ flip;
      }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

// One row of args.d: columns `column` to `column + n` from their sums.
template <typename T>
QUANTRAIN_INLINE void dequantize_row(const Int8MmArgs& args, const int32_t* sums, int64_t row, int64_t column,
                                     int64_t n) {
  T* d = static_cast<T*>(args.d) + row * args.n + column;
  const float a_scale = args.a_scale ? args.a_scale[row * args.a_scale_stride] : 1.0f;
  const auto store = [&](const auto& b_scale, const auto& bias) QUANTRAIN_INLINE_LAMBDA {
    if (args.outliers.count > 0) {
      const float* const scale = args.outliers.scale + row * 2;
      const int shift = int8_outlier_shift(scale[0], scale[1], args.outliers.count);
      const int32_t low_unit = 1 << shift, high_unit = kInt8Plane << shift;
      const float* const high = args.outliers.sums + row * 2 * args.n + column;
      const float* const low = high + args.n;
      for (int64_t j = 0; j < n; ++j) {
        const int32_t sum =
            sums[j] + static_cast<int32_t>(high[j]) * high_unit + static_cast<int32_t>(low[j]) * low_unit;
        d[j] = from_float<T>(bias(static_cast<float>(sum) * b_scale(j) * a_scale, j));
      }
    } else if (args.accumulate)
      for (int64_t j = 0; j < n; ++j)
        d[j] = from_float<T>(to_float(d[j]) + bias(static_cast<float>(sums[j]) * b_scale(j) * a_scale, j));
    else
      for (int64_t j = 0; j < n; ++j) d[j] = from_float<T>(bias(static_cast<float>(sums[j]) * b_scale(j) * a_scale, j));
  };
  const auto scale = [&](int64_t j) QUANTRAIN_INLINE_LAMBDA { return args.b_scale[column + j]; };
  const float all = args.b_scale && args.b_scale_stride == 0 ? *args.b_scale : 1.0f;
  const auto same_scale = [&](int64_t) QUANTRAIN_INLINE_LAMBDA { return all; };
  const auto add = [&](float value, int64_t j) QUANTRAIN_INLINE_LAMBDA { return value + args.bias[column + j]; };
  const auto same = [](float value, int64_t) QUANTRAIN_INLINE_LAMBDA { return value; };
  if (args.b_scale && args.b_scale_stride == 1)
    args.bias ? store(scale, add) : store(scale, same);
  else
    args.bias ? store(same_scale, add) : store(same_scale, same);
}

template <typename T>
void dequantize_tile(const Int8MmArgs& args, const int32_t* sums, int64_t stride, int64_t row, int64_t rows,
                     int64_t column, int64_t n) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t i = 0; i < rows; ++i) dequantize_row<T>(args, sums + i * stride, row + i, column, n);
  });
}

}  // namespace

bool int8_isa_supported(Int8Isa isa) {
#if defined(QUANTRAIN_X86)
  const bool avx2 = best_isa() != Isa::kBaseline, avx512 = best_isa() == Isa::kV4;
  switch (isa) {
    case Int8Isa::kAvx512Vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    case Int8Isa::kAvxVnni:
      return avx2 && __builtin_cpu_supports("avxvnni");
    case Int8Isa::kAvx512:
      return avx512;
    case Int8Isa::kAvx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Int8Isa::kPlain;
#endif
}

Int8Isa best_int8_isa() {
  static const Int8Isa best = [] {
    for (const Int8Isa isa : {Int8Isa::kAvx512Vnni, Int8Isa::kAvxVnni, Int8Isa::kAvx512, Int8Isa::kAvx2})
      if (int8_isa_supported(isa)) return isa;
    return Int8Isa::kPlain;
  }();
  return best;
}

Int8MmPlan plan_int8_mm(const Int8MmArgs& args, Int8Isa isa) {
  const Kernel kernel = kernel_of(isa);
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  Int8MmPlan plan;
  plan.isa = isa;
  plan.a_rows = kernel.shape.a_rows;
  plan.b_rows = kernel.shape.b_rows;
  plan.groups = parts(args.k, kernel.bytes ? 4 : 2);
  plan.a_panels = parts(args.m, plan.a_rows);
  plan.b_panels = parts(args.n, plan.b_rows);
  plan.tasks = parts(args.m, kTaskRows) * plan.b_panels;
  return plan;
}

void pack_int8_a(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin,
                 int64_t end) {
  const bool bytes = kernel_of(plan.isa).bytes;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * plan.a_rows, rows = std::min(plan.a_rows, args.m - row);
      pack_panel(args.a + row * args.k, args.k, rows, plan.a_rows, plan.groups, bytes, 0u,
                 packed.a + row * plan.groups);
      // b is 128 too large: the sums begin with what that adds.
      for (int64_t i = 0; i < plan.a_rows; ++i) {
        uint32_t sum = 0;  // unsigned: beyond k = 65536 the parts may wrap, though the result does not
        if (bytes && i < rows)
          for (int64_t c = 0; c < args.k; ++c) sum += static_cast<uint32_t>(args.a[(row + i) * args.k + c]);
        packed.start[row + i] = static_cast<int32_t>(0u - 128u * sum);
      }
    }
  });
}

void pack_int8_b(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin,
                 int64_t end) {
  const bool bytes = kernel_of(plan.isa).bytes;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * plan.b_rows, rows = std::min(plan.b_rows, args.n - row);
      pack_panel(args.b + row * args.k, args.k, rows, plan.b_rows, plan.groups, bytes, bytes ? 0x80808080u : 0u,
                 packed.b + row * plan.groups);
    }
  });
}

void int8_mm(const Int8MmArgs& args, const Int8MmPlan& plan, const Int8MmPacked& packed, int64_t begin, int64_t end) {
  const Kernel kernel = kernel_of(plan.isa);
  alignas(64) int32_t sums[kTaskRows * kMaxColumns];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / plan.b_panels * kTaskRows, rows = std::min(kTaskRows, args.m - row);
    const int64_t column = task % plan.b_panels * plan.b_rows, columns = std::min(plan.b_rows, args.n - column);
    int64_t group = 0;
    do {  // once for k = 0 too
      const int64_t groups = std::min(kBlockGroups, plan.groups - group);
      for (int64_t i = 0; i < rows; i += plan.a_rows)
        kernel.tile({packed.a + (row + i) * plan.groups + group * plan.a_rows,
                     packed.b + column * plan.groups + group * plan.b_rows, packed.start + row + i,
                     sums + i * plan.b_rows, groups, group == 0});
      group += kBlockGroups;
    } while (group < plan.groups);
    dispatch_float(args.dtype, [&](auto* type) {
      dequantize_tile<std::remove_pointer_t<decltype(type)>>(args, sums, plan.b_rows, row, rows, column, columns);
    });
  }
}

bool has_int8_few_rows() { return int8_isa_supported(Int8Isa::kAvx2); }

void int8_few_rows_sums(const Int8MmArgs& args, int32_t* sums, int64_t begin, int64_t end) {
#if defined(QUANTRAIN_X86)
  for (int64_t j = begin; j < end;) {
    const bool four = end - j >= 4;
    for (int64_t i = 0; i < args.m;) {
      const bool two = args.m - i >= 2;
      const auto tile = two ? (four ? few_rows_2x4 : few_rows_2x1) : (four ? few_rows_1x4 : few_rows_1x1);
      tile(args.a + i * args.k, args.b + j * args.k, args.k, args.n, sums + i * args.n + j);
      i += two ? 2 : 1;
    }
    j += four ? 4 : 1;
  }
#else
  for (int64_t i = 0; i < args.m; ++i)
    for (int64_t j = begin; j < end; ++j) sums[i * args.n + j] = 0;  // not called: has_int8_few_rows()
#endif
}

void dequantize_sums(const Int8MmArgs& args, const int32_t* sums, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    dequantize_tile<std::remove_pointer_t<decltype(type)>>(args, sums + begin * args.n, args.n, begin, end - begin, 0,
                                                           args.n);
  });
}

}  // namespace quantrain::cpu

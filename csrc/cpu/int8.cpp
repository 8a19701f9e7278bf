#include "csrc/cpu/int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "csrc/cpu/philox.h"
#include "csrc/cpu/simd.h"

// Rows are walked twice: for their absmax, then, from the cache, for their codes. Columns go kInt8ColumnTile at a time
// down the rows, and their codes leave through square tiles that are transposed in registers.

namespace quantrain::cpu {
namespace {

constexpr int kRun = kPhiloxBatch * kInt8Item;  // elements of a row that are handled at a time
constexpr int kTile = static_cast<int>(kInt8ColumnTile);
constexpr int kTileRows = 64;  // rows of a transposed tile
static_assert(kRun == 2 * kTile);

// The largest |x| as bits: of numbers that are not negative the order is that of their bits, and NaN is above Inf.
QUANTRAIN_INLINE int32_t magnitude(float x) { return static_cast<int32_t>(detail::float_to_bits(x) & 0x7fffffffu); }

QUANTRAIN_INLINE float magnitude_value(int32_t bits) { return detail::bits_to_float(static_cast<uint32_t>(bits)); }

QUANTRAIN_INLINE int8_t stored_code(float scaled, float dither) {
  return static_cast<int8_t>(static_cast<uint8_t>(int8_code(scaled, dither)));
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <typename T, typename Factor>
QUANTRAIN_INLINE void quantize_row(const Int8QuantizeRowsArgs& a, int64_t row, const Factor& factor) {
  const int64_t n =
      a.columns;  // a local copy: a store of a code may change what is behind a reference, as far as the compiler knows
  const T* x = static_cast<const T*>(a.x) + row * n;
  int8_t* codes = a.codes + row * n;
  int32_t largest = 0;
  for (int64_t c = 0; c < n; ++c) largest = std::max(largest, magnitude(to_float(x[c]) * factor(c)));
  const float scale = int8_scale(magnitude_value(largest)), inverse = int8_inverse(scale, a.stochastic);
  a.scale[row] = scale;
  if (!(scale == scale)) {
    std::memset(codes, 0, static_cast<size_t>(n));
  } else if (!a.stochastic) {
    for (int64_t c = 0; c < n; ++c) codes[c] = stored_code(to_float(x[c]) * factor(c) * inverse, 0.0f);
  } else {
    const auto block = static_cast<uint64_t>(row * int8_items_per_row(n));
    alignas(64) uint16_t numbers[kRun];
    for (int64_t at = 0; at < n; at += kRun) {
      const auto first = block + static_cast<uint64_t>(at / kInt8Item);
      philox_batch(a.philox, [&](int i) QUANTRAIN_INLINE_LAMBDA { return first + static_cast<uint64_t>(i); }, numbers);
      const int count = static_cast<int>(std::min<int64_t>(n - at, kRun));
      for (int i = 0; i < count; ++i)
        codes[at + i] = stored_code(to_float(x[at + i]) * factor(at + i) * inverse, int8_dither(numbers[i], 0));
    }
  }
}

template <typename T>
void quantize_rows_typed(const Int8QuantizeRowsArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    if (a.column_factor)
      for (int64_t row = begin; row < end; ++row)
        quantize_row<T>(a, row, [factor = a.column_factor](int64_t c) QUANTRAIN_INLINE_LAMBDA { return factor[c]; });
    else
      for (int64_t row = begin; row < end; ++row)
        quantize_row<T>(a, row, [](int64_t) QUANTRAIN_INLINE_LAMBDA { return 1.0f; });
  });
}

// ---- transposed tiles -----------------------------------------------------------------------------------------------

using Bytes16 = int8_t __attribute__((vector_size(16)));

// Interleaving the two halves of the rows rotates the eight bits of an element's (row, column) by one place: after four
// times row and column have changed places.
QUANTRAIN_INLINE void transpose16(const int8_t* from, int64_t from_stride, int8_t* to, int64_t to_stride) {
  Bytes16 x[16], y[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&x[i], from + i * from_stride, 16);
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] =
          __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
  for (int i = 0; i < 16; ++i) std::memcpy(to + i * to_stride, &x[i], 16);
}

// A tile of codes, rows of x by kTile columns, on its way to rows of its columns.
struct CodeTile {
  alignas(64) int8_t code[kTileRows][kTile];
  alignas(64) int8_t transposed[kTile][kTileRows];

  QUANTRAIN_INLINE void store(int8_t* to, int64_t to_stride, int rows, int columns) {
    for (int r = 0; r < kTileRows; r += 16)
      for (int c = 0; c < kTile; c += 16) transpose16(&code[r][c], kTile, &transposed[c][r], kTileRows);
    for (int c = 0; c < columns; ++c) {
      if (rows == kTileRows)
        std::memcpy(to + c * to_stride, transposed[c], kTileRows);
      else
        std::memcpy(to + c * to_stride, transposed[c], static_cast<size_t>(rows));
    }
  }
};

// Calls fill(tile, at, n, row, rows) for each tile of the column tiles from `begin` to `end`, then stores it into `to`
// [columns, rows].
template <typename Fill>
QUANTRAIN_INLINE void transposed_tiles(int8_t* to, int64_t rows, int64_t columns, int64_t tile_index,
                                       const Fill& fill) {
  CodeTile tile;
  const int64_t at = tile_index * kTile;
  const int n = static_cast<int>(std::min<int64_t>(columns - at, kTile));
  if (n < kTile) std::memset(tile.code, 0, sizeof(tile.code));
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(rows - row, kTileRows));
    for (int r = 0; r < count; ++r) fill(row + r, at, n, tile.code[r]);
    tile.store(to + at * rows + row, rows, count, n);
  }
}

// ---- columns --------------------------------------------------------------------------------------------------------

// The largest magnitudes of n columns from `at` on; value(row, column).
template <typename Value>
QUANTRAIN_INLINE void column_magnitudes(int64_t rows, int64_t at, int n, int32_t* largest, const Value& value) {
  for (int i = 0; i < n; ++i) largest[i] = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int i = 0; i < n; ++i) largest[i] = std::max(largest[i], magnitude(value(row, at + i)));
}

// Scales of n columns, and what their elements are multiplied by: `keep` has all bits, or none where the scale is NaN.
struct ColumnScales {
  alignas(64) float inverse[kTile];
  alignas(64) uint32_t keep[kTile];

  QUANTRAIN_INLINE void set(int i, float scale, bool stochastic) {
    inverse[i] = int8_inverse(scale, stochastic);
    keep[i] = scale == scale ? ~0u : 0u;
  }

  QUANTRAIN_INLINE int8_t code(int i, float x, float dither) const {
    return static_cast<int8_t>(static_cast<uint8_t>(int8_code(x * inverse[i], dither) & keep[i]));
  }
};

template <typename T>
void column_absmax_typed(const Int8ColumnAbsmaxArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const T* x = static_cast<const T*>(a.x);
    alignas(64) int32_t largest[kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t at = tile * kTile;
      const int n = static_cast<int>(std::min<int64_t>(a.columns - at, kTile));
      const auto walk = [&](const auto& factor) QUANTRAIN_INLINE_LAMBDA {
        column_magnitudes(a.rows, at, n, largest, [&](int64_t row, int64_t c) QUANTRAIN_INLINE_LAMBDA {
          return to_float(x[row * a.columns + c]) * factor(row);
        });
      };
      if (a.row_factor)
        walk([&](int64_t row) QUANTRAIN_INLINE_LAMBDA { return a.row_factor[row]; });
      else
        walk([](int64_t) QUANTRAIN_INLINE_LAMBDA { return 1.0f; });
      for (int i = 0; i < n; ++i) a.absmax[at + i] = magnitude_value(largest[i]);
    }
  });
}

template <typename T>
void quantize_columns_typed(const Int8QuantizeColumnsArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    constexpr int kTileItems = kTile / kInt8Item;
    const T* x = static_cast<const T*>(a.x);
    const auto items = static_cast<uint64_t>(int8_items_per_row(a.columns));
    ColumnScales scales;
    alignas(64) uint16_t numbers[kRun];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile;
      for (int64_t c = first; c < std::min<int64_t>(first + kTile, a.columns); ++c) {
        a.scale[c] = int8_scale(a.absmax[c]);
        scales.set(static_cast<int>(c - first), a.scale[c], a.stochastic);
      }
      transposed_tiles(
          a.codes, a.rows, a.columns, tile, [&](int64_t row, int64_t at, int n, int8_t* codes) QUANTRAIN_INLINE_LAMBDA {
            const T* from = x + row * a.columns + at;
            const float factor = a.row_factor ? a.row_factor[row] : 1.0f;
            if (!a.stochastic) {
              for (int i = 0; i < n; ++i) codes[i] = scales.code(i, to_float(from[i]) * factor, 0.0f);
              return;
            }
            if (row % 2 == 0) {  // the numbers of two rows at a time
              const uint64_t block = static_cast<uint64_t>(row) * items + static_cast<uint64_t>(at / kInt8Item);
              philox_batch(
                  a.philox,
                  [&](int i) QUANTRAIN_INLINE_LAMBDA {
                    return block + static_cast<uint64_t>(i % kTileItems) + (i < kTileItems ? 0 : items);
                  },
                  numbers);
            }
            const uint16_t* number = numbers + row % 2 * kTile;
            for (int i = 0; i < n; ++i)
              codes[i] = scales.code(i, to_float(from[i]) * factor, int8_dither(number[i], 0));
          });
    }
  });
}

// ---- weights --------------------------------------------------------------------------------------------------------

// kAuto's rule. All NaN: folded.
bool folded(const Int8WeightTransposeArgs& a) {
  if (a.scheme != Int8WeightScheme::kAuto) return a.scheme == Int8WeightScheme::kFold;
  double largest = 0.0, sum = 0.0;
  for (int64_t o = 0; o < a.out; ++o) {
    const double scale = a.row_scale[o], square = scale * scale;  // in float32 it may leave the range
    largest = std::max(largest, square);
    sum += square;
  }
  return !(largest * static_cast<double>(a.out) > kInt8FoldBound * sum);
}

QUANTRAIN_INLINE float weight_value(int8_t code, float scale) { return static_cast<float>(code) * scale; }
template <typename T>
QUANTRAIN_INLINE float weight_value(T value, float) {
  return to_float(value);
}

QUANTRAIN_INLINE int8_t weight_code(int8_t code, float, uint32_t) { return code; }
template <typename T>
QUANTRAIN_INLINE int8_t weight_code(T value, float inverse, uint32_t keep) {
  return static_cast<int8_t>(static_cast<uint8_t>(int8_code(to_float(value) * inverse, 0.0f) & keep));
}

template <typename T>
void weight_transpose_typed(const Int8WeightTransposeArgs& a, int64_t begin, int64_t end) {
  const bool fold = folded(a);
  if (begin == 0)
    for (int64_t o = 0; o < a.out; ++o) a.column_factor[o] = fold ? a.row_scale[o] : 1.0f;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const T* weight = static_cast<const T*>(a.weight);
    ColumnScales scales;
    alignas(64) int32_t largest[kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile;
      const int width = static_cast<int>(std::min<int64_t>(a.in - first, kTile));
      if (fold) {
        for (int i = 0; i < width; ++i) a.scale[first + i] = 1.0f;
        transposed_tiles(a.codes, a.out, a.in, tile,
                         [&](int64_t row, int64_t at, int n, int8_t* codes) QUANTRAIN_INLINE_LAMBDA {
                           const float scale = a.row_scale[row], inverse = int8_inverse(scale, false);
                           const uint32_t keep = scale == scale ? ~0u : 0u;
                           for (int i = 0; i < n; ++i)
                             codes[i] = weight_code(weight[row * a.in + at + i], inverse, keep);
                         });
        continue;
      }
      const auto value = [&](int64_t row, int64_t c)
                             QUANTRAIN_INLINE_LAMBDA { return weight_value(weight[row * a.in + c], a.row_scale[row]); };
      column_magnitudes(a.out, first, width, largest, value);
      for (int i = 0; i < width; ++i) {
        a.scale[first + i] = int8_scale(magnitude_value(largest[i]));
        scales.set(i, a.scale[first + i], false);
      }
      transposed_tiles(a.codes, a.out, a.in, tile,
                       [&](int64_t row, int64_t at, int n, int8_t* codes) QUANTRAIN_INLINE_LAMBDA {
                         for (int i = 0; i < n; ++i) codes[i] = scales.code(i, value(row, at + i), 0.0f);
                       });
    }
  });
}

template <typename T>
void outlier_planes_typed(const Int8QuantizeOutliersArgs& a, const float* main_scale, int64_t begin, int64_t end) {
  std::vector<float> values(static_cast<size_t>(a.count));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    const auto product = [&](int64_t column) {
      return a.column_factor ? to_float(x[column]) * a.column_factor[column] : to_float(x[column]);
    };
    float absmax = 0.0f;
    bool finite = main_scale[row] == main_scale[row];
    for (int64_t i = 0; i < a.count; ++i) {
      const float value = a.outliers[i] < 0 ? 0.0f : product(a.outliers[i]);
      values[static_cast<size_t>(i)] = value;
      finite = finite && std::fabs(value) <= std::numeric_limits<float>::max();
      absmax = std::max(absmax, std::fabs(value));
    }
    int8_t* codes = a.codes + row * a.columns;
    int8_t* hi = a.planes + row * 2 * a.count;
    int8_t* lo = hi + a.count;
    float* scale = a.scale + row * 2;
    if (!finite) {
      scale[0] = scale[1] = std::numeric_limits<float>::quiet_NaN();
      std::memset(codes, 0, static_cast<size_t>(a.columns));
      std::memset(hi, 0, static_cast<size_t>(2 * a.count));
      continue;
    }
    // A scale of 1 may be that of zeros.
    const bool zeros =
        main_scale[row] == 1.0f && std::all_of(codes, codes + a.columns, [](int8_t c) { return c == 0; });
    const Int8OutlierScales scales = int8_outlier_scales(zeros ? 0.0f : main_scale[row], absmax, a.count);
    scale[0] = scales.main;
    scale[1] = scales.outlier;
    if (scale[0] > main_scale[row] && !zeros) {  // rare: all codes anew
      const float inverse = int8_inverse(scale[0], false);
      for (int64_t c = 0; c < a.columns; ++c)
        codes[c] = static_cast<int8_t>(static_cast<uint8_t>(int8_code(product(c) * inverse, 0.0f)));
      for (int64_t i = 0; i < a.count; ++i)
        if (a.outliers[i] >= 0) codes[a.outliers[i]] = 0;
    }
    const float inverse = 1.0f / scale[1];
    for (int64_t i = 0; i < a.count; ++i) {
      const int32_t q = int8_outlier_code(values[static_cast<size_t>(i)] * inverse);
      hi[i] = static_cast<int8_t>(int8_outlier_high(q));
      lo[i] = static_cast<int8_t>(q - kInt8Plane * hi[i]);
    }
  }
}

}  // namespace

void int8_quantize_rows(const Int8QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { quantize_rows_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void int8_outlier_planes(const Int8QuantizeOutliersArgs& args, const float* main_scale, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    outlier_planes_typed<std::remove_pointer_t<decltype(type)>>(args, main_scale, begin, end);
  });
}

void int8_column_absmax(const Int8ColumnAbsmaxArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { column_absmax_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void int8_quantize_columns(const Int8QuantizeColumnsArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { quantize_columns_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void int8_transpose(const Int8TransposeArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t tile = begin; tile < end; ++tile)
      transposed_tiles(a.transposed, a.rows, a.columns, tile,
                       [&](int64_t row, int64_t at, int n, int8_t* codes) QUANTRAIN_INLINE_LAMBDA {
                         std::memcpy(codes, a.codes + row * a.columns + at, static_cast<size_t>(n));
                       });
  });
}

void int8_weight_transpose(const Int8WeightTransposeArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kInt8) return weight_transpose_typed<int8_t>(args, begin, end);
  dispatch_float(args.dtype,
                 [&](auto* type) { weight_transpose_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace quantrain::cpu

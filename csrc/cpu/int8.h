// CPU kernels of the int8 family. Each works on [begin, end) of what the comment names.
#pragma once

#include "csrc/common/int8.h"
#include "csrc/common/int8_fused.h"

namespace quantrain::cpu {

constexpr int64_t kInt8ColumnTile = 64;  // columns of a task that walks down columns

inline int64_t int8_column_tiles(int64_t columns) { return (columns + kInt8ColumnTile - 1) / kInt8ColumnTile; }

void int8_quantize_rows(const Int8QuantizeRowsArgs& args, int64_t begin, int64_t end);  // rows

// The outlier columns of rows as two planes (quantrain/ops/int8_outliers.h), beside codes that int8_quantize_rows made
// with a factor of 0 there. A row with NaN or Inf in either part gets scales NaN, codes and planes 0.
struct Int8OutlierPlanesArgs {
  const void* x;               // [rows, columns] of dtype
  const float* column_factor;  // [columns] or null
  const int64_t* outliers;     // [count]; negative: a column of zeros
  const float* main_scale;     // [rows]
  int8_t* codes;               // [rows, columns]
  int8_t* planes;              // [rows, 2 count]: hi, then lo
  float* scale;                // [rows, 2]
  DType dtype;
  int64_t rows, columns, count;
};
void int8_outlier_planes(const Int8OutlierPlanesArgs& args, int64_t begin, int64_t end);  // rows

// sum[r, j] += (128 hi + lo)[r, c] * scale[r, 1] * weight[c, j] over the columns c, in their order: of so few columns a
// product of floats costs less than packing them.
struct Int8OutlierAddArgs {
  const int8_t* planes;  // [rows, 2 count]
  const float* scale;    // [rows, 2]
  const float* weight;   // [count, n]
  float* sum;            // [rows, n]
  int64_t count, n;
};
void int8_outlier_add(const Int8OutlierAddArgs& args, int64_t begin, int64_t end);  // rows

void int8_column_absmax(const Int8ColumnAbsmaxArgs& args, int64_t begin, int64_t end);        // column tiles
void int8_quantize_columns(const Int8QuantizeColumnsArgs& args, int64_t begin, int64_t end);  // column tiles
void int8_transpose(const Int8TransposeArgs& args, int64_t begin, int64_t end);               // column tiles
void int8_weight_transpose(const Int8WeightTransposeArgs& args, int64_t begin, int64_t end);  // column tiles
void int8_norm(const Int8NormArgs& args, int64_t begin, int64_t end);                         // rows
void int8_activation(const Int8ActivationArgs& args, int64_t begin, int64_t end);             // rows

int64_t int8_weight_mm_rows();  // of x, up to which int8_weight_mm takes less time than decoding the weight first
void int8_weight_mm(const Int8WeightMmArgs& args, int64_t begin, int64_t end);  // rows of the weight

}  // namespace quantrain::cpu

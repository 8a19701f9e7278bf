// CPU kernels of the int8 family. Each works on [begin, end) of what the comment names.
#pragma once

#include "csrc/common/int8.h"
#include "csrc/common/int8_fused.h"
#include "csrc/common/rotary.h"

namespace quantrain::cpu {

constexpr int64_t kInt8ColumnTile = 64;  // columns of a task that walks down columns

inline int64_t int8_column_tiles(int64_t columns) { return (columns + kInt8ColumnTile - 1) / kInt8ColumnTile; }

void int8_quantize_rows(const Int8QuantizeRowsArgs& args, int64_t begin, int64_t end);  // rows

// Beside codes and scales [rows] that int8_quantize_rows made with a factor of 0 in the outlier columns.
void int8_outlier_planes(const Int8QuantizeOutliersArgs& args, const float* main_scale, int64_t begin,
                         int64_t end);  // rows

void int8_column_absmax(const Int8ColumnAbsmaxArgs& args, int64_t begin, int64_t end);        // column tiles
void int8_quantize_columns(const Int8QuantizeColumnsArgs& args, int64_t begin, int64_t end);  // column tiles
void int8_transpose(const Int8TransposeArgs& args, int64_t begin, int64_t end);               // column tiles
void int8_weight_transpose(const Int8WeightTransposeArgs& args, int64_t begin, int64_t end);  // column tiles
void int8_norm(const Int8NormArgs& args, int64_t begin, int64_t end);                         // rows
void int8_activation(const Int8ActivationArgs& args, int64_t begin, int64_t end);             // rows
void rotate_heads(const RotaryArgs& args, int64_t begin, int64_t end);                        // tokens

int64_t int8_weight_mm_rows();  // of x, up to which int8_weight_mm takes less time than decoding the weight first
void int8_weight_mm(const Int8WeightMmArgs& args, int64_t begin, int64_t end);  // rows of the weight

}  // namespace quantrain::cpu

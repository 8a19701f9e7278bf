// CUDA kernels of the int8 family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current
// device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include <cstddef>
#include <string_view>

#include "csrc/common/int8.h"
#include "csrc/common/int8_fused.h"
#include "csrc/common/rotary.h"

namespace quantrain::cuda {

int int8_quantize_rows(const Int8QuantizeRowsArgs& args, void* stream);

int int8_quantize_outliers(const Int8QuantizeOutliersArgs& args, void* stream);

// int8_quantize_rows and int8_quantize_columns of one x, with the same random numbers, in two readings instead of
// three.
struct Int8RowsAndColumnsArgs {
  const void* x;               // [rows, columns] of dtype
  const float* column_factor;  // [columns] or null, for rows
  const float* row_factor;     // [rows] or null, for columns
  float* absmax;               // [rows + columns], scratch
  int8_t* row_codes;           // [rows, columns]
  float* row_scale;            // [rows]
  int8_t* column_codes;        // [columns, rows]
  float* column_scale;         // [columns]
  DType dtype;
  int64_t rows;
  int64_t columns;
  bool stochastic;
  PhiloxState philox;
};

bool int8_suits_rows_and_columns(const Int8RowsAndColumnsArgs& args);
int int8_rows_and_columns(const Int8RowsAndColumnsArgs& args, void* stream);

int int8_column_absmax(const Int8ColumnAbsmaxArgs& args, void* stream);
int int8_quantize_columns(const Int8QuantizeColumnsArgs& args, void* stream);
int int8_transpose(const Int8TransposeArgs& args, void* stream);
int int8_weight_transpose(const Int8WeightTransposeArgs& args, void* stream);
int int8_norm(const Int8NormArgs& args, void* stream);
// y += x, of whole eights of elements, both on 16 bytes.
int add_to(const void* x, void* y, DType dtype, int64_t elements, void* stream);
int rotate_heads(const RotaryArgs& args, void* stream);
int int8_activation(const Int8ActivationArgs& args, void* stream);

// Whether int8_weight_mm takes these arguments: float16 or bfloat16, at most kInt8WeightRows rows of x, k a multiple of
// 16, pointers on 16 bytes, compute capability 8.0.
constexpr int64_t kInt8WeightRows = 32;
bool int8_weight_mm_suits(const Int8WeightMmArgs& args);
int int8_weight_mm(const Int8WeightMmArgs& args, void* stream);

// 10 * major + minor of the current device.
int compute_capability();

// A kernel of int8_mm by name, for tests and measurements; an empty name leaves the choice to the shape.
struct Int8MmKernel {
  std::string_view name = {};
  int swizzle = 1;
  int splits = 0;
};

// What int8_mm needs in `workspace` for these sizes, on the current device.
size_t int8_mm_workspace(const Int8MmArgs& args, const Int8MmKernel& kernel = {});

// Hopper's kernel for the shape where one serves it, else that of sm_80, which any later device runs. A named kernel
// that does not serve it, or that does not exist, is cudaErrorInvalidValue.
int int8_mm(const Int8MmArgs& args, void* stream, const Int8MmKernel& kernel = {});

}  // namespace quantrain::cuda

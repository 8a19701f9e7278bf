// Which weights stay, and weights that stay at zero: the pruning family.
//
// A mask is packed, uint8 [ceil(numel / 8)]: bit i % 8 of byte i / 8 is element i of the weight in row-major order, 1
// where it is kept. Bits past the end are 0.
//
// Scores: |w| (Han et al., arXiv:1506.02626), or |w| n_j with n_j the norm of input column j (Wanda, Sun et al.,
// arXiv:2306.11695, eq. 1). A weight [O, ...] is taken as a matrix [O, K]. Exactly as many elements are dropped as the
// sparsity says, rounded half to even; of equal scores the later element goes first; NaN is kept. CPU and CUDA agree.
//
// No gradients. Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain {

// pattern: "layer": the lowest scores of the whole weight; "row": of each output row; "n:m", such as "2:4": n of m
// neighbours along K are kept, and sparsity is not read. input_norm: float32 [K], or none for |w|.
QUANTRAIN_API at::Tensor prune_mask(const at::Tensor& weight,
                                    const std::optional<at::Tensor>& input_norm = std::nullopt, double sparsity = 0.5,
                                    std::string_view pattern = "layer");

// One threshold for all: the lowest |w| of the weights together, of which earlier ones are kept where equal. All on one
// device.
QUANTRAIN_API std::vector<at::Tensor> prune_masks(const std::vector<at::Tensor>& weights, double sparsity);

// mask: bool or numbers of any shape; 0 is dropped.
QUANTRAIN_API at::Tensor pack_mask(const at::Tensor& mask);
// bool, of that shape, contiguous.
QUANTRAIN_API at::Tensor unpack_mask(const at::Tensor& mask, at::IntArrayRef shape);

// Zero where the bit is 0, NaN too, in place; elements that are kept are not touched. Tensors of any type of 1, 2, 4 or
// 8 bytes, on one device. On CUDA one launch for up to 96 contiguous tensors.
QUANTRAIN_API void apply_masks_(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& masks);

struct SparseGptOptions {
  double sparsity = 0.5;
  std::string_view pattern = "layer";  // of each block of 128 columns, as published; or "row", or "n:m"
  double damping = 0.01;               // times the mean of the hessian's diagonal, doubled until it has a factor
  std::optional<at::Tensor> scale = std::nullopt;  // float32 [O, 1]: kept weights are rounded to codes times it
  int64_t quant_min = -128;
  int64_t quant_max = 127;
};

struct SparseGptWeight {
  at::Tensor weight;  // of the weight's shape and type; 0 where dropped
  at::Tensor mask;    // packed
};

// SparseGPT (Frantar and Alistarh, arXiv:2301.00774, algorithm 1): columns in turn, the error of what is dropped or
// rounded is spread over the columns after it. weight [O, K]; hessian [K, K] of float32 or float64, the sum of x x^T up
// to a factor. The score is w^2 / U_jj^2 with U^T U the damped inverse. Arithmetic in float64; waits for the device.
QUANTRAIN_API SparseGptWeight sparsegpt_prune(const at::Tensor& weight, const at::Tensor& hessian,
                                              const SparseGptOptions& options = {});

}  // namespace quantrain

// A training step of a convolution with a folded batch norm, as one node: what the layers call, eagerly. Its operators
// (fold_fake_quantize, quant_conv2d, batch_norm_act, ...) say what is computed and what is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "autograd/observed.h"
#include "quantrain/ops/export.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain {

// Undefined tensors are absent. Observed: the fake-quantizer of the layers that read the result, where its scale is
// given.
struct ConvBatchNorm : Observed {
  // The convolution of a fake-quantized input, which is kept as its codes where it has some.
  at::Tensor input, codes, input_scale, input_zero_point;
  bool packs_codes = false;  // two codes are kept in a byte: they have at most 4 bits
  at::Tensor weight;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;
  GradientQuantizer grad_input{.rows = "sample"}, grad_weight{.rows = "sample"};
  // The folded weight's codes.
  int64_t weight_min = -128, weight_max = 127;
  bool weight_symmetric = true;
  at::Tensor weight_scale;  // learned, one per row; undefined: each row's own
  double weight_grad_factor = 1.0;
  // The batch norm, with the statistics of the batch; they move the running ones, where `moves`. folding_variance: what
  // is folded with, where it is not the running variance.
  at::Tensor bn_weight, bn_bias, running_mean, running_var, batches, folding_variance;
  double momentum = 0.1, eps = 1e-5;
  bool moves = true;
  // What follows.
  at::Tensor residual;
  std::string activation = "identity";
  double grad_factor = 1.0;  // of a scale that is learned: one that requires a gradient
};

struct ConvBatchNormResult {
  at::Tensor output;
  at::Tensor codes, scale, zero_point;  // of the output, where it is fake-quantized
  at::Tensor folding_variance;          // a copy of what was folded with
};

QUANTRAIN_API ConvBatchNormResult conv_batch_norm(const ConvBatchNorm& call);

}  // namespace quantrain

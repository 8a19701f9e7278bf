// A training step of a linear layer with a fake-quantized weight, as one node: what the layers call, eagerly. Its
// operators (norm_act_fake_quantize, quant_linear, fqt_linear) say what is computed and what is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "autograd/observed.h"
#include "quantrain/ops/export.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain {

// What a linear layer reads, rounded: norm_act_fake_quantize with an observer, or norm_act_fake_quantize_dynamic.
struct RowRounding : Observed {
  at::Tensor input, other, weight, bias;
  std::string function = "identity", dtype;
  double eps = 0.0;
  bool dynamic = false;  // each row's own scale
};

struct RoundedRows {
  at::Tensor values, codes, scale, zero_point;  // zero_point undefined: symmetric
};

QUANTRAIN_API RoundedRows round_rows(const RowRounding& call);

// Undefined tensors are absent.
struct QuantLinear {
  // [..., K], of the type of the product: fake-quantized, and kept as its codes where it has some.
  at::Tensor input, codes, input_scale, input_zero_point;
  bool packs_codes = false;  // two codes are kept in a byte: they have at most 4 bits
  // [N, K], of that type or float32. Each row in `weight_groups` equal parts with a symmetric scale of their own, taken
  // from them; rounded anew in the backward pass, so that nothing but the weight itself is kept. 0: taken as it is.
  at::Tensor weight;
  int64_t weight_groups = 1, weight_min = -128, weight_max = 127;
  at::Tensor rounded;  // the rounded weight, where it was made before (for another part of the batch): it is kept then
  at::Tensor bias;
  GradientQuantizer grad_input{.rows = "token"}, grad_weight{.rows = "token"};
};

QUANTRAIN_API at::Tensor quant_linear(const QuantLinear& call);

// What `rounded` above is, without a gradient.
QUANTRAIN_API at::Tensor rounded_weight(const QuantLinear& call);

}  // namespace quantrain

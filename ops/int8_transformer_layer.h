// The layer of int8_transformer.h as plain functions: what the operators and Int8TransformerCall run.
#pragma once

#include "quantrain/ops/int8_transformer.h"

namespace quantrain::detail {

// Key and value heads: the option, 0 for as many as heads.
int64_t int8_transformer_kv_heads(const Int8TransformerOptions& options);
int64_t int8_transformer_head_size(const Int8TransformerWeights& weights, const Int8TransformerOptions& options);

// Whether the layer's result comes with its codes, which the next layer's first product reads.
bool int8_transformer_gives_codes(const Int8TransformerWeights& weights, const Int8TransformerOptions& options);

// The checks are Meta's too.
void check_int8_transformer(const at::Tensor& input, const Int8TransformerWeights& weights,
                            const Int8TransformerOptions& options, const Int8TransformerInputs& inputs);
void check_int8_transformer_output(const at::Tensor& input, const at::Tensor& attended,
                                   const Int8TransformerWeights& weights, const Int8TransformerOptions& options);

Int8TransformerResult run_int8_transformer(const at::Tensor& input, const Int8TransformerWeights& weights,
                                           const Int8TransformerOptions& options, const Int8TransformerInputs& inputs);
at::Tensor run_int8_transformer_qkv(const at::Tensor& input, const Int8TransformerWeights& weights,
                                    const Int8TransformerOptions& options, const Int8TransformerInputs& inputs);
Int8TransformerResult run_int8_transformer_output(const at::Tensor& input, const at::Tensor& attended,
                                                  const Int8TransformerWeights& weights,
                                                  const Int8TransformerOptions& options);

}  // namespace quantrain::detail

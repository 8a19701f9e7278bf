// The layer of int8_transformer.h as bare launches, where all of its products are plain int8 ones on a GPU: a tenth of
// a millisecond that operators and allocations would take is most of what a short sequence takes.
#pragma once

#include "quantrain/ops/int8_transformer.h"

namespace quantrain::detail {

// Whether a product is of int8 rows with a scale of their own: what the fused kernels end in.
bool int8_transformer_plain(const Int8TransformerProduct& product, const Int8TransformerOptions& options);

#if defined(QUANTRAIN_WITH_CUDA)
// input contiguous. The kernels and the order are those of the composition: the same bits.
bool int8_transformer_launches(const at::Tensor& input, const Int8TransformerWeights& weights,
                               const Int8TransformerOptions& options);
at::Tensor int8_transformer_launch_qkv(const at::Tensor& input, const Int8TransformerWeights& weights,
                                       const Int8TransformerOptions& options, const Int8TransformerInputs& inputs);
Int8TransformerResult int8_transformer_launch_output(const at::Tensor& input, const at::Tensor& attended,
                                                     const Int8TransformerWeights& weights,
                                                     const Int8TransformerOptions& options, bool gives_codes);
#endif

}  // namespace quantrain::detail

// CPU kernels of the fake_quant family. Each works on a range of elements (or of row chunks), so that the operator can
// share one tensor among threads; the results do not depend on the cut.
#pragma once

#include <cstdint>

#include "csrc/common/fake_quant.h"

namespace quantrain::cpu {

// `begin` is a multiple of 8: two threads never write one byte of the mask.
void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end);
void fake_quantize_backward(const FakeQuantizeBackwardArgs& args, int64_t begin, int64_t end);
void quantize(const QuantizeArgs& args, int64_t begin, int64_t end);
void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end);

// [begin, end) counts row chunks: row * chunks_per_row + chunk.
void fake_quantize_learnable_backward(const LearnableBackwardArgs& args, int64_t begin, int64_t end);
void min_max(const MinMaxArgs& args, int64_t begin, int64_t end);
void range_error(const RangeErrorArgs& args, int64_t begin, int64_t end);

void qparams_from_range(const QParamsFromRangeArgs& args);
void observe(const ObserveArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu

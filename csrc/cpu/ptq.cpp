#include "csrc/cpu/ptq.h"

#include <algorithm>
#include <cmath>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {

void gptq_block(const GptqBlockArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * a.stride;
      double w[kGptqBlock];
      for (int64_t j = 0; j < a.count; ++j) w[j] = a.w[first + j];
      for (int64_t i = 0; i < a.count; ++i) {
        const double zero_point = a.zero_point ? a.zero_point[first + i] : 0.0;
        const double code = std::rint(w[i] * a.inverse[first + i]) + zero_point;
        const double q = std::min(std::max(code, a.low[i]), a.high[i]);
        const double* const upper = a.upper + i * a.count;
        const double error = (w[i] - (q - zero_point) * a.scale[first + i]) / upper[i];
        a.codes[first + i] = q;
        a.errors[row * a.count + i] = error;
        for (int64_t j = i + 1; j < a.count; ++j) w[j] -= error * upper[j];
      }
    }
  });
}

}  // namespace quantrain::cpu

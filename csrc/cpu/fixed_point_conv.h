// The CPU's convolution of 8-bit codes: the weight in the order in which the processor's dot product instruction takes
// it, and tiles of sums in registers, read straight from the rows of the input. Rows are copied first where they need
// padding or another type.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/common/fixed_point_conv.h"
#include "csrc/cpu/int8_mm.h"

namespace quantrain::cpu {

// A row is one of the output, n * oh; where a pixel depends on one pixel alone (1 x 1), images are one sequence of
// pixels, cut into rows.
struct FixedPointConvPlan {
  int64_t tasks;  // groups of output channels x rows
  int64_t grain;  // tasks that are worth a thread
  int64_t rows, row_pixels, pixels;
  int64_t group_blocks;  // of 16 output channels, in a group
  bool flat;             // rows of a sequence of pixels
  bool direct;           // no copy of the input
};

class FixedPointConvKernel {
 public:
  // Of args the weight with its bias and shape, and input_signed; they must outlive this.
  FixedPointConvKernel(const FixedPointConvArgs& args, Int8Isa isa);

  FixedPointConvPlan plan(const FixedPointConvArgs& args) const;
  void run(const FixedPointConvArgs& args, const FixedPointConvPlan& plan, int64_t begin, int64_t end) const;  // tasks

 private:
  enum class Path { kPlain, kDepthwise, kTiles };

  void pack(const FixedPointConvArgs& args);

  Path path_;
  Int8Isa isa_;
  int64_t row_words_;  // of a row of taps, kw * c codes: four to a word, or two as int16
  int64_t blocks_;     // of 16 output channels
  int64_t bound_;      // no sum is larger
  std::vector<uint32_t> memory_;
  const uint32_t* weight_;      // [blocks, kh, row_words, 16], on a 64-byte boundary; [kh, kw, c] int16 where depthwise
  std::vector<int32_t> start_;  // [blocks, 16]: what sums begin with
};

}  // namespace quantrain::cpu

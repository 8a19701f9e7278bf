// CPU kernels of the gradient_quant family. Those with `begin` and `end` work on a part of what the comment names.
#pragma once

#include "csrc/common/gradient_quant.h"

namespace quantrain::cpu {

constexpr int64_t kColumnTile = 128;  // columns of a tile: a block of rows of it stays in the second-level cache
constexpr int64_t kRoundSpan = 4096;  // columns of a task of round_gradient

inline int64_t round_tasks(int64_t rows, int64_t columns) { return rows * ((columns + kRoundSpan - 1) / kRoundSpan); }
inline int64_t column_tiles(int64_t columns) { return (columns + kColumnTile - 1) / kColumnTile; }

void gradient_grids(const GradientGridsArgs& args, int64_t begin, int64_t end);      // groups
void round_gradient(const RoundGradientArgs& args, int64_t begin, int64_t end);      // round_tasks
void ordering_ranges(const OrderingRangesArgs& args, int64_t begin, int64_t end);    // rows
void plan_reflectors(const PlanReflectorsArgs& args, int64_t begin, int64_t end);    // blocks
void reflected_ranges(const ReflectedRangesArgs& args, int64_t begin, int64_t end);  // blocks x splits
void round_reflected(const RoundReflectedArgs& args, int64_t begin, int64_t end);    // blocks x splits
void reflect_rows(const ReflectRowsArgs& args, int64_t begin, int64_t end);          // column_tiles

}  // namespace quantrain::cpu

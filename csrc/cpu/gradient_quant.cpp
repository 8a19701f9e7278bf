#include "csrc/cpu/gradient_quant.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/cpu/lanes.h"
#include "csrc/cpu/philox.h"

// Rounding goes along rows, with random numbers made sixteen Philox blocks at a time. The Householder kernels work on
// tiles: a block of rows by kColumnTile columns, in float32.

namespace quantrain::cpu {
namespace {

constexpr int kTile = static_cast<int>(kColumnTile);
static_assert(kPhiloxBatch * kPhiloxElements == kTile);

// ---- random numbers -------------------------------------------------------------------------------------------------

// The numbers of the kTile elements from block `first` on.
QUANTRAIN_INLINE void uniform_tile(const PhiloxState& state, uint64_t first, uint16_t* numbers) {
  philox_batch(state, [&](int i) QUANTRAIN_INLINE_LAMBDA { return first + static_cast<uint64_t>(i); }, numbers);
}

// Uniform numbers of up to kTile elements that begin with a block.
struct Uniforms {
  alignas(64) uint16_t number[kTile];
  alignas(64) float value[kTile];

  QUANTRAIN_INLINE void fill(const PhiloxState& state, uint64_t first, bool stochastic) {
    if (stochastic) {
      uniform_tile(state, first, number);
      for (int i = 0; i < kTile; ++i) value[i] = uniform16(number[i]);
    } else {
      for (int i = 0; i < kTile; ++i) value[i] = 0.5f;
    }
  }
};

template <typename T>
QUANTRAIN_INLINE void load(const T* x, int n, float* values) {
  for (int i = 0; i < n; ++i) values[i] = to_float(x[i]);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// One grid for all elements, or one per element.
struct SameGrid {
  Grid grid;
  float inv_scale;
  QUANTRAIN_INLINE Grid at(int) const { return grid; }
  QUANTRAIN_INLINE float inverse(int) const { return inv_scale; }
};

struct ColumnGrids {
  alignas(64) float scale[kTile], offset[kTile], inv_scale[kTile];
  QUANTRAIN_INLINE Grid at(int i) const { return Grid{scale[i], offset[i]}; }
  QUANTRAIN_INLINE float inverse(int i) const { return inv_scale[i]; }
};

template <typename T, typename Grids>
QUANTRAIN_INLINE void round_values(const float* x, int n, const Grids& grids, float half, const float* uniform, T* y) {
  for (int i = 0; i < n; ++i)
    y[i] = from_float<T>(round_to_grid<T>(x[i], grids.at(i), grids.inverse(i), half, uniform[i]).value);
}

template <typename Grids>
QUANTRAIN_INLINE void round_codes(const float* x, int n, const Grids& grids, float half, const float* uniform,
                                  int8_t* codes) {
  for (int i = 0; i < n; ++i) {
    const float code = round_to_grid<float>(x[i], grids.at(i), grids.inverse(i), half, uniform[i]).code;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(code));
  }
}

template <typename T>
void round_gradient_typed(const RoundGradientArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const int64_t spans = (a.columns + kRoundSpan - 1) / kRoundSpan, blocks = philox_blocks_per_row(a.columns);
    const float half = half_codes(a.bits);
    Uniforms uniforms;
    ColumnGrids columns;
    alignas(64) float values[kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / spans, first = task % spans * kRoundSpan;
      const int64_t group = a.axis == GridAxis::kRow ? row : 0;
      const SameGrid same{Grid{a.scale[group], a.offset[group]}, 1.0f / a.scale[group]};
      for (int64_t at = first; at < std::min(first + kRoundSpan, a.columns); at += kTile) {
        const int n = static_cast<int>(std::min(a.columns - at, kColumnTile));
        load(static_cast<const T*>(a.x) + row * a.columns + at, n, values);
        uniforms.fill(a.philox, static_cast<uint64_t>(row * blocks + at / kPhiloxElements), a.stochastic);
        const auto round = [&](const auto& grids) QUANTRAIN_INLINE_LAMBDA {
          const int64_t to = row * a.columns + at;
          if (a.codes)
            round_codes(values, n, grids, half, uniforms.value, a.codes + to);
          else
            round_values(values, n, grids, half, uniforms.value, static_cast<T*>(a.y) + to);
        };
        if (a.axis == GridAxis::kColumn) {
          for (int i = 0; i < n; ++i) {
            columns.scale[i] = a.scale[at + i];
            columns.offset[i] = a.offset[at + i];
            columns.inv_scale[i] = 1.0f / a.scale[at + i];
          }
          round(columns);
        } else {
          round(same);
        }
      }
    }
  });
}

// ---- tiles of a group -----------------------------------------------------------------------------------------------

// The positions of one block of rows, and the columns of one split.
struct BlockSpan {
  int64_t first, last;  // positions
  int64_t begin, end;   // columns
  int64_t split;

  QUANTRAIN_INLINE BlockSpan(const RowBlocks& blocks, int64_t columns, int64_t splits, int64_t task) {
    const int64_t block = task / splits, tiles = column_tiles(columns);
    split = task % splits;
    first = blocks.first(block);
    last = first + blocks.size(block);
    begin = tiles * split / splits * kColumnTile;
    end = std::min(tiles * (split + 1) / splits * kColumnTile, columns);
  }
};

// The rows of one group, kTile columns of them.
struct Tile {
  int rows = 0;
  const int32_t* order = nullptr;  // [rows]
  const Reflector* reflector = nullptr;
  alignas(64) float value[kMaxGroup][kTile];

  template <typename T>
  QUANTRAIN_INLINE void load_rows(const T* x, int64_t columns, int64_t at, int n) {
    for (int p = 0; p < rows; ++p) {
      load(x + order[p] * columns + at, n, value[p]);
      for (int i = n; i < kTile; ++i) value[p][i] = 0.0f;
    }
  }

  // T x, or T^-1 x. Sums go in the order of positions.
  QUANTRAIN_INLINE void reflect(bool inverse) {
    alignas(64) float sum[kTile];
    for (int i = 0; i < kTile; ++i) sum[i] = 0.0f;
    for (int p = 0; p < rows; ++p) {
      const float s = inverse ? 1.0f : reflector[p].s, n = reflector[p].n;
      float* row = value[p];
      for (int i = 0; i < kTile; ++i) {
        row[i] *= s;
        sum[i] += n * row[i];
      }
    }
    for (int p = 0; p < rows; ++p) {
      const float t = inverse ? reflector[p].t : 1.0f, m = reflector[p].m;
      float* row = value[p];
      for (int i = 0; i < kTile; ++i) row[i] = (row[i] - m * sum[i]) * t;
    }
  }

  // Widens [min, max] to hold row p's first n values; NaN if one is.
  QUANTRAIN_INLINE void widen(int p, int n, float& min, float& max) {
    float* row = value[p];
    for (int i = n; i < kTile; ++i) row[i] = row[0];
    Lanes low, high;
    std::memcpy(&low, row, sizeof(low));
    high = low;
    LaneMask nan = low != low;
    for (int i = 16; i < kTile; i += 16) {
      Lanes next;
      std::memcpy(&next, row + i, sizeof(next));
      low = next < low ? next : low;
      high = next > high ? next : high;
      nan |= next != next;
    }
    for (int j = 0; j < 16; ++j) {
      min = smaller(min, nan[j] ? NAN : low[j]);
      max = larger(max, nan[j] ? NAN : high[j]);
    }
  }
};

// One for each thread: too large for the stack.
Tile& thread_tile() {
  static thread_local Tile tile;
  return tile;
}

// Calls f(tile) for each group of the positions from `first` to `last`.
template <typename F>
QUANTRAIN_INLINE void for_each_group(Tile& tile, const int32_t* order, const Reflector* reflector, int64_t first,
                                     int64_t last, const F& f) {
  for (int64_t p = first; p < last;) {
    const int64_t end = group_end(reflector, p, std::min(last, p + kMaxGroup));
    tile.rows = static_cast<int>(end - p);
    tile.order = order + p;
    tile.reflector = reflector + p;
    f();
    p = end;
  }
}

template <typename T>
void reflected_ranges_typed(const ReflectedRangesArgs& a, int64_t begin, int64_t end) {
  Tile& tile = thread_tile();
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    for (int64_t task = begin; task < end; ++task) {
      const BlockSpan span(a.blocks, a.columns, a.splits, task);
      float* min = a.partial_min + span.split * a.blocks.rows;
      float* max = a.partial_max + span.split * a.blocks.rows;
      for (int64_t p = span.first; p < span.last; ++p) {
        min[a.order[p]] = kInf;
        max[a.order[p]] = -kInf;
      }
      for (int64_t at = span.begin; at < span.end; at += kTile) {
        const int n = static_cast<int>(std::min(span.end - at, kColumnTile));
        for_each_group(tile, a.order, a.reflector, span.first, span.last, [&]() QUANTRAIN_INLINE_LAMBDA {
          tile.load_rows(static_cast<const T*>(a.x), a.columns, at, n);
          tile.reflect(false);
          for (int p = 0; p < tile.rows; ++p) tile.widen(p, n, min[tile.order[p]], max[tile.order[p]]);
        });
      }
    }
  });
}

template <typename T>
void round_reflected_typed(const RoundReflectedArgs& a, int64_t begin, int64_t end) {
  Tile& tile = thread_tile();
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const int64_t blocks_per_row = philox_blocks_per_row(a.columns);
    const float half = half_codes(a.bits);
    Uniforms uniforms;
    for (int64_t task = begin; task < end; ++task) {
      const BlockSpan span(a.blocks, a.columns, a.splits, task);
      for (int64_t at = span.begin; at < span.end; at += kTile) {
        const int n = static_cast<int>(std::min(span.end - at, kColumnTile));
        for_each_group(tile, a.order, a.reflector, span.first, span.last, [&]() QUANTRAIN_INLINE_LAMBDA {
          tile.load_rows(static_cast<const T*>(a.x), a.columns, at, n);
          tile.reflect(false);
          for (int p = 0; p < tile.rows; ++p) {
            const int64_t row = tile.order[p];
            const SameGrid grid{Grid{a.scale[row], a.offset[row]}, 1.0f / a.scale[row]};
            uniforms.fill(a.philox, static_cast<uint64_t>(row * blocks_per_row + at / kPhiloxElements), a.stochastic);
            float* values = tile.value[p];
            for (int i = 0; i < kTile; ++i)
              values[i] = dithered_code(values[i], grid.grid, grid.inv_scale, half, uniforms.value[i] - 0.5f);
            if (a.codes) {
              int8_t* codes = a.codes + row * a.columns + at;
              for (int i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(static_cast<int32_t>(values[i]));
            } else {
              for (int i = 0; i < kTile; ++i) values[i] = grid_value(values[i], grid.grid);
            }
          }
          if (!a.y) return;
          tile.reflect(true);
          for (int p = 0; p < tile.rows; ++p) {
            const int64_t row = tile.order[p];
            T* y = static_cast<T*>(a.y) + row * a.columns + at;
            if (std::is_same_v<T, float> || !a.stochastic) {
              for (int i = 0; i < n; ++i) y[i] = from_float<T>(tile.value[p][i]);
            } else {
              const auto block = static_cast<uint64_t>(row * blocks_per_row + at / kPhiloxElements);
              uniform_tile(a.philox, kSecondRounding + block, uniforms.number);
              for (int i = 0; i < n; ++i) y[i] = round_to_type<T>(tile.value[p][i], uniforms.number[i]);
            }
          }
        });
      }
    }
  });
}

// ---- the plan -------------------------------------------------------------------------------------------------------

// The last m of a block's sorted ranges with (rows - m) range[m - 1] > the sum of the m largest: the leaders, each with
// a share of the small rows above one.
int64_t count_leaders(const float* range, int64_t rows) {
  double sum = 0.0;
  int64_t leaders = 1;
  for (int64_t m = 1; m < rows; ++m) {
    sum += static_cast<double>(range[m - 1]);
    if (static_cast<double>(rows - m) * static_cast<double>(range[m - 1]) > sum) leaders = m;
  }
  return leaders;
}

void plan_block(const PlanReflectorsArgs& a, int64_t block) {
  const int64_t rows = a.blocks.size(block), first = a.blocks.first(block);
  int64_t index[kMaxGroup];
  float range[kMaxGroup];
  for (int64_t i = 0; i < rows; ++i) {
    index[i] = a.by_range[a.blocks.rank(block, i)];
    range[i] = ordering_range(a.min[index[i]], a.max[index[i]]);
  }
  const auto place = [&](int64_t position, int64_t i, int64_t k, bool leads, float leader_range, float small_range) {
    const bool zero_row = a.min[index[i]] == 0.0f && a.max[index[i]] == 0.0f;
    a.order[first + position] = static_cast<int32_t>(index[i]);
    a.reflector[first + position] = make_reflector(k, leads, leader_range, small_range, zero_row);
  };
  if (rows < 3) {
    for (int64_t i = 0; i < rows; ++i) place(i, i, 1, true, 0.0f, 0.0f);
    return;
  }
  const int64_t leaders = count_leaders(range, rows), small = rows - leaders;
  double total = 0.0;
  for (int64_t i = 0; i < leaders; ++i) total += static_cast<double>(range[i]);
  double sum = 0.0;
  int64_t taken = 0;
  for (int64_t i = 0; i < leaders; ++i) {
    sum += static_cast<double>(range[i]);
    const int64_t upto = small_rows_upto(i, leaders, small, sum, total);
    const int64_t k = 1 + upto - taken;
    const float small_range = k > 1 ? range[leaders + taken] : 0.0f;
    place(i + taken, i, k, true, range[i], small_range);
    for (int64_t j = taken; j < upto; ++j) place(i + 1 + j, leaders + j, k, false, range[i], small_range);
    taken = upto;
  }
}

}  // namespace

void gradient_grids(const GradientGridsArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float *mins = a.min + i * a.group_stride, *maxs = a.max + i * a.group_stride;
    float min = *mins, max = *maxs;
    for (int64_t split = 1; split < a.splits; ++split) {
      min = smaller(min, mins[split * a.split_stride]);
      max = larger(max, maxs[split * a.split_stride]);
    }
    const Grid grid = make_grid(min, max, a.bits, a.preserve_zero);
    a.scale[i] = grid.scale;
    a.offset[i] = grid.offset;
  }
}

void round_gradient(const RoundGradientArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { round_gradient_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void ordering_ranges(const OrderingRangesArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float min = a.partial_min[i * a.splits], max = a.partial_max[i * a.splits];
    for (int64_t split = 1; split < a.splits; ++split) {
      min = smaller(min, a.partial_min[i * a.splits + split]);
      max = larger(max, a.partial_max[i * a.splits + split]);
    }
    a.min[i] = min;
    a.max[i] = max;
    a.range[i] = ordering_range(min, max);
  }
}

void plan_reflectors(const PlanReflectorsArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) plan_block(args, block);
}

void reflected_ranges(const ReflectedRangesArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { reflected_ranges_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void round_reflected(const RoundReflectedArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { round_reflected_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void reflect_rows(const ReflectRowsArgs& a, int64_t begin, int64_t end) {
  Tile& tile = thread_tile();
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t at = begin * kColumnTile; at < std::min(end * kColumnTile, a.columns); at += kTile) {
      const int n = static_cast<int>(std::min(a.columns - at, kColumnTile));
      for_each_group(tile, a.order, a.reflector, 0, a.rows, [&]() QUANTRAIN_INLINE_LAMBDA {
        tile.load_rows(a.x, a.columns, at, n);
        tile.reflect(a.inverse);
        for (int p = 0; p < tile.rows; ++p)
          std::memcpy(a.y + tile.order[p] * a.columns + at, tile.value[p], static_cast<size_t>(n) * sizeof(float));
      });
    }
  });
}

}  // namespace quantrain::cpu

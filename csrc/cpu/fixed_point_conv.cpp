#include "csrc/cpu/fixed_point_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "csrc/cpu/fixed_point_conv_codes.h"
#include "csrc/cpu/fixed_point_conv_tile.h"
#include "csrc/cpu/simd.h"

namespace quantrain::cpu {

using namespace conv;

namespace {

constexpr int64_t kFlatRow = 112;            // pixels of a row of a sequence: a multiple of every tile
constexpr int64_t kBandBytes = 48 * 1024;    // of input, gone through once for each block of output channels
constexpr int64_t kGroupBytes = 320 * 1024;  // of weight that stays in the second-level cache
constexpr int64_t kGrainMacs = 3'000'000;    // below it a second thread costs more than it brings
constexpr int64_t kMaxTile = 16 * 64;        // sums

// ---- any shape ------------------------------------------------------------------------------------------------------

template <typename T>
QUANTRAIN_INLINE void plain_row(const FixedPointConvArgs& args, int64_t row) {
  const int64_t channels = args.c / args.groups, per_group = args.o / args.groups;
  const int64_t n = row / args.oh, top = row % args.oh * args.stride_h - args.padding_h;
  const T* image = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  for (int64_t ox = 0; ox < args.ow; ++ox) {
    const int64_t left = ox * args.stride_w - args.padding_w;
    for (int64_t o = 0; o < args.o; ++o) {
      int32_t sum = args.bias ? args.bias[o] : 0;
      for (int64_t ky = std::max<int64_t>(-top, 0); ky < std::min(args.kh, args.h - top); ++ky)
        for (int64_t kx = std::max<int64_t>(-left, 0); kx < std::min(args.kw, args.w - left); ++kx) {
          const T* x = image + ((top + ky) * args.w + left + kx) * args.c + o / per_group * channels;
          const int8_t* w = args.weight + ((o * args.kh + ky) * args.kw + kx) * channels;
          int32_t part = 0;
          for (int64_t c = 0; c < channels; ++c) part += x[c] * w[c];
          sum += part;
        }
      fixed_point_conv_output(args, sum, (row * args.ow + ox) * args.o + o, o);
    }
  }
}

// ---- one channel in, one out ----------------------------------------------------------------------------------------

// 64 channels at a time: products fit int16, sums int32. w: [kh, kw, c].
template <typename T>
QUANTRAIN_INLINE void depthwise_row(const FixedPointConvArgs& args, const int16_t* w, const Shifts& shifts,
                                    int64_t row) {
  constexpr int64_t kChannels = 64;
  const int64_t n = row / args.oh, top = row % args.oh * args.stride_h - args.padding_h;
  const T* image = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  const int64_t y_begin = std::max<int64_t>(-top, 0), y_end = std::min(args.kh, args.h - top);
  const bool fast = args.shift && shifts.small && (!args.residual || args.residual_type != DType::kInt32);
  for (int64_t first = 0; first < args.c; first += kChannels) {
    const int64_t channels = std::min(kChannels, args.c - first);
    for (int64_t ox = 0; ox < args.ow; ++ox) {
      const int64_t left = ox * args.stride_w - args.padding_w;
      const int64_t x_begin = std::max<int64_t>(-left, 0), x_end = std::min(args.kw, args.w - left);
      int32_t sums[kChannels];
      for (int64_t c = 0; c < kChannels; ++c) sums[c] = c < channels && args.bias ? args.bias[first + c] : 0;
      for (int64_t ky = y_begin; ky < y_end; ++ky)
        for (int64_t kx = x_begin; kx < x_end; ++kx) {
          const T* x = image + ((top + ky) * args.w + left + kx) * args.c + first;
          const int16_t* tap = w + (ky * args.kw + kx) * args.c + first;
          const auto add = [&](int64_t count) QUANTRAIN_INLINE_LAMBDA {
            for (int64_t c = 0; c < count; ++c) sums[c] += static_cast<int16_t>(static_cast<int16_t>(x[c]) * tap[c]);
          };
          channels == kChannels ? add(kChannels) : add(channels);
        }
      const int64_t i = (row * args.ow + ox) * args.o + first;
      if (!fast)
        for (int64_t c = 0; c < channels; ++c) fixed_point_conv_output(args, sums[c], i + c, first + c);
      else if (!args.residual)
        write_codes<uint8_t, false>(args, shifts, sums, i, first, channels);
      else if (args.residual_type == DType::kInt8)
        write_codes<int8_t, true>(args, shifts, sums, i, first, channels);
      else
        write_codes<uint8_t, true>(args, shifts, sums, i, first, channels);
    }
  }
}

// ---- memory of a thread ---------------------------------------------------------------------------------------------

// Kept between calls, so that a warm layer allocates nothing.
struct Scratch {
  std::vector<uint8_t> input;
  std::vector<const uint8_t*> rows;
  std::vector<Segment> segments;
  std::vector<int32_t> shifts;
  alignas(64) int32_t sums[kMaxTile];

  uint8_t* aligned_input(int64_t bytes) {
    if (static_cast<int64_t>(input.size()) < bytes + 64) input.resize(static_cast<size_t>(bytes + 64));
    return input.data() + (64 - reinterpret_cast<uintptr_t>(input.data()) % 64) % 64;
  }
};

Scratch& scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

QUANTRAIN_INLINE void copy_bytes(const uint8_t* __restrict__ from, uint8_t* __restrict__ to, int64_t n, uint8_t flip) {
  if (!flip) {
    std::memcpy(to, from, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ flip;
}

template <typename T>
QUANTRAIN_INLINE void widen(const T* __restrict__ from, int16_t* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// n codes as bytes, the signed ones 128 too large, or as int16.
QUANTRAIN_INLINE void copy_codes(const uint8_t* from, uint8_t* to, int64_t n, bool bytes, bool is_signed) {
  if (bytes)
    copy_bytes(from, to, n, is_signed ? 0x80 : 0);
  else if (is_signed)
    widen(reinterpret_cast<const int8_t*>(from), reinterpret_cast<int16_t*>(to), n);
  else
    widen(from, reinterpret_cast<int16_t*>(to), n);
}

// Rows [begin, end) of one group of channels, as long as one copy of their input stays in the cache.
class Band {
 public:
  Band(const FixedPointConvArgs& args, const FixedPointConvPlan& plan, bool bytes)
      : args_(args), plan_(plan), bytes_(bytes), memory_(scratch()) {
    pixel_bytes_ = bytes ? args.c : 2 * args.c;
    const int64_t columns = plan.flat ? plan.row_pixels : args.w + 2 * args.padding_w;
    pitch_ = plan.direct ? args.w * args.c : columns * pixel_bytes_;
    run_ = run_pixels(plan.row_pixels, plan.direct);
  }

  int run() const { return run_; }
  int64_t step() const { return plan_.flat ? pixel_bytes_ : args_.stride_w * pixel_bytes_; }
  int64_t pitch() const { return pitch_; }

  // The segments of as many rows as fit, at least one; returns the first row that is left.
  int64_t load(int64_t begin, int64_t end, int run) {
    memory_.rows.clear();
    const int64_t last = plan_.flat     ? load_flat(begin, end)
                         : plan_.direct ? load_direct(begin, end)
                                        : load_copy(begin, end);
    cut(begin, last, run);
    return last;
  }

 private:
  int64_t load_flat(int64_t begin, int64_t end) {
    const auto* input = static_cast<const uint8_t*>(args_.input);
    const int64_t row_bytes = plan_.row_pixels * pixel_bytes_;
    const int64_t last = std::min(end, begin + std::max<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1));
    if (plan_.direct) {
      for (int64_t row = begin; row < last; ++row) memory_.rows.push_back(input + row * row_bytes);
      return last;
    }
    uint8_t* copy = memory_.aligned_input((last - begin) * row_bytes + 16 * pixel_bytes_ + 16);
    const int64_t first = begin * kFlatRow, count = std::min(last * kFlatRow, plan_.pixels) - first;
    copy_codes(input + first * args_.c, copy, count * args_.c, bytes_, args_.input_signed);
    for (int64_t row = begin; row < last; ++row) memory_.rows.push_back(copy + (row - begin) * row_bytes);
    return last;
  }

  int64_t load_direct(int64_t begin, int64_t end) {
    const auto* input = static_cast<const uint8_t*>(args_.input);
    const int64_t row_bytes = args_.stride_h * pitch_;
    const int64_t last = std::min(end, begin + std::max<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1));
    for (int64_t row = begin; row < last; ++row)
      memory_.rows.push_back(input + row / args_.oh * args_.h * pitch_ + row % args_.oh * row_bytes);
    return last;
  }

  // Rows of one image share rows of the copy, so an image's rows are taken in one piece: a second piece would
  // have rows of its own between the two, which the copy below does not have.
  int64_t load_copy(int64_t begin, int64_t end) {
    const int64_t budget = kBandBytes / std::max<int64_t>(pitch_, 1);
    int64_t taken = 0;   // rows of the copy that are filled
    int64_t needed = 0;  // rows of the copy for [begin, last)
    int64_t last = begin;
    while (last < end) {
      const int64_t left = std::min(args_.oh - last % args_.oh, end - last);
      const int64_t rows = std::min(left, std::max<int64_t>(rows_that_fit(budget - needed), needed == 0 ? 1 : 0));
      if (rows == 0) break;
      needed += copied_rows(rows);
      last += rows;
      if (rows < left) break;
    }
    uint8_t* copy = memory_.aligned_input(needed * pitch_ + 16 * args_.stride_w * pixel_bytes_ + 16);
    for (int64_t row = begin; row < last;) {
      const int64_t rows = std::min(args_.oh - row % args_.oh, last - row);
      const int64_t height = copied_rows(rows);
      copy_rows(row / args_.oh, row % args_.oh * args_.stride_h - args_.padding_h, height, copy + taken * pitch_);
      for (int64_t y = 0; y < rows; ++y) memory_.rows.push_back(copy + (taken + y * args_.stride_h) * pitch_);
      taken += height;
      row += rows;
    }
    return last;
  }

  // Rows of the copy that this many neighbouring rows of output read, and how many of those a copy of this many rows
  // serves.
  int64_t copied_rows(int64_t rows) const { return (rows - 1) * args_.stride_h + args_.kh; }
  int64_t rows_that_fit(int64_t copied) const {
    return copied < args_.kh ? 0 : (copied - args_.kh) / args_.stride_h + 1;  // a negative quotient rounds up
  }

  // Rows top to top + height of image n, padded with zeros.
  void copy_rows(int64_t n, int64_t top, int64_t height, uint8_t* to) const {
    const auto* image = static_cast<const uint8_t*>(args_.input) + n * args_.h * args_.w * args_.c;
    const int zero = bytes_ && args_.input_signed ? 0x80 : 0;
    const auto border = static_cast<size_t>(args_.padding_w * pixel_bytes_);
    for (int64_t y = top; y < top + height; ++y, to += pitch_) {
      if (y < 0 || y >= args_.h) {
        std::memset(to, zero, static_cast<size_t>(pitch_));
        continue;
      }
      std::memset(to, zero, border);
      copy_codes(image + y * args_.w * args_.c, to + border, args_.w * args_.c, bytes_, args_.input_signed);
      std::memset(to + border + args_.w * pixel_bytes_, zero, border);
    }
  }

  void cut(int64_t begin, int64_t end, int run) {
    memory_.segments.clear();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * plan_.row_pixels, pixels = std::min(plan_.row_pixels, plan_.pixels - first);
      const uint8_t* x = memory_.rows[static_cast<size_t>(row - begin)];
      for (int64_t p = 0; p < pixels; p += run) {
        const int64_t back = pixels >= run ? std::max<int64_t>(p + run - pixels, 0) : 0;
        memory_.segments.push_back({x + (p - back) * step(), first + p - back, static_cast<int>(back),
                                    static_cast<int>(std::min<int64_t>(run, pixels - p + back))});
      }
    }
  }

  const FixedPointConvArgs& args_;
  const FixedPointConvPlan& plan_;
  bool bytes_;
  Scratch& memory_;
  int64_t pixel_bytes_, pitch_;
  int run_;
};

}  // namespace

// ---- packing --------------------------------------------------------------------------------------------------------

FixedPointConvKernel::FixedPointConvKernel(const FixedPointConvArgs& args, Int8Isa isa)
    : path_(args.groups == 1                                 ? Path::kTiles
            : args.groups == args.c && args.groups == args.o ? Path::kDepthwise
                                                             : Path::kPlain),
      isa_(isa),
      row_words_((args.kw * args.c + (takes_bytes(isa) ? 3 : 1)) / (takes_bytes(isa) ? 4 : 2)),
      blocks_((args.o + kBlock - 1) / kBlock),
      bound_(0),
      weight_(nullptr) {
  const int64_t row = args.kh * args.kw * (args.c / std::max<int64_t>(args.groups, 1));
  const int64_t largest = args.input_signed ? 128 : 255;
  for (int64_t o = 0; o < args.o; ++o) {
    int64_t sum = args.bias ? std::abs(static_cast<int64_t>(args.bias[o])) : 0;
    for (int64_t i = 0; i < row; ++i) sum += largest * std::abs(static_cast<int>(args.weight[o * row + i]));
    bound_ = std::max(bound_, sum);
  }
  if (path_ == Path::kTiles) pack(args);
  if (path_ == Path::kDepthwise) {
    memory_.resize(static_cast<size_t>((args.kh * args.kw * args.c + 1) / 2));
    auto* w = reinterpret_cast<int16_t*>(memory_.data());
    for (int64_t o = 0; o < args.o; ++o)
      for (int64_t tap = 0; tap < args.kh * args.kw; ++tap)
        w[tap * args.c + o] = args.weight[o * args.kh * args.kw + tap];
    weight_ = memory_.data();
  }
}

void FixedPointConvKernel::pack(const FixedPointConvArgs& args) {
  const bool bytes = takes_bytes(isa_);
  const int64_t row = args.kw * args.c, block_words = args.kh * row_words_ * kBlock, per_word = bytes ? 4 : 2;
  memory_.assign(static_cast<size_t>(blocks_ * block_words + kBlock), 0u);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  uint32_t* packed = memory_.data() + (64 - address % 64) % 64 / 4;
  weight_ = packed;
  start_.assign(static_cast<size_t>(blocks_ * kBlock), 0);
  for (int64_t o = 0; o < args.o; ++o) {
    uint32_t sum = 0;  // unsigned: parts may wrap
    for (int64_t ky = 0; ky < args.kh; ++ky) {
      const int8_t* w = args.weight + (o * args.kh + ky) * row;
      uint32_t* words = packed + o / kBlock * block_words + ky * row_words_ * kBlock + o % kBlock;
      for (int64_t i = 0; i < row; ++i) {
        sum += static_cast<uint32_t>(w[i]);
        const int64_t lane = i % per_word;
        words[i / per_word * kBlock] |= bytes ? static_cast<uint32_t>(static_cast<uint8_t>(w[i])) << 8 * lane
                                              : static_cast<uint32_t>(static_cast<uint16_t>(w[i])) << 16 * lane;
      }
    }
    // A signed input is taken 128 too large: the sums begin with what that adds.
    const uint32_t bias = args.bias ? static_cast<uint32_t>(args.bias[o]) : 0u;
    start_[static_cast<size_t>(o)] = static_cast<int32_t>(bias - (bytes && args.input_signed ? 128u * sum : 0u));
  }
}

// ---- running --------------------------------------------------------------------------------------------------------

FixedPointConvPlan FixedPointConvKernel::plan(const FixedPointConvArgs& args) const {
  FixedPointConvPlan plan{};
  plan.pixels = args.n * args.oh * args.ow;
  plan.rows = args.n * args.oh;
  plan.row_pixels = args.ow;
  const int64_t depth = args.kh * args.kw * (args.c / args.groups);
  plan.group_blocks = blocks_;
  int64_t groups = 1;
  if (path_ == Path::kTiles) {
    const bool unpadded = args.padding_h == 0 && args.padding_w == 0;
    plan.flat = args.kh == 1 && args.kw == 1 && args.stride_h == 1 && args.stride_w == 1 && unpadded;
    plan.direct = unpadded && takes_bytes(isa_) && !args.input_signed && args.kw * args.c % 4 == 0;
    if (plan.flat) {
      plan.row_pixels = std::min(plan.pixels, kFlatRow);
      plan.rows = (plan.pixels + kFlatRow - 1) / kFlatRow;
    }
    const int64_t block_bytes = std::max<int64_t>(depth * kBlock, 1);
    const int64_t fitting = std::max<int64_t>(kGroupBytes / block_bytes / 4 * 4, 4);
    plan.group_blocks = std::min(blocks_, plan.rows < 8 ? std::min<int64_t>(fitting, 4) : fitting);
    groups = (blocks_ + plan.group_blocks - 1) / plan.group_blocks;
  }
  plan.tasks = plan.rows * groups;
  const int64_t macs = std::max<int64_t>(plan.row_pixels * std::max<int64_t>(depth, 8) * args.o / groups, 1);
  plan.grain = std::max<int64_t>(kGrainMacs / macs, 1);
  return plan;
}

void FixedPointConvKernel::run(const FixedPointConvArgs& args, const FixedPointConvPlan& plan, int64_t begin,
                               int64_t end) const {
  Scratch& memory = scratch();
  if (path_ == Path::kPlain) {
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row)
        args.input_signed ? plain_row<int8_t>(args, row) : plain_row<uint8_t>(args, row);
    });
    return;
  }
  const Shifts shifts = shifts_of(args, blocks_, bound_, memory.shifts);
  if (path_ == Path::kDepthwise) {
    const auto* w = reinterpret_cast<const int16_t*>(weight_);
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row)
        args.input_signed ? depthwise_row<int8_t>(args, w, shifts, row) : depthwise_row<uint8_t>(args, w, shifts, row);
    });
    return;
  }
  Band band(args, plan, takes_bytes(isa_));
  // The last row of a sequence may be shorter than a run: then its pixels go one by one.
  Tiles tiles = tiles_of(isa_, band.run());
  const int64_t rest = plan.flat ? plan.pixels % kFlatRow : 0;
  const int64_t block_words = args.kh * row_words_ * kBlock;
  while (begin < end) {
    const int64_t group = begin / plan.rows, first_row = begin % plan.rows;
    const int64_t rows_end = std::min(plan.rows, first_row + end - begin);
    const int64_t first_block = group * plan.group_blocks,
                  last_block = std::min(blocks_, first_block + plan.group_blocks);
    for (int64_t row = first_row; row < rows_end;) {
      const bool short_row = plan.direct && rest != 0 && row == plan.rows - 1 && rest < band.run();
      const Tiles& now = short_row ? (tiles = tiles_of(isa_, 1)) : tiles;
      const int64_t limit =
          plan.direct && rest != 0 && rest < band.run() && !short_row ? std::min(rows_end, plan.rows - 1) : rows_end;
      const int64_t next = band.load(row, limit, now.pixels);
      for (int64_t block = first_block; block < last_block;) {
        const TileShape& shape = last_block - block >= now.most.blocks ? now.most : now.last;
        const int64_t channels = std::min<int64_t>(shape.blocks * kBlock, args.o - block * kBlock);
        const std::vector<Segment>& segments = memory.segments;
        for (size_t s = 0; s < segments.size(); s += static_cast<size_t>(shape.segments)) {
          const Segment& one = segments[s];
          const bool both = shape.segments == 2 && s + 1 < segments.size();
          const Segment& two = both ? segments[s + 1] : one;
          (both ? shape.tile : shape.alone)({{one.x, two.x},
                                             band.step(),
                                             band.pitch(),
                                             args.kh,
                                             row_words_,
                                             weight_ + block * block_words,
                                             start_.data() + block * kBlock,
                                             memory.sums});
          const int64_t stride = shape.blocks * kBlock;
          if (both && one.skip == 0 && two.skip == 0 && two.pixel == one.pixel + now.pixels) {
            write_segment(args, shifts, {one.x, one.pixel, 0, now.pixels + two.count}, memory.sums, stride,
                          block * kBlock, channels);
            continue;
          }
          write_segment(args, shifts, one, memory.sums, stride, block * kBlock, channels);
          if (both)
            write_segment(args, shifts, two, memory.sums + now.pixels * stride, stride, block * kBlock, channels);
        }
        block += shape.blocks;
      }
      row = next;
    }
    begin += rows_end - first_row;
    if (begin < end) tiles = tiles_of(isa_, band.run());
  }
}

}  // namespace quantrain::cpu

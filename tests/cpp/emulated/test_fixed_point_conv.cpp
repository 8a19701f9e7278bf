// The CUDA convolutions of the fixed_point family on a CPU, thread by thread: where each byte is read and written, and
// the codes, without a GPU.
#include "blocks.h"

#include <catch2/catch.hpp>

#include <string>

#include "csrc/cuda/fixed_point_conv/gather.cuh"
#include "csrc/cuda/fixed_point_conv/patch.cuh"
#include "csrc/cuda/fixed_point_conv/wgmma.cuh"

using namespace quantrain;
using namespace quantrain::cuda;
using namespace quantrain::cuda::conv;
using emulated::Buffer;
using emulated::generator;
using emulated::random_int;
using emulated::run_blocks;

namespace {

struct Shape {
  int n, h, w, c, o, kh, kw, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
};

struct Codes {
  DType residual = DType::kFloat32;  // kFloat32: none
  bool input_signed = false, output_signed = false, per_channel = true;
  int low_shift = 8, high_shift = 12, low_residual_shift = 0;
  bool sums = false;
};

// Both places of the weights, and one tile a block or several.
template <typename Engine, typename Tile>
void run_mma(const FixedPointConvArgs& a) {
  MmaParams p = mma_params(a);
  p.column_tiles = static_cast<int>(ceil_div(a.o, Tile::kTileN));
  p.row_tiles = static_cast<int>(ceil_div(p.pixels, Tile::kTileM));
  p.steps = static_cast<int>(ceil_div(a.kh * a.kw * a.c, Tile::kDepth));
  p.stages = Tile::kStages;
  const auto shared = [&](bool resident) {
    p.resident = resident;
    return lay_out(p, Tile::kTileM * Tile::kDepth, Tile::kTileN * Tile::kDepth, Tile::kRuleBytes);
  };
  if (shared(random_int(0, 1) == 1) > static_cast<int>(emulated::kSharedBytes)) shared(false);
  p.row_step = std::max(1, p.row_tiles / random_int(1, 3));
  const auto blocks = static_cast<unsigned>(p.row_step * p.column_tiles);
  run_blocks(blocks, 1, Tile::kThreads, [&] {
    a.input_signed ? fixed_point_conv_mma_kernel<Engine, Tile, true>(p)
                   : fixed_point_conv_mma_kernel<Engine, Tile, false>(p);
  });
}

template <int kWords>
void run_gather(const FixedPointConvArgs& a) {
  const GatherParams p = gather_params(a);
  const auto columns = static_cast<unsigned>(ceil_div(a.o, GatherShape::kTileN));
  run_blocks(std::min(2u, static_cast<unsigned>(p.row_tiles)), columns, GatherShape::kThreads, [&] {
    a.input_signed ? fixed_point_conv_gather_kernel<kWords, true>(p) : fixed_point_conv_gather_kernel<kWords, false>(p);
  });
}

template <int kC, int kSegments>
void run_patch(const FixedPointConvArgs& a) {
  PatchParams p = patch_params(a);
  lay_out_patch(p, kSegments);
  const auto columns = static_cast<unsigned>(ceil_div(a.o, PatchShape::kTileN));
  run_blocks(std::min(2u, static_cast<unsigned>(p.tiles)), columns, PatchShape::kThreads, [&] {
    a.input_signed ? fixed_point_conv_patch_kernel<kC, kSegments, true>(p)
                   : fixed_point_conv_patch_kernel<kC, kSegments, false>(p);
  });
}

template <typename Run>
void check(const Shape& s, const Codes& k, const Run& run) {
  FixedPointConvArgs a{};
  a.n = s.n, a.h = s.h, a.w = s.w, a.c = s.c, a.o = s.o, a.kh = s.kh, a.kw = s.kw, a.groups = 1;
  a.stride_h = s.stride_h, a.stride_w = s.stride_w, a.padding_h = s.padding_h, a.padding_w = s.padding_w;
  a.oh = (s.h + 2 * s.padding_h - s.kh) / s.stride_h + 1;
  a.ow = (s.w + 2 * s.padding_w - s.kw) / s.stride_w + 1;
  const auto outputs = static_cast<size_t>(a.n * a.oh * a.ow * a.o);
  const size_t residual_bytes = k.residual == DType::kInt32 ? 4 : 1;
  Buffer<uint8_t> input(static_cast<size_t>(a.n * a.h * a.w * a.c)), residual(outputs * residual_bytes);
  Buffer<int8_t> weight(static_cast<size_t>(a.o * a.kh * a.kw * a.c));
  Buffer<uint8_t> output(outputs * (k.sums ? 4 : 1));
  for (size_t i = 0; i < input.size; ++i) input.data[i] = static_cast<uint8_t>(generator());
  for (size_t i = 0; i < weight.size; ++i) weight.data[i] = static_cast<int8_t>(random_int(-127, 127));
  for (size_t i = 0; i < outputs; ++i) {
    if (k.residual == DType::kInt32)
      reinterpret_cast<int32_t*>(residual.data)[i] = random_int(-300000, 300000);
    else
      residual.data[i] = static_cast<uint8_t>(generator());
  }
  std::vector<int32_t> bias(s.o), shift(s.o), residual_shift(s.o);
  for (auto& value : bias) value = random_int(-40000, 40000);
  for (auto& value : shift) value = random_int(k.low_shift, k.high_shift);
  for (auto& value : residual_shift) value = random_int(k.low_residual_shift, 9);
  const bool has_residual = k.residual != DType::kFloat32;
  a.input = input.data, a.weight = weight.data, a.bias = bias.data(), a.output = output.data;
  a.input_signed = k.input_signed, a.output_signed = k.output_signed;
  a.shift = k.sums ? nullptr : shift.data();
  a.residual = has_residual ? residual.data : nullptr;
  a.residual_type = k.residual;
  a.residual_shift = residual_shift.data();
  a.shift_stride = a.residual_shift_stride = k.per_channel;
  emulated::readable = {input.range(), weight.range(), residual.range()};
  emulated::fault = nullptr;
  emulated::bank_conflicts = 0;
  run(a);

  size_t wrong = 0;
  for (size_t i = 0; i < outputs; ++i) {
    const auto channel = static_cast<int64_t>(i) % a.o, pixel = static_cast<int64_t>(i) / a.o;
    const int64_t ox = pixel % a.ow, oy = pixel / a.ow % a.oh, image = pixel / a.ow / a.oh;
    int32_t sum = bias[static_cast<size_t>(channel)];
    for (int64_t r = 0; r < a.kh; ++r) {
      for (int64_t t = 0; t < a.kw; ++t) {
        const int64_t y = oy * a.stride_h - a.padding_h + r, x = ox * a.stride_w - a.padding_w + t;
        if (y < 0 || y >= a.h || x < 0 || x >= a.w) continue;
        for (int64_t c = 0; c < a.c; ++c) {
          const uint8_t value = input.data[((image * a.h + y) * a.w + x) * a.c + c];
          sum += (k.input_signed ? static_cast<int8_t>(value) : value) *
                 weight.data[((channel * a.kh + r) * a.kw + t) * a.c + c];
        }
      }
    }
    if (k.sums) {
      wrong += reinterpret_cast<int32_t*>(output.data)[i] != sum;
      continue;
    }
    const auto rule = static_cast<size_t>(k.per_channel ? channel : 0);
    const int32_t other = k.residual == DType::kInt32   ? reinterpret_cast<int32_t*>(residual.data)[i]
                          : k.residual == DType::kInt8  ? static_cast<int8_t>(residual.data[i])
                          : k.residual == DType::kUInt8 ? residual.data[i]
                                                        : 0;
    wrong += output.data[i] != static_cast<uint8_t>(fixed_point_requantized_sum(
                                   sum, other, shift[rule], has_residual ? residual_shift[rule] : 0, k.output_signed));
  }
  INFO("n " << s.n << ", " << s.h << "x" << s.w << ", " << s.c << " -> " << s.o << ", " << s.kh << "x" << s.kw);
  CHECK(wrong == 0);
  CHECK(output.end_is_untouched());
  CHECK(std::string(emulated::fault ? emulated::fault : "") == "");
  CHECK(emulated::bank_conflicts == 0);
}

constexpr auto kNone = DType::kFloat32, kU8 = DType::kUInt8, kI8 = DType::kInt8, kI32 = DType::kInt32;

template <typename Tile, typename Engine = MmaEngine>
void check_tile() {
  const auto run = [](const FixedPointConvArgs& a) { run_mma<Engine, Tile>(a); };
  check({2, 7, 5, 64, 64, 1, 1}, {}, run);
  check({9, 9, 9, 32, 64, 3, 3, 1, 1, 1, 1}, {kNone, false, true, true, 0, 15}, run);
  check({3, 6, 5, 16, 48, 3, 3, 1, 1, 1, 1}, {kU8, false, false, true, 8, 14}, run);
  check({2, 9, 11, 48, 80, 3, 3, 2, 2, 1, 1}, {kI8, true, true, true, 7, 14, -3}, run);
  check({9, 7, 9, 64, 88, 1, 1}, {kU8, false, true, true, 10, 15}, run);
  check({9, 7, 9, 64, 80, 1, 1}, {kI8, false, false, false, 7, 9}, run);
  check({2, 8, 8, 256, 272, 1, 1, 2, 2}, {kI32, false, true, true, 10, 12, -3}, run);
  check({1, 9, 9, 80, 20, 2, 3, 1, 2, 0, 2}, {kI32, true, false, false}, run);
  check({2, 5, 5, 128, 33, 3, 1, 1, 1, 1, 0}, {kI8, false, true, true, -2, 30, -3}, run);
  check({70, 1, 1, 272, 144, 1, 1}, {kNone, true, false, true, 8, 12, 0, true}, run);
  check({5, 3, 3, 16, 7, 3, 3, 1, 1, 1, 1}, {kNone, true, false, true, 8, 12, 0, true}, run);
}

}  // namespace

TEST_CASE("mma.sync tiles give the codes of a plain loop", "[fixed_point_conv]") {
  check_tile<MmaTile<TileShape<64, 64, 2, 2>, 64, 4, 5>>();
  check_tile<MmaTile<TileShape<64, 64, 2, 2>, 128, 3, 4>>();
  check_tile<MmaTile<TileShape<128, 64, 2, 2>, 64, 4, 4>>();
  check_tile<MmaTile<TileShape<128, 64, 2, 2>, 128, 3, 3>>();
  check_tile<MmaTile<TileShape<128, 128, 2, 4>, 64, 4, 2>>();
  check_tile<MmaTile<TileShape<128, 128, 2, 4>, 128, 3, 2>>();
  check_tile<MmaTile<TileShape<128, 256, 2, 4>, 64, 4, 1>>();
}

TEST_CASE("wgmma tiles give the codes of a plain loop", "[fixed_point_conv]") {
  check_tile<WgmmaTile<128, 128, 128, 3, 2>, WgmmaEngine>();
  check_tile<WgmmaTile<128, 128, 64, 5, 2>, WgmmaEngine>();
  check_tile<WgmmaTile<128, 64, 128, 3, 3>, WgmmaEngine>();
  check_tile<WgmmaTile<128, 64, 64, 4, 3>, WgmmaEngine>();
  check_tile<WgmmaTile<64, 128, 128, 3, 3>, WgmmaEngine>();
  check_tile<WgmmaTile<64, 64, 128, 4, 3>, WgmmaEngine>();
}

TEST_CASE("patches of an image give the codes of a plain loop", "[fixed_point_conv]") {
  check({4, 23, 41, 3, 64, 7, 7, 2, 2, 3, 3}, {}, run_patch<3, 2>);
  check({4, 13, 13, 3, 24, 7, 7, 2, 2, 3, 3}, {kU8, true, true}, run_patch<3, 2>);
  check({4, 9, 27, 3, 80, 5, 5, 1, 3, 4, 4}, {kNone, false, true, true, 6, 11, 0, true}, run_patch<3, 2>);
  check({4, 9, 27, 1, 5, 8, 8, 1, 3, 4, 4}, {kI32, false, true, true, 6, 11, -3}, run_patch<1, 2>);
  check({4, 15, 13, 3, 16, 3, 3, 1, 1, 1, 1}, {kI8, true, false, true, 7, 10}, run_patch<3, 1>);
  check({4, 9, 27, 3, 16, 3, 3, 1, 1, 1, 1}, {kNone, false, true, true, -2, 20}, run_patch<3, 1>);
  check({6, 5, 2, 3, 16, 3, 3, 1, 1, 1, 1}, {kI8, false, false, true, 4, 7}, run_patch<3, 1>);
  check({2, 28, 27, 1, 16, 3, 3, 1, 1, 1, 1}, {kNone, false, false, true, 6, 9}, run_patch<1, 1>);
  check({4, 5, 1, 1, 16, 3, 3, 1, 1, 1, 1}, {kI8, true, false, true, 4, 7}, run_patch<1, 1>);
  check({2, 28, 27, 4, 72, 4, 4, 2, 1, 1, 0}, {kI32, false, true, true, 6, 11, -3}, run_patch<4, 1>);
}

TEST_CASE("gathered windows give the codes of a plain loop", "[fixed_point_conv]") {
  check({2, 23, 21, 3, 64, 7, 7, 2, 2, 3, 3}, {}, run_gather<6>);
  check({1, 13, 13, 3, 20, 7, 7, 2, 2, 3, 3}, {kU8, true, true}, run_gather<6>);
  check({2, 15, 13, 3, 16, 3, 3, 1, 1, 1, 1}, {kI8, true, false, true, 7, 10}, run_gather<3>);
  check({2, 28, 27, 1, 16, 3, 3, 1, 1, 1, 1}, {kNone, false, false, true, 6, 9}, run_gather<0>);
  check({1, 9, 9, 20, 72, 3, 3, 2, 1, 1, 1}, {kI32, false, true, true, -1, 20, -3}, run_gather<0>);
  check({3, 5, 5, 7, 5, 2, 3, 1, 1, 1, 2}, {kNone, true, true, true, 7, 10, 0, true}, run_gather<0>);
  check({300, 1, 1, 30, 10, 1, 1}, {kNone, true, true, true, 7, 10, 0, true}, run_gather<0>);
}

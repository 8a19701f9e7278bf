// int8_mm's kernel for sm_80 on a CPU, thread by thread: where each byte is read and written, and the sums, without a
// GPU.
#include "blocks.h"

#include <catch2/catch.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "csrc/cuda/int8_mm/mma.cuh"

using namespace quantrain;
using namespace quantrain::cuda;
using emulated::Buffer;
using emulated::random_int;

namespace {

struct Shape {
  int64_t m, n, k, outliers = 0;
};

void fill(Buffer<int8_t>& codes, int low, int high) {
  for (size_t i = 0; i < codes.size; ++i) codes.data[i] = static_cast<int8_t>(random_int(low, high));
}

void fill(Buffer<float>& values) {
  for (size_t i = 0; i < values.size; ++i) values.data[i] = static_cast<float>(random_int(1, 64)) / 64.0f;
}

void check(const Shape& s) {
  const auto size = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
  Buffer<int8_t> a(size(s.m, s.k)), b(size(s.n, s.k)), planes(size(s.m, 2 * s.outliers)), apart(size(s.n, s.outliers));
  Buffer<float> scale(size(s.m, 2)), b_scale(size(s.n, 1)), bias(size(s.n, 1)), d(size(s.m, s.n));
  fill(a, -127, 127);
  fill(b, -128, 127);
  fill(planes, -64, 63);
  fill(apart, -128, 127);
  fill(scale);
  fill(b_scale);
  fill(bias);
  std::vector<int> shift(static_cast<size_t>(s.m));
  for (size_t row = 0; row < shift.size(); ++row) {
    shift[row] = random_int(0, s.outliers > 0 ? int8_outlier_limit(s.outliers) : 0);
    scale.data[2 * row + 1] = scale.data[2 * row] * static_cast<float>(1 << shift[row]);
  }
  Int8MmArgs args{a.data, b.data,          scale.data, b_scale.data, 2,   1,     bias.data,
                  d.data, DType::kFloat32, s.m,        s.n,          s.k, false, nullptr};
  if (s.outliers > 0) args.outliers = {s.outliers, planes.data, apart.data, scale.data};
  emulated::readable = {a.range(), b.range()};
  emulated::fault = nullptr;
  emulated::bank_conflicts = 0;
  const auto row_tiles = static_cast<int>((s.m + mma::kTile - 1) / mma::kTile);
  const auto column_tiles = static_cast<int>((s.n + mma::kTile - 1) / mma::kTile);
  emulated::run_blocks(static_cast<unsigned>(row_tiles * column_tiles), 1, mma::kThreads, [&] {
    if (s.outliers > 0)
      mma::int8_mm_kernel<float, true>(args, row_tiles, column_tiles);
    else
      mma::int8_mm_kernel<float, false>(args, row_tiles, column_tiles);
  });

  size_t wrong = 0;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      int64_t sum = 0;
      for (int64_t c = 0; c < s.outliers; ++c) {
        const int q = 128 * planes.data[i * 2 * s.outliers + c] + planes.data[(i * 2 + 1) * s.outliers + c];
        sum += int64_t{q} * apart.data[j * s.outliers + c];
      }
      sum *= int64_t{1} << shift[static_cast<size_t>(i)];
      for (int64_t c = 0; c < s.k; ++c) sum += int64_t{a.data[i * s.k + c]} * b.data[j * s.k + c];
      const float want = (static_cast<float>(sum) * b_scale.data[j]) * scale.data[2 * i] + bias.data[j];
      wrong += d.data[i * s.n + j] != want;
    }
  }
  INFO(s.m << " x " << s.n << " x " << s.k << ", " << s.outliers << " outlier columns");
  CHECK(wrong == 0);
  CHECK(d.end_is_untouched());
  CHECK(std::string(emulated::fault ? emulated::fault : "") == "");
  CHECK(emulated::bank_conflicts == 0);
}

}  // namespace

TEST_CASE("int8_mm's tiles", "[int8_mm]") {
  for (const Shape& s : {Shape{1, 1, 16}, {5, 130, 80}, {128, 128, 64}, {200, 72, 272}, {131, 257, 48}}) check(s);
}

TEST_CASE("int8_mm's sums begin with outlier columns", "[int8_mm]") {
  for (const Shape& s :
       {Shape{1, 1, 16, 1}, {7, 130, 80, 3}, {128, 128, 64, 16}, {150, 72, 272, 32}, {131, 257, 48, 40}})
    check(s);
}

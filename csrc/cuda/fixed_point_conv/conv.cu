#include "csrc/cuda/fixed_point_conv/conv.h"

#include <cstdlib>
#include <string_view>

#include "csrc/cuda/fixed_point_conv/conv.cuh"

// The choice among the convolution kernels, and those without tensor cores.

namespace quantrain::cuda {
namespace conv {
namespace {

constexpr int kThreads = 256;
constexpr int kDepthwisePixels = 4;  // of a row that a thread computes

// One thread per output, any shape.
__global__ void __launch_bounds__(kThreads)
    fixed_point_conv_plain_kernel(const __grid_constant__ FixedPointConvArgs g) {
  const int64_t total = g.n * g.oh * g.ow * g.o, group_c = g.c / g.groups, group_o = g.o / g.groups;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t channel = index % g.o, pixel = index / g.o;
    const int64_t ox = pixel % g.ow, oy = pixel / g.ow % g.oh, image = pixel / g.ow / g.oh;
    const int8_t* weight = g.weight + channel * g.kh * g.kw * group_c;
    int32_t sum = 0;
    for (int64_t r = 0; r < g.kh; ++r) {
      const int64_t y = oy * g.stride_h - g.padding_h + r;
      for (int64_t s = 0; s < g.kw; ++s, weight += group_c) {
        const int64_t x = ox * g.stride_w - g.padding_w + s;
        if (y < 0 || y >= g.h || x < 0 || x >= g.w) continue;
        const int64_t first = ((image * g.h + y) * g.w + x) * g.c + channel / group_o * group_c;
        const auto* const bytes = static_cast<const uint8_t*>(g.input) + first;
        for (int64_t i = 0; i < group_c; ++i)
          sum += (g.input_signed ? static_cast<int8_t>(bytes[i]) : bytes[i]) * weight[i];
      }
    }
    write_output(g, index, channel, sum);
  }
}

// Threads (words, pixel groups): a thread has four channels of kDepthwisePixels neighbours in a row. Weights of the
// block's channels lie in shared memory as [taps, words], four channels per word.
template <bool kInputSigned>
__global__ void __launch_bounds__(kThreads)
    fixed_point_conv_depthwise_kernel(const __grid_constant__ FixedPointConvArgs g, FastDivisor row_groups,
                                      FastDivisor rows, uint32_t groups) {
  extern __shared__ uint32_t taps_shared[];
  const int taps = static_cast<int>(g.kh * g.kw), kw = static_cast<int>(g.kw);
  const int64_t first_channel = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * 4;
  const bool inside = first_channel < g.c;
  for (int tap = threadIdx.y; tap < taps; tap += blockDim.y) {
    uint32_t word = 0;
    for (int i = 0; inside && i < 4; ++i)
      word |= static_cast<uint32_t>(static_cast<uint8_t>(g.weight[(first_channel + i) * taps + tap])) << i * 8;
    taps_shared[tap * blockDim.x + threadIdx.x] = word;
  }
  __syncthreads();
  if (!inside) return;
  const int h = static_cast<int>(g.h), w = static_cast<int>(g.w);
  const CodeRange range(g.output_signed);
  int32_t start[4];
  float unit[4];
  bool fast = g.shift && !g.residual;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int bias = g.bias ? g.bias[first_channel + i] : 0;
    const int shift = g.shift ? g.shift[(first_channel + i) * g.shift_stride] : 0;
    fast = fast && is_fast(bias, shift, taps);
    start[i] = bias + code_base(g.output_signed);
    unit[i] = unit_of(min(max(shift, 0), kFastShift));
  }
  for (uint32_t group = blockIdx.x * blockDim.y + threadIdx.y; group < groups; group += gridDim.x * blockDim.y) {
    const uint32_t line = row_groups.divide(group);  // image * oh + oy
    const int ox0 = static_cast<int>(group - line * row_groups.divisor) * kDepthwisePixels;
    const uint32_t image = rows.divide(line);
    const int y0 = static_cast<int>((line - image * rows.divisor) * g.stride_h - g.padding_h);
    const int x0 = static_cast<int>(ox0 * g.stride_w - g.padding_w);
    int sums[kDepthwisePixels][4];
#pragma unroll
    for (int q = 0; q < kDepthwisePixels; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[q][i] = 0;
    for (int tap = 0, r = 0, s = 0; tap < taps; ++tap) {
      const uint32_t weight = taps_shared[tap * blockDim.x + threadIdx.x];
      const int y = y0 + r;
      const auto* const line_bytes =
          static_cast<const uint8_t*>(g.input) + (static_cast<int64_t>(image) * h + y) * w * g.c + first_channel;
#pragma unroll
      for (int q = 0; q < kDepthwisePixels; ++q) {
        const int x = x0 + q * static_cast<int>(g.stride_w) + s;
        if (y < 0 || y >= h || x < 0 || x >= w) continue;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(line_bytes + x * g.c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int value = kInputSigned ? static_cast<int8_t>(word >> i * 8) : static_cast<uint8_t>(word >> i * 8);
          sums[q][i] += value * static_cast<int8_t>(weight >> i * 8);
        }
      }
      if (++s == kw) {
        s = 0;
        ++r;
      }
    }
#pragma unroll
    for (int q = 0; q < kDepthwisePixels; ++q) {
      if (ox0 + q >= g.ow) continue;
      const int64_t index = (static_cast<int64_t>(line) * g.ow + ox0 + q) * g.c + first_channel;
      if (fast) {
        uint32_t code[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) code[i] = rounded(sums[q][i], ChannelRule(start[i], unit[i], range));
        *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(g.output) + index) =
            low_bytes(code[0], code[1], code[2], code[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) write_any(g, index + i, first_channel + i, sums[q][i]);
      }
    }
  }
}

bool on_words(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 4 == 0; }

}  // namespace

bool suits_depthwise(const FixedPointConvArgs& a) {
  const int64_t groups = a.n * a.oh * ceil_div(a.ow, kDepthwisePixels);
  return a.groups == a.c && a.o == a.c && a.c > 1 && a.c % 4 == 0 && a.kh * a.kw <= 256 && groups < (1ll << 31) &&
         a.c < (1 << 22) && a.w < (1 << 20) && a.h < (1 << 20) && on_words(a.input) && on_words(a.output);
}

int launch_depthwise(const FixedPointConvArgs& a, void* stream) {
  const int64_t row_groups = ceil_div(a.ow, kDepthwisePixels), groups = a.n * a.oh * row_groups;
  const unsigned words = a.c >= 128 ? 32 : a.c >= 64 ? 16 : 8;
  const dim3 block(words, kThreads / words);
  const int64_t blocks = ceil_div(groups, block.y * 4);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(a.c, words * 4)));
  dispatch_bool(a.input_signed, [&](auto is_signed) {
    fixed_point_conv_depthwise_kernel<is_signed.value>
        <<<grid, block, static_cast<size_t>(a.kh * a.kw * words) * 4, static_cast<cudaStream_t>(stream)>>>(
            a, FastDivisor(static_cast<uint32_t>(row_groups)), FastDivisor(static_cast<uint32_t>(a.oh)),
            static_cast<uint32_t>(groups));
  });
  return cudaGetLastError();
}

int launch_plain(const FixedPointConvArgs& a, void* stream) {
  fixed_point_conv_plain_kernel<<<grid_for(a.n * a.oh * a.ow * a.o, kThreads), kThreads, 0,
                                  static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace conv

int fixed_point_conv2d(const FixedPointConvArgs& a, void* stream) {
  if (a.n * a.oh * a.ow * a.o == 0) return cudaSuccess;
  // Windows of padding alone: the other kernels read the nearest pixel of the image in place of one outside, the plain
  // one reads none.
  if (a.h * a.w * a.c == 0) return conv::launch_plain(a, stream);
  const char* const variable = std::getenv("QUANTRAIN_CUDA_FIXED_POINT_CONV");
  const std::string_view asked = variable ? variable : "";
  if (asked == "plain") return conv::launch_plain(a, stream);
  if (asked == "gather") return conv::suits_gather(a) ? conv::launch_gather(a, stream) : cudaErrorInvalidValue;
  if (asked == "patch") return conv::suits_patch(a) ? conv::launch_patch(a, stream) : cudaErrorInvalidValue;
  if (asked == "depthwise") return conv::suits_depthwise(a) ? conv::launch_depthwise(a, stream) : cudaErrorInvalidValue;
  if (!asked.empty()) return conv::suits_mma(a) ? conv::launch_mma(a, variable, stream) : cudaErrorInvalidValue;
  if (conv::suits_mma(a)) return conv::launch_mma(a, "", stream);
  if (conv::suits_patch(a)) return conv::launch_patch(a, stream);
  if (conv::suits_gather(a)) return conv::launch_gather(a, stream);
  if (conv::suits_depthwise(a)) return conv::launch_depthwise(a, stream);
  return conv::launch_plain(a, stream);
}

}  // namespace quantrain::cuda

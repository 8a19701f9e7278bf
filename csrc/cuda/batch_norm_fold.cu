#include "csrc/cuda/batch_norm.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/joins.cuh"

// A convolution's weight folded with its batch norm and fake-quantized: a thread block a row, which is read from the
// first cache the second time. Compiled with --fmad=false, as fake_quant.cu.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 128;

// Of a block's values, for every thread, in a fixed order.
template <typename Join>
__device__ __forceinline__ float joined(float value, const Join& join) {
  __shared__ float of_warp[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();  // what was joined before may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) value = join(value, of_warp[warp]);
  return value;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) fold_kernel(const FoldArgs a) {
  const int64_t row = blockIdx.x;
  const T* __restrict__ weight = static_cast<const T*>(a.weight) + row * a.columns;
  Out* __restrict__ output = static_cast<Out*>(a.output) + row * a.columns;
  const float scale = folding_scale(a.gamma[row], a.variance[row], a.eps);
  QParams p;
  if (a.step) {
    p = make_qparams(load_parameter(a.step + row), 0.0f);
  } else {
    float low = Min::kNothing, high = Max::kNothing;
    for (int64_t k = threadIdx.x; k < a.columns; k += kThreads) {
      const float value = to_float(weight[k]) * scale;
      low = Min{}(low, value);
      high = Max{}(high, value);
    }
    low = joined(low, Min{});
    high = joined(high, Max{});
    p = quantrain::qparams_from_range(low, high, a.range, a.symmetric);
  }
  if (threadIdx.x == 0) {
    a.conv_scale[row] = scale;
    a.kept_variance[row] = a.variance[row];
  }
  // A warp's 32 elements are four bytes of the mask; every lane reaches the vote.
  const int64_t bytes = (a.columns + 7) / 8, last = (a.columns + 31) / 32 * 32;
  for (int64_t k = threadIdx.x; k < last; k += kThreads) {
    bool passes = false;
    if (k < a.columns) {
      const float v = unclamped_code(to_float(weight[k]) * scale, p);
      passes = code_in_range(v, a.range);
      output[k] = from_float<Out>(dequantized(clamp_code(v, a.range), p));
    }
    const uint32_t bits = __ballot_sync(0xffffffffu, passes);
    const int lane = threadIdx.x % 32;
    const int64_t byte = (k - lane) / 8 + lane;
    if (a.mask && lane < 4 && byte < bytes) a.mask[row * bytes + byte] = static_cast<uint8_t>(bits >> (8 * lane));
  }
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) fold_backward_kernel(const FoldBackwardArgs a) {
  const int64_t row = blockIdx.x, bytes = (a.columns + 7) / 8;
  const T* __restrict__ weight = static_cast<const T*>(a.weight) + row * a.columns;
  const Out* __restrict__ grad_output = static_cast<const Out*>(a.grad_output) + row * a.columns;
  T* __restrict__ grad_weight = static_cast<T*>(a.grad_weight) + row * a.columns;
  const uint8_t* __restrict__ mask = a.mask + row * bytes;
  const float gamma = a.gamma[row], variance = a.variance[row], scale = folding_scale(gamma, variance, a.eps);
  const QParams p = a.step ? make_qparams(load_parameter(a.step + row), 0.0f) : QParams{};
  float along = 0.0f, of_step = 0.0f;
  for (int64_t k = threadIdx.x; k < a.columns; k += kThreads) {
    const float given = to_float(grad_output[k]), w = to_float(weight[k]);
    const float g = mask[k / 8] >> (k % 8) & 1u ? given : 0.0f;
    along += g * w;
    if (a.step) of_step += given * learnable_gradient(w * scale, p, a.range).scale;
    grad_weight[k] = from_float<T>(g * scale);
  }
  if (a.step) {
    of_step = joined(of_step, Sum{});
    if (threadIdx.x == 0) a.grad_step[row] = of_step;
  }
  along = joined(along, Sum{});
  if (threadIdx.x != 0) return;
  a.grad_gamma[row] = folding_gradient(along + (a.grad_scale ? a.grad_scale[row] : 0.0f), gamma, variance, a.eps);
}

}  // namespace

int fold_fake_quantize(const FoldArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    dispatch_float(a.output_dtype, [&](auto* output) {
      fold_kernel<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(output)>>
          <<<static_cast<unsigned>(a.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    });
  });
  return cudaGetLastError();
}

int fold_fake_quantize_backward(const FoldBackwardArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    dispatch_float(a.output_dtype, [&](auto* output) {
      fold_backward_kernel<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(output)>>
          <<<static_cast<unsigned>(a.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda

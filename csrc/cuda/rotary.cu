#include "csrc/common/rotary.h"

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/int8.h"

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;

// A thread for each pair.
template <typename T, typename Angle>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const RotaryArgs a, int64_t pairs) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pairs) return;
  const auto half = static_cast<int>(a.size / 2), heads = static_cast<int>(a.heads);
  const int64_t of_head = index / half, token = of_head / heads;
  const auto i = static_cast<int>(index - of_head * half), head = static_cast<int>(of_head - token * heads);
  T* __restrict__ x = static_cast<T*>(a.x) + (token * a.all_heads + head) * a.size;
  const int64_t at = (a.one_sequence ? token % a.length : token) * a.size;
  const Angle* __restrict__ cos = static_cast<const Angle*>(a.cos) + at;
  const Angle* __restrict__ sin = static_cast<const Angle*>(a.sin) + at;
  const RotatedPair y = rotated(to_float(x[i]), to_float(x[i + half]), to_float(cos[i]), to_float(cos[i + half]),
                                to_float(sin[i]), to_float(sin[i + half]));
  x[i] = from_float<T>(y.low);
  x[i + half] = from_float<T>(y.high);
}

}  // namespace

int rotate_heads(const RotaryArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t pairs = a.tokens * a.heads * (a.size / 2);
  dispatch_float(a.dtype, [&](auto* type) {
    dispatch_float(a.angle_dtype, [&](auto* angle) {
      rotate_kernel<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(angle)>>
          <<<static_cast<unsigned>(ceil_div(pairs, kThreads)), kThreads, 0, stream>>>(a, pairs);
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda

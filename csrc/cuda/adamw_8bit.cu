#include "csrc/cuda/adamw_8bit.h"

#include "csrc/cuda/adamw_8bit.cuh"
#include "csrc/cuda/device.h"

// A warp takes a block of 256 elements, eight to a lane, from its loads to its codes without leaving its registers, and
// without waiting for another warp. One thread block per multiprocessor goes through a run of blocks, whatever tensors
// they belong to: the tables of codes are written to shared memory once, and no thread block ends much later than
// another. The list of tensors travels in the kernel's arguments (up to 32 KB of them since CUDA 12.1), so that a
// captured graph holds it.
//
// 10 bytes an element leave some 80 instructions, of which the integer unit can issue half. Hence tables that give a
// code with one load and one addition (csrc/common/dynamic_map.h), and codes that are packed by bytes of words.

namespace quantrain::cuda {
namespace {

constexpr int kSmallList = 160;  // tensors of a launch: GPT-2 has 148
constexpr int kLargeList = 416;  // 32 KB of arguments; longer lists take several launches

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename F>
__device__ __forceinline__ void dispatch_type(uint32_t type, const F& f) {
  switch (static_cast<DType>(type)) {
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// The last tensor whose first block is not after `block`.
template <int kCapacity>
__device__ __forceinline__ int find_tensor(const DeviceList<kCapacity>& list, int block) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 1) adamw_8bit_kernel(const __grid_constant__ DeviceList<kCapacity> list) {
  const AdamW8bitArgs& a = list.args;
  if (a.found_inf && *a.found_inf != 0.0f) return;
  extern __shared__ uint4 shared[];
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  tables.fill();
  const uint32_t lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto share = [&](unsigned block) { return static_cast<int>(int64_t{list.blocks} * block / gridDim.x); };
  const int begin = share(blockIdx.x), end = share(blockIdx.x + 1);
  const float lr = *a.lr, grad_factor = a.grad_scale ? inverse_scale(*a.grad_scale) : 1.0f;
  float counted = -1.0f;
  AdamW8bitFactors factors{};
  for (int t = find_tensor(list, begin); t < list.count && list.first_block[t] < end; ++t) {
    const int first = list.first_block[t], last = t + 1 < list.count ? list.first_block[t + 1] : list.blocks;
    const int from = max(begin, first), to = min(end, last);
    // Block i of all is for warp (i - begin) % kWarps, so that small tensors keep all warps busy.
    int block = from + (warp + kWarps - (from - begin) % kWarps) % kWarps;
    if (block >= to) continue;
    const float steps = *list.step[t];
    if (steps != counted) {
      counted = steps;
      factors = adamw_8bit_factors(a.beta1, a.beta2, a.eps, a.weight_decay, lr, grad_factor, steps);
      // From the kernel's arguments, where an instruction takes them without a register.
      factors.beta1 = list.beta1;
      factors.one_minus_beta1 = list.one_minus_beta1;
      factors.beta2 = list.beta2;
      factors.one_minus_beta2 = list.one_minus_beta2;
    }
    const uint32_t kind = list.kind[t];
    if (kind & kIsAligned) {
      const int stop = min(to, first + static_cast<int>(list.numel[t] / kStateBlock));
      dispatch_type(kind & 3u, [&](auto* param_type) {
        using P = std::remove_pointer_t<decltype(param_type)>;
        dispatch_type(kind >> 2 & 3u, [&](auto* grad_type) {
          using G = std::remove_pointer_t<decltype(grad_type)>;
          if (kind & kHasCodes)
            for (; block < stop; block += kWarps)
              whole_block<P, G, true>(list, t, factors, block - first, lane, tables);
          else
            for (; block < stop; block += kWarps)
              whole_block<P, G, false>(list, t, factors, block - first, lane, tables);
        });
      });
    }
    for (; block < to; block += kWarps) {
      const int64_t left = list.numel[t] - static_cast<int64_t>(block - first) * kStateBlock;
      const Work work{list.param[t],
                      list.grad[t],
                      list.exp_avg[t],
                      list.exp_avg_sq[t],
                      list.exp_avg_scale[t],
                      list.exp_avg_sq_scale[t],
                      list.mask[t],
                      factors,
                      static_cast<uint64_t>(list.base_block + first) * kDrawsOfBlock};
      any_block(work, kind, block - first, left < kStateBlock ? static_cast<int>(left) : kStateBlock, lane, tables,
                a.stochastic, a.philox);
    }
  }
}

constexpr int kCountThreads = 256;

template <int kCapacity>
struct StepList {
  const float* found_inf;  // [1], or null
  int32_t count;
  float* step[kCapacity];
};

template <int kCapacity>
__global__ void __launch_bounds__(kCountThreads) count_steps_kernel(const __grid_constant__ StepList<kCapacity> list) {
  const int t = static_cast<int>(blockIdx.x * kCountThreads + threadIdx.x);
  if (t < list.count && !(list.found_inf && *list.found_inf != 0.0f)) *list.step[t] += 1.0f;
}

constexpr int kCodesThreads = 256;

// A warp a block.
template <typename T>
__global__ void __launch_bounds__(kCodesThreads) quantize_state_kernel(const StateCodesArgs a) {
  const int64_t b = (static_cast<int64_t>(blockIdx.x) * kCodesThreads + threadIdx.x) / 32;
  const uint32_t lane = threadIdx.x % 32;
  const int64_t first = b * kStateBlock, left = a.numel - first;
  if (left <= 0) return;
  const T* x = static_cast<const T*>(a.values) + first;
  float values[kLaneElements] = {};
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j)
    if (lane + 32 * j < left) values[j] = to_float(x[lane + 32 * j]);
  const float scale = dynamic_scale(largest_magnitude(values)), inverse = dynamic_inverse(scale);
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    if (lane + 32 * j >= left) continue;
    uint32_t code = a.with_sign ? kSignedZero : 0u;
    if (scale == scale)
      code = a.with_sign ? signed_state_code(values[j], inverse, kDeviceSignedBins.entry) >> 16 ^
                               (values[j] < 0.0f ? kSignedZero : 0u)
                         : unsigned_state_code(values[j], inverse, kDeviceUnsignedBins.entry) >> 16;
    a.codes[first + lane + 32 * j] = static_cast<uint8_t>(code);
  }
  if (lane == 0) a.scale[b] = scale;
}

template <typename T>
__global__ void __launch_bounds__(kCodesThreads) dequantize_state_kernel(const StateCodesArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCodesThreads + threadIdx.x;
  if (i < a.numel)
    static_cast<T*>(a.values)[i] = from_float<T>(kDeviceMaps[a.with_sign].value[a.codes[i]] * a.scale[i / kStateBlock]);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

uint8_t kind_of(const AdamW8bitTensor& t) {
  const bool aligned = is_aligned(t.param) && is_aligned(t.grad) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq);
  return static_cast<uint8_t>(static_cast<int>(t.dtype) + 4 * static_cast<int>(t.grad_dtype) +
                              (t.codes ? kHasCodes : 0) + (aligned ? kIsAligned : 0));
}

// The list in pieces of kCapacity tensors. Returns an error.
template <int kCapacity>
cudaError_t launch_pieces(const AdamW8bitArgs& a, cudaStream_t stream) {
  const auto kernel = &adamw_8bit_kernel<kCapacity>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Tables)));
  if (error != cudaSuccess) return error;
  DeviceList<kCapacity> list;
  StepList<kCapacity> steps;
  list.args = a;
  list.args.tensors = nullptr;  // host memory
  list.beta1 = static_cast<float>(a.beta1);
  list.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  list.beta2 = static_cast<float>(a.beta2);
  list.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  steps.found_inf = a.found_inf;
  int64_t base_block = 0;
  for (int64_t first = 0; first < a.count; first += kCapacity) {
    const int64_t last = first + kCapacity < a.count ? first + kCapacity : a.count;
    list.base_block = base_block;
    list.blocks = 0;
    for (int64_t t = first; t < last; ++t) {
      const AdamW8bitTensor& tensor = a.tensors[t];
      const int64_t i = t - first;
      list.param[i] = tensor.param;
      list.grad[i] = tensor.grad;
      list.exp_avg[i] = tensor.exp_avg;
      list.exp_avg_sq[i] = tensor.exp_avg_sq;
      list.exp_avg_scale[i] = tensor.exp_avg_scale;
      list.exp_avg_sq_scale[i] = tensor.exp_avg_sq_scale;
      list.step[i] = steps.step[i] = tensor.step;
      list.mask[i] = tensor.mask;
      list.numel[i] = tensor.numel;
      list.kind[i] = kind_of(tensor);
      list.first_block[i] = list.blocks;
      list.blocks += static_cast<int32_t>(state_blocks_of(tensor.numel));
    }
    list.count = steps.count = static_cast<int32_t>(last - first);
    base_block += list.blocks;
    const unsigned grid = static_cast<unsigned>(
        ceil_div(list.blocks, kWarps) < multiprocessors() ? ceil_div(list.blocks, kWarps) : multiprocessors());
    if (grid > 0) kernel<<<grid, kThreads, sizeof(Tables), stream>>>(list);
    count_steps_kernel<kCapacity>
        <<<static_cast<unsigned>(ceil_div(steps.count, kCountThreads)), kCountThreads, 0, stream>>>(steps);
  }
  return cudaGetLastError();
}

}  // namespace

int adamw_8bit(const AdamW8bitArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return a.count <= kSmallList ? launch_pieces<kSmallList>(a, on) : launch_pieces<kLargeList>(a, on);
}

int quantize_state(const StateCodesArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_state_kernel<T><<<static_cast<unsigned>(ceil_div(state_blocks_of(a.numel), kCodesThreads / 32)),
                               kCodesThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

int dequantize_state(const StateCodesArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dequantize_state_kernel<T><<<static_cast<unsigned>(ceil_div(a.numel, kCodesThreads)), kCodesThreads, 0,
                                 static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda

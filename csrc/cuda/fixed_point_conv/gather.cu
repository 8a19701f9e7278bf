#include "csrc/cuda/fixed_point_conv/gather.cuh"

#include "csrc/cuda/device.h"
#include "csrc/cuda/fixed_point_conv/conv.h"

namespace quantrain::cuda::conv {
namespace {

constexpr int kBlocksAMultiprocessor = 4;

template <int kWords, bool kInputSigned>
int launch(const GatherParams& p, cudaStream_t stream) {
  const int shared = gather_shared_bytes(p.pitch);
  auto* const kernel = &fixed_point_conv_gather_kernel<kWords, kInputSigned>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const auto column_tiles = static_cast<unsigned>(ceil_div(p.g.o, GatherShape::kTileN));
  const int most = static_cast<int>(ceil_div(multiprocessors() * kBlocksAMultiprocessor, column_tiles));
  const dim3 grid(static_cast<unsigned>(p.row_tiles < most ? p.row_tiles : most), column_tiles);
  kernel<<<grid, GatherShape::kThreads, static_cast<size_t>(shared), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

bool suits_gather(const FixedPointConvArgs& a) {
  constexpr int64_t kMaxSide = int64_t{1} << 20;
  return a.groups == 1 && a.c > 0 && a.kw * a.c <= kGatherMaxDepth && a.kh <= kGatherMaxDepth &&
         ceil_div(a.kh * segment_bytes(a), 32) * 32 <= kGatherMaxDepth &&
         a.n * a.oh * a.ow < (int64_t{1} << 31) - 256 && a.h < kMaxSide && a.w < kMaxSide && a.o < kMaxSide &&
         a.padding_h < kMaxSide && a.padding_w < kMaxSide && reinterpret_cast<uintptr_t>(a.input) % 4 == 0;
}

int launch_gather(const FixedPointConvArgs& a, void* stream) {
  const GatherParams p = gather_params(a);
  int error = cudaSuccess;
  dispatch_bool(a.input_signed, [&](auto is_signed) {
    constexpr bool kSigned = is_signed.value;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    error = p.segment == 24   ? launch<6, kSigned>(p, cuda_stream)  // 7 taps of 3 channels
            : p.segment == 12 ? launch<3, kSigned>(p, cuda_stream)  // 3 taps of 3
                              : launch<0, kSigned>(p, cuda_stream);
  });
  return error;
}

}  // namespace quantrain::cuda::conv

#include "csrc/cuda/fixed_point_conv/patch.cuh"

#include "csrc/cuda/device.h"
#include "csrc/cuda/fixed_point_conv/conv.h"

namespace quantrain::cuda::conv {
namespace {

constexpr int kBlocksAMultiprocessor = 4;

template <int kC, int kSegments, bool kInputSigned>
int launch(PatchParams& p, cudaStream_t stream) {
  const int shared = lay_out_patch(p, kSegments);
  auto* const kernel = &fixed_point_conv_patch_kernel<kC, kSegments, kInputSigned>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const auto column_tiles = static_cast<unsigned>(ceil_div(p.g.o, PatchShape::kTileN));
  const int most = static_cast<int>(ceil_div(multiprocessors() * kBlocksAMultiprocessor, column_tiles));
  const dim3 grid(static_cast<unsigned>(p.tiles < most ? p.tiles : most), column_tiles);
  kernel<<<grid, PatchShape::kThreads, static_cast<size_t>(shared), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// The input in whole words: its last is read whole.
bool suits_patch(const FixedPointConvArgs& a) {
  constexpr int64_t kMaxSide = int64_t{1} << 20;
  return a.groups == 1 && (a.c == 1 || a.c == 3 || a.c == 4) && a.kh <= kPatchMaxWindow && a.kw <= kPatchMaxWindow &&
         a.stride_h <= 4 && a.stride_w <= 4 && a.n * a.oh * a.ow < (int64_t{1} << 31) - 256 && a.h < kMaxSide &&
         a.w < kMaxSide && a.o < kMaxSide && reinterpret_cast<uintptr_t>(a.input) % 4 == 0 &&
         a.n * a.h * a.w * a.c % 4 == 0;
}

int launch_patch(const FixedPointConvArgs& a, void* stream) {
  PatchParams p = patch_params(a);
  int error = cudaSuccess;
  dispatch_bool(a.input_signed, [&](auto is_signed) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    dispatch_bool(a.kw > 4, [&](auto is_wide) {
      constexpr int kSegments = is_wide.value ? 2 : 1;
      error = a.c == 1   ? launch<1, kSegments, is_signed.value>(p, cuda_stream)
              : a.c == 3 ? launch<3, kSegments, is_signed.value>(p, cuda_stream)
                         : launch<4, kSegments, is_signed.value>(p, cuda_stream);
    });
  });
  return error;
}

}  // namespace quantrain::cuda::conv

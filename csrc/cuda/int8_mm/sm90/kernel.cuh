// The int8 matrix product on Hopper: CUTLASS 3's persistent, warp-specialized kernel (TMA loads, wgmma s8), dequantized
// in its epilogue:
//
//   d[m, n] = (float(acc[m, n]) * b_scale[n]) * a_scale[m] + bias[n]
//
// One instantiation takes a minute and 4 GB to compile, so each tile has its own file here, for both 16-bit types.
#pragma once

// Not gemm_universal_adapter.h and collective_builder.hpp: they bring every architecture's kernels, at twice the
// compile time.
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "csrc/cuda/int8_mm/sm90/kernels.h"
#include "csrc/cuda/int8_mm/sm90/with_outliers.cuh"

namespace quantrain::cuda::sm90 {

namespace fusion = cutlass::epilogue::fusion;

// The last step of the epilogue, without fused multiply-add, so that the CPU gives the same bits.
template <typename T>
struct Dequantize;

template <int kSize>
struct Dequantize<cutlass::Array<float, kSize>> {
  using Fragment = cutlass::Array<float, kSize>;

  CUTLASS_DEVICE Fragment operator()(const Fragment& a_scale, const Fragment& product, const Fragment& bias) const {
    Fragment result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) result[i] = __fadd_rn(__fmul_rn(product[i], a_scale[i]), bias[i]);
    return result;
  }
};

struct Pingpong {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};

struct Cooperative {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};

// Shares the sum of a tile among thread blocks, where there are fewer tiles than multiprocessors.
struct StreamK {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::StreamKScheduler;
};

// What a kernel does beside the product.
enum class Extra { kNone, kAccumulate, kOutliers };

template <typename Out, typename Schedule, int kTileM, int kTileN, int kClusterM, int kClusterN, Extra kExtra>
struct Kernel {
  static constexpr bool kAccumulate = kExtra == Extra::kAccumulate, kOutliers = kExtra == Extra::kOutliers;
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::_128>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  // A vector over n or m, one number for all, or a default where the pointer is null.
  template <typename Stride>
  using OverN = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride>;
  using ScaleN = OverN<cute::Stride<cute::_0, bool, cute::_0>>;
  using BiasN = OverN<cute::Stride<cute::_0, cute::_1, cute::_0>>;
  using ScaleM = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<bool, cute::_0, cute::_0>>;

  using Product =
      fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>, ScaleN, fusion::Sm90AccFetch>;
  using AddedToC = fusion::Sm90EVT<fusion::Sm90Compute<Dequantize, Out, float, kRound>, ScaleM, Product,
                                   fusion::Sm90SrcFetch<float>>;
  using WithBias = fusion::Sm90EVT<fusion::Sm90Compute<Dequantize, Out, float, kRound>, ScaleM, Product, BiasN>;
  using Fusion = std::conditional_t<kAccumulate, AddedToC, WithBias>;
  using ElementC = std::conditional_t<kAccumulate, float, void>;

  static constexpr int kAlignOut = 128 / cutlass::sizeof_bits<Out>::value;
  static constexpr int kAlignIn = 16;
  using RowMajor = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, ElementC, RowMajor, kAlignOut, Out, RowMajor,
      kAlignOut, typename Schedule::Epilogue, Fusion>::CollectiveOp;
  using Plain = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, kAlignIn, int8_t,
      cutlass::layout::ColumnMajor, kAlignIn, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Main>::CollectiveOp;
  using Main = std::conditional_t<kOutliers, WithOutliers<Plain>, Plain>;
  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Epilogue,
                                                          typename Schedule::Scheduler>;
  using Arguments = typename GemmKernel::Arguments;

  static Arguments arguments(const Int8MmArgs& a, const Tuning& tuning) {
    const int m = static_cast<int>(a.m), n = static_cast<int>(a.n), k = static_cast<int>(a.k);
    const auto stride_a = cutlass::make_cute_packed_stride(typename GemmKernel::StrideA{}, cute::make_shape(m, k, 1));
    const auto stride_b = cutlass::make_cute_packed_stride(typename GemmKernel::StrideB{}, cute::make_shape(n, k, 1));
    const auto stride_d = cutlass::make_cute_packed_stride(typename GemmKernel::StrideD{}, cute::make_shape(m, n, 1));
    const typename ScaleN::Arguments b_scale{a.b_scale, 1.0f, {cute::_0{}, a.b_scale_stride != 0, cute::_0{}}};
    const typename ScaleM::Arguments a_scale{a.a_scale, 1.0f, {a.a_scale_stride != 0, cute::_0{}, cute::_0{}}};
    const typename Product::Arguments product{b_scale, {}, {}};
    typename Fusion::Arguments fused;
    typename GemmKernel::EpilogueArguments epilogue;
    if constexpr (kAccumulate) {
      epilogue = {
          {a_scale, product, {}, {}}, static_cast<const float*>(a.d), stride_d, static_cast<Out*>(a.d), stride_d};
    } else {
      epilogue = {{a_scale, product, {a.bias, 0.0f, {}}, {}}, nullptr, {}, static_cast<Out*>(a.d), stride_d};
    }
    typename GemmKernel::MainloopArguments main{};
    int depth = k;
    if constexpr (kOutliers) {
      main = {{a.a, stride_a, a.b, stride_b}, a.outliers.side, a.outliers.codes, static_cast<int>(a.outliers.count)};
      depth += WithOutliers<Plain>::kDepth;
    } else {
      main = {a.a, stride_a, a.b, stride_b};
    }
    Arguments result{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, depth, 1}, main, epilogue};
    result.hw_info.sm_count = tuning.multiprocessors;
    result.scheduler.max_swizzle_size = tuning.swizzle;
    if constexpr (std::is_same_v<Schedule, StreamK>) {
      if (tuning.splits > 0) result.scheduler.splits = tuning.splits;
    }
    return result;
  }

  static size_t workspace(const Int8MmArgs& a, const Tuning& tuning) {
    return GemmKernel::get_workspace_size(arguments(a, tuning));
  }

  static int run(const Int8MmArgs& a, const Tuning& tuning, void* stream_pointer) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    const Arguments args = arguments(a, tuning);
    if (!GemmKernel::can_implement(args)) return cudaErrorInvalidConfiguration;
    if (GemmKernel::initialize_workspace(args, a.workspace, stream) != cutlass::Status::kSuccess)
      return cudaErrorInvalidConfiguration;
    typename GemmKernel::Params params = GemmKernel::to_underlying_arguments(args, a.workspace);
    const auto* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<GemmKernel>);
    constexpr int kSharedBytes = GemmKernel::SharedStorageSize;
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
      return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kClusterM, kClusterN, 1};
    // Begins while the kernel before it ends (CUTLASS_ENABLE_GDC_FOR_SM90). One scale for all is read too early for
    // that.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    const bool overlaps = !std::is_same_v<Schedule, StreamK> && (!a.a_scale || a.a_scale_stride != 0) &&
                          (!a.b_scale || a.b_scale_stride != 0);
    cudaLaunchConfig_t config{};
    config.gridDim = GemmKernel::get_grid_shape(params);
    config.blockDim = GemmKernel::get_block_shape();
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = overlaps ? 2 : 1;
    void* arguments_of_kernel[] = {&params};
    if (const auto error = cudaLaunchKernelExC(&config, kernel, arguments_of_kernel)) return error;
    return cudaGetLastError();
  }
};

}  // namespace quantrain::cuda::sm90

#define QUANTRAIN_INT8_SM90(name, Out, Schedule, tile_m, tile_n, cluster_m, cluster_n, extra)             \
  namespace quantrain::cuda::sm90 {                                                                       \
  size_t name##_workspace(const Int8MmArgs& args, const Tuning& tuning) {                                 \
    return Kernel<Out, Schedule, tile_m, tile_n, cluster_m, cluster_n, extra>::workspace(args, tuning);   \
  }                                                                                                       \
  int name(const Int8MmArgs& args, const Tuning& tuning, void* stream) {                                  \
    return Kernel<Out, Schedule, tile_m, tile_n, cluster_m, cluster_n, extra>::run(args, tuning, stream); \
  }                                                                                                       \
  }

// As args.dtype says, float16 or bfloat16.
#define QUANTRAIN_INT8_SM90_16_BIT(name, Schedule, tile_m, tile_n, cluster_m, cluster_n, extra)           \
  namespace quantrain::cuda::sm90 {                                                                       \
  template <typename Out>                                                                                 \
  using name##_kernel = Kernel<Out, Schedule, tile_m, tile_n, cluster_m, cluster_n, extra>;               \
  size_t name##_workspace(const Int8MmArgs& args, const Tuning& tuning) {                                 \
    return name##_kernel<cutlass::bfloat16_t>::workspace(args, tuning);                                   \
  }                                                                                                       \
  int name(const Int8MmArgs& args, const Tuning& tuning, void* stream) {                                  \
    return args.dtype == DType::kFloat16 ? name##_kernel<cutlass::half_t>::run(args, tuning, stream)      \
                                         : name##_kernel<cutlass::bfloat16_t>::run(args, tuning, stream); \
  }                                                                                                       \
  }
